"""EnsLoss: slug 22-ensloss."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from trimtab.core.checks import InputError
from trimtab.losses import EnsLoss, ensloss_derivatives

GOLDEN = Path(__file__).parents[1] / "golden" / "22-ensloss"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(n=8, seed=0, scale=1.0, dtype=torch.float64):
    g = generator(seed)
    return scale * torch.randn(n, generator=g, dtype=dtype), torch.randint(2, (n,), generator=g)


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    with np.load(path) as file:
        arrays = dict(file)
    cases = sorted({name.split("/")[0] for name in arrays})
    for case in cases:
        score, target, noise = (torch.from_numpy(arrays[f"{case}/{n}"]) for n in ("score", "target01", "noise"))
        score.requires_grad_()
        value = EnsLoss(lam=float(arrays[f"{case}/lam"]))(score, target, noise)
        value.backward()
        expected = arrays[f"{case}/loss"], arrays[f"{case}/grad_score"]
        # the mean cancels: its rounding is that of its terms, which are of order one
        np.testing.assert_allclose(value.detach(), expected[0], rtol=1e-5, atol=1e-7, err_msg=case)
        np.testing.assert_allclose(score.grad, expected[1], rtol=1e-5, err_msg=case)
    assert cases


lams = st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0, -0.7, -1.0]) | st.floats(-1, 1)


@given(st.integers(0, 10_000), st.integers(1, 40), lams, st.sampled_from([1e-3, 1.0, 30.0, 1e6]))
def test_derivatives_are_those_of_a_convex_calibrated_loss(seed, n, lam, scale):
    margins, _ = some(n, seed, scale)
    noise = 2 * torch.randn(n, generator=generator(seed + 1), dtype=torch.float64)
    g = ensloss_derivatives(margins, noise, lam)
    assert ((g >= -1 - 1e-6) & (g <= -1e-6)).all()
    assert (g[margins.argsort()].diff() >= 0).all()
    beyond = margins > 1
    assert (g[beyond] + 1e-6 >= -1 / margins[beyond] - 1e-12).all()
    # the slopes are the noise's, whoever gets them
    box_cox = noise.exp() if lam == 0 else ((lam * noise).clamp(min=-1).log1p() / lam).exp()
    plain = ensloss_derivatives(margins, noise, lam, tail=False)
    torch.testing.assert_close(plain.sort().values, (-box_cox).clamp(min=-1).sort().values - 1e-6)


@given(st.integers(0, 10_000), st.integers(1, 20))
def test_only_the_order_counts_up_to_a_margin_of_one(seed, n):
    margins, _ = some(n, seed)
    margins = margins.clamp(max=1)
    noise = torch.randn(n, generator=generator(seed + 1), dtype=torch.float64)
    mapped = margins.exp() / math.e - 5
    assert torch.equal(ensloss_derivatives(margins, noise), ensloss_derivatives(mapped, noise))


def test_small_lam_is_near_none_and_extremes_are_clamped():
    margins, noise = torch.linspace(-2, 0.5, 6), torch.tensor([-3.0, -1, -0.5, 0, 1, 3])
    torch.testing.assert_close(
        ensloss_derivatives(margins, noise, 1e-4), ensloss_derivatives(margins, noise), rtol=1e-2, atol=0
    )
    # 1 + 0.5 * -3 is below zero: a slope of 0; with -0.7 and 3 an infinite one
    assert ensloss_derivatives(margins, noise, 0.5)[-1] == -1e-6
    assert ensloss_derivatives(margins, noise, -0.7)[0] == -1 - 1e-6
    half = ensloss_derivatives(margins, noise, clamp=0.5, eps=0.0)
    assert half.min() == -0.5
    assert half.max() < 0


def test_equal_margins_keep_the_order_of_the_batch():
    noise = torch.tensor([0.0, -1.0, -2.0])
    torch.testing.assert_close(
        ensloss_derivatives(torch.zeros(3), noise, eps=0.0), -torch.tensor([0.0, -1.0, -2.0]).exp()
    )


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_the_gradient_is_g_y_over_n(seed, n):
    scores, labels = some(n, seed, 3.0)
    noise = torch.randn(n, generator=generator(seed + 1), dtype=torch.float64)
    y = 2 * labels - 1
    value = EnsLoss()(scores.requires_grad_(), labels, noise)
    value.backward()
    g = ensloss_derivatives(y * scores, noise)
    torch.testing.assert_close(scores.grad, g * y / n)
    torch.testing.assert_close(value, (g * y * scores).mean())


def test_gradcheck_without_the_tail():
    scores, labels = some(7)
    noise = torch.randn(7, generator=generator(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: EnsLoss(tail=False)(s, labels, noise), scores.requires_grad_())


def test_columns_and_both_formats_say_the_same():
    scores, labels = some(6)
    noise = torch.randn(6, generator=generator(1), dtype=torch.float64)
    expected = EnsLoss()(scores, labels, noise)
    for s in (scores, scores[:, None]):
        for y in (labels, labels[:, None].float(), labels.bool(), labels.to(torch.uint8)):
            assert torch.equal(EnsLoss()(s, y, noise), expected)
        assert torch.equal(EnsLoss(label_format="pm1")(s, 2 * labels - 1, noise), expected)


def test_each_step_has_another_loss_and_a_seed_gives_them_again():
    scores, labels = some(16)
    loss, twin, other = EnsLoss(), EnsLoss(generator=generator(0)), EnsLoss(generator=generator(1))
    values = [loss(scores, labels) for _ in range(3)]
    assert len(set(values)) == 3
    assert values == [twin(scores, labels) for _ in range(3)]
    assert values[0] != other(scores, labels)


def test_training_continues_from_a_saved_state():
    scores, labels = some(16)
    loss = EnsLoss(lam_period=2)
    for epoch in range(3):
        loss.set_epoch(epoch)
        loss(scores, labels)
    saved, copied = save(loss.state_dict()), copy.deepcopy(loss)
    expected = [loss(scores, labels) for _ in range(2)]
    restored = EnsLoss(lam_period=2, generator=generator(9))
    restored.load_state_dict(load(saved))
    for other in (restored, copied):
        assert other.lam == loss.lam != 0
        assert expected == [other(scores, labels) for _ in range(2)]


def test_lam_is_redrawn_at_its_period():
    loss = EnsLoss(lam_period=3, generator=generator(2))
    seen = []
    for epoch in range(300):
        loss.set_epoch(epoch)
        seen.append(float(loss.lam))
    assert len(set(seen)) == 100
    assert all(seen[i] == seen[i - i % 3] for i in range(300))
    assert -1 <= min(seen) < -0.9
    assert 0.9 < max(seen) < 1
    never = EnsLoss(lam=0.25)
    never.set_epoch(0)
    assert never.lam == 0.25


def test_huge_scores_and_one_class_are_harmless():
    for scores in (torch.tensor([1e4, -1e4, 1e4]), torch.tensor([3e38, -1e38, 0.0])):
        scores.requires_grad_()
        value = EnsLoss()(scores, torch.ones(3))
        value.backward()
        assert value.isfinite()
        assert scores.grad.isfinite().all()
        assert (scores.grad < 0).all()


@pytest.mark.compiled
def test_one_graph_where_the_noise_is_handed_over():
    scores, labels = some(8, dtype=torch.float32)
    noise = torch.randn(8, generator=generator(1))
    loss = EnsLoss(lam_period=1)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for epoch in range(3):
        loss.set_epoch(epoch)
        torch.testing.assert_close(compiled(scores, labels, noise), loss(scores, labels, noise))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2), r"scores must have shape \(n,\) or \(n, 1\), one output a sample"),
        (torch.zeros(0), torch.zeros(0), "scores must have shape"),
        (torch.tensor(0.0), torch.tensor(0.0), "scores must have shape"),
        (torch.tensor([0, 1]), torch.zeros(2), "scores must be floating point, got int64"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), "scores must be finite, found nan at row 1"),
        (torch.zeros(3), torch.zeros(2), r"labels must have shape \(3,\) or \(3, 1\), got \(2,\)"),
        (torch.zeros(3), torch.tensor([0, 1, 2]), "labels must be 0 or 1, found 2 at row 2"),
        (torch.zeros(2), torch.tensor([1, -1]), "labels must be 0 or 1, found -1 at row 1"),
        (torch.zeros(2), torch.tensor([0.5, torch.nan]), "labels must be 0 or 1, found 0.5 at row 0"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "labels must be on the device of scores"),
    ],
)
def test_bad_input_is_refused(scores, labels, message):
    with pytest.raises(InputError, match=message):
        EnsLoss()(scores, labels)


@pytest.mark.bad_input
def test_settings_out_of_range_are_refused():
    for settings, message in [
        ({"lam": float("inf")}, "lam must lie in"),
        ({"lam_period": 0}, "lam_period must be at least 1"),
        ({"clamp": 0.0}, r"clamp must lie in \(0, inf\)"),
        ({"eps": -1e-9}, "eps must lie in"),
        ({"label_format": "pm"}, "label_format must be one of 01, pm1"),
    ]:
        with pytest.raises(InputError, match=message):
            EnsLoss(**settings)
    with pytest.raises(InputError, match="labels must be -1 or 1, found 0 at row 0"):
        EnsLoss(label_format="pm1")(torch.zeros(1), torch.zeros(1))
    with pytest.raises(InputError, match="noise must have 2 entries, one for each sample, got 3"):
        ensloss_derivatives(torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match="noise must have 2 entries, one for each sample, got 3"):
        EnsLoss()(torch.zeros(2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match="noise must be on the device of scores, cpu, got meta"):
        EnsLoss()(torch.zeros(2), torch.zeros(2), torch.zeros(2, device="meta"))
    with pytest.raises(InputError, match="epoch must be at least 0"):
        EnsLoss(lam_period=1).set_epoch(-1)
