"""What every measure owes: it agrees with its definition, its Metric with its function, and bad input is refused."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import metrics
from trimtab.core.checks import InputError

BINS = 10
PAIRS = {
    "ece": (metrics.expected_calibration_error, metrics.ExpectedCalibrationError, {"bins": BINS}),
    "ece_em": (
        metrics.expected_calibration_error_equal_mass,
        metrics.ExpectedCalibrationErrorEqualMass,
        {"bins": BINS},
    ),
    "ece_em_closed": (
        metrics.expected_calibration_error_equal_mass,
        metrics.ExpectedCalibrationErrorEqualMass,
        {"bins": BINS, "include_lowest": True},
    ),
    "cw": (metrics.classwise_calibration_error, metrics.ClasswiseCalibrationError, {"bins": BINS}),
    "cw_em": (
        metrics.classwise_calibration_error_equal_mass,
        metrics.ClasswiseCalibrationErrorEqualMass,
        {"bins": BINS, "classes": 2},
    ),
    "mce": (metrics.maximum_calibration_error, metrics.MaximumCalibrationError, {"bins": BINS}),
    "ksce": (metrics.kolmogorov_smirnov_error, metrics.KolmogorovSmirnovError, {}),
    "kdece": (metrics.kernel_density_error, metrics.KernelDensityError, {}),
    "mmce": (metrics.maximum_mean_calibration_error, metrics.MaximumMeanCalibrationError, {"width": 0.2}),
    "nll": (metrics.negative_log_likelihood, metrics.NegativeLogLikelihood, {}),
    "brier": (metrics.brier_score, metrics.BrierScore, {}),
    "brier_parts": (metrics.brier_decomposition, metrics.BrierDecomposition, {"bins": BINS}),
    "reliability": (metrics.reliability_curve, metrics.ReliabilityCurve, {"bins": BINS, "level": 0.9}),
    "risk_coverage": (metrics.risk_coverage_curve, metrics.RiskCoverageCurve, {}),
    "aurc": (metrics.aurc, metrics.AURC, {}),
    "ace": (metrics.average_calibration_error, metrics.AverageCalibrationError, {"bins": BINS}),
    "rms": (metrics.root_mean_square_calibration_error, metrics.RootMeanSquareCalibrationError, {"bins": BINS}),
    "kumar": (
        metrics.root_mean_square_calibration_error,
        metrics.RootMeanSquareCalibrationError,
        {"bins": BINS, "equal_mass": True, "debiased": True, "classwise": True},
    ),
    "tace": (
        metrics.thresholded_adaptive_calibration_error,
        metrics.ThresholdedAdaptiveCalibrationError,
        {"bins": BINS, "threshold": 0.1},
    ),
    "smooth": (metrics.smooth_calibration_error, metrics.SmoothCalibrationError, {}),
    "kuiper": (metrics.kuiper_error, metrics.KuiperError, {}),
    "harmonic": (metrics.harmonic_calibration_score, metrics.HarmonicCalibrationScore, {"bins": BINS, "beta": 2.0}),
}
TAKES_CLASSES = ("cw", "cw_em", "brier_parts")
BINNED = [name for name, (_, _, settings) in PAIRS.items() if "bins" in settings]
pairs = pytest.mark.parametrize("name", PAIRS)


def metric(name, c):
    _, kind, settings = PAIRS[name]
    return kind(c, **settings) if name in TAKES_CLASSES else kind(**settings)


def numbers(value):
    parts = value if isinstance(value, tuple) else (value,)
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).reshape(-1) for part in parts])


def same(a, b, atol=1e-12):
    torch.testing.assert_close(numbers(a), numbers(b), atol=atol, rtol=0, equal_nan=True)


@pairs
@pytest.mark.filterwarnings("ignore:no sample is right")
@settings(max_examples=15)
@given(given=definitions.predictions(), parts=st.integers(2, 4))
def test_batches_and_merged_states_equal_one_shot(name, given, parts):
    logits, y = given
    p, c = logits.softmax(1), logits.shape[1]
    function, _, settings = PAIRS[name]
    expected = function(p, y, **settings)
    whole, other = metric(name, c), metric(name, c)
    for i in range(parts):
        if len(y[i::parts]):
            whole.update(p[i::parts], y[i::parts])
    same(whole.compute(), expected)
    if len(y) > 1:
        first = metric(name, c)
        first.update(p[:1], y[:1])
        other.update(p[1:], y[1:])
        first.merge_state(other)
        same(first.compute(), expected)
    whole.reset()
    whole.update(p, y)
    same(whole.compute(), expected)


@pairs
@pytest.mark.filterwarnings("ignore:no sample is right")
@settings(max_examples=15)
@given(given=definitions.predictions(), seed=st.integers(0, 99))
def test_the_order_of_the_rows_is_irrelevant(name, given, seed):
    logits, y = given
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    function, _, settings = PAIRS[name]
    p = logits.softmax(1)
    same(function(p[order], y[order], **settings), function(p, y, **settings))


@pairs
def test_containers_and_precisions(name):
    p, y = definitions.some_probs(300, 3, dtype=torch.float64)
    function, _, settings = PAIRS[name]
    expected = function(p, y, **settings)
    same(function(p.numpy(), y.numpy(), **settings), expected)
    same(function(p.numpy(), y.int().numpy(), **settings), expected)
    same(function(p.clone().requires_grad_(), y, **settings), expected)
    if name not in ("reliability", "risk_coverage"):
        p32 = p.float()
        same(function(p32, y, **settings), expected, atol=2e-3)
        for half in (p.half(), p.bfloat16()):
            same(
                function(half, y, **settings),
                function(half.float() / half.float().sum(1, keepdim=True), y, **settings),
                0.05,
            )


@pairs
@pytest.mark.bad_input
def test_bad_input_is_refused(name):
    function, _, settings = PAIRS[name]
    p, y = torch.full((4, 2), 0.5), torch.tensor([0, 1, 1, 0])
    with_nan, unnormalised, negative = p.clone(), p.clone(), p.clone()
    with_nan[2, 1] = torch.nan
    unnormalised[1] = 0.3
    negative[3] = torch.tensor([-0.5, 1.5])
    for probs, labels, message in (
        (with_nan, y, r"probs must be finite, found nan at row 2, column 1"),
        (unnormalised, y, r"probs must sum to one in every row .*, row 1 sums to 0.6"),
        (negative, y, r"probs must lie in \[0, 1\], found -0.5 at row 3, column 0"),
        (p[:0], y[:0], "probs must have at least one row"),
        (p[:, :1], y, "probs must have at least 2 columns, got 1"),
        (p, y[:3], "labels must have 4 entries, one for each row, got 3"),
        (p, y.float(), "labels must be integer class indices, got float32"),
        (p, y + 1, r"labels must lie in 0..1, found 2 at row 1"),
    ):
        with pytest.raises(InputError, match=message):
            function(probs, labels, **settings)
        with pytest.raises(InputError, match=message):
            metric(name, 2).update(probs, labels)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BINNED)
@pytest.mark.parametrize("bins", [0, -1, 2.5, True])
def test_bins_are_whole_numbers(name, bins):
    function, kind, settings = PAIRS[name]
    changed = settings | {"bins": bins}
    with pytest.raises(InputError, match="bins must be"):
        function(torch.full((4, 2), 0.5), torch.tensor([0, 1, 1, 0]), **changed)
    with pytest.raises(InputError, match="bins must be"):
        kind(2, **changed) if name in TAKES_CLASSES else kind(**changed)


@pytest.mark.bad_input
def test_other_settings_are_checked():
    p, y = torch.full((4, 2), 0.5), torch.tensor([0, 1, 1, 0])
    with pytest.raises(InputError, match=r"classes must be at most 2, got 3"):
        metrics.classwise_calibration_error(p, y, classes=3)
    with pytest.raises(InputError, match=r"classes must be at least 1, got 0"):
        metrics.classwise_calibration_error_equal_mass(p, y, classes=0)
    with pytest.raises(InputError, match=r"width must lie in \[0.01, inf\), got 0"):
        metrics.maximum_mean_calibration_error(p, y, width=0)
    with pytest.raises(InputError, match=r"beta must lie in \[0, inf\), got -1"):
        metrics.harmonic_calibration_score(p, y, beta=-1)
    with pytest.raises(InputError, match=r"level must lie in \(0, 1\), got 1"):
        metrics.reliability_curve(p, y, level=1)
    for kind in (metrics.ClasswiseCalibrationError, metrics.ClasswiseCalibrationErrorEqualMass):
        with pytest.raises(InputError, match="probs must have 3 columns, got 2"):
            kind(3).update(p, y)
    with pytest.raises(InputError, match="bins must name at least one bin count"):
        metrics.top_label_errors(p, y, bins=[])
    with pytest.raises(InputError, match=r"bins\[1\] must be at least 1, got 0"):
        metrics.top_label_errors(p, y, bins=[5, 0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bins", [1, 15, 100])
def test_calibration_errors_are_their_definitions(seed, bins):
    p, y = definitions.some_probs(200, 4, seed=seed)
    values, hits = definitions.top(p, y)
    expected = {
        metrics.expected_calibration_error: definitions.ece(values, hits, bins),
        metrics.expected_calibration_error_equal_mass: definitions.ece_equal_mass(values, hits, bins),
        metrics.maximum_calibration_error: definitions.mce(values, hits, bins),
        metrics.classwise_calibration_error: definitions.classwise(p, y, bins, definitions.ece),
        metrics.classwise_calibration_error_equal_mass: definitions.classwise(p, y, bins, definitions.ece_equal_mass),
    }
    for function, value in expected.items():
        assert function(p, y, bins) == pytest.approx(value, abs=1e-12), function.__name__
    assert metrics.kolmogorov_smirnov_error(p, y) == pytest.approx(definitions.ksce(values, hits), abs=1e-12)
    assert metrics.maximum_mean_calibration_error(p, y) == pytest.approx(definitions.mmce(values, hits), abs=1e-12)


def test_parity_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, y = definitions.some_probs(2000, 5)
    for bins in (5, 15, 100):
        ours = metrics.expected_calibration_error(p, y, bins), metrics.maximum_calibration_error(p, y, bins)
        theirs = [float(multiclass_calibration_error(p, y, 5, bins, norm)) for norm in ("l1", "max")]
        assert ours == pytest.approx(theirs, abs=1e-6)  # theirs are sums of float32


@given(groups=st.lists(st.tuples(st.integers(6, 9), st.integers(1, 3)), min_size=1, max_size=4))
def test_perfectly_calibrated_predictions_have_no_error(groups):
    rows, labels = [], []
    for tenths, times in groups:
        rows += [[tenths / 10, 1 - tenths / 10]] * (10 * times)
        labels += ([0] * tenths + [1] * (10 - tenths)) * times
    p, y = torch.tensor(rows, dtype=torch.float64), torch.tensor(labels)
    perfect = [
        "ece",
        "ece_em",
        "ece_em_closed",
        "cw",
        "cw_em",
        "mce",
        "ksce",
        "mmce",
        "ace",
        "rms",
        "kumar",
        "tace",
        "kuiper",
        "smooth",
    ]
    for name in perfect:
        function, _, settings = PAIRS[name]
        assert function(p, y, **settings) == pytest.approx(0, abs=1e-7), name


def test_honest_probabilities_have_little_density_error():
    g = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(20000, 3, generator=g)).softmax(1)
    y = p.multinomial(1, generator=g)[:, 0]
    assert metrics.kernel_density_error(p, y) < 0.01


@pytest.mark.filterwarnings("ignore:no sample is right")
@given(given=definitions.predictions())
def test_errors_stay_in_bounds(given):
    logits, y = given
    p = logits.softmax(1)
    bounded = set(PAIRS) - {"kdece", "nll", "brier", "brier_parts", "reliability", "risk_coverage"}
    for name in sorted(bounded):
        function, _, settings = PAIRS[name]
        assert 0 <= function(p, y, **settings) <= 1 + 1e-12, name
    assert 0 <= metrics.brier_score(p, y) <= 2
    assert metrics.negative_log_likelihood(p, y) >= 0


def test_nothing_right_leaves_density_undefined():
    p, y = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]), torch.tensor([1, 1])
    with pytest.warns(RuntimeWarning, match="no sample is right"):
        assert np.isnan(metrics.kernel_density_error(p, y))


def test_two_classes_use_the_probability_of_class_one():
    p, y = definitions.some_probs(400, 2)
    expected = definitions.kdece(p[:, 1].numpy(), (y == 1).numpy())
    assert metrics.kernel_density_error(p, y) == pytest.approx(expected, abs=1e-4)


def test_classes_that_do_not_occur_count_unless_told_otherwise():
    p, y = definitions.some_probs(300, 5)
    y = y.clamp(max=2)
    all_five = [definitions.ece(p[:, k].numpy(), (y == k).numpy(), 15) for k in range(5)]
    assert metrics.classwise_calibration_error(p, y) == pytest.approx(np.mean(all_five))
    assert metrics.classwise_calibration_error(p, y, classes=3) == pytest.approx(np.mean(all_five[:3]))


def test_top_label_errors_are_the_single_ones():
    p, y = definitions.some_probs(1000, 4)
    errors = metrics.top_label_errors(p, y)
    assert len(errors) == 28
    assert errors["ECE_20"] == pytest.approx(metrics.expected_calibration_error(p, y, 20), abs=1e-12)
    assert errors["ECE_em_20"] == pytest.approx(metrics.expected_calibration_error_equal_mass(p, y, 20), abs=1e-12)
    assert errors["MCE_20"] == pytest.approx(metrics.maximum_calibration_error(p, y, 20), abs=1e-12)
    assert errors["KSCE"] == pytest.approx(metrics.kolmogorov_smirnov_error(p, y), abs=1e-12)


def test_log_loss_is_scikit_learns_and_infinite_where_the_truth_was_impossible():
    from sklearn.metrics import log_loss

    p, y = definitions.some_probs(300, 4)
    assert metrics.negative_log_likelihood(p, y) == pytest.approx(log_loss(y, p.numpy(), labels=range(4)), rel=1e-12)
    assert metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == np.inf


def test_harmonic_score():
    p, y = definitions.some_probs(500, 4)
    accuracy = float((p.argmax(1) == y).double().mean())
    calibration = 1 - metrics.expected_calibration_error(p, y)
    assert metrics.harmonic_calibration_score(p, y) == pytest.approx(2 / (1 / accuracy + 1 / calibration))
    assert metrics.harmonic_calibration_score(p, y, beta=0) == pytest.approx(accuracy)
    assert metrics.harmonic_calibration_score(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == 0
