"""RankMixup and MNDCG: slug 19-rankmixup."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from trimtab.core.checks import InputError
from trimtab.losses import MNDCG, RankMixup, make_mixtures

GOLDEN = Path(__file__).parents[1] / "golden" / "19-rankmixup"
LOSSES = pytest.mark.parametrize("loss", [RankMixup(weight=1), RankMixup(weight=1, on="probs", margin=0.2), MNDCG()])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(n=6, c=4, sets=1, seed=0, dtype=torch.float64):
    """Logits, labels, logits of mixtures and their targets."""
    g = generator(seed)
    labels = torch.randint(c, (n,), generator=g)
    mixed = make_mixtures(torch.zeros(n, 1, dtype=dtype), labels, classes=c, sets=sets, generator=g)
    logits = 2 * torch.randn(n, c, generator=g, dtype=dtype)
    return logits, labels, 2 * torch.randn(sets * n, c, generator=g, dtype=dtype), mixed.targets


@pytest.mark.golden
@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path, precision):
    rtol, dtype = {"f64": (1e-9, torch.float64), "f32": (1e-5, torch.float32)}[precision]
    with np.load(path) as file:
        arrays = dict(file)
    cases = sorted({name.split("/")[0] for name in arrays if f"/{precision}/" in name})
    for case in cases:
        get = {name.removeprefix(f"{case}/"): torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}
        weight = float(get["alpha"])
        loss = RankMixup(margin=float(get["margin"]), weight=weight) if "margin" in get else MNDCG(weight=weight)
        z, mixed = (get[name].to(dtype).requires_grad_() for name in ("logits", "mixup_logits"))
        rest = get["targets"], mixed, get["mixup_targets"].to(dtype)
        total = loss(z, *rest)
        total.backward()
        ce, ranking = loss.terms(z, *rest)
        found = {"loss": total, "loss_ce": ce, "loss_mixup": ranking, "grad_logits": z.grad, "grad_mixup": mixed.grad}
        for name, value in found.items():
            expected = get[f"{precision}/{name}"].numpy()
            np.testing.assert_allclose(value.detach(), expected, rtol=rtol, atol=rtol / 100, err_msg=f"{case} {name}")
    assert cases


@LOSSES
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(2, 6), st.integers(1, 4))
def test_the_definition(loss, seed, n, c, sets):
    sets = 1 if isinstance(loss, RankMixup) else sets
    z, y, mixed, targets = some(n, c, sets, seed)
    ranking = 0.0
    for i in range(n):
        rows = range(i, sets * n, n)
        if isinstance(loss, MNDCG):
            items = sorted(
                ((float(targets[k].max()), float(mixed[k].softmax(0).max())) for k in rows), key=lambda t: -t[0]
            )
            items = [(1.0, float(z[i].softmax(0).max())), *items]
            ideal, gain = (sum(t[part] / np.log2(j + 2) for j, t in enumerate(items)) for part in (0, 1))
            ranking += 1 - min(ideal / gain, gain / ideal)
        else:
            top = (lambda v: v.max()) if loss.on == "logits" else (lambda v: v.softmax(0).max())
            ranking += max(0.0, float(top(mixed[i]) - top(z[i])) + loss.margin)
    if isinstance(loss, RankMixup):
        ranking *= float((targets.max(1).values < 1).double().mean())
    expected = float(cross_entropy(z, y)) + loss.weight * ranking / n
    assert float(loss(z, y, mixed, targets)) == pytest.approx(expected, rel=1e-7)  # discounts in float32


@LOSSES
def test_gradients_of_both_passes(loss):
    z, y, mixed, targets = some(sets=1 if isinstance(loss, RankMixup) else 3)
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, y, b, targets), (z.requires_grad_(), mixed.requires_grad_()), fast_mode=False
    )


def test_elementwise_masking_leaves_out_mixtures_of_one_class():
    z, y, mixed, targets = some(8, 3, seed=1)
    kept = targets.amax(1) < 1
    assert 0 < kept.sum() < 8
    loss = RankMixup(masking="elementwise", margin=5)
    hinges = (mixed.amax(1) - z.amax(1) + 5).relu()
    assert torch.allclose(loss.terms(z, y, mixed, targets)[1], hinges[kept].sum() / 8)
    mixed.requires_grad_()
    loss(z, y, mixed, targets).backward()
    assert torch.equal(mixed.grad.abs().sum(1) > 0, kept)


def test_nothing_is_ranked_in_a_batch_of_one_class_or_one_sample():
    for n in (1, 5):
        z, _, mixed, _ = some(n, 3)
        y = torch.full((n,), 2)
        loss = RankMixup()
        targets = make_mixtures(z, y, classes=3, generator=generator()).targets
        assert torch.equal(loss(z, y, mixed, targets), cross_entropy(z, y))


def test_a_share_that_rounds_does_not_hide_a_mixture_of_one_class():
    z, y, mixed, _ = some(4, 3)
    targets = (1 - 1e-7) * one_hot(y, 3).double()
    targets[:, 0] += 1 - targets.sum(1)
    assert RankMixup().terms(z, y, mixed, targets)[1] == 0


def test_the_earlier_of_equally_relevant_mixtures_comes_first():
    z, y = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    targets = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    probs = torch.tensor([[0.4, 0.3, 0.3], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]], dtype=torch.float64)
    d = 1 / np.log2([2, 3, 4, 5])
    expected = 1 - d @ [1 / 3, 0.9, 0.5, 0.4] / (d @ [1, 1, 1, 0.6])
    assert float(MNDCG().terms(z, y, probs.log(), targets)[1]) == pytest.approx(expected)


@LOSSES
def test_huge_logits_and_certain_targets_leave_finite_gradients(loss):
    z, y, mixed, targets = some(6, 3, 1, dtype=torch.float32)
    z, mixed = (5e3 * v for v in (z, mixed))
    value = loss(z.requires_grad_(), y, mixed.requires_grad_(), targets)
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()
    assert mixed.grad.isfinite().all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "mixed_logits": a["mixed_logits"][:5]}, r"shape \(m \* 4, 3\).*got \(5, 3\) and \(8, 3\)"),
        (lambda a: {k: v[:6] if "mixed" in k else v for k, v in a.items()}, r"shape \(m \* 4, 3\)"),
        (lambda a: {**a, "mixed_targets": 2 * a["mixed_targets"]}, r"mixed_targets must lie in \[0, 1\]"),
        (lambda a: {**a, "mixed_targets": a["mixed_targets"] / 2}, "mixed_targets must sum to one"),
        (lambda a: {**a, "mixed_targets": a["labels"]}, r"mixed_targets must have shape \(n, c\)"),
        (lambda a: {**a, "mixed_logits": a["mixed_logits"] * torch.nan}, "mixed_logits must be finite, found nan"),
        (lambda a: {**a, "labels": a["labels"] + 2}, r"labels must lie in 0..2, found 3 at row"),
        (lambda a: {**a, "logits": torch.zeros(4, 3, 2, 2)}, r"logits must have shape \(n, c\)"),
        (lambda a: {**a, "mixed_logits": a["mixed_logits"].to("meta")}, "mixed_logits must be on the device of logits"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = dict(zip(("logits", "labels", "mixed_logits", "mixed_targets"), some(4, 3, 2)))
    given["labels"] = torch.tensor([0, 1, 2, 0])
    with pytest.raises(InputError, match=message):
        MNDCG()(**change(given))


@pytest.mark.bad_input
def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="one mixture of each sample, got 2; MNDCG takes more"):
        RankMixup()(*some(4, 3, 2))
    for settings, message in [
        ({"weight": -1}, "weight must lie in"),
        ({"margin": float("nan")}, "margin must lie in"),
        ({"on": "scores"}, "on must be one of logits, probs"),
        ({"masking": "none"}, "masking must be one of official, elementwise"),
    ]:
        with pytest.raises(InputError, match=message):
            RankMixup(**settings)
