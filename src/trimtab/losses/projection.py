"""How far keypoints are off because the camera is only roughly right: the thresholds of 2D keypoints.

Mesh regressors project with a camera that is the same for all images, of a long focal length, because the true one is
unknown. Then even the true body misses its 2D keypoints, and a loss on them bends the pose instead. `camera_bias`
measures by how much, output by output: `ThresholdAdaptiveScaling` takes it as its thresholds.

Paper: Dwivedi et al., TokenHMR, CVPR 2024 (arXiv:2404.16752), which takes thresholds from this error; how it places the
camera is not told there, so here it is placed at its best: the translation of least squared error, sample by sample.

What we found: at its best the camera explains little. For random bodies that fill a crop, the bias is 0.001 at a true
distance of 1.5 m, 0.0003 at 3 m and 0.0001 at 6 m, where the authors' thresholds are 0.005 to 0.017: these must hold
what a camera that is estimated adds. Take thresholds of that size unless your cameras are fitted.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.precision import doubled
from trimtab.losses import base

_STEPS = 8


def perspective(
    points: Float[Tensor, "n k 3"], camera: Float[Tensor, "n 3"], *, focal: float = 5000.0, size: float = 256.0
) -> Float[Tensor, "n k 2"]:
    """Where points fall in a square crop, in units of its side from its middle, as HMR's cameras say it.

    Args:
        points: (n, k, 3) in metres, around the body's root; the camera looks along the third axis.
        camera: (n, 3) scale, > 0, and translations to the right and down: the body stands at the distance
            2 focal / (size scale + 1e-9).
        focal: focal length, in pixels; 5000.
        size: side of the crop, in pixels; 256.

    Returns:
        (n, k, 2).

    Raises:
        InputError: a shape is wrong, a value is not finite, a number is not positive, or a point is not in front of
            the camera.

    Example:
        >>> perspective(torch.tensor([[[0.0, 0.0, 0.0], [0.0, -0.9, 0.0]]]), torch.tensor([[1.0, 0.1, 0.0]]))
        tensor([[[ 0.0500,  0.0000],
                 [ 0.0500, -0.4500]]])
    """
    base.same_device(points=points, camera=camera)
    _check_points(points, "points", 3)
    checks.matrix(camera, "camera", columns=3)
    if len(camera) != len(points):
        raise InputError(f"camera must have {len(points)} rows, one for each body, got {len(camera)}")
    checks.number(focal, "focal", low=0.0, low_open=True)
    checks.number(size, "size", low=0.0, low_open=True)
    scale, x, y = camera.unbind(1)
    if not checks.unread(scale) and bool((scale <= 0).any()):
        first = int((scale <= 0).to(torch.uint8).argmax())
        raise InputError(f"camera must have a positive scale in column 0, found {scale[first]:g} at row {first}")
    placed = points + torch.stack((x, y, 2 * focal / (size * scale + 1e-9)), 1)[:, None]
    behind = placed[..., 2] <= 0
    if not checks.unread(behind) and bool(behind.any()):
        raise InputError(f"camera must be in front of all points, it is not at {checks.first_bad(behind)}")
    return _projected(placed, focal / size)


def camera_bias(
    points: Float[Tensor, "n k 3"],
    keypoints: Float[Tensor, "n k 2"],
    *,
    confidence: Float[Tensor, "n k"] | None = None,
    focal: float = 5000.0,
    size: float = 256.0,
) -> Float[Tensor, " k"]:
    """Mean squared distance of true keypoints from true points under the approximate camera, placed at its best.

    Args:
        points: (n, k, 3) true points, in metres; k >= 2.
        keypoints: (n, k, 2) where the true camera shows them, in units of the crop's side from its middle.
        confidence: (n, k) weights >= 0, 0 where a keypoint is not to be seen; one by default.
        focal, size: the approximate camera, in pixels; 5000 and 256.

    Returns:
        (k,) squared distances: `thresholds` of `ThresholdAdaptiveScaling`.

    Raises:
        InputError: a shape or value is wrong, a keypoint is never seen, or no camera in front of a body shows it so.

    Example:
        >>> body = torch.randn(50, 6, 3, generator=torch.Generator().manual_seed(0)) / 2
        >>> camera = torch.tensor([[0.9, 0.0, 0.1]])  # scale, right, down
        >>> seen = perspective(body, camera.expand(50, 3), focal=500.0)
        >>> bool((camera_bias(body, seen, focal=500.0) < 1e-9).all())
        True
        >>> bool((camera_bias(body, seen) > 1e-4).all())
        True
    """
    weight = torch.ones_like(points[..., 0]) if confidence is None else confidence
    base.same_device(points=points, keypoints=keypoints, confidence=weight)
    _check_points(points, "points", 3)
    _check_points(keypoints, "keypoints", 2)
    if keypoints.shape[:2] != points.shape[:2] or points.shape[1] < 2:
        raise InputError(f"keypoints must be as many as points, and 2 or more, got {tuple(keypoints.shape)}")
    if weight.shape != points.shape[:2]:
        raise InputError(f"confidence must have shape {tuple(points.shape[:2])}, got {tuple(weight.shape)}")
    weight = doubled(checks.finite(weight, "confidence"))
    if bool((weight < 0).any()):
        raise InputError(f"confidence must be >= 0, found {checks.first_bad(weight < 0)}")
    unseen = weight.sum(0) == 0
    if bool(unseen.any()):
        first = int(unseen.to(torch.uint8).argmax())
        raise InputError(
            f"confidence must be positive for each keypoint in some sample, it is not for keypoint {first}"
        )
    ratio = checks.number(focal, "focal", low=0.0, low_open=True) / checks.number(size, "size", low=0.0, low_open=True)
    space, seen = doubled(points), doubled(keypoints)
    away = (_projected(space + _placed(space, seen, weight, ratio)[:, None], ratio) - seen).square().sum(-1)
    return ((weight * away).sum(0) / weight.sum(0)).to(points.dtype)


def _placed(points: Tensor, seen: Tensor, weight: Tensor, ratio: float) -> Float[Tensor, "n 3"]:
    """The translations of least squared error: linear in the first step, by Gauss and Newton after it."""
    shown, depth = seen, torch.ones_like(weight)
    translation = torch.zeros_like(points[:, 0])
    for _ in range(_STEPS):
        target = shown * points[..., 2:] - ratio * points[..., :2] + (seen - shown) * depth[..., None]
        slope = torch.zeros(*shown.shape, 3, dtype=points.dtype, device=points.device)
        slope[..., 0, 0] = slope[..., 1, 1] = ratio
        slope[..., 2] = -shown
        scale = weight.sqrt() / depth
        rows, goals = (slope * scale[..., None, None]).flatten(1, 2), (target * scale[..., None]).flatten(1)
        translation = torch.linalg.lstsq(rows, goals[..., None]).solution[..., 0]
        depth = points[..., 2] + translation[:, None, 2]
        if not bool((depth > 0).all()):
            row = int((depth <= 0).any(1).to(torch.uint8).argmax())
            raise InputError(f"keypoints must show the points from in front of them, row {row} does not")
        shown = _projected(points + translation[:, None], ratio)
    return translation


def _projected(points: Tensor, ratio: float) -> Float[Tensor, "n k 2"]:
    return ratio * points[..., :2] / points[..., 2:]


def _check_points(value: Tensor, name: str, size: int) -> None:
    if value.ndim != 3 or value.shape[2] != size or value.numel() == 0 or not value.is_floating_point():
        raise InputError(f"{name} must be floating point of shape (n, k, {size}), got {tuple(value.shape)}")
    checks.finite(value, name)
