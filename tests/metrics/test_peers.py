"""The measures that peers have: the same numbers as torchmetrics, netcal and uncertainty-calibration."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import metrics
from trimtab.core.checks import InputError

SEEDS = pytest.mark.parametrize("seed", range(3))


def binary(n=500, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, generator=g, dtype=torch.float64)
    return truth.sqrt(), torch.bernoulli(truth, generator=g).long()


@SEEDS
@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_binary_error_is_torchmetrics(seed, norm):
    from torchmetrics.functional.classification import binary_calibration_error

    p, y = binary(seed=seed)
    for bins in (1, 7, 15):
        ours = metrics.binary_calibration_error(p, y, bins, norm)
        assert ours == pytest.approx(float(binary_calibration_error(p, y, bins, norm)), abs=1e-6)


@SEEDS
def test_top_label_errors_are_netcals(seed):
    from netcal.metrics import ACE

    p, y = definitions.some_probs(700, 5, seed=seed)
    for bins in (5, 15, 40):
        theirs = ACE(bins).measure(p.numpy(), y.numpy())
        assert metrics.average_calibration_error(p, y, bins) == pytest.approx(theirs, abs=1e-9)


@SEEDS
def test_root_mean_square_error_is_torchmetrics(seed):
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, y = definitions.some_probs(700, 5, seed=seed)
    for bins in (5, 15, 40):
        theirs = float(multiclass_calibration_error(p, y, 5, bins, "l2"))
        assert metrics.root_mean_square_calibration_error(p, y, bins) == pytest.approx(theirs, abs=1e-6)


@SEEDS
@pytest.mark.parametrize("equal_mass", [False, True])
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("classwise", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_root_mean_square_error_is_kumars(seed, equal_mass, debiased, classwise, ties):
    from calibration.utils import get_equal_bins, get_equal_prob_bins, lower_bound_scaling_ce

    p, y = definitions.some_probs(317, 4, seed=seed)
    if ties:
        p = ((p * 20).round() + 0.5) / ((p * 20).round() + 0.5).sum(1, keepdim=True)
    for bins in (2, 15, 60):
        theirs = lower_bound_scaling_ce(
            p.numpy(),
            y.numpy(),
            2,
            debiased,
            bins,
            get_equal_bins if equal_mass else get_equal_prob_bins,
            "marginal" if classwise else "top-label",
        )
        ours = metrics.root_mean_square_calibration_error(
            p, y, bins, equal_mass=equal_mass, debiased=debiased, classwise=classwise
        )
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_debiasing_leaves_nothing_of_honest_probabilities():
    g = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(4000, 5, generator=g, dtype=torch.float64)).softmax(1)
    y = p.multinomial(1, generator=g)[:, 0]
    plain = metrics.root_mean_square_calibration_error(p, y, 200, equal_mass=True)
    debiased = metrics.root_mean_square_calibration_error(p, y, 200, equal_mass=True, debiased=True)
    assert plain > 0.08
    assert debiased < 0.03


@SEEDS
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.2])
def test_thresholded_error_is_its_definition(seed, threshold):
    p, y = (x.numpy() for x in definitions.some_probs(200, 4, seed=seed))
    errors = []
    for k in range(4):
        kept = p[:, k] > threshold
        order = np.argsort(p[kept, k])
        gaps = [(y[kept] == k)[part].mean() - p[kept, k][part].mean() for part in np.array_split(order, 6)]
        sizes = [len(part) for part in np.array_split(order, 6)]
        errors.append(np.abs(gaps) @ sizes / sum(sizes))
    ours = metrics.thresholded_adaptive_calibration_error(p, y, 6, threshold)
    assert ours == pytest.approx(np.mean(errors), abs=1e-12)


@given(given=definitions.predictions())
def test_kuiper_is_the_largest_run(given):
    logits, y = given
    p = logits.softmax(1)
    values, hits = definitions.top(p, y)
    runs = [abs((hits - values)[(values > s) & (values <= t)].sum()) for s in [-1, *np.unique(values)] for t in values]
    kuiper = metrics.kuiper_error(p, y)
    assert kuiper == pytest.approx(max(runs) / len(values), abs=1e-12)
    assert kuiper >= metrics.kolmogorov_smirnov_error(p, y) - 1e-12


def smooth(values, hits, width, points=20_000):
    """The smoothed error as its definition says: a Gaussian with its mirror images, on a fine grid."""
    t = (np.arange(points) + 0.5) / points
    total = np.zeros(points)
    for p, hit in zip(values, hits):
        for mirrored in (p + 2 * k for k in range(-3, 4)):
            for centre in (mirrored, -mirrored):
                total += (hit - p) * np.exp(-(((t - centre) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    return np.abs(total).mean() / len(values)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_the_smooth_error_is_its_own_width(n):
    p, y = definitions.some_probs(n, 3, seed=n)
    error = metrics.smooth_calibration_error(p, y)
    assert smooth(*definitions.top(p, y), error) == pytest.approx(error, abs=2e-5)


def test_the_smooth_error_of_honest_probabilities_vanishes():
    g = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(40_000, 5, generator=g)).softmax(1)
    y = p.multinomial(1, generator=g)[:, 0]
    assert metrics.smooth_calibration_error(p, y) < 0.012
    assert metrics.smooth_calibration_error((p**3) / (p**3).sum(1, keepdim=True), y) > 0.15


@given(given=definitions.predictions())
def test_norms_are_in_order(given):
    logits, y = given
    p = logits.softmax(1)
    ece, rms, worst = (
        metrics.expected_calibration_error(p, y),
        metrics.root_mean_square_calibration_error(p, y),
        metrics.maximum_calibration_error(p, y),
    )
    assert ece <= rms + 1e-12
    assert rms <= worst + 1e-12
    assert metrics.average_calibration_error(p, y) <= worst + 1e-12
    assert metrics.root_mean_square_calibration_error(p, y, debiased=True) <= rms + 1e-12


@given(seed=st.integers(0, 1000), n=st.integers(1, 60), ties=st.booleans())
def test_binary_norms_containers_and_batches(seed, n, ties):
    p, y = binary(n, seed)
    p = (5 * p).round() / 5 if ties else p
    found = [metrics.binary_calibration_error(p, y, 10, norm) for norm in ("l1", "l2", "max")]
    assert found == sorted(found) or max(np.diff(found) * -1) < 1e-12
    assert metrics.binary_calibration_error(p.numpy(), y.bool().numpy(), 10) == pytest.approx(found[0], abs=1e-12)
    parts = [metrics.BinaryCalibrationError(10), metrics.BinaryCalibrationError(10)]
    for i, part in enumerate(parts):
        if len(p[i::2]):
            part.update(p[i::2], y[i::2])
    parts[0].merge_state(parts[1])
    assert float(parts[0].compute()) == pytest.approx(found[0], abs=1e-12)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    p, y = torch.full((4, 2), 0.5), torch.tensor([0, 1, 1, 0])
    for probs, outcomes, message in (
        (p, y, r"probs must be floating point of shape \(n,\)"),
        (p[:0, 0], y[:0], r"probs must be floating point of shape \(n,\), n >= 1"),
        (p[:, 0] + 1, y, r"probs must lie in \[0, 1\], found 1.5 at row 0"),
        (p[:, 0] * torch.nan, y, "probs must be finite, found nan at row 0"),
        (p[:, 0], y + 1, r"outcomes must lie in 0..1, found 2 at row 1"),
        (p[:, 0], y[:2], "outcomes must have 4 entries"),
        (p[:, 0], y.float(), "outcomes must be integer"),
    ):
        with pytest.raises(InputError, match=message):
            metrics.binary_calibration_error(probs, outcomes)
    with pytest.raises(InputError, match="norm must be one of l1, l2, max, got 'l3'"):
        metrics.BinaryCalibrationError(norm="l3")
    with pytest.raises(InputError, match="bins must be at least 1"):
        metrics.BinaryCalibrationError(0)
    with pytest.raises(InputError, match=r"threshold must lie below 1 / 3 for so many classes, got 0.4"):
        metrics.thresholded_adaptive_calibration_error(torch.full((4, 3), 1 / 3), y, threshold=0.4)
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 0.5\), got 0.5"):
        metrics.ThresholdedAdaptiveCalibrationError(threshold=0.5)
