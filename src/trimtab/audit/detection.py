"""The audit of an object detector: measure how honest its scores are, correct them, and report."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab.audit.correct import CALIBRATOR_FILE, triple
from trimtab.audit.detectors import CANDIDATES, Half, candidate_of, chosen_of, rank
from trimtab.audit.report import detection as report
from trimtab.audit.result import Curve, DetectionAudit, DetectionRow, Triple
from trimtab.calibration import DetectionCalibrator
from trimtab.core import checks, persist, stats
from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth
from trimtab.core.progress import track
from trimtab.metrics import Matches, detection_ece, laace, laece, laece_per_class, lrp, match_detections, resampling
from trimtab.metrics.detection import score_bins
from trimtab.metrics.matching import image_sums

BINS = 25
PACKAGES = ("trimtab", "torch", "numpy", "scipy", "scikit-learn")


def audit_detections(
    truth: str | Path,
    detections: str | Path,
    out: str | Path,
    *,
    calibration: tuple[str | Path, str | Path] | None = None,
    seed: int = 0,
    resamples: int = 200,
    level: float = 0.95,
    folds: int = 5,
) -> DetectionAudit:
    """Measure a detector from its detections in COCO's format, correct its scores, and leave the report in `out`.

    Args:
        truth: ground truth: a JSON file with images, categories and annotations.
        detections: what the detector reports, with all scores: a JSON list of image_id, category_id, bbox and score.
        out: folder for ``report.html``, ``audit.json``, ``detections_calibrated.json`` (all detections, thresholded and
            calibrated), ``calibrator.safetensors`` and ``.json``.
        calibration: another such pair of files, of the same categories, to fit the corrections on. Without it the
            images are split at random into two halves: one to fit on, one to measure on.
        seed: the same seed gives the same numbers.
        resamples: bootstrap resamples of the images behind every interval.
        level: coverage of the intervals.
        folds: folds of the cross-validation that ranks the calibrators.

    Raises:
        InputError: a file cannot be used; the message says which part and why.
    """
    checks.integer(seed, "seed", low=0)
    checks.integer(resamples, "resamples", low=20)
    checks.integer(folds, "folds", low=2)
    checks.number(level, "level", low=0, high=1, low_open=True, high_open=True)
    started = time.perf_counter()
    seconds: list[tuple[str, float]] = []

    def lap(step: str) -> None:
        seconds.append((step, time.perf_counter() - started - sum(s for _, s in seconds)))

    out = Path(out)
    whole, fitting, measured, note = _halves(truth, detections, calibration, seed)
    lap("read")
    ranking = rank(fitting, folds, seed)
    lap("rank calibrators")
    counts = _counts(measured, resamples, seed)
    fitted = {candidate: candidate.fit(fitting.truth, fitting.detections) for candidate in CANDIDATES}
    scenes = {
        candidate: _Scene(measured.truth, calibrator.transform(measured.detections), counts)
        for candidate, calibrator in track(list(fitted.items()), "measure calibrators")
    }
    chosen = chosen_of(ranking)
    before, after = scenes[CANDIDATES[0]], scenes[chosen]
    calibrator = fitted[chosen]
    result = DetectionAudit(
        title=Path(detections).name,
        n=len(measured.images),
        n_fit=len(fitting.images),
        objects=int((~measured.truth.crowd).sum()),
        detections=len(measured.detections),
        passed={"before": len(before.matches.row), "after": len(after.matches.row)},
        c=whole.truth.classes,
        level=level,
        interval_method=(
            f"Intervals are bootstrap intervals from {resamples} resamples of the images, centred at the estimate."
        ),
        before=before.triples(level),
        after=after.triples(level),
        change={name: triple(x) for name, x in resampling.changes(before.values, after.values, level).items()},
        reliability={when: scene.curve(level) for when, scene in (("before", before), ("after", after))},
        histogram={when: scene.histogram() for when, scene in (("before", before), ("after", after))},
        ranking=[replace(row, measures=scenes[candidate_of(row)].triples(level)) for row in ranking],
        per_class=_classes(calibrator, measured, before, after),
        steps=[],
        versions={name: metadata.version(name) for name in PACKAGES},
        settings={"resamples": resamples, "level": level, "seed": seed, "folds": folds},
        notes=[note, *_notes(measured)],
    )
    lap("measure")
    calibrator.save(out / CALIBRATOR_FILE)
    calibrator.transform(whole.detections).write(out / "detections_calibrated.json", whole.truth)
    lap("write")
    result = replace(result, steps=[*seconds, ("in all", time.perf_counter() - started)])
    persist.write_json(out / "audit.json", asdict(result))
    report.write(result, out / "report.html")
    return result


def _halves(
    truth: str | Path, detections: str | Path, calibration: tuple[str | Path, str | Path] | None, seed: int
) -> tuple[Half, Half, Half, str]:
    """All boxes, those to fit on, those to measure on, and a note on how they were parted."""
    there = GroundTruth.read(truth)
    whole = Half(there, Detections.read(detections, there), torch.arange(there.images))
    if calibration:
        other = GroundTruth.read(calibration[0])
        if other.class_ids != there.class_ids:
            raise InputError(f"{calibration[0]} must have the categories of {truth}: {list(there.class_ids)[:8]}")
        fitting, measured = Half(other, Detections.read(calibration[1], other), torch.arange(other.images)), whole
        note = f"The corrections were fitted on {Path(calibration[1]).name}."
    else:
        if there.images < 2:
            raise InputError(f"{truth} must hold at least two images, one to fit on and one to measure on, found one")
        shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(there.images))
        fitting, measured = (whole.where(half.sort().values) for half in torch.tensor_split(shuffled, 2))
        note = (
            "The images were split in two halves at random: the corrections were fitted on one, and everything was "
            "measured on the other."
        )
    for name, half in (("fitting", fitting), ("measured", measured)):
        for what, n in (("objects", int((~half.truth.crowd).sum())), ("detections", len(half.detections))):
            if not n:
                raise InputError(f"the {name} images must hold {what}, found none in {len(half.images)} images")
    return whole, fitting, measured, note


def _counts(measured: Half, resamples: int, seed: int) -> Tensor:
    """How often each image counts in each resample; images outside the measured half never do."""
    counts = torch.zeros(resamples, measured.truth.images, dtype=torch.float64)
    drawn = stats.resample_counts(len(measured.images), resamples, seed)
    counts[:, measured.images] = torch.from_numpy(drawn).double()
    return counts


class _Scene:
    """Detections at their operating point, and what is measured of them."""

    def __init__(self, truth: GroundTruth, found: Detections, counts: Tensor) -> None:
        self.counts = counts
        self.matches = match_detections(truth, found)
        half = match_detections(truth, found, tau=0.5)
        self.values: tuple[dict[str, Tensor], dict[str, Tensor]] = (
            _measures(self.matches, half, None),
            _measures(self.matches, half, counts),
        )

    def triples(self, level: float) -> dict[str, Triple]:
        """Every measure with its interval."""
        found = {name: triple(x) for name, x in resampling.intervals(*self.values, level).items()}
        ends = ({"gap": values["mean_overlap"]} for values in self.values)
        tops = ({"gap": values["mean_score"]} for values in self.values)
        return found | {"gap": triple(resampling.changes(tuple(ends), tuple(tops), level)["gap"])}

    def curve(self, level: float) -> Curve:
        """Mean overlap against mean score in each bin of the score, all classes together."""
        samples, score, overlap = _bins(self.matches)
        resampled = _bins(self.matches, self.counts)
        ends = [
            resampling.intervals(
                {"iou": overlap[b] / samples[b]}, {"iou": resampled[2, :, b] / resampled[0, :, b]}, level
            )
            for b in range(BINS)
            if samples[b] > 0
        ]
        held = (samples > 0).nonzero()[:, 0].tolist()
        return Curve(
            lower=[b / BINS for b in held],
            upper=[(b + 1) / BINS for b in held],
            count=[int(samples[b]) for b in held],
            confidence=[float(score[b] / samples[b]) for b in held],
            accuracy=[float(overlap[b] / samples[b]) for b in held],
            accuracy_low=[end["iou"].low for end in ends],
            accuracy_high=[end["iou"].high for end in ends],
        )

    def histogram(self) -> list[int]:
        """How many detections have a score in each bin."""
        return [int(n) for n in _bins(self.matches)[0]]


def _bins(matches: Matches, counts: Tensor | None = None) -> Tensor:
    """Number of detections, sum of scores and sum of overlaps in each bin of the score: (3, bins) or (3, r, bins)."""
    rows = ~matches.ignored
    scores, iou = matches.scores[rows], matches.iou[rows]
    values = torch.stack([torch.ones_like(scores), scores, iou], 1)
    return image_sums(matches.image[rows], score_bins(scores, BINS), values, matches.images, BINS, counts)


def _measures(matches: Matches, half: Matches, counts: Tensor | None) -> dict[str, Tensor]:
    n, score, overlap = _bins(matches, counts).sum(-1)
    parts = lrp(matches, counts).mean
    return {
        "laece": laece(matches, BINS, counts),
        "laace": laace(matches, counts=counts),
        "lrp": parts["error"],
        "lrp_localisation": parts["localisation"],
        "lrp_false": parts["false_positives"],
        "lrp_missed": parts["false_negatives"],
        "dece": detection_ece(half, counts=counts),
        "mean_score": score / n,
        "mean_overlap": overlap / n,
    }


def _classes(calibrator: DetectionCalibrator, measured: Half, before: _Scene, after: _Scene) -> list[DetectionRow]:
    c = measured.truth.classes
    objects = torch.bincount(before.matches.object_label, minlength=c).tolist()
    columns = []
    for scene in (before, after):
        passed = torch.bincount(scene.matches.label, minlength=c)
        mean = torch.bincount(scene.matches.label, scene.matches.scores, minlength=c) / passed
        columns += [passed.tolist(), mean.tolist(), laece_per_class(scene.matches, BINS).tolist()]
        columns += [lrp(scene.matches).error.tolist()]
    thresholds = [t.tolist() for t in (calibrator.thresholds_before, calibrator.thresholds_after)]
    overlap = torch.bincount(before.matches.label, before.matches.iou, minlength=c)
    overlap = overlap / torch.bincount(before.matches.label, minlength=c)
    return [
        DetectionRow(name, *rest)
        for name, *rest in zip(measured.truth.names, objects, *thresholds, overlap.tolist(), *columns)
    ]


def _notes(measured: Half) -> list[str]:
    c = measured.truth.classes
    present = torch.bincount(measured.truth.label[~measured.truth.crowd], minlength=c) > 0
    absent = [name for name, there in zip(measured.truth.names, present.tolist()) if not there]
    if not absent:
        return []
    listed = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
    return [f"No object of {len(absent)} of the {c} classes is in the measured images, so they have no LRP: {listed}."]
