"""Training a slot model with few masks: it draws its input again, and its slots are matched to the true segments.

Prabhudesai et al., "Test-time Adaptation with Slot-Centric Models", ICML 2023 (arXiv:2203.11194); their code
(mihirp1998/Slot-TTA) is followed: segments are matched by the Euclidean distance between masks, segments that are not
there are matched too but cost nothing, and a mask's ones are weighted by the share of zeros in the whole batch. That
code marks one segment too few as present, so that the last object of every picture is never learnt and counts as
unlabelled when measured; here what is there is present (`present` says otherwise).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from trimtab.adaptation.slots import SlotModel
from trimtab.core import checks, modules, progress
from trimtab.core.checks import InputError
from trimtab.core.predictions import take_apart

_TINY = 1e-6


class HungarianMaskLoss(nn.Module):
    """Binary cross-entropy between predicted masks and the true ones that they match best.

    Example:
        >>> truth = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> loss = HungarianMaskLoss()
        >>> float(loss(truth.flip(1), truth)), round(float(loss(truth.flip(1) * 0.5 + 0.25, truth)), 4)
        (0.0, 0.2877)

    Reference:
        Prabhudesai et al., ICML 2023, https://arxiv.org/abs/2203.11194
    """

    def forward(
        self,
        masks: Float[Tensor, "n slots *where"],
        truth: Float[Tensor, "n segments *where"],
        present: Bool[Tensor, "n segments"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss, in nats a place.

        Args:
            masks: predicted, in [0, 1].
            truth: true masks of zeros and ones, no more segments than slots; all zeros where there is no segment, and
                in pictures without labels.
            present: which segments count; those that have a place by default.

        Raises:
            InputError: more segments than slots, nothing present, or entries out of range.
        """
        if truth.ndim != masks.ndim or len(truth) != len(masks) or truth.shape[2:] != masks.shape[2:]:
            raise InputError(f"truth must be masks like the predicted, {tuple(masks.shape)}, got {tuple(truth.shape)}")
        if truth.shape[1] > masks.shape[1]:
            raise InputError(
                f"truth must hold no more segments than there are slots, {masks.shape[1]}, got {truth.shape[1]}"
            )
        odd = (truth != 0) & (truth != 1)
        if bool(odd.any()):
            raise InputError(f"truth must be zeros and ones, found {float(truth[odd][0]):g} at {checks.first_bad(odd)}")
        wrong = ~((masks >= 0) & (masks <= 1))
        if bool(wrong.any()):
            raise InputError(f"masks must lie in [0, 1], found {float(masks[wrong][0]):g} at {checks.first_bad(wrong)}")
        ours, theirs = masks.flatten(2), truth.flatten(2)
        present = theirs.any(2) if present is None else present
        if not bool(present.any()):
            raise InputError("truth must hold at least one segment in the batch, it holds none")
        counts = F.pad(present, (0, ours.shape[1] - theirs.shape[1]))[:, :, None].to(ours)
        theirs = F.pad(theirs, (0, 0, 0, ours.shape[1] - theirs.shape[1])).to(ours) * counts
        ours = torch.take_along_dim(ours, match_masks(ours.detach(), theirs)[:, :, None], 1)
        ones, zeros = theirs, (1 - theirs) * counts
        weights = ones * (zeros.sum() / (ones.sum() + _TINY)) + zeros
        with torch.autocast(ours.device.type, enabled=False):  # on CUDA it refuses logarithms of probabilities
            errors = F.binary_cross_entropy(ours, theirs, reduction="none")
        return (weights * errors).sum() / (weights.sum() + _TINY)


def match_masks(
    masks: Float[Tensor, "n slots places"], truth: Float[Tensor, "n segments places"]
) -> Int[Tensor, "n segments"]:
    """For each true mask the slot that is its own: those at the least sum of Euclidean distances.

    Example:
        >>> truth = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> match_masks(truth.flip(1), truth)
        tensor([[1, 0]])
    """
    costs = torch.cdist(truth, masks).cpu().numpy()
    return torch.tensor([linear_sum_assignment(cost)[1].tolist() for cost in costs], device=masks.device)


def occupancy_loss(claims: Float[Tensor, "*where"], occupied: Float[Tensor, "*where"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of predicted occupancy, its ones weighted by (zeros + 1) / (ones + 1) of the batch.

    Args:
        claims: logits.
        occupied: zeros and ones.

    Example:
        >>> round(float(occupancy_loss(torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0]))), 4)
        0.8664
    """
    ones = occupied.sum()
    return F.binary_cross_entropy_with_logits(claims, occupied, pos_weight=(occupied.numel() - ones + 1) / (ones + 1))


def train_slots(
    model: SlotModel,
    loader: Iterable[Any],
    *,
    steps: int,
    lr: float = 5e-4,
    warmup: int = 500,
    mask_weight: float = 0.01,
    max_norm: float | None = None,
) -> torch.optim.Adam:
    """Train a slot model on images and their masks: reconstruction error plus `HungarianMaskLoss`.

    Args:
        model: trained in place.
        loader: batches (images (n, c, h, w) in [0, 1], true masks (n, segments, h, w)); begun anew when it ends. The
            authors take 16 images a batch.
        steps: updates; 500 000 on CLEVR.
        lr: Adam's learning rate; 5e-4.
        warmup: updates over which the rate rises from 0; 500.
        mask_weight: of the mask loss, >= 0; 0.01.
        max_norm: the gradient's norm is clipped there, > 0; None, as the authors do, does not clip.

    Returns:
        The optimizer, whose ``state_dict()`` `SlotTTA` may go on from.

    Raises:
        InputError: the loader is empty, masks are missing or malformed, a setting is out of range, or the loss is not
            finite.

    Example:
        >>> from trimtab.adaptation.slots import slot_autoencoder
        >>> images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> masks = (images[:, :1] > 0.5).float()
        >>> optimizer = train_slots(slot_autoencoder(3, 8), [(images, masks)], steps=2)
    """
    steps = checks.integer(steps, "steps", low=1)
    warmup = checks.integer(warmup, "warmup", low=0)
    mask_weight = checks.number(mask_weight, "mask_weight", low=0.0)
    if max_norm is not None:
        checks.number(max_norm, "max_norm", low=0.0, low_open=True)
    optimizer = torch.optim.Adam(model.parameters(), checks.number(lr, "lr", low=0.0, low_open=True))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / warmup) if warmup else 1.0)
    mask_loss, device = HungarianMaskLoss(), modules.device_of(model)
    for step, batch in enumerate(progress.track(islice(progress.endless(loader), steps), "slot training", steps)):
        images, truth = take_apart(batch, device)
        if truth is None or not isinstance(images, Tensor):
            raise InputError("loader must yield (images, masks), two tensors")
        scene = model(checks.finite(images, "images"))
        if not bool(scene.prediction.isfinite().all()):
            raise InputError(f"lr must be smaller: what the model draws at step {step} is not finite")
        loss = F.mse_loss(scene.prediction, images) + mask_weight * mask_loss(scene.masks, truth)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
    return optimizer
