"""How honest a detector's scores are: LaECE, LaACE and D-ECE.

Take LaECE_0 or LaACE_0 where a score should tell the overlap to expect. D-ECE is the older measure: it asks whether
a box is a true positive at overlap 0.5, forgets the classes, and changes with the score threshold. All are of the boxes
above the operating thresholds; `lrp` tells how good these boxes are.

Kuzucu, Oksuz, Sadeghi, Dokania (2024), arXiv 2405.20459; Küppers et al. (2020) for D-ECE. Like the authors' code, the
mean of LaECE and LaACE leaves out classes whose error is exactly 0, classes without detections among them, and LaACE
counts detections in crowds with an overlap of 0 (`include_ignored`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.boxes import BoxMetric
from trimtab.metrics.matching import Matches, image_sums


def laece(matches: Matches, bins: int = 25, counts: Num[Tensor, "r images"] | None = None) -> Tensor:
    """Localisation-aware expected calibration error: how far a score is from the overlap to expect.

    The mean of `laece_per_class` over classes, those without error left out (see the module).

    Args:
        matches: of the detections above the operating thresholds; at ``tau = 0`` for LaECE_0.
        bins: equal-width bins (lower, upper] of the score; the first holds 0 too.
        counts: how often each image counts, in each of r resamples; by default once.

    Returns:
        A number in 0..1, or r of them; NaN without detections.

    Example:
        >>> import torch
        >>> from trimtab.core.detections import Detections, GroundTruth
        >>> from trimtab.metrics import match_detections
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]])
        >>> truth = GroundTruth(zero[:1], zero[:1], boxes[:1], torch.tensor([False]), (1,), (1,))
        >>> found = Detections(zero, zero, boxes, torch.tensor([0.75, 0.25], dtype=torch.float64), 1, 1)
        >>> laece(match_detections(truth, found))
        tensor(0.2500, dtype=torch.float64)

    Reference:
        Kuzucu et al., On Calibration of Object Detectors: Pitfalls, Evaluation and Baselines, ECCV 2024.
    """
    return _mean_of_classes(laece_per_class(matches, bins, counts))


def laece_per_class(
    matches: Matches, bins: int = 25, counts: Num[Tensor, "r images"] | None = None
) -> Float[Tensor, "*r classes"]:
    """For each class the sum over bins of |sum of score - IoU| over the number of detections; NaN without any."""
    samples, gap = laece_bins(matches, bins, counts)
    return gap.abs().sum(-1) / samples.sum(-1)


def laece_bins(
    matches: Matches, bins: int = 25, counts: Num[Tensor, "r images"] | None = None
) -> tuple[Float[Tensor, "*r classes bins"], Float[Tensor, "*r classes bins"]]:
    """How many detections fall in every bin of every class, and the sum of their score - IoU."""
    checks.integer(bins, "bins", low=1)
    kept = ~matches.ignored
    scores = matches.scores[kept]
    values = torch.stack([torch.ones_like(scores), scores - matches.iou[kept]], 1)
    cell = matches.label[kept] * bins + score_bins(scores, bins)
    sums = image_sums(matches.image[kept], cell, values, matches.images, matches.classes * bins, counts)
    samples, gap = sums.unflatten(-1, (matches.classes, bins))
    return samples, gap


def laace(matches: Matches, *, include_ignored: bool = True, counts: Num[Tensor, "r images"] | None = None) -> Tensor:
    """Localisation-aware adaptive calibration error: the mean of |score - IoU|, one detection a bin.

    The mean over classes, those without error left out (see the module).

    Args:
        matches: of the detections above the operating thresholds; at ``tau = 0`` for LaACE_0.
        include_ignored: count detections in crowds, with an overlap of 0, as the authors' code does.
        counts: how often each image counts, in each of r resamples; by default once.

    Example:
        >>> import torch
        >>> from trimtab.core.detections import Detections, GroundTruth
        >>> from trimtab.metrics import match_detections
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]])
        >>> truth = GroundTruth(zero[:1], zero[:1], boxes[:1], torch.tensor([False]), (1,), (1,))
        >>> found = Detections(zero, zero, boxes, torch.tensor([0.75, 0.5]), 1, 1)
        >>> laace(match_detections(truth, found))
        tensor(0.3750, dtype=torch.float64)

    Reference:
        Kuzucu et al., On Calibration of Object Detectors: Pitfalls, Evaluation and Baselines, ECCV 2024.
    """
    return _mean_of_classes(laace_per_class(matches, include_ignored=include_ignored, counts=counts))


def laace_per_class(
    matches: Matches, *, include_ignored: bool = True, counts: Num[Tensor, "r images"] | None = None
) -> Float[Tensor, "*r classes"]:
    """The mean of |score - IoU| of each class; NaN without detections."""
    kept = ~matches.ignored | include_ignored
    gap = (matches.scores[kept] - matches.iou[kept]).abs()
    values = torch.stack([torch.ones_like(gap), gap], 1)
    samples, error = image_sums(
        matches.image[kept], matches.label[kept], values, matches.images, matches.classes, counts
    )
    return error / samples


def detection_ece(matches: Matches, bins: int = 10, counts: Num[Tensor, "r images"] | None = None) -> Tensor:
    """Expected calibration error of detections: how far scores are from precision, all classes together.

    Args:
        matches: at ``tau = 0.5`` in the literature, of detections with a score of at least 0.3.
        bins: equal-width bins (lower, upper] of the score; the first holds 0 too.
        counts: how often each image counts, in each of r resamples; by default once.

    Returns:
        A number in 0..1, or r of them; NaN without detections.

    Example:
        >>> import torch
        >>> from trimtab.core.detections import Detections, GroundTruth
        >>> from trimtab.metrics import match_detections
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]])
        >>> truth = GroundTruth(zero[:1], zero[:1], boxes[:1], torch.tensor([False]), (1,), (1,))
        >>> found = Detections(zero, zero, boxes, torch.tensor([0.75, 0.75]), 1, 1)
        >>> detection_ece(match_detections(truth, found, tau=0.5))
        tensor(0.2500, dtype=torch.float64)

    Reference:
        Küppers et al., Multivariate Confidence Calibration for Object Detection, CVPR Workshops 2020.
    """
    checks.integer(bins, "bins", low=1)
    kept = ~matches.ignored
    scores = matches.scores[kept]
    values = torch.stack([torch.ones_like(scores), scores - matches.hit[kept].double()], 1)
    samples, gap = image_sums(matches.image[kept], score_bins(scores, bins), values, matches.images, bins, counts)
    return gap.abs().sum(-1) / samples.sum(-1)


def score_bins(scores: Float[Tensor, " n"], bins: int) -> Int[Tensor, " n"]:
    """The bin (lower, upper] of each score; the first holds 0 too."""
    # edges are the doubles nearest to k / bins, where a score often lies; those of linspace may be the next below
    edges = torch.arange(1, bins, dtype=torch.float64, device=scores.device) / bins
    return torch.bucketize(scores, edges)


def _mean_of_classes(error: Float[Tensor, "*r classes"]) -> Tensor:
    """The mean over classes that have an error; 0 where all that have detections are without."""
    mean = error.where(error > 0, torch.nan).nanmean(-1)
    return mean.where((error > 0).any(-1), error.nanmean(-1))


class LaECE(BoxMetric):
    """`laece` over batches of images.

    Args:
        num_classes, box_format, tau, max_detections: as in `BoxMetric`.
        bins: equal-width bins of the score.

    Example:
        >>> import torch
        >>> boxes, label = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
        >>> metric = LaECE(num_classes=1)
        >>> found = {"boxes": boxes, "scores": torch.tensor([0.75]), "labels": label}
        >>> metric.update([found], [{"boxes": boxes, "labels": label}])
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, num_classes: int, *, bins: int = 25, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.bins = checks.integer(bins, "bins", low=1)

    def compute(self) -> Tensor:
        """LaECE of all images together."""
        return laece(self._matches(), self.bins)


class LaACE(BoxMetric):
    """`laace` over batches of images.

    Args:
        num_classes, box_format, tau, max_detections: as in `BoxMetric`.
        include_ignored: count detections in crowds, with an overlap of 0.

    Example:
        >>> import torch
        >>> boxes, label = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
        >>> metric = LaACE(num_classes=1)
        >>> found = {"boxes": boxes, "scores": torch.tensor([0.75]), "labels": label}
        >>> metric.update([found], [{"boxes": boxes, "labels": label}])
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, num_classes: int, *, include_ignored: bool = True, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.include_ignored = include_ignored

    def compute(self) -> Tensor:
        """LaACE of all images together."""
        return laace(self._matches(), include_ignored=self.include_ignored)


class DetectionECE(BoxMetric):
    """`detection_ece` over batches of images.

    Args:
        num_classes, box_format, max_detections: as in `BoxMetric`.
        tau: least intersection over union of a true positive.
        bins: equal-width bins of the score.

    Example:
        >>> import torch
        >>> boxes, label = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
        >>> metric = DetectionECE(num_classes=1)
        >>> found = {"boxes": boxes, "scores": torch.tensor([0.75]), "labels": label}
        >>> metric.update([found], [{"boxes": boxes, "labels": label}])
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, num_classes: int, *, tau: float = 0.5, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(num_classes, tau=tau, **kwargs)
        self.bins = checks.integer(bins, "bins", low=1)

    def compute(self) -> Tensor:
        """D-ECE of all images together."""
        return detection_ece(self._matches(), self.bins)
