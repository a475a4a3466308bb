"""Measures of regressions: netcal's and scikit-learn's numbers, mergeable states, and what must hold for all input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import metrics
from trimtab.core.checks import InputError
from trimtab.metrics.regression import bin_of

SEEDS = pytest.mark.parametrize("seed", range(3))
LEVELS = [0.1, 0.5, 0.9]
GAUSSIAN = {
    "ence": (metrics.expected_normalised_calibration_error, metrics.ExpectedNormalisedCalibrationError, {"bins": 7}),
    "ence_mass": (
        metrics.expected_normalised_calibration_error,
        metrics.ExpectedNormalisedCalibrationError,
        {"bins": 7, "equal_mass": True},
    ),
    "uce": (metrics.uncertainty_calibration_error, metrics.UncertaintyCalibrationError, {"bins": 7}),
    "uce_mass": (
        metrics.uncertainty_calibration_error,
        metrics.UncertaintyCalibrationError,
        {"bins": 7, "equal_mass": True},
    ),
    "qce": (metrics.quantile_calibration_error, metrics.QuantileCalibrationError, {"levels": LEVELS}),
    "qce_bins": (metrics.quantile_calibration_error, metrics.QuantileCalibrationError, {"levels": LEVELS, "bins": 5}),
}


def forecasts(n=800, seed=0, factor=1.3):
    """Means, standard deviations and targets whose errors are `factor` times as large as stated."""
    g = torch.Generator().manual_seed(seed)
    mean, noise, spread = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3))
    std = (0.5 * spread).exp()
    return mean, std, mean + factor * std * noise


@SEEDS
@pytest.mark.parametrize("bins", [1, 5, 20])
def test_the_errors_are_netcals(seed, bins):
    from netcal.metrics.regression import ENCE, QCE, UCE

    mean, std, y = forecasts(seed=seed)
    given, levels = (mean.numpy(), std.numpy()), np.array(LEVELS)
    found = {
        "ence": (
            metrics.expected_normalised_calibration_error(mean, std, y, bins),
            ENCE(bins).measure(given, y.numpy()),
        ),
        "uce": (metrics.uncertainty_calibration_error(mean, std, y, bins), UCE(bins).measure(given, y.numpy())),
        "m-qce": (
            metrics.quantile_calibration_error(mean, std, y, LEVELS),
            QCE(bins, marginal=True).measure(given, y.numpy(), levels),
        ),
        "c-qce": (
            metrics.quantile_calibration_error(mean, std, y, LEVELS, bins=bins),
            QCE(bins, marginal=False).measure(given, y.numpy(), levels),
        ),
    }
    for name, (ours, theirs) in found.items():
        assert ours == pytest.approx(float(np.squeeze(theirs)), abs=1e-9), name


@SEEDS
def test_intervals_are_netcals(seed):
    from netcal.metrics.regression import PICP
    from scipy.stats import norm

    mean, std, y = forecasts(seed=seed)
    for level in LEVELS:
        lower, upper = norm.interval(level, mean.numpy(), std.numpy())
        theirs = PICP().measure((mean.numpy(), std.numpy()), y.numpy(), level)
        assert metrics.interval_coverage(lower, upper, y.numpy()) == pytest.approx(float(theirs.picp[0]), abs=1e-12)
        assert metrics.interval_width(lower, upper) == pytest.approx(float(theirs.mpiw[0]), rel=1e-12)


@SEEDS
def test_pinball_is_scikit_learns(seed):
    from sklearn.metrics import mean_pinball_loss

    g = torch.Generator().manual_seed(seed)
    quantiles, y = torch.randn(300, 3, generator=g), torch.randn(300, generator=g)
    theirs = [mean_pinball_loss(y, quantiles[:, i], alpha=level) for i, level in enumerate(LEVELS)]
    assert metrics.pinball_loss(quantiles, y, LEVELS) == pytest.approx(np.mean(theirs), abs=1e-7)
    assert metrics.pinball_loss(quantiles[:, :1].numpy(), y.numpy(), [0.1]) == pytest.approx(theirs[0], abs=1e-7)


@pytest.mark.parametrize("name", GAUSSIAN)
@given(seed=st.integers(0, 1000), n=st.integers(1, 40), parts=st.integers(1, 4))
def test_batches_merge_and_the_order_is_irrelevant(name, seed, n, parts):
    function, kind, settings = GAUSSIAN[name]
    mean, std, y = forecasts(n, seed)
    std = (2 * std).ceil() / 2  # ties
    expected = function(mean, std, y, **settings)
    assert 0 <= expected < np.inf
    pieces = [kind(**settings) for _ in range(parts)]
    for i, piece in enumerate(pieces):
        if len(y[i::parts]):
            piece.update(mean[i::parts], std[i::parts], y[i::parts])
    for piece in pieces[1:]:
        if piece.update_called:
            pieces[0].merge_state(piece)
    assert float(pieces[0].compute()) == pytest.approx(expected, abs=1e-12, rel=1e-12)
    assert function(mean.numpy(), std.numpy(), y.numpy(), **settings) == pytest.approx(expected, abs=1e-12, rel=1e-12)


@given(seed=st.integers(0, 100), scale=st.floats(0.01, 100))
def test_units(seed, scale):
    mean, std, y = forecasts(60, seed)
    scaled = [scale * x for x in (mean, std, y)]
    for name, power in (("ence", 0), ("uce", 2), ("qce", 0)):
        function, _, settings = GAUSSIAN[name]
        assert function(*scaled, **settings) == pytest.approx(
            scale**power * function(mean, std, y, **settings), rel=1e-6
        )
    loss = metrics.pinball_loss(scaled[0][:, None], scaled[2], [0.3])
    assert loss == pytest.approx(scale * metrics.pinball_loss(mean[:, None], y, [0.3]), rel=1e-9)


def test_honest_forecasts_have_little_error_and_others_theirs():
    honest, short = forecasts(50_000, factor=1.0), forecasts(50_000, factor=2.0)
    for equal_mass in (False, True):
        error = metrics.expected_normalised_calibration_error(*honest, bins=5, equal_mass=True)
        assert error < 0.02
        error = metrics.expected_normalised_calibration_error(*short, bins=5, equal_mass=True)
        assert error == pytest.approx(1, abs=0.03)
        variance = float(short[1].square().mean())
        error = metrics.uncertainty_calibration_error(*short, bins=5, equal_mass=equal_mass)
        assert error == pytest.approx(3 * variance, rel=0.05)
    assert metrics.quantile_calibration_error(*honest) < 0.01
    assert metrics.quantile_calibration_error(*honest, bins=5) < 0.02
    assert metrics.quantile_calibration_error(*short) > 0.15


def test_the_marginal_error_is_blind_where_the_conditional_one_sees():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, generator=g)
    std = torch.tensor([1.0, 2.0]).repeat(20_000)
    y = noise * torch.tensor([1.4, 0.6]).repeat(20_000) * std
    marginal, conditional = (metrics.quantile_calibration_error(torch.zeros(40_000), std, y, bins=b) for b in (None, 2))
    assert marginal < 0.05
    assert conditional > 0.12


@given(seed=st.integers(0, 1000), level=st.floats(0.05, 0.95))
def test_no_constant_beats_the_empirical_quantile(seed, level):
    y = torch.randn(41, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = y.sort().values[int(np.ceil(41 * level)) - 1]

    def loss(constant):
        return metrics.pinball_loss(torch.full((41, 1), float(constant), dtype=torch.float64), y, [level])

    assert loss(best) <= min(loss(c) for c in y) + 1e-12


def test_bins_of_equal_mass_are_equal_however_many_samples():
    samples = torch.bincount(bin_of(torch.arange(1_400_000, dtype=torch.float64), 1000, equal_mass=True))
    assert samples.unique().tolist() == [1400]


@pytest.mark.bad_input
def test_bad_input_is_refused():
    mean, std, y = forecasts(5)
    cases = (
        ((mean[:0], std[:0], y[:0]), r"mean must be floating point of shape \(n,\), n >= 1"),
        ((mean[:, None], std, y), r"mean must be floating point of shape \(n,\)"),
        ((mean.long(), std, y), "mean must be floating point"),
        ((mean, std[:3], y), "std must have 5 entries, got 3"),
        ((mean, std, y[:3]), "targets must have 5 entries, got 3"),
        ((mean, std * 0, y), "std must be > 0, found 0 at row 0"),
        ((mean, std, y * torch.nan), "targets must be finite, found nan at row 0"),
    )
    for function, kind, settings in GAUSSIAN.values():
        for arguments, message in cases:
            with pytest.raises(InputError, match=message):
                function(*arguments, **settings)
        if "bins" in settings:
            with pytest.raises(InputError, match="bins must be at least 1, got 0"):
                kind(**settings | {"bins": 0})
    for levels in ([], 0.5):
        with pytest.raises(InputError, match="levels must be a sequence of at least one probability"):
            metrics.quantile_calibration_error(mean, std, y, levels)
    with pytest.raises(InputError, match=r"levels\[1\] must lie in \(0, 1\), got 1"):
        metrics.PinballLoss([0.5, 1.0])
    with pytest.raises(InputError, match="quantiles must have 2 columns, got 1"):
        metrics.pinball_loss(mean[:, None], y, [0.1, 0.2])
    with pytest.raises(InputError, match="targets must have 5 entries, got 3"):
        metrics.pinball_loss(mean[:, None], y[:3], [0.1])
    with pytest.raises(InputError, match="upper must not lie below lower, it does at row 0"):
        metrics.interval_width(mean + 1, mean)
    with pytest.raises(InputError, match="upper must have 5 entries, got 2"):
        metrics.interval_coverage(mean, mean[:2], y)
