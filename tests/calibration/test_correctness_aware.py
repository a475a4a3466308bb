"""Correctness-aware calibration: the authors' numbers, and what a temperature from views promises."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import HARD, generator

from trimtab import Predictions
from trimtab.calibration import CorrectnessAware, CorrectnessAwareLoss, load, version_features
from trimtab.core.checks import InputError
from trimtab.metrics import classwise_calibration_error, expected_calibration_error, roc_auc

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "02-correctness-aware").glob("*.npz"))


def seen(n=600, c=5, v=3, seed=0, dtype=torch.float64):
    """Logits of originals and of v copies, each with its own noise, and labels from what is behind them."""
    random = generator(seed)
    truth = 2 * torch.randn(n, 1, c, generator=random, dtype=torch.float64)
    labels = truth[:, 0].softmax(1).multinomial(1, generator=random)[:, 0]
    labels[:2] = torch.tensor([0, 1])
    all_seen = (2 * (truth + torch.randn(n, v + 1, c, generator=random, dtype=torch.float64))).to(dtype)
    return all_seen[:, 0], labels, all_seen[:, 1:]


def quick(**arguments):
    return CorrectnessAware(**{"epochs": 3, "batch": 100, **arguments})


# the authors' numbers


def with_state(arrays, which, k):
    """A calibrator with the authors' parameters."""
    calibrator = CorrectnessAware(k=k)
    part = {name: torch.from_numpy(arrays[f"{which}/{name}"]) for name in AUTHORS}
    embed = torch.cat([part["embed_layer.0.weight"], part["embed_layer.0.bias"][:, None]], 1)
    out = torch.cat([part["temperature_layer.weight"][0], part["temperature_layer.bias"]])
    counts = torch.ones(arrays["logits"].shape[1])
    calibrator._store(embed, embed=embed, out=out, counts=counts)
    return calibrator


AUTHORS = ("embed_layer.0.weight", "embed_layer.0.bias", "temperature_layer.weight", "temperature_layer.bias")


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as arrays:
        there = {name: arrays[name] for name in arrays.files}
    logits, labels = torch.from_numpy(there["logits"]), torch.from_numpy(there["labels"])
    copies = sorted(name for name in there if name.startswith("logits_t"))
    views = torch.stack([torch.from_numpy(there[name]) for name in copies], 1)
    return there, logits, labels, views, there["args"].shape[1] // len(copies)


def test_there_are_golden_numbers():
    assert GOLDEN


@pytest.mark.golden
def test_the_authors_features_and_temperatures(golden):
    arrays, logits, _, views, k = golden
    np.testing.assert_allclose(version_features(logits, views, k), arrays["args"], rtol=1e-5, atol=1e-6)
    for which in ("init", "final"):
        calibrator = with_state(arrays, which, k)
        temperature = calibrator.temperature(logits, views)
        np.testing.assert_allclose(temperature, arrays[f"T_{which}"], rtol=1e-5)
        np.testing.assert_allclose(logits / temperature[:, None], arrays[f"cal_logits_{which}"], rtol=1e-5, atol=1e-6)
        expected = torch.from_numpy(arrays[f"cal_logits_{which}"]).softmax(1)
        torch.testing.assert_close(calibrator(logits, views=views).exp(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.golden
def test_the_authors_balanced_loss_and_its_gradients(golden):
    arrays, logits, labels, views, k = golden
    calibrator = with_state(arrays, "init", k)
    state = {name: getattr(calibrator, name).requires_grad_() for name in ("embed", "out")}
    z = logits.clone().requires_grad_()
    scaled = z / calibrator.temperature(logits, views)[:, None]
    value = CorrectnessAwareLoss(balance=True)(scaled, labels)
    assert value.item() == pytest.approx(float(arrays["loss_init"]), rel=1e-5)
    value.backward()
    np.testing.assert_allclose(z.grad, arrays["grad_logits_init"], atol=1e-6, rtol=1e-4)
    embed, out = state["embed"].grad, state["out"].grad
    found = (embed[:, :-1], embed[:, -1], out[None, :-1], out[-1:])
    for name, gradient in zip(AUTHORS, found):
        np.testing.assert_allclose(gradient, arrays[f"grad_init/{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.golden
def test_the_authors_training(golden):
    """Ten steps of Adam at 1e-4 with all samples in a batch, from the authors' start."""
    arrays, logits, labels, views, k = golden
    calibrator = with_state(arrays, "init", k)
    parameters = [calibrator.embed.requires_grad_(), calibrator.out.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, 1e-4)
    loss = CorrectnessAwareLoss(balance=True)
    for _ in range(10):
        optimizer.zero_grad()
        loss(logits / calibrator.temperature(logits, views)[:, None], labels).backward()
        optimizer.step()
    final = with_state(arrays, "final", k)
    torch.testing.assert_close(calibrator.embed.detach(), final.embed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(calibrator.out.detach(), final.out, rtol=1e-5, atol=1e-5)


def gaps(inner_edges, confidence, right, side):
    """Share of the samples times |accuracy - confidence| in every bin; "left": a bin includes its upper edge."""
    at = np.searchsorted(inner_edges, confidence, side)
    return np.abs(np.bincount(at, right) - np.bincount(at, confidence)) / len(at)


@pytest.mark.golden
def test_the_authors_measures(golden):
    """Three are not what their names say: ace and mce weight the gaps by size, and ks sorts by correctness."""
    arrays, _, labels, _, _ = golden
    measures = dict(zip(arrays["metric_names"].tolist(), arrays["metric_values"]))
    p = torch.from_numpy(arrays["cal_logits_final"]).softmax(1)
    top, predicted = p.max(1)
    confidence, right = top.double().numpy(), (predicted == labels).double().numpy()
    inner = np.arange(1, 25) / 25
    order = np.argsort(right, kind="stable")
    found = {
        "ece": expected_calibration_error(p, labels, 25),
        "bs": float(np.square(confidence - right).mean()),
        "ace": gaps(np.quantile(confidence, inner, method="averaged_inverted_cdf"), confidence, right, "right").sum(),
        "mce": gaps(inner, confidence, right, "left").max(),
        "auc": roc_auc(top, predicted == labels),
        "ks": np.abs(np.cumsum((right - confidence)[order])).max() / len(right),
        "sce": classwise_calibration_error(p, labels, 25),
    }
    assert set(measures) <= set(found)
    for name, value in measures.items():
        assert found[name] == pytest.approx(float(value), abs=1e-4), name


# the loss


@given(seed=st.integers(0, 10**6), n=st.integers(1, 50), c=st.integers(2, 6), balance=st.booleans())
def test_the_loss_is_what_the_formula_says(seed, n, c, balance):
    random = generator(seed)
    logits = 3 * torch.randn(n, c, generator=random, dtype=torch.float64)
    labels = torch.randint(0, c, (n,), generator=random)
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).double()
    weights = torch.ones(n)
    if balance and 0 < right.mean() < 1:
        weights = torch.where(right > 0, 1 - right.mean(), right.mean())
    expected = (weights * (confidence - right) ** 2).sum() / weights.sum()
    assert CorrectnessAwareLoss(balance)(logits, labels).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("label", [0, 1])
def test_all_right_or_all_wrong(label):
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0]], requires_grad=True)
    labels = torch.tensor([label, label])
    value = CorrectnessAwareLoss(balance=True)(logits, labels)
    value.backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(value, CorrectnessAwareLoss()(logits, labels))


@pytest.mark.parametrize("balance", [False, True])
def test_gradcheck(balance):
    logits, labels, _ = seen(10)
    assert torch.autograd.gradcheck(lambda z: CorrectnessAwareLoss(balance)(z, labels), (logits.requires_grad_(),))


# the calibrator


@given(
    seed=st.integers(0, 10**6),
    c=st.integers(2, 7),
    v=st.integers(1, 5),
    k=st.integers(1, 9),
    loss=st.sampled_from(["ca", "ce"]),
)
def test_predictions_stay_and_temperatures_are_in_their_range(seed, c, v, k, loss):
    logits, labels, views = seen(80, c, v, seed)
    calibrator = quick(k=k, loss=loss).fit(logits, labels, views=views)
    assert calibrator.embed.shape == (5, v * min(k, c) + 1)
    temperature = calibrator.temperature(logits, views)
    assert (temperature >= 0.1).all()
    assert (temperature <= 10).all()
    log_p = calibrator(logits, views=views)
    assert torch.equal(log_p.argmax(1), logits.argmax(1))
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(80, dtype=torch.float64))


def test_views_that_waver_make_a_sample_cooler_trusted():
    logits, labels, views = seen(3000)
    calibrator = CorrectnessAware().fit(logits, labels, views=views)
    fresh, truth, copies = seen(3000, seed=1)
    before = CorrectnessAwareLoss()(fresh, truth)
    after = CorrectnessAwareLoss()(calibrator(fresh, views=copies), truth)
    assert after < 0.8 * before
    agree = (copies.argmax(2) == fresh.argmax(1)[:, None]).all(1)
    temperature = calibrator.temperature(fresh, copies)
    assert temperature[~agree].mean() > temperature[agree].mean()


def test_balance_makes_an_accurate_model_under_confident():
    logits, labels, views = seen(3000, c=3)
    logits, views = 2 * logits, 2 * views
    easy = torch.where(torch.arange(3000) % 4 > 0, logits.argmax(1), labels)
    gaps = []
    for balance in (False, True):
        p = CorrectnessAware(balance=balance).fit(logits, easy, views=views).predict_proba(logits, views=views)
        gaps.append(float((p.argmax(1) == easy).double().mean() - p.amax(1).mean()))
    assert abs(gaps[0]) < 0.08
    assert gaps[1] > gaps[0] + 0.05


@pytest.mark.parametrize("arguments", [{}, {"balance": True}, {"loss": "ce"}], ids=str)
@pytest.mark.parametrize("case", HARD, ids=lambda case: case[0])
def test_hard_calibration_sets(case, arguments):
    _, logits, labels, *weights = case
    views = torch.stack([logits, -logits], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrator = quick(**arguments).fit(logits, labels, weights=weights[0] if weights else None, views=views)
    probs = calibrator.predict_proba(logits, views=views)
    assert torch.isfinite(calibrator.embed).all()
    assert torch.isfinite(calibrator.out).all()
    assert torch.isfinite(probs).all()
    assert torch.allclose(probs.float().sum(1), torch.ones(len(logits)), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "made",
    [
        lambda v: torch.zeros_like(v),
        lambda v: v[:1].expand_as(v),
        lambda v: v[:, :1].expand_as(v),
        lambda v: v[:, :1],
        lambda v: 1e4 * v.sign(),
        lambda v: 1e300 * v.sign(),
    ],
    ids=["constant", "equal rows", "equal copies", "one copy", "saturated", "too large for single precision"],
)
def test_hard_views(made, dtype):
    logits, labels, views = seen(60)
    logits, views = logits.to(dtype), made(views.double())
    calibrator = CorrectnessAware(epochs=5).fit(logits, labels, views=views)
    for x in (logits, 1e4 * logits.sign()):
        p = calibrator.predict_proba(x, views=views)
        assert torch.isfinite(calibrator(x, views=views)).all()
        torch.testing.assert_close(p.double().sum(1), torch.ones(60).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("balance", [False, True])
def test_weights_count_as_copies(balance):
    """In one batch, where the order of the samples does not matter."""
    logits, labels, views = seen(60)
    weights = torch.randint(0, 4, (60,), generator=generator(1)).double()
    whole = {"batch": 1000, "epochs": 5, "balance": balance}
    weighted = quick(**whole).fit(logits, labels, weights=weights, views=views)
    times = weights.long()
    copied = quick(**whole).fit(
        logits.repeat_interleave(times, 0), labels.repeat_interleave(times), views=views.repeat_interleave(times, 0)
    )
    torch.testing.assert_close(weighted(logits, views=views), copied(logits, views=views))


def test_state_travels_and_the_seed_decides(tmp_path):
    logits, labels, views = seen(200)
    calibrator = quick().fit(logits, labels, views=views)
    calibrator.save(tmp_path / "ca.safetensors")
    back = load(tmp_path / "ca.safetensors")
    assert repr(back) == repr(calibrator)
    assert torch.equal(back(logits, views=views), calibrator(logits, views=views))
    again, other = (quick(seed=seed).fit(logits, labels, views=views)(logits, views=views) for seed in (0, 1))
    assert torch.equal(again, calibrator(logits, views=views))
    assert not torch.equal(other, again)


def test_predictions_feed_it():
    logits, labels, views = seen(200)
    predictions = Predictions(logits, labels, views=views)
    calibrator = quick().fit_predictions(predictions)
    assert torch.equal(calibrator.transform(predictions).logits, calibrator(logits, views=views))
    array = calibrator.predict_proba(logits.numpy(), views=views.numpy())
    assert isinstance(array, np.ndarray)


def test_gradients_and_torch_export():
    logits, labels, views = seen(100, dtype=torch.float32)
    calibrator = quick().fit(logits, labels, views=views)

    class Deployed(torch.nn.Module):
        def forward(self, logits, views):
            return calibrator(logits, views=views)

    rows = {0: torch.export.Dim("n")}
    program = torch.export.export(Deployed(), (logits[:4], views[:4]), dynamic_shapes=(rows, rows))
    torch.testing.assert_close(program.module()(logits, views), calibrator(logits, views=views))
    double = quick().fit(logits.double(), labels, views=views.double())
    inputs = (logits[:5].double().requires_grad_(), views[:5].double().requires_grad_())
    assert torch.autograd.gradcheck(lambda z, v: double(z, views=v), inputs)


@pytest.mark.bad_input
def test_bad_input():
    logits, labels, views = seen(50)
    with pytest.raises(InputError, match=r"views must have shape \(50, v, 5\) with v >= 1, got \(49, 3, 5\)"):
        quick().fit(logits, labels, views=views[:49])
    with pytest.raises(InputError, match=r"views must have shape \(50, v, 5\) with v >= 1, got \(50, 3, 4\)"):
        quick().fit(logits, labels, views=views[:, :, :4])
    with pytest.raises(InputError, match="views must be finite, found nan at axis 0 index 2"):
        quick().fit(logits, labels, views=views.index_fill(0, torch.tensor([2]), float("nan")))
    with pytest.raises(InputError, match="CorrectnessAware works on views; it was given nothing else"):
        quick().fit(logits, labels)
    calibrator = quick().fit(logits, labels, views=views)
    with pytest.raises(InputError, match="views must hold 3 copies as in fit, got 2"):
        calibrator(logits, views=views[:, :2])
    with pytest.raises(InputError, match="calibrated_logits must be finite"):
        CorrectnessAwareLoss()(logits * float("nan"), labels)
    with pytest.raises(InputError, match="loss must be 'ca' or 'ce', got 'mse'"):
        CorrectnessAware(loss="mse")
    with pytest.raises(InputError, match="balance must be False for the loss 'ce'"):
        CorrectnessAware(loss="ce", balance=True)
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        CorrectnessAware(k=0)
