"""Localisation recall precision: how good a set of boxes is, in one number, and the thresholds that make it best.

For the operating point of a detector, the boxes that are passed on; average precision speaks of all thresholds at once.

Oksuz et al. (2021). The code of Kuzucu et al. (2024) leaves a class out of means where it has objects and no detection,
so that a detector improves by falling silent, and out of that of false positives where all its detections are false.
Here LRP of the one is 1, everything missed, and the share of false positives of the other is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

from trimtab.metrics.boxes import BoxMetric
from trimtab.metrics.matching import Matches, image_sums


class LRPParts(NamedTuple):
    """LRP error of each class, and what it is made of; (classes,), or (r, classes) for r resamples."""

    error: Float[Tensor, "*r classes"]
    localisation: Float[Tensor, "*r classes"]
    false_positives: Float[Tensor, "*r classes"]
    false_negatives: Float[Tensor, "*r classes"]

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean of each over the classes that have it."""
        return {name: part.nanmean(-1) for name, part in self._asdict().items()}


def lrp(matches: Matches, counts: Num[Tensor, "r images"] | None = None) -> LRPParts:
    """Localisation recall precision error of a set of detections.

    (sum over true positives of (1 - IoU) / (1 - tau) + false positives + false negatives) / (all three counted), in
    0..1, lower is better. Its parts are the mean of 1 - IoU over true positives, the share of detections that are
    false, and the share of objects that are missed.

    Args:
        matches: of the detections above the operating thresholds.
        counts: how often each image counts, in each of r resamples; by default once.

    Returns:
        Four numbers a class: NaN for classes that are not in the ground truth, and where a part is of nothing.

    Example:
        >>> import torch
        >>> from trimtab.core.detections import Detections, GroundTruth
        >>> from trimtab.metrics import match_detections
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]])
        >>> truth = GroundTruth(zero[:1], zero[:1], boxes[:1], torch.tensor([False]), (1,), (1,))
        >>> found = Detections(zero, zero, boxes, torch.tensor([0.9, 0.6]), 1, 1)
        >>> lrp(match_detections(truth, found, tau=0.5)).error
        tensor([0.5000], dtype=torch.float64)

    Reference:
        Oksuz, Cam, Kalkan, Akbas, One Metric to Measure Them All, TPAMI 2021.
    """
    hit, wrong = matches.hit, ~matches.hit & ~matches.ignored
    rows = torch.stack([hit, hit * (1 - matches.iou), wrong, torch.zeros_like(matches.iou)], 1)
    objects = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64, device=rows.device).expand(
        len(matches.object_image), -1
    )
    found, distance, false, there = image_sums(
        torch.cat([matches.image, matches.object_image]),
        torch.cat([matches.label, matches.object_label]),
        torch.cat([rows, objects]),
        matches.images,
        matches.classes,
        counts,
    )
    missed = there - found
    known = torch.where(there > 0, 1.0, torch.nan)
    return LRPParts(
        known * (distance / (1 - matches.tau) + false + missed) / (found + false + missed),
        known * distance / found,
        known * false / (found + false),
        missed / there,
    )


def lrp_optimal_thresholds(matches: Matches) -> Float[Tensor, " classes"]:
    """The score of each class at which keeping all detections from there on upwards has the lowest LRP error.

    Returns:
        Thresholds (classes,): a detection stays if its score is at least its class's threshold. NaN for a class
        without a true positive and -1 for one without objects or without detections: both keep all their detections,
        since no threshold is better than another.

    Example:
        >>> import torch
        >>> from trimtab.core.detections import Detections, GroundTruth
        >>> from trimtab.metrics import match_detections
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]])
        >>> truth = GroundTruth(zero[:1], zero[:1], boxes[:1], torch.tensor([False]), (1,), (1,))
        >>> found = Detections(zero, zero, boxes, torch.tensor([0.9, 0.6]), 1, 1)
        >>> lrp_optimal_thresholds(match_detections(truth, found))
        tensor([0.9000], dtype=torch.float64)

    Reference:
        Oksuz, Cam, Kalkan, Akbas, Localization Recall Precision, ECCV 2018.
    """
    objects = torch.bincount(matches.object_label, minlength=matches.classes).tolist()
    counted = ~matches.ignored
    sizes = torch.bincount(matches.label[counted], minlength=matches.classes).tolist()
    best = []
    columns = (torch.split(x[counted], sizes) for x in (matches.scores, matches.hit, matches.iou))
    for scores, hit, iou, there in zip(*columns, objects):
        if not there or not len(scores):
            best.append(-1.0)
            continue
        found, false = hit.cumsum(0), (~hit).cumsum(0)
        distance = (hit * (1 - iou)).cumsum(0) / (1 - matches.tau)
        missed = there - found
        error = (distance + false + missed) / (found + false + missed)
        best.append(float(scores[error.argmin()]) if bool(hit.any()) else float("nan"))
    return torch.tensor(best, dtype=torch.float64, device=matches.scores.device)


class LocalisationRecallPrecision(BoxMetric):
    """`lrp` over batches of images: a dict of the mean over classes of the error and of its parts.

    Args:
        num_classes: labels lie in 0..num_classes-1.
        box_format: ``"xyxy"``, ``"xywh"`` or ``"cxcywh"``.
        tau: least intersection over union of a true positive.
        max_detections: how many detections of an image and class count.

    Example:
        >>> import torch
        >>> boxes, label = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
        >>> metric = LocalisationRecallPrecision(num_classes=1)
        >>> found = {"boxes": boxes, "scores": torch.tensor([0.9]), "labels": label}
        >>> metric.update([found], [{"boxes": boxes, "labels": label}])
        >>> metric.compute()["error"]
        tensor(0., dtype=torch.float64)
    """

    def compute(self) -> dict[str, Tensor]:
        """LRP of all images together."""
        return lrp(self._matches()).mean
