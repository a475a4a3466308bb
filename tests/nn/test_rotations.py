"""Rotations (60-tokenhmr): six numbers give a rotation, and angles are right everywhere."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.nn import rot6d_to_matrix, rotation_angle


def six(seed, n=5):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6))
def test_six_numbers_give_a_rotation_and_a_rotation_its_six_numbers(seed):
    x = six(seed)
    matrix = rot6d_to_matrix(x)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3, dtype=x.dtype).expand(5, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(5, dtype=x.dtype))
    torch.testing.assert_close(rot6d_to_matrix(matrix[:, :2].flatten(1)), matrix)


def test_gradients_are_those_of_the_values():
    x, y = six(0).requires_grad_(), six(1)
    assert torch.autograd.gradcheck(lambda x: rotation_angle(rot6d_to_matrix(x), rot6d_to_matrix(y)), (x,))


@given(st.integers(0, 10**6), st.floats(0, math.pi))
def test_the_angle_of_a_turn_is_found(seed, angle):
    start = rot6d_to_matrix(six(seed, 2))
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]], dtype=torch.float64)
    about = start[:1].mT @ turn @ start[:1]
    found = rotation_angle(about @ start, start)
    torch.testing.assert_close(found, torch.full_like(found, angle), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("angle", [0.0, math.pi])
def test_gradients_are_finite_at_the_ends(angle):
    turn = torch.diag(torch.tensor([math.cos(angle), math.cos(angle), 1.0])).requires_grad_()
    rotation_angle(turn, torch.eye(3)).backward()
    assert turn.grad.isfinite().all()


@pytest.mark.bad_input
def test_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"x must be floating point of shape \(..., 6\), got float32 \(2, 5\)"):
        rot6d_to_matrix(torch.zeros(2, 5))
    with pytest.raises(InputError, match="x must be finite, found nan at row 0, column 0"):
        rot6d_to_matrix(torch.full((1, 6), torch.nan))
    with pytest.raises(InputError, match=r"second must be floating point of shape \(2, 3, 3\), got float32 \(3, 3\)"):
        rotation_angle(torch.zeros(2, 3, 3), torch.zeros(3, 3))
