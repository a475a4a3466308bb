"""Ways of calibrating a detector, ranked by cross-validation over images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.audit.result import RankedDetector
from trimtab.calibration import DetectionCalibrator
from trimtab.calibration.detection import Kind
from trimtab.core.detections import Detections, GroundTruth
from trimtab.core.progress import track
from trimtab.metrics import match_detections


class Candidate(NamedTuple):
    """A calibrator to try."""

    kind: Kind
    classwise: bool

    @property
    def name(self) -> str:
        """What the report calls it."""
        names = {"isotonic": "Isotonic regression", "linear": "Linear regression", "platt": "Platt scaling"}
        names |= {"temperature": "Temperature scaling", "identity": "Thresholds alone"}
        if self.kind == "identity":
            return names[self.kind]
        return f"{names[self.kind]}, {'class by class' if self.classwise else 'all classes together'}"

    def fit(self, truth: GroundTruth, detections: Detections) -> DetectionCalibrator:
        """The calibrator, fitted."""
        return DetectionCalibrator(self.kind, classwise=self.classwise).fit(truth, detections)


# from the simplest to the most flexible: the order in which the one-standard-error rule prefers them
CANDIDATES = (
    Candidate("identity", True),
    Candidate("temperature", False),
    Candidate("linear", False),
    Candidate("platt", False),
    Candidate("isotonic", False),
    Candidate("temperature", True),
    Candidate("linear", True),
    Candidate("platt", True),
    Candidate("isotonic", True),
)


class Half(NamedTuple):
    """The boxes of some of the images, and which images these are."""

    truth: GroundTruth
    detections: Detections
    images: Tensor

    def where(self, images: Tensor) -> Half:
        """The boxes of some of these images."""
        marks = torch.zeros(self.truth.images, dtype=torch.bool)
        marks[images] = True
        return Half(self.truth.within(marks), self.detections.within(marks), images)


def rank(fitting: Half, folds: int, seed: int) -> list[RankedDetector]:
    """Every candidate by its cross-validated squared error of score against overlap, the best first.

    All candidates are judged on the same detections, those above the thresholds of the raw scores; the error of every
    image is kept, so that differences are compared image by image.
    """
    random = np.random.default_rng(seed)
    parts = np.array_split(random.permutation(len(fitting.images)), min(folds, len(fitting.images)))
    errors = np.zeros((len(CANDIDATES), fitting.truth.images))
    counted = np.zeros(fitting.truth.images)
    spent = np.zeros(len(CANDIDATES))
    for part in track(parts, "rank calibrators"):
        held = torch.zeros(len(fitting.images), dtype=torch.bool)
        held[torch.from_numpy(part)] = True
        train, test = fitting.where(fitting.images[~held]), fitting.where(fitting.images[held])
        for k, candidate in enumerate(CANDIDATES):
            start = time.perf_counter()
            calibrator = candidate.fit(train.truth, train.detections)
            spent[k] += time.perf_counter() - start
            if k == 0:
                matches = match_detections(test.truth, test.detections.above(calibrator.thresholds_before))
                rows = ~matches.ignored
                image = matches.image[rows].numpy()
                counted += np.bincount(image, minlength=fitting.truth.images)
            scores = calibrator(matches.scores[rows], matches.label[rows])
            squared = (scores - matches.iou[rows]).square().numpy()
            errors[k] += np.bincount(image, squared, minlength=fitting.truth.images)
    n = max(counted.sum(), 1)
    means = errors.sum(1) / n
    best = int(means.argmin())
    away = errors - errors[best] - (means - means[best])[:, None] * counted
    spread = np.sqrt((away**2).sum(1)) / n
    near = means <= means[best] + spread
    first = int(near.argmax())
    order = np.argsort(means, kind="stable")
    return [
        RankedDetector(
            CANDIDATES[k].name,
            CANDIDATES[k].kind,
            CANDIDATES[k].classwise,
            math.sqrt(means[k]),
            math.sqrt(means[k]) - math.sqrt(means[best]),
            spread[k] / (2 * math.sqrt(means[best])) if means[best] else math.nan,
            spent[k],
            chosen=bool(k == first),
        )
        for k in order.tolist()
    ]


def candidate_of(row: RankedDetector) -> Candidate:
    """What a row of the ranking stands for."""
    return next(c for c in CANDIDATES if c.name == row.name)


def chosen_of(ranking: Sequence[RankedDetector]) -> Candidate:
    """The candidate that the one-standard-error rule picked."""
    return candidate_of(next(row for row in ranking if row.chosen))
