"""08-detector-calibration: parity with the authors' code, and what holds for every detector."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.calibration import DetectionCalibrator, load
from trimtab.claims.calibration.detector_calibration import scene
from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth
from trimtab.metrics import detection_ece, laace, laece, lrp, match_detections
from trimtab.metrics.detection import laece_bins

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "08-detector-calibration").glob("*.npz"))
KINDS = ("isotonic", "linear", "platt", "temperature", "identity")
SETTINGS = {
    "laece0": {"tau": 0.0, "arguments": {}},
    "dece": {"tau": 0.5, "arguments": {"target": "tp", "classwise": False, "thresholds": 0.3}},
}
ATOL = {"platt_scaling": 1e-4, "temperature_scaling": 1e-4}
every = pytest.mark.parametrize("kind", KINDS)


def truth_of(rows, n, c):
    x = torch.from_numpy(rows)
    image, label = x[:, 1].long() - 1, x[:, 2].long() - 1
    return GroundTruth(image, label, x[:, 3:7], x[:, 7] == 1, range(1, n + 1), range(1, c + 1))


def detections_of(rows, n, c):
    x = torch.from_numpy(rows)
    return Detections(x[:, 0].long() - 1, x[:, 1].long() - 1, x[:, 2:6], x[:, 6], n, c)


def fitted(calibrator):
    """The classes that have a map."""
    return (calibrator.offsets.diff() > 0).numpy()


def steepness(name, params):
    """a and b of every map, from what the authors' code keeps."""
    a = params.reshape(len(params), -1).T
    return np.stack([1 / np.abs(a[0]), 0 * a[0]]) if name == "temperature_scaling" else np.stack([np.abs(a[0]), a[1]])


def loss_and_slope(calibrator, truth, kept, maps, target):
    """The mean cross-entropy of each map, and the largest entry of its gradient."""
    matches = match_detections(truth, kept, tau=calibrator.matching_tau)
    wanted = matches.iou if target == "iou" else matches.hit.double()
    out = []
    for g, (a, b) in zip(fitted(calibrator).nonzero()[0], maps.T):
        own = ((matches.label == g) | (not calibrator.classwise)) & ~matches.ignored
        z, t = matches.scores[own].logit(), wanted[own]
        p = (a * z + b).sigmoid()
        loss = torch.nn.functional.binary_cross_entropy(p, t)
        out.append((float(loss), float(((p - t) * z).mean().abs())))
    return np.array(out).T


@pytest.mark.golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    checked = set()
    with np.load(path) as z:
        n, c = int(z["n_images"]), int(z["n_classes"])
        validation = truth_of(z["val_gt"], n, c), detections_of(z["val_det"], n, c)
        truth, detections = truth_of(z["test_gt"], n, c), detections_of(z["test_det"], n, c)
        runs = sorted({tuple(key.split("/")[:2]) for key in z.files if "/" in key})
        for tag, name in runs:
            expected = {key.split("/")[2]: z[key] for key in z.files if key.startswith(f"{tag}/{name}/")}
            checked |= {f"{tag}/{name}/{key}" for key in expected}
            tau, arguments = SETTINGS[tag]["tau"], SETTINGS[tag]["arguments"]
            kind = name.split("_")[0]
            search = {"search": "lbfgs"} if kind in ("platt", "temperature") else {}
            calibrator = DetectionCalibrator(kind, **search, **arguments).fit(*validation)
            atol = ATOL.get(name, 1e-6)
            if "params" in expected:
                expected["params"] = expected["params"][fitted(calibrator)]

            assert_close(calibrator.thresholds_before, expected["pre_thr"], 1e-6)
            if not converged(calibrator, validation, name, expected):
                # the authors' solver ran astray, to a place that rounding decides
                best = DetectionCalibrator(kind, **arguments).fit(*validation)
                kept = validation[1].above(best.thresholds_before)
                theirs = steepness(name, expected["params"])
                target = arguments.get("target", "iou")
                ours = loss_and_slope(best, validation[0], kept, best.maps.numpy(), target)[0]
                assert (ours < loss_and_slope(best, validation[0], kept, theirs, target)[0]).all()
            else:
                assert_close(calibrator.thresholds_after, expected["op_thr"], atol)
                calibrated = calibrator.transform(detections)
                assert_close(table(calibrated), expected["cal_det"], atol)
                # a hundred steps of a tenth leave some of the way to the optimum
                optimum = DetectionCalibrator(kind, **arguments).fit(*validation).transform(detections)
                assert_close(table(optimum), expected["cal_det"], 10 * atol)
                if name == "linear_regression":
                    assert_close(calibrator.maps.T, expected["params"], 1e-6)
                elif "params" in expected:
                    assert_close(calibrator.maps, steepness(name, expected["params"]), 1e-4)

            final = detections_of(expected["cal_det"], n, c)
            matches = match_detections(truth, final, tau=tau)
            samples, gap = laece_bins(matches)
            held = expected["weights_cb"] > 0
            assert_close((samples / samples.sum(1, keepdim=True)).nan_to_num(), expected["weights_cb"], 1e-6)
            assert_close((gap / samples).abs().numpy()[held], expected["errors_cb"][held], 1e-6)
            assert_close(laece(matches), expected["laece"], 1e-6)
            assert_close(laace(matches), expected["laace"], 1e-6)
            at_half = match_detections(truth, final, tau=0.5)
            assert_close(detection_ece(at_half), expected["dece_tau05_10bins"], 1e-6)
            counted = expected["lrp"] != -1
            for part, key in zip(lrp(matches), ("lrp", "lrp_loc", "lrp_fp", "lrp_fn")):
                if key == "lrp_fp":
                    # where all detections are false, the authors' share of false ones is NaN
                    counted &= ~(np.isnan(expected[key]) & (part == 1).numpy())
                assert_close(part.numpy()[counted], expected[key][counted], 1e-6)
    inputs = {"n_images", "n_classes", "val_gt", "val_det", "test_gt", "test_det"}
    assert checked
    with np.load(path) as z:
        assert set(z.files) == checked | inputs


def converged(calibrator, validation, name, expected):
    if name not in ("platt_scaling", "temperature_scaling"):
        return True
    kept = validation[1].above(calibrator.thresholds_before)
    maps = steepness(name, expected["params"])
    return loss_and_slope(calibrator, validation[0], kept, maps, calibrator.target)[1].max() < 1e-2


def table(found):
    columns = (found.image[:, None] + 1, found.label[:, None] + 1, found.boxes, found.scores[:, None])
    return torch.cat([column.double() for column in columns], 1)


def assert_close(ours, theirs, atol):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)


def test_there_are_golden_vectors():
    assert GOLDEN


def validation(seed=0, **size):
    return scene(np.random.default_rng(seed), **size)


@every
@pytest.mark.parametrize("classwise", [True, False])
@pytest.mark.parametrize("target", ["iou", "tp"])
def test_scores_stay_scores_and_their_order(kind, classwise, target):
    truth, detections = validation(images=60)
    calibrator = DetectionCalibrator(kind, classwise=classwise, target=target).fit(truth, detections)
    s = torch.linspace(0, 1, 201, dtype=torch.float64)
    for label in range(2):
        out = calibrator(s, torch.full((201,), label))
        assert out.isfinite().all()
        assert ((out >= 0) & (out <= 1)).all()
        assert (out.diff() >= 0).all()
    if not classwise:
        assert torch.equal(calibrator(s, torch.zeros(201).long()), calibrator(s, torch.ones(201).long()))
    kept = calibrator.transform(detections)
    assert len(kept) > 0
    assert ((kept.scores >= calibrator.thresholds_after[kept.label]) | (kept.scores < 0)).all()


@pytest.mark.parametrize("kind", ["isotonic", "platt", "linear"])
def test_calibration_is_learnt_and_stays_on_fresh_images(kind):
    truth, detections = validation(7)
    before, after = (DetectionCalibrator(k).fit(*validation(6)).transform(detections) for k in ("identity", kind))
    errors = [float(laece(match_detections(truth, found))) for found in (before, after)]
    assert errors[1] < 0.6 * errors[0]


def test_isotonic_maps_are_scikit_learns():
    from sklearn.isotonic import IsotonicRegression

    truth, detections = validation(images=80)
    calibrator = DetectionCalibrator(thresholds=0.0).fit(truth, detections)
    matches = match_detections(truth, detections)
    s = np.random.default_rng(0).uniform(size=1000)
    for k in range(2):
        own = matches.label == k
        fitted = IsotonicRegression(out_of_bounds="clip").fit(matches.scores[own].numpy(), matches.iou[own].numpy())
        ours = calibrator(torch.from_numpy(s), torch.full((1000,), k))
        np.testing.assert_allclose(ours.numpy(), fitted.predict(s), atol=1e-12)
        at_knots = calibrator(torch.from_numpy(fitted.X_thresholds_), torch.full((len(fitted.X_thresholds_),), k))
        np.testing.assert_allclose(at_knots.numpy(), fitted.y_thresholds_, atol=1e-12)


@settings(max_examples=12)
@given(st.integers(0, 1000), st.sampled_from(["platt", "temperature"]), st.sampled_from(["bce", "qfl"]))
def test_no_other_parameters_lose_less(seed, kind, loss):
    truth, detections = validation(seed, images=30)
    best = DetectionCalibrator(kind, loss=loss, thresholds=0.0).fit(truth, detections)
    matches = match_detections(truth, detections)
    z = matches.scores.logit()

    def lost(maps):
        a, b = maps[:, matches.label]
        p = (a * z + b).sigmoid()
        entropy = torch.nn.functional.binary_cross_entropy(p, matches.iou, reduction="none")
        return torch.bincount(matches.label, entropy * (p - matches.iou).abs() if loss == "qfl" else entropy)

    least = lost(best.maps)
    others = [DetectionCalibrator(kind, loss=loss, thresholds=0.0, search="lbfgs").fit(truth, detections).maps]
    if kind == "platt":
        others += [DetectionCalibrator(kind, loss=loss, thresholds=0.0, search="grid").fit(truth, detections).maps]
    for a, b in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        others += [best.maps + torch.tensor([[a], [b if kind == "platt" else 0.0]])]
    for other in others:
        assert (least <= lost(other) * (1 + 1e-4)).all()


@every
def test_it_travels(kind, tmp_path):
    truth, detections = validation(images=40)
    calibrator = DetectionCalibrator(kind, thresholds=0.1).fit(truth, detections)
    calibrator.save(tmp_path / "calibrator.safetensors")
    again = load(tmp_path / "calibrator.safetensors")
    assert repr(again) == repr(calibrator)
    assert torch.equal(again.transform(detections).scores, calibrator.transform(detections).scores)


@every
def test_the_precision_of_the_scores_stays(kind):
    truth, detections = validation(images=40)
    calibrator = DetectionCalibrator(kind).fit(truth, detections)
    single = Detections(
        detections.image, detections.label, detections.boxes, detections.scores.float(), 40, detections.classes
    )
    assert calibrator.transform(single).scores.dtype == torch.float32


@every
@pytest.mark.parametrize("classwise", [True, False])
@pytest.mark.parametrize("thresholds", ["lrp", 0.3])
def test_empty_classes_images_and_detectors_are_legal(kind, classwise, thresholds):
    truth, detections = validation(images=30)
    columns = truth.image, truth.label, truth.boxes, truth.crowd
    more = GroundTruth(*columns, range(40), range(5))
    found = Detections(detections.image, detections.label * 3, detections.boxes, detections.scores, 40, 5)
    calibrator = DetectionCalibrator(kind, classwise=classwise, thresholds=thresholds).fit(more, found)
    scores = torch.tensor([0.4, 0.6])
    # class 4 has neither objects nor detections: what comes passes
    assert calibrator(scores, torch.tensor([4, 4])).isfinite().all()
    if classwise:
        assert torch.equal(calibrator(scores, torch.tensor([4, 4])), scores)
    nothing = found.rows(torch.zeros(len(found), dtype=torch.bool))
    silent = DetectionCalibrator(kind, classwise=classwise, thresholds=thresholds).fit(more, nothing)
    assert len(silent.transform(nothing)) == 0
    assert silent(scores, torch.tensor([0, 1])).tolist() == scores.tolist()
    bare = GroundTruth(*(column[:0] for column in columns), range(40), range(5))
    untrue = DetectionCalibrator(kind, classwise=classwise, thresholds=thresholds).fit(bare, found)
    assert untrue.transform(found).scores.isfinite().all()


@pytest.mark.parametrize("scores", [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
@every
def test_extreme_and_constant_scores_stay_finite(kind, scores):
    truth, detections = validation(images=30)
    s = torch.tensor(scores, dtype=torch.float64)[torch.arange(len(detections)) % 2]
    odd = Detections(detections.image, detections.label, detections.boxes, s, 30, 2)
    for target in ("iou", "tp"):
        out = DetectionCalibrator(kind, target=target).fit(truth, odd)(s, odd.label)
        assert out.isfinite().all()


def test_separable_hits_stay_finite():
    image, label = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(6, 1).double()
    truth = GroundTruth(image[:3], label[:3], boxes[:3], torch.zeros(3, dtype=torch.bool), range(6), "a")
    scores = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.1], dtype=torch.float64)
    calibrator = DetectionCalibrator("platt", target="tp", thresholds=0.0).fit(
        truth, Detections(image, label, boxes, scores, 6, 1)
    )
    assert calibrator.maps.isfinite().all()
    assert calibrator(scores, label).round().tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["platt", "temperature"])
def test_scores_that_say_the_opposite_are_flattened(kind):
    image, label = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(6, 1).double()
    truth = GroundTruth(image[3:], label[3:], boxes[3:], torch.zeros(3, dtype=torch.bool), range(6), "a")
    scores = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.1], dtype=torch.float64)
    found = Detections(image, label, boxes, scores, 6, 1)
    for loss in ("bce", "qfl"):
        calibrator = DetectionCalibrator(kind, target="tp", thresholds=0.0, loss=loss).fit(truth, found)
        assert 0 <= float(calibrator.maps[0, 0]) <= 0.0101


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "beta"}, "kind must be one of isotonic, linear, platt, temperature, identity, got 'beta'"),
        ({"target": "map"}, "target must be one of iou, tp"),
        ({"thresholds": "best"}, "thresholds must be 'lrp' or a number"),
        ({"thresholds": 1.5}, r"thresholds must lie in \[0, 1\]"),
        ({"tau": 1.0}, r"tau must lie in \[0, 1\)"),
        ({"loss": "qfl"}, "loss goes with platt and temperature, isotonic has none to choose"),
        ({"kind": "temperature", "search": "grid"}, "search must be 'optimum' for temperature, got 'grid'"),
        ({"max_detections": 0}, "max_detections must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, message):
    with pytest.raises(InputError, match=message):
        DetectionCalibrator(**arguments)


@pytest.mark.bad_input
def test_other_classes_and_unfitted_calibrators_are_refused_in_words():
    truth, detections = validation(images=20)
    with pytest.raises(InputError, match="not fitted"):
        DetectionCalibrator().transform(detections)
    with pytest.raises(InputError, match="not fitted"):
        DetectionCalibrator()(detections.scores, detections.label)
    calibrator = DetectionCalibrator().fit(truth, detections)
    other = Detections(detections.image, detections.label, detections.boxes, detections.scores, 20, 3)
    with pytest.raises(InputError, match="detections must be of 2 classes as in fit, they are of 3"):
        calibrator.transform(other)
    with pytest.raises(InputError, match="detections must be of the 2 classes of the ground truth, they are of 3"):
        DetectionCalibrator().fit(truth, other)
