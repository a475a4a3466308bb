"""Matrix scaling: the optimum of the penalised likelihood, by either solver."""

import pytest
import torch
from score_sets import generator, log_loss, overconfident
from sklearn.linear_model import LogisticRegression

from trimtab.calibration import MatrixScaling, TemperatureScaling, VectorScaling, matrix
from trimtab.core.checks import InputError


def objective(calibrator, logits, labels, weights=None):
    """The paper's penalised loss of a fitted calibrator and its gradient, by automatic differentiation."""
    w, b = (x.clone().requires_grad_() for x in (calibrator.weight, calibrator.bias))
    c = len(b)
    shares = torch.ones(len(labels)).double() if weights is None else weights
    temperature = float(TemperatureScaling().fit(logits, labels, weights=weights).temperature)
    off = ~torch.eye(c, dtype=torch.bool)
    total = float(shares.sum())
    penalties = {
        "off_diagonal": (w[off].square().mean(), c * (c - 1) * temperature**2 / (2 * total * 0.05**2)),
        "intercept": (b.square().mean(), c / (2 * total)),
        "diagonal": ((w.diagonal() - 1 / temperature).square().mean(), c * temperature**2 / (2 * total * 0.3**2)),
    }
    at_label = (logits.log_softmax(1) @ w.mT + b).log_softmax(1).gather(1, labels[:, None])[:, 0]
    loss = -(at_label @ shares) / total
    for name, (square, default) in penalties.items():
        given = getattr(calibrator, name)
        loss = loss + square * (default if given is None else given)
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, (w, b))])


@pytest.mark.parametrize("c", [2, 3, 8])
@pytest.mark.parametrize("penalties", [{}, {"off_diagonal": 0.1, "intercept": 0.2, "diagonal": 0.0}, {"intercept": 0}])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_vanishes(c, penalties, weighted):
    logits, labels = overconfident(800, c)
    weights = 3 * torch.rand(800, generator=generator(1)).double() if weighted else None
    calibrator = MatrixScaling(**penalties).fit(logits, labels, weights=weights)
    _, gradient = objective(calibrator, logits, labels, weights)
    assert gradient.abs().max() < 1e-5


def test_both_solvers_agree(monkeypatch):
    logits, labels = overconfident(2000, 7)
    newton = MatrixScaling().fit(logits, labels)
    monkeypatch.setattr(matrix, "_NEWTON_PARAMETERS", 2)
    large = MatrixScaling().fit(logits, labels)
    assert objective(large, logits, labels)[0] <= objective(newton, logits, labels)[0] + 1e-9
    assert torch.allclose(large(logits), newton(logits), atol=1e-3)


def test_without_penalties_it_is_logistic_regression_on_log_probabilities():
    logits, labels = overconfident(2000, 3)
    calibrator = MatrixScaling(off_diagonal=0, intercept=0, diagonal=0).fit(logits, labels)
    features = logits.log_softmax(1).numpy()
    peer = LogisticRegression(C=torch.inf, tol=1e-10, max_iter=5000).fit(features, labels.numpy())
    assert torch.allclose(calibrator(logits).exp(), torch.from_numpy(peer.predict_proba(features)), atol=1e-4)


def test_heavy_penalties_leave_one_slope_a_class():
    logits, labels = overconfident(500, 4)
    calibrator = MatrixScaling(off_diagonal=1e6, intercept=1e6).fit(logits, labels)
    assert (calibrator.weight - calibrator.weight.diag().diag()).abs().max() < 1e-5
    assert calibrator.bias.abs().max() < 1e-5
    alone = MatrixScaling(off_diagonal=1e6, intercept=1e6, diagonal=1e6).fit(logits, labels)
    tempered = TemperatureScaling().fit(logits, labels)
    assert torch.allclose(alone(logits), tempered(logits), atol=1e-4)


def test_it_mends_what_no_slope_and_shift_a_class_can():
    """Classes 0 and 1 are mixed up more often than the model says: their scores lean on each other."""
    random = generator(0)
    truth = 2 * torch.randn(6000, 4, generator=random, dtype=torch.float64)
    labels = truth.softmax(1).multinomial(1, generator=random)[:, 0]
    blur = torch.eye(4, dtype=torch.float64)
    blur[0, 1] = blur[1, 0] = -0.6
    logits = truth @ blur.mT
    fit, rest = slice(0, 3000), slice(3000, None)
    loss = {
        kind: log_loss(kind().fit(logits[fit], labels[fit])(logits[rest]), labels[rest])
        for kind in (VectorScaling, MatrixScaling)
    }
    assert loss[MatrixScaling] < loss[VectorScaling] - 0.01


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["off_diagonal", "intercept", "diagonal"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "auto"])
def test_bad_arguments(name, value):
    with pytest.raises(InputError, match=f"{name} must"):
        MatrixScaling(**{name: value})
