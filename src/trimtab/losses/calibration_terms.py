"""Calibration as a term of the loss: how far the confidences of a batch are from its accuracy, differentiably.

Added to the cross-entropy they train a network to say how often it is right; `AugCal` puts one on augmented synthetic
images. `DCA` compares two means, and is the one to begin with; `MDCA` does so for every class, so it sees confidences
that are too high in one class and too low in another; `MMCE` compares only samples of similar confidence, so neither
can stand in for the other. They are noisy in small batches, and lowering all confidences alike lowers them too: the
cross-entropy must stay beside them. Whether a prediction is right carries no gradient.

DCA: Liang, Zhang, Wang, Jacobs 2020, arXiv 2009.04057. MDCA: Hebbalaguppe, Prakash, Madan, Arora 2022, arXiv
2203.13834; the latter's code (mdca-loss/MDCA-Calibration) is followed in both, without the cross-entropy that it has
within. MMCE: Kumar, Sarawagi, Jain, ICML 2018. The PyTorch code that circulates for MMCE forms n x n pairs; the Laplace
kernel factorises along sorted confidences, so that prefix sums give the same value and gradient in O(n log n). That
code also leaves out the square root, which the paper has.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.precision import doubled
from trimtab.losses.base import flat_labels, full_precision, same_device, widened

_ZERO = 1e-16  # a mean of products of gaps that rounding cannot tell from none


class DCA(nn.Module):
    """|mean confidence - accuracy| of the batch.

    Args:
        ignore_index: samples (pixels) with this label do not count; None, all do.

    Example:
        >>> import torch
        >>> from trimtab.losses import DCA
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # 0.85 sure, half right
        >>> round(float(DCA()(probs.log(), torch.tensor([0, 0]))), 4)
        0.35

    Reference:
        Liang et al., Improved Trainable Calibration Method for Neural Networks on Medical Imaging Classification,
        BMVC 2020, arXiv 2009.04057.
    """

    def __init__(self, *, ignore_index: int | None = None) -> None:
        super().__init__()
        self.ignore_index = None if ignore_index is None else checks.integer(ignore_index, "ignore_index")

    def forward(self, logits: Float[Tensor, "n c *shape"], labels: Int[Tensor, "n *shape"]) -> Float[Tensor, ""]:
        """The term of a batch.

        Args:
            logits: (n, c), or (n, c, ...) with a prediction for every pixel; finite.
            labels: (n,) or (n, ...), integers in 0..c-1 or `ignore_index`.

        Raises:
            InputError: a shape, type, device or value is wrong, or no sample counts.
        """
        z, y, shares = _rows(logits, labels, self.ignore_index)
        confidence, hits = _judged(z, y)
        return (shares * (hits - confidence)).sum().abs()


class MDCA(nn.Module):
    """The mean over classes of |mean probability of the class - how often it occurs| in the batch.

    Args:
        ignore_index: samples (pixels) with this label do not count; None, all do.

    Example:
        >>> import torch
        >>> from trimtab.losses import MDCA
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> round(float(MDCA()(probs.log(), torch.tensor([0, 0]))), 4)
        0.45

    Reference:
        Hebbalaguppe et al., A Stitch in Time Saves Nine: A Train-Time Regularizing Loss for Improved Neural Network
        Calibration, CVPR 2022, arXiv 2203.13834.
    """

    def __init__(self, *, ignore_index: int | None = None) -> None:
        super().__init__()
        self.ignore_index = None if ignore_index is None else checks.integer(ignore_index, "ignore_index")

    def forward(self, logits: Float[Tensor, "n c *shape"], labels: Int[Tensor, "n *shape"]) -> Float[Tensor, ""]:
        """The term of a batch; arguments and errors as in `DCA`."""
        z, y, shares = _rows(logits, labels, self.ignore_index)
        occurs = z.new_zeros(z.shape[1]).index_add(0, y, shares)
        with full_precision(z):
            return (shares @ z.softmax(1) - occurs).abs().mean()


class MMCE(nn.Module):
    """Maximum mean calibration error: sqrt of the mean over pairs of gap_i gap_j exp(-|p_i - p_j| / width).

    p is the confidence, and gap the hit (0 or 1) minus p. Unweighted it equals the metric
    `trimtab.metrics.maximum_mean_calibration_error`. Below 1e-8 it is 0, and so is its gradient.

    Args:
        width: of the Laplace kernel, at least 0.01; 0.4 as in Kumar et al.
        weighted: right and wrong predictions weigh alike, however few the wrong ones are, as the paper trains; where
            there is none of a kind, the other stands alone.
        ignore_index: samples (pixels) with this label do not count; None, all do.

    Example:
        >>> import torch
        >>> from trimtab.losses import MMCE
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(float(MMCE()(probs.log(), torch.tensor([0, 0, 1, 0]))), 4)
        0.1056

    Reference:
        Kumar, Sarawagi, Jain, Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings, ICML
        2018.
    """

    def __init__(self, *, width: float = 0.4, weighted: bool = False, ignore_index: int | None = None) -> None:
        super().__init__()
        self.width = checks.number(width, "width", low=0.01)
        self.weighted = weighted
        self.ignore_index = None if ignore_index is None else checks.integer(ignore_index, "ignore_index")

    def forward(self, logits: Float[Tensor, "n c *shape"], labels: Int[Tensor, "n *shape"]) -> Float[Tensor, ""]:
        """The term of a batch; arguments and errors as in `DCA`."""
        z, y, shares = _rows(logits, labels, self.ignore_index)
        confidence, hits = _judged(z, y)
        if self.weighted:
            right, wrong, one = hits * shares, (1 - hits) * shares, shares.amax()
            shares = right / right.sum().clamp(min=one) + wrong / wrong.sum().clamp(min=one)
        p, order = doubled(confidence).sort(stable=True)
        # for p_j <= p_i the kernel is exp(p_j / width) / exp(p_i / width): the sum over j is a prefix sum
        g = doubled(shares * (hits - confidence))[order]
        grown = ((p - p[-1:]) / self.width).exp()
        below = (g * grown).cumsum(0) / grown
        pairs = 2 * (g @ below) - g @ g
        return ((pairs > _ZERO) * pairs.clamp(min=_ZERO).sqrt()).to(z.dtype)


def _rows(
    logits: Tensor, labels: Tensor, ignore_index: int | None
) -> tuple[Float[Tensor, "m c"], Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Checked logits and labels, a row for each sample or pixel, and each one's share of the mean."""
    z, y = checks.tensor(logits, "logits"), checks.tensor(labels, "labels")
    same_device(logits=z, labels=y)
    rows = widened(checks.logits(z.movedim(1, -1).flatten(0, -2) if z.ndim > 2 else z))
    y, counts = flat_labels(z, y, ignore_index)
    if not checks.unread(counts) and not bool(counts.any()):
        raise InputError(f"labels must not all be ignore_index, {ignore_index}")
    return rows, y, counts.to(rows.dtype) / counts.sum()


def _judged(z: Float[Tensor, "m c"], y: Int[Tensor, " m"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Confidences, and 1 where the prediction is right."""
    confidence, predicted = z.softmax(1).max(1)
    return confidence, (predicted == y).to(z.dtype)
