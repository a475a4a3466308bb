import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth
from trimtab.core.stats import resample_counts
from trimtab.metrics import (
    DetectionECE,
    LaACE,
    LaECE,
    LocalisationRecallPrecision,
    detection_ece,
    laace,
    laace_per_class,
    laece,
    laece_per_class,
    lrp,
    lrp_optimal_thresholds,
    match_detections,
)
from trimtab.metrics.detection import score_bins


def scene(seed, images=6, classes=3, crowds=0.1):
    random = np.random.default_rng(seed)
    m, n = random.integers(0, 20), random.integers(0, 30)

    def places(k):
        return (torch.from_numpy(random.integers(0, most, k)) for most in (images, classes))

    corner, side = random.uniform(0, 4, (m + n, 2)), random.uniform(0, 4, (m + n, 2))
    boxes = torch.from_numpy(np.concatenate([corner, side], 1))
    crowd = torch.from_numpy(random.uniform(size=m) < crowds)
    truth = GroundTruth(*places(m), boxes[:m], crowd, range(images), range(classes))
    return truth, Detections(*places(n), boxes[m:], torch.from_numpy(random.uniform(size=n)), images, classes)


def same(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), equal_nan=True, rtol=0, atol=1e-12)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5]))
def test_every_measure_by_its_definition(seed, tau):
    truth, detections = scene(seed)
    matches = match_detections(truth, detections, tau=tau)
    rows = list(zip(*(getattr(matches, x).tolist() for x in ("label", "scores", "iou", "hit", "ignored"))))
    errors, laeces, laaces = [], [], []
    for k in range(3):
        counted = [(s, iou, hit) for label, s, iou, hit, ignored in rows if label == k and not ignored]
        there = sum(1 for label, crowd in zip(truth.label, truth.crowd) if label == k and not crowd)
        found = sum(hit for *_, hit in counted)
        false, missed = len(counted) - found, there - found
        distance = sum((1 - iou) / (1 - tau) for _, iou, hit in counted if hit)
        errors.append((distance + false + missed) / (found + false + missed) if there else math.nan)
        bins = {}
        for s, iou, _ in counted:
            bins.setdefault(max(0, math.ceil(s * 25) - 1), []).append(s - iou)
        laeces.append(sum(abs(sum(gaps)) for gaps in bins.values()) / len(counted) if counted else math.nan)
        every = [abs(s - iou) for label, s, iou, *_ in rows if label == k]
        laaces.append(sum(every) / len(every) if every else math.nan)
    assert same(lrp(matches).error, errors)
    assert same(laece_per_class(matches), laeces)
    assert same(laace_per_class(matches), laaces)
    for ours, classes in ((laece(matches), laeces), (laace(matches), laaces)):
        known = [x for x in classes if x > 0]
        if known:
            assert same(ours, sum(known) / len(known))


@given(st.integers(0, 10_000))
def test_the_threshold_is_the_best_cut(seed):
    truth, detections = scene(seed)
    thresholds = lrp_optimal_thresholds(match_detections(truth, detections))
    for k, threshold in enumerate(thresholds.tolist()):
        own = detections.rows(detections.label == k)
        cuts = [float(lrp(match_detections(truth, own.above(s))).error[k]) for s in [0.0, *own.scores.tolist()]]
        if threshold >= 0:
            best = float(lrp(match_detections(truth, own.above(threshold))).error[k])
            assert best <= min(cuts) + 1e-12
        elif math.isnan(threshold):
            assert not match_detections(truth, own).hit.any()
        else:
            assert threshold == -1
            there = (truth.label == k) & ~truth.crowd
            counted = ~match_detections(truth, own).ignored
            assert not there.any() or not counted.any()


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_counts_are_copies_of_images(seed):
    truth, detections = scene(seed)
    counts = torch.from_numpy(resample_counts(6, 3, seed))
    matches = [match_detections(truth, detections, tau=tau) for tau in (0.0, 0.5)]
    for r, count in enumerate(counts.tolist()):
        parts = [i for i, times in enumerate(count) for _ in range(times)]
        copies = [copied(truth, detections, parts, tau) for tau in (0.0, 0.5)]
        for ours, theirs in zip(lrp(matches[0], counts), lrp(copies[0])):
            assert same(ours[r], theirs)
        assert same(laece(matches[0], counts=counts)[r], laece(copies[0]))
        assert same(laace(matches[0], counts=counts)[r], laace(copies[0]))
        assert same(detection_ece(matches[1], counts=counts)[r], detection_ece(copies[1]))


def copied(truth, detections, parts, tau):
    """Matches of a data set in which every image of `parts` is an image of its own."""

    def stacked(columns, image):
        rows = [(image == i).nonzero()[:, 0] for i in parts]
        number = torch.cat([torch.full((len(r),), j) for j, r in enumerate(rows)])
        return number, *(column[torch.cat(rows)] for column in columns)

    there = stacked((truth.label, truth.boxes, truth.crowd), truth.image)
    found = stacked((detections.label, detections.boxes, detections.scores), detections.image)
    n = len(parts)
    return match_detections(GroundTruth(*there, range(n), range(3)), Detections(*found, n, 3), tau=tau)


@pytest.mark.parametrize("bins", [3, 10, 25])
def test_a_score_on_an_edge_is_in_the_bin_below(bins):
    k = np.arange(bins + 1)
    edges, inside = torch.from_numpy(k / bins), torch.from_numpy((k + 0.5) / bins)[:bins]
    assert score_bins(edges, bins).tolist() == [0, *range(bins)]
    assert score_bins(inside, bins).tolist() == list(range(bins))


def test_a_perfect_detector_has_no_error_and_a_silent_one_misses_all():
    truth, detections = scene(5, crowds=0)
    perfect = Detections(truth.image, truth.label, truth.boxes, torch.ones(len(truth)).double(), 6, 3)
    matches = match_detections(truth, perfect, tau=0.5)
    for error in (laece(matches), laace(matches), detection_ece(matches), lrp(matches).error):
        assert (error.abs() < 1e-14).all()
    silent = match_detections(truth, detections.rows(torch.zeros(len(detections), dtype=torch.bool)))
    assert (lrp(silent).error == 1).all()
    assert lrp(silent).localisation.isnan().all()
    assert laece(silent).isnan()
    assert detection_ece(silent).isnan()
    assert lrp_optimal_thresholds(silent).tolist() == [-1, -1, -1]


def test_a_class_without_ground_truth_has_no_lrp_but_a_calibration_error():
    truth, detections = scene(5)
    others = truth.label != 1
    without = GroundTruth(
        truth.image[others], truth.label[others], truth.boxes[others], truth.crowd[others], range(6), range(3)
    )
    matches = match_detections(without, detections)
    assert lrp(matches).error.isnan().tolist() == [False, True, False]
    assert float(lrp_optimal_thresholds(matches)[1]) == -1
    assert same(laece_per_class(matches)[1], detections.scores[detections.label == 1].mean())
    assert not laece_per_class(matches).isnan().any()


METRICS = {
    LocalisationRecallPrecision: lambda m, _: lrp(m).mean["error"],
    LaECE: lambda m, _: laece(m),
    LaACE: lambda m, _: laace(m),
    DetectionECE: lambda _, m: detection_ece(m),
}


def dicts(truth, detections, convert=lambda boxes: boxes):
    preds, target = [], []
    for i in range(truth.images):
        own, there = detections.image == i, truth.image == i
        preds.append({"boxes": convert(detections.boxes[own]), "scores": detections.scores[own]})
        preds[-1]["labels"] = detections.label[own]
        target.append({"boxes": convert(truth.boxes[there]), "labels": truth.label[there]})
        target[-1]["iscrowd"] = truth.crowd[there].long()
    return preds, target


FORMATS = {
    "xywh": lambda b: b,
    "xyxy": lambda b: torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1),
    "cxcywh": lambda b: torch.cat([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], 1),
}


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("box_format", FORMATS)
def test_batches_add_up(kind, box_format):
    truth, detections = scene(5)
    preds, target = dicts(truth, detections, FORMATS[box_format])
    metric, other = kind(num_classes=3, box_format=box_format), kind(num_classes=3, box_format=box_format)
    metric.update(preds[:2], target[:2])
    metric.update(preds[2:4], target[2:4])
    other.update(preds[4:], target[4:])
    metric.merge_state(other)
    found = metric.compute()
    matches = [match_detections(truth, detections, tau=tau) for tau in (0.0, 0.5)]
    assert same(found["error"] if isinstance(found, dict) else found, METRICS[kind](*matches))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        ([], [], "preds and target must have as many images, at least one, got 0 and 0"),
        ([{}], [], "as many images"),
        ([{"scores": None}], [{}], r"preds\[0\] must have 'scores'"),
        ([{}], [{"labels": None}], r"target\[0\] must have 'labels'"),
        ([{"scores": torch.tensor([2.0])}], [{}], r"scores must lie in \[0, 1\], found 2"),
        ([{"labels": torch.tensor([3])}], [{}], r"label must lie in 0..2, found 3"),
        ([{"scores": torch.tensor([1.0, 1.0])}], [{}], r"preds\[0\]\['scores'\] must have shape \(1,\), got \(2,\)"),
        ([{"boxes": torch.tensor([[5.0, 0, 1, 1]])}], [{}], "boxes must have width >= 0, found -4"),
        ([{"boxes": torch.zeros(1, 5)}], [{}], r"preds\[0\]\['boxes'\] must have shape \(n, 4\), got \(1, 5\)"),
    ],
)
def test_bad_batches_are_refused_in_words(preds, target, message):
    there = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([0])}
    found = {**there, "scores": torch.ones(1)}

    def changed(image, change):
        return {key: value for key, value in {**image, **change}.items() if value is not None}

    with pytest.raises(InputError, match=message):
        LaECE(num_classes=3).update([changed(found, x) for x in preds], [changed(there, x) for x in target])


@pytest.mark.bad_input
def test_bad_arguments_are_refused_in_words():
    with pytest.raises(InputError, match="box_format must be xyxy, xywh or cxcywh, got 'yxyx'"):
        LaECE(num_classes=3, box_format="yxyx")
    with pytest.raises(InputError, match="num_classes must be at least 1"):
        LaACE(num_classes=0)
    with pytest.raises(InputError, match="bins must be at least 1"):
        DetectionECE(num_classes=1, bins=0)
    with pytest.raises(InputError, match="bins must be at least 1"):
        laece(match_detections(*scene(0)), bins=0)
