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
    spread = max(float(calibrator.spread), 1e-3)  # where it is zero, the weights are too
    penalties = {
        "off_diagonal": (w[off].square().mean(), c * (c - 1) * temperature**2 / (2 * total * spread**2)),
        "intercept": (b.square().mean(), c / (2 * total)),
        "diagonal": ((w.diagonal() - 1 / temperature).square().mean(), c * temperature**2 / (2 * total * 0.3**2)),
    }
    at_label = (logits.log_softmax(1) @ w.mT + b).log_softmax(1).gather(1, labels[:, None])[:, 0]
    loss = -(at_label @ shares) / total
    for name, (square, default) in penalties.items():
        given = getattr(calibrator, name)
        loss = loss + square * (default if given is None else given)
    grad_w, grad_b = torch.autograd.grad(loss, (w, b))
    if calibrator.spread == 0:
        assert not w[off].any()
        grad_w = grad_w.diagonal()
    return loss.detach(), torch.cat([grad_w.flatten(), grad_b])


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


def mixed_up(n, c, amount):
    """Labels, and logits in which every class lies in wait for the next."""
    random = generator(0)
    truth = 2 * torch.randn(n, c, generator=random, dtype=torch.float64)
    labels = truth.softmax(1).multinomial(1, generator=random)[:, 0]
    return truth - amount * truth.roll(1, 1), labels


@pytest.mark.parametrize("n", [600, 5000])
def test_off_diagonal_weights_are_let_go_where_they_help_and_only_there(n):
    spreads = []
    for amount in (0.0, 0.4):
        logits, labels = mixed_up(2 * n, 8, amount)
        calibrator = MatrixScaling().fit(logits[:n], labels[:n])
        spreads.append(float(calibrator.spread))
        given = 8 * 7 / (2 * n * (0.05 / TemperatureScaling().fit(logits[:n], labels[:n]).temperature) ** 2)
        fixed = MatrixScaling(off_diagonal=float(given)).fit(logits[:n], labels[:n])
        assert float(fixed.spread) == pytest.approx(0.05)
        chosen, usual = (log_loss(m(logits[n:]), labels[n:]) for m in (calibrator, fixed))
        assert chosen < usual + 1e-3
    assert spreads[0] <= 0.015
    assert spreads[1] == pytest.approx(0.15)


def test_the_choice_does_not_depend_on_copies_of_the_logits_constant():
    logits, labels = mixed_up(900, 5, 0.4)
    shifted = logits + torch.randn(900, 1, generator=generator(3)).double()
    plain, moved = (MatrixScaling().fit(x, labels) for x in (logits, shifted))
    assert plain.spread == moved.spread
    assert torch.allclose(plain(logits), moved(shifted), atol=1e-4)


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
