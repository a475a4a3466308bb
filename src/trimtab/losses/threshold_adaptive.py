"""Threshold-adaptive loss scaling: full loss for gross errors, a twentieth of it for errors that the labels may have.

Reach for it where labels are biased by an amount that is known: keypoints under an approximate camera, poses from a
fit. Below the threshold of an output the label is no authority, and pulls weakly; samples that are trusted always pull
in full. `camera_bias` measures the thresholds of keypoints.

Paper: Dwivedi, Sun, Patel, Feng, Black, "TokenHMR: Advancing Human Mesh Recovery with a Tokenized Pose Representation",
CVPR 2024 (arXiv:2404.16752); written anew from its description. One rule covers the five terms of the authors' loss
(tests/losses/test_threshold_adaptive.py adds them up to its value and gradients): 2D keypoints, ``distance="l1"`` and
the squared distance as error; rotations, ``"mse"`` with `trimtab.nn.rotation_angle` as error; 3D keypoints, which
count where the 2D error is gross or the sample is trusted, ``weak=0``. Departures: the authors' code trains on trusted
samples that have no pose labels, on whatever lies in their place; here a sample of confidence 0 never counts. Theirs
overwrites the confidences of the caller's batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses import base
from trimtab.losses.base import Reduction

Distance = Literal["l1", "mse"]


class ThresholdAdaptiveScaling(nn.Module):
    """The distance of each output from its label, scaled by `weak` where the error is within the output's threshold.

    Args:
        thresholds: (k,) one for each output, or a number for all, >= 0, in the units of the error: squared distance by
            default. The authors' are 0.005 to 0.017 for 2D keypoints in units of the crop (a tenth of it, squared),
            0.46 for the root's angle and 0.12 to 0.62 for the body's, in radians.
        weak: scale of errors within the threshold, in [0, 1]; 0.05, as in both of the authors' configurations.
        distance: ``"l1"``, the sum of absolute differences (the authors' for keypoints), or ``"mse"``, the sum of
            squared ones (theirs for rotations).
        reduction: ``"sum"``, as in the authors' code, whose weights of the terms belong to batches of 48; ``"mean"``
            over the n k outputs, or ``"none"``.

    Attributes:
        thresholds: a buffer.

    Raises:
        InputError: a number, a threshold or a name is out of range.

    Example:
        >>> loss = ThresholdAdaptiveScaling(0.01)
        >>> label = torch.zeros(1, 2, 2)
        >>> said = torch.tensor([[[0.05, 0.05], [0.5, 0.5]]])
        >>> loss.gross(said, label)
        tensor([[False,  True]])
        >>> round(float(loss(said, label)), 4)
        1.005

    Reference:
        Dwivedi et al., CVPR 2024, https://arxiv.org/abs/2404.16752
    """

    thresholds: Tensor

    def __init__(
        self,
        thresholds: Float[Tensor, "..."] | float,
        *,
        weak: float = 0.05,
        distance: Distance = "l1",
        reduction: Reduction = "sum",
    ):
        super().__init__()
        checks.tensor(thresholds, "thresholds")
        limits = torch.as_tensor(thresholds).clone()
        if limits.ndim > 1 or limits.numel() == 0 or limits.is_complex():
            raise InputError(f"thresholds must be a number or have shape (k,), got {tuple(limits.shape)}")
        limits = checks.finite(limits if limits.is_floating_point() else limits.float(), "thresholds")
        if not limits.is_meta and bool((limits < 0).any()):
            raise InputError(f"thresholds must be >= 0, found {float(limits.min()):g}")
        self.register_buffer("thresholds", limits)
        self.weak = checks.number(weak, "weak", low=0.0, high=1.0)
        self.distance = checks.one_of(distance, "distance", Distance)
        self.reduction = checks.one_of(reduction, "reduction", Reduction)

    def forward(
        self,
        prediction: Float[Tensor, "n k *d"],
        target: Float[Tensor, "n k *d"],
        *,
        confidence: Tensor | None = None,
        error: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            prediction, target: (n, k, ...) k outputs of any shape.
            confidence: (n, k), or (n,) for all outputs of a sample, >= 0: weighs the loss, and the error where that is
                computed here; 0 where there is no label. One by default.
            error: (n, k) or (n,), >= 0, what is held against the thresholds; the squared distance times the
                confidence by default.
            trusted: (n,) or (n, k): where it is not zero, the loss counts in full.

        Returns:
            A scalar, or (n, k) losses without reduction.

        Raises:
            InputError: a shape, type, device or value is wrong.
        """
        prediction, target, weight = self._checked(prediction, target, confidence)
        gross = self._gross(prediction, target, weight, error, trusted)
        difference = (prediction - target).reshape(*gross.shape, -1)
        away = (difference.abs() if self.distance == "l1" else difference.square()).sum(-1)
        return base.reduced(torch.where(gross, weight, self.weak * weight) * away, self.reduction)

    def gross(
        self,
        prediction: Float[Tensor, "n k *d"],
        target: Float[Tensor, "n k *d"],
        *,
        confidence: Tensor | None = None,
        error: Tensor | None = None,
        trusted: Tensor | None = None,
    ) -> Bool[Tensor, "n k"]:
        """Which outputs count in full; takes what `forward` takes.

        The authors' rule for 3D keypoints is ``error=confidence * gross``, the confidence in 2D where the 2D error is
        gross, against a threshold of 0.5 with ``weak=0``.
        """
        return self._gross(*self._checked(prediction, target, confidence), error, trusted)

    def _checked(self, prediction: Tensor, target: Tensor, confidence: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        base.same_device(prediction=prediction, target=target, thresholds=self.thresholds)
        k = self.thresholds.shape[0] if self.thresholds.ndim else None
        for name, value in (("prediction", prediction), ("target", target)):
            if not value.is_floating_point():
                raise InputError(f"{name} must be floating point, got {str(value.dtype).removeprefix('torch.')}")
            if value.ndim < 2 or value.numel() == 0 or k not in (None, value.shape[1]):
                raise InputError(f"{name} must have shape (n, {k or 'k'}, ...), none of it 0, got {tuple(value.shape)}")
            checks.finite(value, name)
        if prediction.shape != target.shape:
            raise InputError(f"target must have the shape {tuple(prediction.shape)}, got {tuple(target.shape)}")
        prediction = base.widened(prediction)
        if confidence is None:
            weight = prediction.new_ones(prediction.shape[:2])
        else:
            weight = _positive(confidence, "confidence", prediction).to(prediction.dtype)
        return prediction, target.to(prediction.dtype), weight

    @torch.no_grad()
    def _gross(
        self, prediction: Tensor, target: Tensor, weight: Tensor, error: Tensor | None, trusted: Tensor | None
    ) -> Bool[Tensor, "n k"]:
        if error is None:
            error = weight * (prediction - target).square().reshape(*weight.shape, -1).sum(-1)
        gross = _positive(error, "error", prediction) > self.thresholds
        return gross if trusted is None else gross | (_outputs(trusted, "trusted", prediction) != 0)


def _outputs(value: Tensor, name: str, prediction: Tensor) -> Tensor:
    """`value` as (n, k)."""
    base.same_device(prediction=prediction, **{name: value})
    n, k = prediction.shape[:2]
    if value.shape not in ((n,), (n, k)):
        raise InputError(f"{name} must have shape ({n}, {k}) or ({n},), got {tuple(value.shape)}")
    return checks.finite(value, name).reshape(n, -1).expand(n, k)


def _positive(value: Tensor, name: str, prediction: Tensor) -> Tensor:
    """`value` as (n, k), refused where it is negative."""
    return checks.within(_outputs(value, name, prediction), name, 0.0, torch.inf)
