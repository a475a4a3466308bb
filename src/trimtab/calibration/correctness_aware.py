"""Correctness-aware calibration: a temperature for every sample, from how the model sees transformed copies of it.

A model that is right tends to stay with its answer when the image is turned, greyed or brightened; one that is wrong
tends to waver. A small network reads that from the copies' probabilities of the classes that the original ranks first,
and gives each sample a temperature of its own, so that no prediction changes. It is trained so that the calibrated
confidence comes close to 1 where the model is right and to 0 where it is wrong. Reach for it where augmented copies are
at hand and samples are to be ranked by how far they can be trusted, also on shifted data; where only the average
confidence has to be right, `TemperatureScaling` does as well and needs one pass of the model.

Liu, Wang, Zou, Zou, Zheng (2024), arXiv 2404.13016. The loss is the paper's mean; the authors' code weights right and
wrong samples so that both halves count alike (`balance=True`). What the weights teach is the chance of being right if
half the samples were wrong: a model of 86 % accuracy comes out far under-confident (see the claim), and looks better on
shifted data only because its accuracy is nearer one half there. The code trains at a rate of 1e-4 for ten epochs, too
short to leave the random start, where a first temperature below 0.1 sits on the clamp without a gradient; here the
network starts near T = 1.5 and is trained at 3e-3 for 60. The code's second head, a predicted correctness that its loss
does not use, is left out, and so is the copies' fixed number.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from trimtab.calibration.base import Calibrator
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.progress import track
from trimtab.core.threads import one_thread

_COOLEST, _HOTTEST = 0.1, 10.0


class CorrectnessAwareLoss(nn.Module):
    """Mean squared distance between the largest probability and whether it is right.

    Args:
        balance: weight samples so that the right and the wrong ones count alike, as in the authors' code: not
            consistent with calibration. Where all are right, or all wrong, the plain mean is taken (the code divides
            zero by zero). False, as in the paper.

    Example:
        >>> import torch
        >>> from trimtab.calibration import CorrectnessAwareLoss
        >>> logits = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]).log()
        >>> round(float(CorrectnessAwareLoss()(logits, torch.tensor([0, 0, 1]))), 3)  # (0.01 + 0.04 + 0.49) / 3
        0.18
        >>> round(float(CorrectnessAwareLoss(balance=True)(logits, torch.tensor([0, 0, 1]))), 4)
        0.2575

    Reference:
        Liu et al., Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.
    """

    def __init__(self, balance: bool = False) -> None:
        super().__init__()
        self.balance = balance

    def forward(self, calibrated_logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The loss of calibrated logits (n, c) and labels (n,) in 0..c-1.

        Raises:
            InputError: a shape, type or range is wrong.
        """
        z = checks.logits(calibrated_logits, "calibrated_logits")
        errors, right = _squared_distance(z, checks.labels(labels, *z.shape))
        return (_balanced(right, torch.ones_like(errors)) * errors).mean() if self.balance else errors.mean()


def version_features(
    logits: Float[Tensor, "n c"], views: Float[Tensor, "n v c"], k: int = 4
) -> Float[Tensor, "n features"]:
    """What the transformed copies say about the classes that the original ranks first.

    Args:
        logits: of the original, (n, c).
        views: of v transformed copies, (n, v, c), in the same order wherever the features go.
        k: how many classes; all c where there are fewer. 4 as the authors.

    Returns:
        (n, v min(k, c)): every copy's probabilities of the original's classes from first to k-th, copy by copy.

    Example:
        >>> import torch
        >>> from trimtab.calibration import version_features
        >>> views = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]]).log()
        >>> version_features(torch.tensor([[1.0, 3.0, 2.0]]), views, k=2)
        tensor([[0.3000, 0.2000, 0.8000, 0.1000]])
    """
    first = logits.topk(min(k, logits.shape[1]), 1).indices
    return views.softmax(2).gather(2, first[:, None].expand(-1, views.shape[1], -1)).flatten(1)


class CorrectnessAware(Calibrator):
    """softmax(logits / T(views)), with T in 0.1..10 from a network of one hidden layer.

    Args:
        k: classes of the original that the network sees; all c where there are fewer. 4 as the authors.
        hidden: units of the hidden layer; 5 as the authors.
        loss: ``"ca"``, the correctness-aware loss, or ``"ce"``, the log loss, the authors' comparison.
        balance: see `CorrectnessAwareLoss`; True for parity with the authors' code.
        lr: Adam's rate; 3e-3 is ours, where the code's 1e-4 hardly moves.
        epochs: passes over the samples; 60 is ours, the code's 10.
        batch: samples a step; 500 is ours, the code's 1000.
        seed: of the network's start and of the order of the samples.

    Attributes:
        embed: (hidden, v k + 1), the hidden layer's weights and biases.
        out: (hidden + 1,), the output's.

    Example:
        >>> import torch
        >>> from trimtab.calibration import CorrectnessAware
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(1500, 4, 5, generator=generator)
        >>> truth = 2 * torch.randn(1500, 5, generator=generator)
        >>> labels = truth.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> seen = 2 * (truth[:, None] + noise)  # an original and three copies
        >>> calibrator = CorrectnessAware().fit(seen[:, 0], labels, views=seen[:, 1:])
        >>> calibrator.predict_proba(seen[:, 0], views=seen[:, 1:]).shape
        torch.Size([1500, 5])

    Reference:
        Liu et al., Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.
    """

    needs = frozenset({"views"})
    trains = True
    embed: Tensor
    out: Tensor

    def __init__(
        self,
        *,
        k: int = 4,
        hidden: int = 5,
        loss: Literal["ca", "ce"] = "ca",
        balance: bool = False,
        lr: float = 3e-3,
        epochs: int = 60,
        batch: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.k = checks.integer(k, "k", low=1)
        self.hidden = checks.integer(hidden, "hidden", low=1)
        if loss not in ("ca", "ce"):
            raise InputError(f"loss must be 'ca' or 'ce', got {loss!r}")
        if balance and loss == "ce":
            raise InputError("balance must be False for the loss 'ce', which knows no right and wrong")
        self.loss = loss
        self.balance = balance
        self.lr = checks.number(lr, "lr", low=0, low_open=True)
        self.epochs = checks.integer(epochs, "epochs", low=1)
        self.batch = checks.integer(batch, "batch", low=1)
        self.seed = checks.integer(seed, "seed", low=0)
        self._declare("embed", "out")

    def temperature(self, logits: Float[Tensor, "n c"], views: Float[Tensor, "n v c"]) -> Float[Tensor, " n"]:
        """Every sample's T; above one where it is to be trusted less than it says.

        Raises:
            InputError: the calibrator is not fitted, or was fitted to another number of views.
        """
        self._must_be_fitted()
        features = version_features(logits, views, self.k).to(logits.dtype)
        if features.shape[1] != self.embed.shape[1] - 1:
            fitted = (self.embed.shape[1] - 1) // min(self.k, logits.shape[1])
            raise InputError(f"views must hold {fitted} copies as in fit, got {views.shape[1]}")
        return _temperature(features, self.embed.to(logits.dtype), self.out.to(logits.dtype))

    @one_thread()
    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None, views: Tensor) -> None:
        # only differences of logits count, and these centred ones are small enough to be divided by any temperature
        z = logits - logits.amax(1, keepdim=True)
        features = version_features(logits, _widened(views, logits), self.k).to(logits.dtype)
        shares = torch.ones_like(z[:, 0]) if weights is None else (weights / weights.mean()).to(z.dtype)
        random = torch.Generator().manual_seed(self.seed)
        embed = _uniform((self.hidden, features.shape[1] + 1), features.shape[1], random)
        out = _uniform((self.hidden + 1,), self.hidden, random)
        out[-1] = 1.5
        embed, out = (value.to(z).requires_grad_() for value in (embed, out))
        optimizer = Adam([embed, out], self.lr)
        with torch.enable_grad():
            for _ in track(range(self.epochs), "correctness-aware"):
                for rows in torch.randperm(len(z), generator=random).to(z.device).split(self.batch):
                    scaled = z[rows] / _temperature(features[rows], embed, out)[:, None]
                    optimizer.zero_grad()
                    (self._losses(scaled, labels[rows], shares[rows]) * shares[rows]).mean().backward()
                    optimizer.step()
        self._store(logits, embed=embed.detach(), out=out.detach())

    def _losses(self, scaled: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        if self.loss == "ce":
            return cross_entropy(scaled, labels, reduction="none")
        errors, right = _squared_distance(scaled, labels)
        return _balanced(right, shares) * errors if self.balance else errors

    def _log_probs(self, logits: Tensor, views: Tensor) -> Tensor:
        temperature = self.temperature(logits, _widened(views, logits))
        return (logits / temperature[:, None]).log_softmax(-1)


def _widened(views: Tensor, logits: Tensor) -> Tensor:
    """Not narrowed: a large logit in double precision is infinite in single."""
    return views.to(torch.promote_types(views.dtype, logits.dtype))


def _temperature(features: Tensor, embed: Tensor, out: Tensor) -> Tensor:
    hidden = (features @ embed[:, :-1].mT + embed[:, -1]).relu()
    return (hidden @ out[:-1] + out[-1]).clamp(_COOLEST, _HOTTEST)


def _squared_distance(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(confidence - right)^2 of every sample, and whether it is right."""
    confidence, predicted = logits.softmax(1).max(1)
    right = predicted == labels
    return (confidence - right.to(confidence)) ** 2, right


def _balanced(right: Tensor, shares: Tensor) -> Tensor:
    """Weights of mean one under which the right samples count as much as the wrong ones; one where there are none."""
    accuracy = (right * shares).sum() / shares.sum()
    weights = torch.where(right, 1 - accuracy, accuracy)
    total = (weights * shares).sum() / shares.sum()
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(shares.dtype).tiny), 1.0)


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    """The start of torch's linear layers."""
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(inputs)
