"""h-calibration: the authors' numbers, a slow loss that says what is meant, and what a fit promises."""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_sets import HARD, generator, overconfident

from trimtab.calibration import HCalibration, HCalibrationLoss, TemperatureScaling, load
from trimtab.calibration.criteria import debiased_ece
from trimtab.calibration.event_windows import Weighting
from trimtab.calibration.h_calibration import CANDIDATES
from trimtab.calibration.monotone_maps import monotone_network, piecewise_linear, tempered_mixture
from trimtab.core.checks import InputError

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "05-h-calibration").glob("*.npz"))
WEIGHTINGS = get_args(Weighting)
MAPS = ["temperature", "linear", "pwlinear", "nonlinear"]


def quick(map_="pwlinear", **arguments):
    return HCalibration(map_, **{"epochs": 12, "size": 3, **arguments})


def bent(n=1000, c=4, seed=0):
    """Logits whose fault no temperature mends, their labels, and the true probabilities."""
    random = generator(seed)
    truth = (2 * torch.randn(n, c, generator=random, dtype=torch.float64)).log_softmax(1)
    return -1.3 * (-truth) ** 1.5, truth.exp().multinomial(1, generator=random)[:, 0], truth.exp()


# the authors' numbers


def golden_losses():
    for path in GOLDEN:
        with np.load(path) as arrays:
            for key in arrays.files:
                if key.startswith("loss/"):
                    yield pytest.param(path, key.removeprefix("loss/"), id=f"{path.stem}/{key}")


@pytest.mark.golden
@pytest.mark.parametrize(("path", "key"), list(golden_losses()))
def test_the_authors_losses_and_gradients(path, key):
    name, _, subsets = key.rpartition("_")
    weighting = name if name == "unweighted" else name.removesuffix("weighted")
    assert weighting in WEIGHTINGS
    with np.load(path) as arrays:
        logits, labels = torch.from_numpy(arrays["logits"]).requires_grad_(), torch.from_numpy(arrays["labels"])
        left_out = None if subsets == "loo" else 0
        loss = HCalibrationLoss(weighting, window=int(arrays["veclen"]), left_out=left_out)
        centroids = None
        if weighting.startswith("clu"):
            rows = torch.from_numpy(arrays[f"centroids/cluaceweighted_{subsets}"]).sort(1).values
            left = loss.subsets(labels, logits.shape[1])[0]
            counts = torch.bincount(labels, minlength=logits.shape[1])
            absent = int(counts.argmin()) if subsets == "loo" else 0  # whose row serves all that do not occur
            centroids = rows[torch.where(left < 0, absent, left)]
        value = loss.of_checked(logits.softmax(1), labels, centroids)
        assert value.item() == pytest.approx(float(arrays[f"loss/{key}"]), rel=2e-4)
        value.backward()
        expected = arrays[f"grad/{key}"]
        np.testing.assert_allclose(logits.grad, expected, atol=1e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_authors_maps(path):
    with np.load(path) as arrays:
        log_p = torch.from_numpy(arrays["logits"]).log_softmax(1)
        there = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    out = piecewise_linear(log_p, there["pw_slopes"], exact=False)
    torch.testing.assert_close(out, there["pw_out"], rtol=1e-5, atol=1e-5)
    mixed = tempered_mixture(log_p, there["ens_para"].flatten(), there["ens_weight"].flatten())
    torch.testing.assert_close(mixed.exp(), there["ens_probs"], rtol=1e-5, atol=1e-6)
    layers = [f"umnn/model_monotonic.integrand.net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    network = torch.cat([there[name].flatten() for name in layers])
    x = (log_p - there["umnn/meanlogit"]) / there["umnn/logitstd"]
    torch.testing.assert_close(monotone_network(x, network), there["umnn_out"], rtol=1e-5, atol=1e-5)


def test_there_are_golden_numbers_for_every_weighting():
    keys = {param.values[1].rpartition("_")[0] for param in golden_losses()}
    assert len(keys) == len(WEIGHTINGS)


# the loss


def slow_loss(p, y, weighting, window, epsilon=1e-20):
    """One subset of events, by loops."""
    c = p.shape[1]
    flat, hits = p.ravel(), np.eye(c)[y].ravel()
    order = np.argsort(flat, kind="stable")
    q, gap = flat[order], (flat - hits)[order]
    half, m = window // 2, len(q)
    errors = np.array(
        [max(abs(gap[max(0, i - half) : i + half + 1].sum()) / (window + 1) - epsilon, 0) for i in range(m)]
    )
    if weighting == "unweighted":
        return errors.mean()
    if weighting == "den":
        return sum(errors[i] * (q[min(i + half, m - 1)] - q[max(i - half, 0)]) for i in range(m)) / window
    if weighting == "dst":
        others = [[j for j in range(max(0, i - half), min(m, i + half + 1)) if j != i] for i in range(m)]
        return sum(errors[i] * np.abs(q[near] - q[i]).mean() for i, near in enumerate(others))
    edges = np.linspace(0, 1, 16)
    inside = [(q >= low) & (q <= high) for low, high in pairwise(edges)]
    means = np.array([errors[within].sum() / (within.sum() + 1e-5) for within in inside])
    if weighting == "ace":
        return means.mean()
    top = p.max(1)
    tops = np.array([((top >= low) & (top <= high)).sum() for low, high in pairwise(edges)])
    return (means * tops / tops.sum()).mean()


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 40),
    c=st.integers(2, 5),
    half=st.integers(1, 60),
    weighting=st.sampled_from(["unweighted", "ace", "ece", "den", "dst"]),
    leave=st.booleans(),
)
def test_the_loss_is_what_loops_say(seed, n, c, half, weighting, leave):
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(c), size=n)
    y = random.integers(0, c, size=n)
    y[:2] = 0, 1
    kept = [y != k for k in range(c)] if leave else [np.ones(n, dtype=bool)]
    expected = np.mean([slow_loss(p[rows], y[rows], weighting, 2 * half) for rows in kept])
    loss = HCalibrationLoss(weighting, window=2 * half, scale=1.0, left_out=None if leave else 0)
    assert loss(torch.from_numpy(p), torch.from_numpy(y)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 60),
    c=st.integers(2, 5),
    decimals=st.integers(0, 4),
    weighting=st.sampled_from(WEIGHTINGS),
)
def test_ties_and_single_classes_give_finite_numbers(seed, n, c, decimals, weighting):
    random = generator(seed)
    logits = (10 * torch.randn(n, c, generator=random)).round(decimals=decimals).requires_grad_()
    labels = torch.randint(0, int(torch.randint(1, c + 1, (), generator=random)), (n,), generator=random)
    value = HCalibrationLoss(weighting, window=4)(logits.softmax(1), labels)
    value.backward()
    assert torch.isfinite(value)
    assert value >= 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("weighting", ["unweighted", "ace", "ece", "cluace", "cluece"])
def test_gradcheck(weighting):
    logits, labels, _ = bent(12, 3)
    loss = HCalibrationLoss(weighting, window=6, scale=1.0)
    assert torch.autograd.gradcheck(lambda z: loss.of_checked(z.softmax(1), labels), (logits.requires_grad_(),))


def test_true_probabilities_lose_less_than_wrong_ones():
    logits, labels, truth = bent(4000)
    for weighting in WEIGHTINGS:
        loss = HCalibrationLoss(weighting)
        assert loss(truth, labels) < 0.8 * loss(logits.softmax(1), labels)


def test_drawn_classes_estimate_the_mean_over_all():
    logits, labels, _ = bent(300, 12)
    probs = logits.softmax(1)
    whole = HCalibrationLoss(left_out=None)(probs, labels)
    drawn = HCalibrationLoss(left_out=4, seed=3)
    values = torch.stack([drawn(probs, labels) for _ in range(60)])
    assert values.std() > 0
    assert values.mean().item() == pytest.approx(whole.item(), rel=4 * float(values.std() / whole) / 60**0.5)
    again = HCalibrationLoss(left_out=4, seed=3)
    assert torch.equal(torch.stack([again(probs, labels) for _ in range(60)]), values)
    assert torch.equal(HCalibrationLoss(left_out=12)(probs, labels), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    logits = torch.randn(40, 3, generator=generator(0)).to(dtype).requires_grad_()
    probs = (logits.float().softmax(1) * 64).round().div(64).to(dtype)  # rows that sum to one in few bits
    probs = torch.cat([probs[:, :2], 1 - probs[:, :2].sum(1, keepdim=True)], 1)
    value = HCalibrationLoss()(probs, torch.arange(40) % 3)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_a_thousand_classes():
    logits, labels, _ = bent(60, 1000)
    loss = HCalibrationLoss()(logits.float().softmax(1), labels)
    assert torch.isfinite(loss)


@pytest.mark.bad_input
def test_bad_input_of_the_loss():
    probs, labels = torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])
    with pytest.raises(InputError, match="window must be even, got 201"):
        HCalibrationLoss(window=201)
    with pytest.raises(InputError, match=r"weighting must be one of cluace, cluece, .*, got 'mib'"):
        HCalibrationLoss("mib")
    with pytest.raises(InputError, match=r"probs must lie in \[0, 1\], found 1.5 at row 2, column 0"):
        HCalibrationLoss()(probs.index_put((torch.tensor([2]),), torch.tensor([1.5, -0.5])), labels)
    with pytest.raises(InputError, match="probs must be finite, found nan at row 0, column 0"):
        HCalibrationLoss()(probs * float("nan"), labels)
    with pytest.raises(InputError, match="probs must have at least two rows, got 1"):
        HCalibrationLoss()(probs[:1], labels[:1])
    with pytest.raises(InputError, match=r"labels must lie in 0..1, found 2 at row 0"):
        HCalibrationLoss()(probs, labels + 2)


# the maps


@given(seed=st.integers(0, 10**6), pieces=st.integers(1, 20))
def test_the_exact_piecewise_map_is_continuous_and_rises(seed, pieces):
    slopes = torch.randn(pieces + 1, generator=generator(seed), dtype=torch.float64)
    log_p = torch.linspace(-150, 0, 4001, dtype=torch.float64)[None]
    steps = piecewise_linear(log_p, slopes)[0].diff()
    assert (steps >= 0).all()
    assert steps.max() <= slopes.abs().max() * 150 / 4000 + 1e-9


def test_the_authors_piecewise_map_can_fall():
    log_p = torch.tensor([[-10.01, -9.99]])
    slopes = torch.tensor([2.0, 2.0, 3.0] + 8 * [1.0])
    falls, rises = piecewise_linear(log_p, slopes, exact=False), piecewise_linear(log_p, slopes)
    assert falls[0, 0] > falls[0, 1]
    assert rises[0, 0] < rises[0, 1]


def test_unit_slopes_are_the_identity():
    log_p = torch.linspace(-99, 0, 50)[None]
    for exact in (True, False):
        torch.testing.assert_close(piecewise_linear(log_p, torch.ones(11), exact), log_p)


def test_the_quadrature_integrates():
    network = 0.5 * torch.randn(4 * 4 + 4 * 4 + 1, generator=generator(0), dtype=torch.float64)
    x = torch.linspace(-2, 3, 7, dtype=torch.float64)
    fine = torch.stack(
        [
            torch.trapezoid(
                torch.autograd.functional.jvp(lambda t: monotone_network(t, network, 400), line, torch.ones_like(line))[
                    1
                ],
                line,
            )
            for line in (torch.linspace(0, float(end), 4001, dtype=torch.float64) for end in x)
        ]
    )
    assert torch.allclose(monotone_network(x, network), fine, atol=2e-3)


# the calibrator


@pytest.mark.parametrize("map_", MAPS)
def test_every_map_keeps_the_prediction_and_improves(map_):
    logits, labels, truth = bent(800)
    calibrator = HCalibration(map_, epochs=250, size={"linear": 4, "nonlinear": 3, "pwlinear": 50}.get(map_)).fit(
        logits, labels
    )
    calibrated = calibrator(logits)
    assert torch.equal(calibrated.argmax(1), logits.argmax(1))
    before = (logits.softmax(1) - truth).abs().sum(1).mean()
    assert (calibrated.exp() - truth).abs().sum(1).mean() < 0.75 * before


def test_a_bent_map_beats_a_temperature():
    logits, labels, truth = bent(1500)
    gaps = [
        (kind.fit(logits, labels)(logits).exp() - truth).abs().sum(1).mean()
        for kind in (HCalibration(epochs=300), TemperatureScaling())
    ]
    assert gaps[0] < 0.8 * gaps[1]


@pytest.mark.parametrize("map_", MAPS)
@pytest.mark.parametrize("case", HARD, ids=lambda case: case[0])
def test_hard_calibration_sets(map_, case):
    _, logits, labels, *weights = case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrator = quick(map_, epochs=4).fit(logits, labels, weights=weights[0] if weights else None)
    unseen = 100 * torch.randn(40, logits.shape[1], generator=generator(3))
    for x in (logits, unseen):
        probs = calibrator.predict_proba(x)
        assert torch.isfinite(probs).all()
        assert torch.allclose(probs.sum(1), torch.ones(len(x), dtype=probs.dtype), atol=2e-3 if x is logits else 1e-5)


@pytest.mark.parametrize("map_", MAPS)
def test_state_travels(map_, tmp_path):
    logits, labels = overconfident(120, 3)
    calibrator = quick(map_).fit(logits, labels)
    calibrator.save(tmp_path / "h.safetensors")
    back = load(tmp_path / "h.safetensors")
    assert repr(back) == repr(calibrator)
    assert torch.equal(back(logits), calibrator(logits))


@pytest.mark.parametrize("map_", MAPS)
def test_gradients_and_torch_export(map_):
    logits, labels = overconfident(120, 3)
    calibrator = quick(map_, steps=10).fit(logits, labels)
    assert torch.autograd.gradcheck(calibrator, (logits[:5].clone().requires_grad_(),))
    program = torch.export.export(calibrator, (logits[:5],), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert torch.allclose(program.module()(logits), calibrator(logits))


@pytest.mark.parametrize("map_", MAPS)
def test_onnx(map_, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from trimtab.calibration.export import to_onnx

    logits, labels = overconfident(120, 3, dtype=torch.float32)
    calibrator = quick(map_, steps=10).fit(logits, labels)
    to_onnx(None, calibrator, logits[:5], tmp_path / "h.onnx")
    session = runtime.InferenceSession(tmp_path / "h.onnx", providers=["CPUExecutionProvider"])
    out = session.run(None, {"inputs": logits.numpy()})[0]
    np.testing.assert_allclose(out, calibrator(logits).numpy(), atol=1e-4)


def test_weights_count_as_copies():
    logits, labels = overconfident(90, 3)
    weights = torch.randint(0, 4, (90,), generator=generator(1)).double()
    weighted = quick().fit(logits, labels, weights=weights)
    copied = quick().fit(logits.repeat_interleave(weights.long(), 0), labels.repeat_interleave(weights.long()))
    assert torch.equal(weighted(logits), copied(logits))
    tiny = quick().fit(logits, labels, weights=torch.full((90,), 1e-9))
    assert torch.equal(tiny(logits), quick().fit(logits, labels)(logits))


@pytest.mark.parametrize("map_", MAPS)
def test_the_same_seed_the_same_fit_in_batches(map_):
    logits, labels = overconfident(150, 3)
    fits = [quick(map_, batch=40, seed=seed).fit(logits, labels)(logits) for seed in (1, 1, 2)]
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])


def test_large_sets_are_thinned():
    logits, labels = overconfident(150, 3)
    thin = quick(max_events=90).fit(logits, labels)
    assert thin.counts.sum() == 150
    assert not torch.equal(thin(logits), quick().fit(logits, labels)(logits))


@pytest.mark.parametrize("select", ["nll", "dece", "cwece"])
def test_the_best_of_several_maps(select):
    logits, labels, _ = bent(300)
    maps = [["temperature", 1], ["pwlinear", 20], ["nonlinear", 2]]
    chosen = HCalibration(maps, select=select, epochs=20).fit(logits, labels)
    sizes = [chosen.factors.numel(), chosen.slopes.numel(), chosen.network.numel()]
    assert sum(size > 0 for size in sizes) == 1
    assert any(
        torch.equal(chosen(logits), HCalibration(name, size, select=select, epochs=20).fit(logits, labels)(logits))
        for name, size in maps
    )


def test_auto_names_the_papers_maps():
    assert HCalibration("auto")._candidates() == list(CANDIDATES)
    assert len(CANDIDATES) == 12


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 200))
def test_the_debiased_error_is_twice_the_error_less_that_of_redrawn_accuracies(seed, n):
    random = np.random.default_rng(seed)
    confidence = random.random(n)
    correct = (random.random(n) < confidence).astype(float)
    bins = max(1, min(15, n // 2))
    order = np.argsort(confidence, kind="stable")
    parts = np.split(order, [round(n * i / bins) for i in range(1, bins)])
    stated, accuracy = (np.array([x[part].mean() for part in parts]) for x in (confidence, correct))
    sizes = np.array([len(part) for part in parts])
    spread = np.sqrt(accuracy * (1 - accuracy) / sizes)
    normal = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000).numpy()
    drawn = np.abs(accuracy + spread * normal[:, None] - stated).mean()
    expected = 2 * (np.abs(accuracy - stated) * sizes).sum() / n - drawn
    found = debiased_ece(torch.from_numpy(confidence), torch.from_numpy(correct))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.bad_input
def test_bad_arguments():
    with pytest.raises(InputError, match="map_ must be one of temperature, linear, pwlinear, nonlinear, got 'spline'"):
        HCalibration("spline")
    with pytest.raises(InputError, match="size must be None where map_ names several maps"):
        HCalibration("auto", 3)
    with pytest.raises(InputError, match="map_ must name a map, be 'auto', or hold pairs of a map and its size"):
        HCalibration([])
    with pytest.raises(InputError, match="select must be one of nll, dece, cwece, got 'ece'"):
        HCalibration(select="ece")
    with pytest.raises(InputError, match="steps must be even, got 5"):
        HCalibration(steps=5)
    with pytest.raises(InputError, match="window must be even, got 3"):
        HCalibration(window=3)
    with pytest.raises(InputError, match="labels must hold at least two classes"):
        HCalibration().fit(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
