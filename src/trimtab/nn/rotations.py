"""Rotations as networks give them: six numbers for a matrix, and the angle between two matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from trimtab.core import checks
from trimtab.core.checks import InputError


def rot6d_to_matrix(x: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch 3 3"]:
    """The rotations whose first two rows point where the two halves of `x` do (Gram and Schmidt).

    Args:
        x: (..., 6), two vectors that are neither zero nor parallel; where they are, rows of the matrix are zero.

    Returns:
        (..., 3, 3) rotation matrices. A convention with columns instead is their transpose.

    Raises:
        InputError: the last axis is not of six, or a value is not finite.

    Example:
        >>> rot6d_to_matrix(torch.tensor([0.0, 2.0, 0.0, 1.0, 5.0, 0.0]))
        tensor([[ 0.,  1.,  0.],
                [ 1.,  0.,  0.],
                [ 0.,  0., -1.]])

    Reference:
        Zhou et al., On the Continuity of Rotation Representations in Neural Networks, CVPR 2019.
    """
    if x.shape[-1:] != (6,) or not x.is_floating_point():
        raise InputError(f"x must be floating point of shape (..., 6), got {checks.described(x)}")
    checks.finite(x, "x")
    first = F.normalize(x[..., :3], dim=-1)
    second = F.normalize(x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack((first, second, torch.linalg.cross(first, second)), -2)


def rotation_angle(first: Float[Tensor, "*batch 3 3"], second: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch"]:
    """The angle of ``first @ second.T``, in radians, in [0, pi]: how far one must turn from one to the other.

    By the arc tangent of sine and cosine, so that small angles and those near pi are as exact as any, and gradients
    are finite everywhere.

    Args:
        first, second: (..., 3, 3) rotation matrices.

    Returns:
        (...,) angles.

    Raises:
        InputError: shapes differ or are not (..., 3, 3), or a value is not finite.

    Example:
        >>> turned = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> round(float(rotation_angle(turned, torch.eye(3))), 4)
        1.5708
    """
    for name, value in (("first", first), ("second", second)):
        if value.shape[-2:] != (3, 3) or value.shape != first.shape or not value.is_floating_point():
            shape = (*first.shape[:-2], 3, 3)
            raise InputError(f"{name} must be floating point of shape {shape}, got {checks.described(value)}")
        checks.finite(value, name)
    # the columns' cross products sum to the axis times 2 sin, their products to 1 + 2 cos
    sine = torch.linalg.vector_norm(torch.linalg.cross(second, first, dim=-2).sum(-1), dim=-1)
    return torch.atan2(sine, (first * second).sum((-2, -1)) - 1)
