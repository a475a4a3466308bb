"""The two solvers against SciPy, on smooth convex problems that are easy to state."""

import itertools
import time

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import generator

from trimtab.calibration.solve import lbfgs, newton
from trimtab.core.progress import OutOfTime, limit


def quadratics(a, b):
    """Losses x' A x / 2 - b' x for a batch of matrices and vectors."""

    def objective(x):
        ax = (a @ x[:, :, None])[:, :, 0]
        return (x * (ax / 2 - b)).sum(1), ax - b, a.clone()

    return objective


def random_problem(seed, batch, d):
    random = generator(seed)
    root = torch.randn(batch, d + 2, d, generator=random, dtype=torch.float64)
    return root, torch.randn(batch, d, generator=random, dtype=torch.float64)


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 5), d=st.integers(1, 4))
def test_bounded_quadratics(seed, batch, d):
    root, b = random_problem(seed, batch, d)
    found = newton(quadratics(root.mT @ root, b), torch.ones(batch, d).double(), lower=torch.zeros(d))
    for k in range(batch):
        # min |root x - t|^2 over x >= 0 has the same optimum when root' t = b
        t = torch.linalg.lstsq(root[k].mT, b[k]).solution
        expected, _ = scipy.optimize.nnls(root[k].numpy(), t.numpy())
        np.testing.assert_allclose(found[k].numpy(), expected, atol=1e-5)


def test_a_bound_is_left_where_the_slope_leads_inside():
    found = newton(quadratics(torch.eye(2)[None].double(), torch.tensor([[3.0, -1.0]]).double()),
                   torch.zeros(1, 2).double(), lower=torch.zeros(2))  # fmt: skip
    assert torch.allclose(found, torch.tensor([[3.0, 0.0]]).double(), atol=1e-9)


def test_variables_without_effect_stay_and_scales_do_not_matter():
    a = torch.diag(torch.tensor([1e12, 0.0, 1e-12])).double()[None]
    b = torch.tensor([[1e6, 0.0, 1e-6]]).double()
    found = newton(quadratics(a, b), torch.zeros(1, 3).double())
    assert torch.allclose(found, torch.tensor([[1e-6, 0.0, 1e6]]).double(), rtol=1e-6)


def test_steps_that_overshoot_are_damped():
    """log cosh is nearly linear away from zero: plain Newton steps from 3 diverge."""

    def objective(x):
        t = x.tanh()
        return x.cosh().log().sum(1), t, (1 - t**2)[:, :, None]

    assert torch.allclose(newton(objective, torch.full((1, 1), 3.0).double()), torch.zeros(1, 1).double(), atol=1e-6)


def test_a_region_where_the_loss_is_infinite_is_avoided():
    def objective(x):  # x - log x, minimal at 1
        return (x - x.log()).sum(1), 1 - 1 / x, (1 / x**2)[:, :, None]

    start = torch.tensor([[50.0], [1e-3]]).double()
    found = newton(objective, start, lower=torch.zeros(1))
    assert torch.allclose(found, torch.ones(2, 1).double(), atol=1e-6)


def test_newton_says_when_it_did_not_converge():
    def quartic(x):
        return (x**4).sum(1), 4 * x**3, torch.diag_embed(12 * x**2)

    with pytest.warns(RuntimeWarning, match="Newton's method did not converge in 3 iterations"):
        newton(quartic, torch.full((1, 2), 1e3).double(), max_iterations=3)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_lbfgs_on_an_ill_scaled_quadratic(scale):
    root, b = random_problem(1, 1, 6)
    size = torch.logspace(-2, 2, 6).double() * scale
    a = (root.mT @ root)[0] * size[:, None] * size[None, :]

    def objective(x):
        return x @ a @ x / 2 - b[0] @ x, a @ x - b[0]

    expected = torch.linalg.solve(a, b[0])
    found = lbfgs(objective, torch.zeros(6).double(), a.diagonal())
    assert objective(found)[0] - objective(expected)[0] <= 1e-8


def test_lbfgs_says_when_it_did_not_converge():
    root, b = random_problem(2, 1, 6)
    a = (root.mT @ root)[0]
    with pytest.warns(RuntimeWarning, match="L-BFGS did not converge in 2 iterations"):
        lbfgs(
            lambda x: (x @ a @ x / 2 - b[0] @ x, a @ x - b[0]), torch.zeros(6).double(), a.diagonal(), max_iterations=2
        )


def test_both_stop_when_the_time_is_up():
    steps = []

    def flat_quartic(x):
        steps.append(x)
        return (x**4).sum(-1), 4 * x**3, torch.diag_embed(12 * x**2)

    start = torch.full((1, 2), 1e3).double()
    with limit(-1):
        with pytest.raises(OutOfTime):
            newton(flat_quartic, start)
        assert len(steps) == 1
        with pytest.raises(OutOfTime):
            lbfgs(lambda x: flat_quartic(x)[:2], start[0], torch.ones(2).double())
    assert len(steps) < 10
    with limit(1e6):
        assert newton(flat_quartic, start).abs().max() < 1


def test_time_that_ends_on_the_way_ends_the_search(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    steps = []

    def quartic(x):
        steps.append(x)
        return (x**4).sum(1), 4 * x**3, torch.diag_embed(12 * x**2)

    with limit(5), pytest.raises(OutOfTime):
        newton(quartic, torch.full((1, 2), 1e3).double())
    assert len(steps) == 6
