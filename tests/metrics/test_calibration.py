"""The suite: all names, the same numbers as the single measures, and every odd input that it should survive."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import metrics
from trimtab.core.checks import InputError
from trimtab.core.stats import resample_counts
from trimtab.core.temperature import fit_temperature
from trimtab.metrics import measures, rows

quiet = pytest.mark.filterwarnings("ignore:no sample is right", "ignore:the best temperature")


def single_measures(probs, labels):
    by_bins = {
        "ECE": metrics.expected_calibration_error,
        "ECE_em": metrics.expected_calibration_error_equal_mass,
        "cwCE": metrics.classwise_calibration_error,
        "cwCE_em": metrics.classwise_calibration_error_equal_mass,
        "MCE": metrics.maximum_calibration_error,
    }
    alone = {
        "KSCE": metrics.kolmogorov_smirnov_error,
        "KDECE": metrics.kernel_density_error,
        "MMCE": metrics.maximum_mean_calibration_error,
        "NLL": metrics.negative_log_likelihood,
        "Brier": metrics.brier_score,
    }
    binned = {f"{name}_{b}": measure(probs, labels, b) for name, measure in by_bins.items() for b in metrics.BINS}
    return binned | {name: measure(probs, labels) for name, measure in alone.items()}


@pytest.mark.parametrize("c", [2, 3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_suite_is_the_single_measures_before_and_after(c, dtype):
    logits, labels = definitions.some_logits(400, c, dtype=dtype)
    suite = metrics.calibration_suite(logits, labels, temperature=1.7)
    assert list(suite) == [f"{when}_{name}" for when in ("pre", "post") for name in metrics.COLUMNS]
    assert len(suite) == 100
    for when, temperature in (("pre", 1.0), ("post", 1.7)):
        for name, value in single_measures((logits / temperature).softmax(1), labels).items():
            assert suite[f"{when}_{name}"] == pytest.approx(value, abs=1e-9 if dtype == torch.float64 else 1e-5), name


def test_the_names_are_the_studys():
    names = list(
        metrics.calibration_suite(
            *definitions.some_logits(50, 3), ood_scores={"cifar10c": np.array([0.5]), "svhn": np.array([0.4])}
        )
    )
    assert len(names) == 102
    bins = (5, 10, 15, 20, 25, 50, 100, 200, 500)
    stems = [f"{m}_{b}" for m in ("ECE", "ECE_em", "cwCE", "cwCE_em", "MCE") for b in bins]
    stems += ["KSCE", "KDECE", "MMCE", "NLL", "Brier"]
    assert set(names) == {f"{w}_{s}" for w in ("pre", "post") for s in stems} | {"auc_cifar10c", "auc_svhn"}


def test_the_temperature_is_fitted_where_it_is_said():
    logits, labels = definitions.some_logits(2000, 4)
    fit, test = slice(0, 1000), slice(1000, None)
    for fitted_on, temperature in (
        ({"fit_logits": logits[fit], "fit_labels": labels[fit]}, fit_temperature(logits[fit], labels[fit])),
        ({}, fit_temperature(logits[test], labels[test])),
    ):
        found = metrics.calibration_suite(logits[test], labels[test], **fitted_on)
        assert found == metrics.calibration_suite(logits[test], labels[test], temperature=temperature)
        assert found["post_NLL"] < found["pre_NLL"]


def test_unknown_inputs_are_detected_by_the_largest_probability():
    logits, labels = definitions.some_logits(300, 4)
    known = logits.softmax(1).amax(1)
    unknown = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unknown[:20] = known[:20]
    suite = metrics.calibration_suite(logits, labels, temperature=1.0, ood_scores={"far": unknown, "near": known})
    assert suite["auc_far"] == pytest.approx(definitions.auc(known, unknown), abs=1e-9)
    assert suite["auc_near"] == pytest.approx(0.5, abs=1e-4)


@quiet
@settings(max_examples=30)
@given(given=definitions.predictions(), seed=st.integers(0, 99))
def test_whatever_the_input_the_numbers_are_in_bounds_and_free_of_order(given, seed):
    logits, labels = given
    suite = metrics.calibration_suite(logits, labels, temperature=2.0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    again = metrics.calibration_suite(logits[order], labels[order], temperature=2.0)
    for name, value in suite.items():
        assert again[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
        if name.endswith("KDECE"):
            assert np.isnan(value) or 0 <= value <= 1 + 1e-9
        elif name.endswith("Brier"):
            assert 0 <= value <= 2
        else:
            assert 0 <= value <= (np.inf if name.endswith("NLL") else 1 + 1e-12), name


@quiet
@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])),
        (torch.zeros(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])),
        (torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])),
        (1e4 * torch.eye(4)[[0, 1, 2, 3, 0]] - 5e3, torch.tensor([0, 1, 2, 3, 1])),
        (torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), torch.tensor([0, 0])),
        (torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.full((30,), 2)),
        (torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3),
    ],
    ids=["one row", "no opinion", "constant", "extreme", "extreme, two classes", "one class only", "classes absent"],
)
def test_odd_inputs(logits, labels):
    for dtype in (torch.float32, torch.float64):
        suite = metrics.calibration_suite(logits.to(dtype), labels)
        undefined = {name for name, value in suite.items() if not np.isfinite(value)}
        assert undefined <= {"pre_KDECE", "post_KDECE"}
        confidence, correct = definitions.top(logits.double().softmax(1), labels)
        gap = abs(confidence.mean() - correct.mean())
        if confidence.min() == confidence.max():
            for name in ("ECE_15", "ECE_em_15", "MCE_15", "KSCE", "MMCE"):
                assert suite[f"pre_{name}"] == pytest.approx(gap, abs=1e-6), name


def test_equal_logits_are_one_prediction_for_the_first_class():
    suite = metrics.calibration_suite(torch.zeros(4, 2), torch.tensor([0, 1, 1, 1]), temperature=1.0)
    assert suite["pre_ECE_15"] == pytest.approx(0.25)


def test_nothing_right_is_said_in_a_warning():
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    with pytest.warns(RuntimeWarning, match="no sample is right"):
        assert np.isnan(metrics.calibration_suite(logits, torch.tensor([2, 2]), temperature=1.0)["pre_KDECE"])


def test_containers_and_precisions():
    logits, labels = definitions.some_logits(300, 4)
    expected = metrics.calibration_suite(logits, labels, temperature=1.5)
    found = metrics.calibration_suite(logits.numpy(), labels.numpy(), temperature=1.5)
    assert found == expected
    for half in (logits.half(), logits.bfloat16()):
        wide = metrics.calibration_suite(half.float(), labels, temperature=1.5)
        assert metrics.calibration_suite(half, labels, temperature=1.5) == wide
    fixed = logits.numpy().copy()
    fixed.flags.writeable = False
    assert metrics.calibration_suite(fixed, labels.numpy(), temperature=1.5) == expected
    assert metrics.calibration_suite(logits.clone().requires_grad_(), labels, temperature=1.5) == expected


def test_the_input_is_left_alone():
    for dtype in (torch.float32, torch.float64):
        logits, labels = definitions.some_logits(100, 3, dtype=dtype)
        before = logits.clone()
        metrics.calibration_suite(logits, labels)
        metrics.calibration_intervals(logits, labels, resamples=3)
        metrics.top_label_errors(logits.softmax(1), labels)
        assert torch.equal(logits, before)


def test_class_groups_and_row_blocks_do_not_matter(monkeypatch):
    logits, labels = definitions.some_logits(200, 23)
    expected = metrics.calibration_suite(logits, labels, temperature=1.5)
    monkeypatch.setattr(rows, "_GROUP_ELEMENTS", 700)
    monkeypatch.setattr(rows, "_BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(measures, "_PART_ELEMENTS", 100)
    found = metrics.calibration_suite(logits, labels, temperature=1.5)
    assert found == pytest.approx(expected, abs=1e-12)


def test_classes_counted_can_be_chosen():
    logits, labels = definitions.some_logits(200, 5)
    labels = labels.clamp(max=2)
    found = metrics.calibration_suite(logits, labels, temperature=1.0, classes=3)
    assert found["pre_cwCE_15"] == pytest.approx(
        metrics.classwise_calibration_error(logits.softmax(1), labels, classes=3), abs=1e-12
    )


@pytest.mark.bad_input
def test_bad_input_is_refused():
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    with_inf = logits.clone()
    with_inf[1, 2] = torch.inf
    for arguments, options, message in (
        ((with_inf, labels), {}, "logits must be finite, found inf at row 1, column 2"),
        ((logits, labels.float()), {}, "labels must be integer class indices"),
        ((logits, labels + 1), {}, r"labels must lie in 0..2, found 3 at row 2"),
        ((logits, labels, logits), {}, "fit_logits and fit_labels must be given together"),
        ((logits, labels, logits[:, :2], labels), {}, "fit_logits must have 3 columns, got 2"),
        ((logits, labels, logits, labels[:2]), {}, "fit_labels must have 4 entries"),
        ((logits, labels, logits, labels), {"temperature": 1.0}, "temperature must not be given together"),
        ((logits, labels), {"temperature": 0.0}, r"temperature must lie in \[0.01, 100\], got 0"),
        ((logits, labels), {"classes": 4}, "classes must be at most 3, got 4"),
        ((logits, labels), {"ood_scores": {"svhn": torch.tensor([torch.nan])}}, r"ood_scores\['svhn'\] must be finite"),
        ((logits, labels), {"ood_scores": {"svhn": torch.zeros(2, 2)}}, r"ood_scores\['svhn'\] must be .* \(m,\)"),
        ((logits.tolist(), labels.tolist(), None, None), {"classes": 0}, "classes must be at least 1, got 0"),
    ):
        for function in (metrics.calibration_suite, metrics.calibration_intervals):
            with pytest.raises(InputError, match=message):
                function(*arguments, **options)
    for options, message in (
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"level": 1.0}, r"level must lie in \(0, 1\), got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            metrics.calibration_intervals(logits, labels, temperature=1.0, **options)


@settings(max_examples=10)
@quiet
@given(given=definitions.predictions())
def test_the_metric_over_batches_is_the_function(given):
    logits, labels = given
    expected = metrics.calibration_suite(logits, labels, temperature=1.5)
    first, second = metrics.CalibrationSuite(temperature=1.5), metrics.CalibrationSuite(temperature=1.5)
    first.update(logits[:1], labels[:1])
    if len(labels) > 1:
        second.update(logits[1:], labels[1:])
        first.merge_state(second)
    found = {name: float(value) for name, value in first.compute().items()}
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("c", [2, 6])
def test_resampled_measures_are_measures_of_the_resample(c):
    logits, labels = definitions.some_logits(150, c, scale=6)
    logits = (2 * logits).round() / 2  # ties
    counts = resample_counts(150, 4, seed=0)
    weighted = measures.measure_logits(logits, labels, (1.0, 2.0), metrics.BINS, weights=torch.from_numpy(counts))
    for k, count in enumerate(counts):
        drawn = np.repeat(np.arange(150), count)
        repeated = measures.measure_logits(logits[drawn], labels[drawn], (1.0, 2.0), metrics.BINS)
        for many, one in zip(weighted, repeated):
            for name in one.named:
                assert float(many.named[name][k]) == pytest.approx(float(one.named[name]), abs=1e-9), name


def test_intervals_hold_the_estimate_and_repeat():
    logits, labels = definitions.some_logits(300, 4)
    unknown = {"far": torch.rand(100, generator=torch.Generator().manual_seed(1))}
    settings = {"temperature": 1.5, "ood_scores": unknown, "resamples": 60}
    estimates = metrics.calibration_suite(logits, labels, temperature=1.5, ood_scores=unknown)
    found = metrics.calibration_intervals(logits, labels, seed=3, **settings)
    assert list(found) == list(estimates)
    for name, (estimate, low, high) in found.items():
        assert estimate == estimates[name]
        assert 0 <= low <= estimate <= high, name
        assert low < high, name
    assert metrics.calibration_intervals(logits, labels, seed=3, **settings) == found
    assert metrics.calibration_intervals(logits, labels, seed=4, **settings) != found
    wider = metrics.calibration_intervals(logits, labels, seed=3, level=0.999, **settings)
    assert all(wider[name].low <= found[name].low and found[name].high <= wider[name].high for name in found)


def test_intervals_are_as_wide_as_the_estimates_vary():
    names = ("pre_ECE_15", "pre_ECE_em_15", "pre_cwCE_15", "pre_KSCE", "pre_MMCE", "pre_KDECE", "pre_NLL", "pre_Brier")
    values = {name: [] for name in names}
    for seed in range(40):
        logits, labels = definitions.some_logits(500, 4, seed=seed)
        suite = metrics.calibration_suite(logits, labels, temperature=1.0)
        for name in names:
            values[name].append(suite[name])
    found = metrics.calibration_intervals(logits, labels, temperature=1.0, resamples=400)
    for name in names:
        width, expected = found[name].high - found[name].low, 2 * 1.96 * np.std(values[name])
        assert 0.7 < width / expected < 1.4, name
