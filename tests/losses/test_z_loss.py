"""The Z-loss: slug 34-z-loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import SquaredErrorLoss, ZLoss

GOLDEN = Path(__file__).parents[1] / "golden" / "34-z-loss"


def scores(seed, n=6, c=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, c, generator=generator, dtype=dtype), torch.randint(c, (n,), generator=generator)


def sums(logits, labels):
    return logits.gather(1, labels[:, None])[:, 0], logits.square().sum(1), logits.sum(1), logits.shape[1]


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    cases = sorted({name.split("/")[0] for name in arrays})
    for case in cases:
        get = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith(f"{case}/")}
        logits, labels = get["o"].clone().requires_grad_(), get["target"]
        rtol = 1e-9 if logits.dtype == torch.float64 else 1e-4
        atol = rtol * float(get["grad_o"].abs().max())
        value = ZLoss(reduction="sum")(logits, labels)
        value.backward()
        np.testing.assert_allclose(value.detach(), get["loss_sum"], rtol=rtol, err_msg=case)
        np.testing.assert_allclose(logits.grad, get["grad_o"], rtol=rtol, atol=atol, err_msg=case)
        squared = SquaredErrorLoss(reduction="sum")(get["o"], labels)
        np.testing.assert_allclose(squared, get["mse_sum"], rtol=rtol, err_msg=case)

        target = get["o"].gather(1, labels[:, None])[:, 0]
        leaves = [x.clone().requires_grad_() for x in (target, get["q"], get["s"])]
        value = ZLoss(reduction="sum").of_sums(*leaves, logits.shape[1])
        value.backward()
        np.testing.assert_allclose(value.detach(), get["loss_sum"], rtol=rtol, err_msg=case)
        for leaf, name in zip(leaves, ("grad_oc", "grad_q", "grad_s")):
            np.testing.assert_allclose(leaf.grad, get[name], rtol=10 * rtol, err_msg=f"{case} {name}")
    assert cases


some = st.integers(0, 10_000)
sharp = st.floats(0.05, 20)
where = st.floats(-5, 15)


@settings(max_examples=20)
@given(some, sharp, where)
def test_it_is_the_softplus_of_the_targets_z_score(seed, a, b):
    logits, labels = scores(seed)
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
    expected = torch.logaddexp(a * (b - z.gather(1, labels[:, None])[:, 0]), torch.zeros(6, dtype=torch.float64)) / a
    torch.testing.assert_close(ZLoss(a=a, b=b, reduction="none")(logits, labels), expected)
    torch.testing.assert_close(ZLoss(a=a, b=b)(logits, labels), expected.mean())
    torch.testing.assert_close(ZLoss(a=a, b=b, reduction="sum").of_sums(*sums(logits, labels)), expected.sum())


@settings(max_examples=20)
@given(some, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), sharp, where)
def test_shift_and_scale_change_nothing(seed, scale, shift, a, b):
    logits, labels = scores(seed)
    loss = ZLoss(a=a, b=b)
    torch.testing.assert_close(loss(scale * logits + shift, labels), loss(logits, labels), rtol=1e-8, atol=1e-10)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    for direction in (torch.ones_like(logits), logits):
        assert (gradient * direction).sum(1).abs().max() < 1e-12 * max(1, float(gradient.abs().max()))


def test_a_large_a_is_the_hinge():
    logits, labels = scores(0, n=50)
    z = ((logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)).gather(1, labels[:, None])
    hinge = (1 - z[:, 0]).clamp_min(0)
    torch.testing.assert_close(ZLoss(a=1e6, b=1.0, reduction="none")(logits, labels), hinge, rtol=0, atol=1e-6)


def test_a_mean_far_from_zero_costs_no_digits():
    logits, labels = scores(3, dtype=torch.float32)
    far = logits + 4096
    torch.testing.assert_close(ZLoss()(far, labels).double(), ZLoss()(far.double(), labels), rtol=2e-4, atol=0)


@pytest.mark.parametrize("level", [0.0, 0.1, -1e4])
def test_a_row_without_spread_has_no_gradient_and_a_warning(level):
    logits, labels = scores(0, n=3, dtype=torch.float32)
    logits[1] = level
    logits.requires_grad_()
    with pytest.warns(UserWarning, match="logits have no spread at row 1"):
        value = ZLoss(b=1.0, reduction="none")(logits, labels)
    value.sum().backward()
    torch.testing.assert_close(value[1].detach(), F.softplus(torch.tensor(1.0)))
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()
    with pytest.warns(UserWarning, match="row 1"):
        by_sums = ZLoss(b=1.0, reduction="none").of_sums(*sums(logits.detach(), labels))
    torch.testing.assert_close(by_sums, value.detach(), rtol=1e-4, atol=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": 0.0}, r"a must lie in \(0, inf\), got 0"),
        ({"a": -1.0}, r"a must lie in \(0, inf\)"),
        ({"b": float("nan")}, "b must lie in"),
        ({"eps": 0.0}, r"eps must lie in \(0, inf\)"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, none"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ZLoss(**options)


@pytest.mark.bad_input
def test_scores_whose_squares_overflow_are_refused():
    with pytest.raises(InputError, match="the variance of the logits must be finite"):
        ZLoss()(torch.tensor([[1e30, -1e30, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1]))


@pytest.mark.bad_input
def test_two_classes_whose_z_scores_never_change_are_refused():
    with pytest.raises(InputError, match=r"classes must be at least 3: the z-scores of two are 1 and -1, .* got 2"):
        ZLoss()(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    with pytest.raises(InputError, match="classes must be at least 3"):
        ZLoss().of_sums(*torch.ones(3, 4), classes=2)
