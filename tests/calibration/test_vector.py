"""Vector scaling: the optimum of likelihood times prior, by either solver."""

import pytest
import torch
from score_sets import generator, log_loss, overconfident
from sklearn.linear_model import LogisticRegression

from trimtab.calibration import TemperatureScaling, VectorScaling, multinomial
from trimtab.core.checks import InputError


def objective(calibrator, logits, labels, weights=None):
    """The penalised loss of a fitted calibrator and its gradient, by automatic differentiation."""
    w, b = (x.clone().requires_grad_() for x in (calibrator.weight, calibrator.bias))
    shares = torch.ones(len(labels)).double() if weights is None else weights
    factor = 1 / float(TemperatureScaling().fit(logits, labels, weights=weights).temperature)
    at_label = (logits * w + b).log_softmax(1).gather(1, labels[:, None])[:, 0]
    loss = -(at_label @ shares)
    if calibrator.slope_sd is not None:
        loss = loss + ((w / factor - 1) / calibrator.slope_sd).square().sum() / 2
    if calibrator.bias_sd is not None:
        loss = loss + (b / calibrator.bias_sd).square().sum() / 2
    loss = loss / shares.sum()
    return loss.detach(), torch.cat(torch.autograd.grad(loss, (w, b)))


@pytest.mark.parametrize("c", [2, 3, 8])
@pytest.mark.parametrize("sds", [(0.3, 1.0), (2.0, None), (None, 3.0), (None, None)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_vanishes(c, sds, weighted):
    logits, labels = overconfident(800, c)
    weights = 3 * torch.rand(800, generator=generator(1)).double() if weighted else None
    calibrator = VectorScaling(slope_sd=sds[0], bias_sd=sds[1]).fit(logits, labels, weights=weights)
    _, gradient = objective(calibrator, logits, labels, weights)
    assert gradient.abs().max() < 1e-5


def test_both_solvers_agree(monkeypatch):
    logits, labels = overconfident(2000, 12)
    newton = VectorScaling().fit(logits, labels)
    monkeypatch.setattr(multinomial, "_NEWTON_CLASSES", 2)
    large = VectorScaling().fit(logits, labels)
    assert objective(large, logits, labels)[0] <= objective(newton, logits, labels)[0] + 1e-9
    assert torch.allclose(large(logits), newton(logits), atol=1e-3)


def test_with_two_classes_and_no_prior_it_is_logistic_regression():
    logits, labels = overconfident(500, 2)
    calibrator = VectorScaling(slope_sd=None, bias_sd=None).fit(logits, labels)
    peer = LogisticRegression(C=torch.inf, tol=1e-10, max_iter=1000).fit(logits.numpy(), labels.numpy())
    assert torch.allclose(calibrator(logits).exp(), torch.from_numpy(peer.predict_proba(logits.numpy())), atol=1e-5)


def test_the_prior_fades():
    """The same data a thousand times over leave the prior no say."""
    logits, labels = overconfident(200, 3)
    weights = torch.full((200,), 1e6).double()
    with_prior = VectorScaling().fit(logits, labels, weights=weights)
    without = VectorScaling(slope_sd=None, bias_sd=None).fit(logits, labels)
    assert torch.allclose(with_prior(logits), without(logits), atol=1e-4)


def test_it_finds_the_shifts_that_were_put_in():
    logits, labels = overconfident(50_000, 3, factor=1.0)
    shift = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    calibrator = VectorScaling().fit(logits + shift, labels)
    plain = VectorScaling().fit(logits, labels)
    moved = (plain.bias - calibrator.bias - shift * plain.weight).numpy()
    assert moved == pytest.approx(moved.mean(), abs=0.02)
    assert log_loss(calibrator(logits + shift), labels) == pytest.approx(log_loss(plain(logits), labels), abs=1e-4)


def test_a_class_that_never_occurred_becomes_rare_but_not_impossible():
    logits, labels = overconfident(500, 4)
    labels = labels.where(labels != 3, labels.new_tensor(0))
    p = VectorScaling().fit(logits, labels).predict_proba(logits)[:, 3]
    assert 0 < p.mean() < logits.softmax(1)[:, 3].mean() / 5


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["slope_sd", "bias_sd"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "wide", True])
def test_bad_arguments(name, value):
    with pytest.raises(InputError, match=f"{name} must"):
        VectorScaling(**{name: value})
