"""Matching, held against the COCO protocol written as the loops that it is, and against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth
from trimtab.metrics import match_detections, matching


def scene(seed, images=4, classes=3, objects=6, detections=12, crowds=0.2, ties=True):
    """Boxes on a coarse lattice and few scores, so that overlaps and scores tie."""
    random = np.random.default_rng(seed)

    def boxes(n):
        corner, side = random.integers(0, 6, (n, 2)), random.integers(0, 5, (n, 2))
        return torch.from_numpy(np.concatenate([corner, side], 1).astype(float))

    m, n = images * objects, images * detections
    image, label = (torch.from_numpy(random.integers(0, most, m)) for most in (images, classes))
    crowd = torch.from_numpy(random.uniform(size=m) < crowds)
    truth = GroundTruth(image, label, boxes(m), crowd, range(images), range(classes))
    image, label = (torch.from_numpy(random.integers(0, most, n)) for most in (images, classes))
    scores = torch.from_numpy(random.integers(0, 8, n) / 8 if ties else random.uniform(size=n))
    return truth, Detections(image, label, boxes(n), scores, images, classes)


def overlap(a, b, crowd):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    return common / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - common)


def by_loops(truth, detections, tau, most):
    """(row, box or -1, overlap) of every detection that counts, one after another."""
    out = {}
    for image in range(truth.images):
        for label in range(truth.classes):
            rows = [i for i in range(len(detections)) if detections.image[i] == image and detections.label[i] == label]
            boxes = [j for j in range(len(truth)) if truth.image[j] == image and truth.label[j] == label]
            boxes.sort(key=lambda j: bool(truth.crowd[j]))
            taken = set()
            for row in sorted(rows, key=lambda i: -float(detections.scores[i]))[:most]:
                best, found = min(tau, 1 - 1e-10), -1
                for j in boxes:
                    crowd = bool(truth.crowd[j])
                    if j in taken and not crowd:
                        continue
                    if found >= 0 and not truth.crowd[found] and crowd:
                        break
                    iou = overlap(detections.boxes[row].tolist(), truth.boxes[j].tolist(), crowd)
                    if iou >= best:
                        best, found = iou, j
                taken.add(found)
                out[row] = (found, best if found >= 0 else 0.0)
    return out


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5, 0.75]), st.sampled_from([1, 3, 100]))
def test_side_by_side_is_one_after_another(seed, tau, most):
    truth, detections = scene(seed)
    matches = match_detections(truth, detections, tau=tau, max_detections=most)
    expected = by_loops(truth, detections, tau, most)
    assert sorted(matches.row.tolist()) == sorted(expected)
    for i, row in enumerate(matches.row.tolist()):
        box, iou = expected[row]
        crowd = box >= 0 and bool(truth.crowd[box])
        assert int(matches.truth[i]) == box
        assert bool(matches.hit[i]) == (box >= 0 and not crowd)
        assert bool(matches.ignored[i]) == crowd
        assert float(matches.iou[i]) == (0 if crowd else iou)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5]))
def test_blocks_change_nothing(seed, tau):
    truth, detections = scene(seed)
    whole = match_detections(truth, detections, tau=tau)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_PAIRS", 5)
        parts = match_detections(truth, detections, tau=tau)
    assert torch.equal(whole.truth, parts.truth)
    assert torch.equal(whole.iou, parts.iou)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_rows_are_ordered_by_class_and_falling_score(seed):
    matches = match_detections(*scene(seed))
    keys = list(zip(matches.label.tolist(), (-matches.scores).tolist(), matches.image.tolist()))
    assert keys == sorted(keys)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0.25, 4.0, 1024.0]))
def test_the_unit_of_length_does_not_matter(seed, unit):
    truth, detections = scene(seed)
    scaled = GroundTruth(truth.image, truth.label, truth.boxes * unit, truth.crowd, truth.image_ids, truth.class_ids)
    other = Detections(detections.image, detections.label, detections.boxes * unit, detections.scores, 4, 3)
    assert torch.equal(match_detections(truth, detections).truth, match_detections(scaled, other).truth)


def test_at_tau_zero_a_box_far_away_is_a_true_positive_of_no_overlap():
    zero = torch.tensor([0])
    truth = GroundTruth(zero, zero, torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([False]), "a", "b")
    found = Detections(zero, zero, torch.tensor([[50.0, 50, 1, 1]]), torch.tensor([0.9]), 1, 1)
    at_zero, above = match_detections(truth, found), match_detections(truth, found, tau=0.01)
    assert (at_zero.hit.tolist(), at_zero.iou.tolist()) == ([True], [0.0])
    assert above.hit.tolist() == [False]


def test_nothing_there_and_nothing_found():
    truth, detections = scene(0)
    nothing = truth.within(torch.zeros(4, dtype=torch.bool))
    silent = detections.within(torch.zeros(4, dtype=torch.bool))
    assert not match_detections(nothing, detections).hit.any()
    assert len(match_detections(nothing, detections).object_label) == 0
    assert len(match_detections(truth, silent).row) == 0
    assert len(match_detections(nothing, silent).row) == 0


@pytest.mark.bad_input
def test_bad_input_is_refused_in_words():
    truth, detections = scene(0)
    with pytest.raises(InputError, match=r"tau must lie in \[0, 1\), got 1"):
        match_detections(truth, detections, tau=1)
    with pytest.raises(InputError, match="max_detections must be at least 1, got 0"):
        match_detections(truth, detections, max_detections=0)
    more = GroundTruth(truth.image, truth.label, truth.boxes, truth.crowd, range(5), range(3))
    with pytest.raises(InputError, match="detections must be of the 5 images of the ground truth, they are of 4"):
        match_detections(more, detections)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.75])
def test_pycocotools_finds_the_same(seed, tau):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, detections = scene(seed, images=8, objects=10, detections=30, ties=seed % 2 == 0)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(8)],
        "categories": [{"id": k} for k in range(3)],
        "annotations": [
            {"id": j + 1, "image_id": int(i), "category_id": int(k), "bbox": b, "iscrowd": int(c), "area": b[2] * b[3]}
            for j, (i, k, b, c) in enumerate(zip(truth.image, truth.label, truth.boxes.tolist(), truth.crowd))
        ],
    }
    columns = zip(detections.image, detections.label, detections.boxes.tolist(), detections.scores)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = coco.loadRes(
            [{"image_id": int(i), "category_id": int(k), "bbox": b, "score": float(s)} for i, k, b, s in columns]
        )
        judge = COCOeval(coco, results, "bbox")
        judge.params.iouThrs, judge.params.maxDets = np.array([tau]), [5]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
    expected = {}
    for found in filter(None, judge.evalImgs):
        for row, box, ignored in zip(found["dtIds"], found["dtMatches"][0], found["dtIgnore"][0]):
            expected[row - 1] = (int(box) - 1, bool(ignored))
    matches = match_detections(truth, detections, tau=tau, max_detections=5)
    ours = zip(matches.row.tolist(), matches.truth.tolist(), matches.ignored.tolist())
    assert {row: (box, ignored) for row, box, ignored in ours} == expected
    assert len(expected) > 50
