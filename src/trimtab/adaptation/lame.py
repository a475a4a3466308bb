"""LAME: leave the model alone and let the batch's predictions agree with their neighbours.

Reach for it on label-correlated streams (video, one class at a time), where all that uses batch statistics collapses:
neighbours in feature space are drawn to the same class. On well-mixed streams it tends to hurt.

Paper: Boudiaf, Mueller, Ben Ayed, Bertinetto, "Parameter-free Online Test-time Adaptation", CVPR 2022
(arXiv:2201.05718). The authors' code (fiveai/LAME) is followed: the kNN kernel is not made symmetric unless asked;
the RBF kernel keeps its diagonal, and its width is the mean distance to the k-th smallest entry of each row, the
point itself included. Where that width is 0 (a batch of one, or of equal inputs) the code divides by zero; here the
kernel is its limit.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.adaptation.base import Adapter, Inputs, Options
from trimtab.core import checks, modules
from trimtab.core.checks import InputError

Kernel = Literal["rbf", "knn", "linear"]


class LAME(Adapter):
    """Laplacian-adjusted maximum-likelihood estimation: smooths the probabilities of a batch over a graph of features.

    One forward pass a batch and at most 100 products of an (n, n) with an (n, c) matrix. No parameter changes.

    Args:
        model: a classifier, logits (n, c); used in eval mode, with the source's statistics.
        features: name of the module whose input is taken as features; the last linear layer by default.
        kernel: ``"rbf"``, the authors' default, draws every input to every other one, the more the larger the batch;
            ``"knn"`` to its `knn` nearest alone; ``"linear"`` by the cosine.
        knn: neighbours, >= 1; 5.
        symmetric: use the mean of the kernel and its transpose.
        strength: weight of the neighbours, >= 0; 1.
        iterations: at most so many; 100.
        **options: what every `Adapter` takes.

    Raises:
        InputError: an argument is out of range, or no module gives features.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lame = LAME(model)
        >>> probs = lame(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        >>> torch.allclose(probs.sum(1), torch.ones(16))
        True

    Reference:
        Boudiaf et al., CVPR 2022, https://arxiv.org/abs/2201.05718
    """

    outputs: ClassVar[Literal["logits", "probabilities"]] = "probabilities"

    def __init__(
        self,
        model: nn.Module,
        *,
        features: str | None = None,
        kernel: Kernel = "rbf",
        knn: int = 5,
        symmetric: bool = False,
        strength: float = 1.0,
        iterations: int = 100,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        if kernel not in ("rbf", "knn", "linear"):
            raise InputError(f"kernel must be 'rbf', 'knn' or 'linear', got {kernel!r}")
        self.kernel = kernel
        self.knn = checks.integer(knn, "knn", low=1)
        self.symmetric = symmetric
        self.strength = checks.number(strength, "strength", low=0.0)
        self.iterations = checks.integer(iterations, "iterations", low=1)
        self.features = features
        self._head()
        self._begin()
        self._rows_interact = True

    def _head(self) -> nn.Module:
        if self.features is None:
            return modules.last_linear(self.model)
        return modules.submodule(self.model, self.features)

    def _adapt(self, x: Inputs) -> Tensor:
        with torch.no_grad():
            return self._predict(x)

    def _predict(self, x: Inputs) -> Tensor:
        with modules.watch_input(self._head()) as seen:
            logits = self._call(self.model, x)
        if not seen or len(seen[-1]) != len(logits):
            raise InputError("features must name a module that sees every input once")
        weights = affinity(seen[-1].flatten(1), self.kernel, self.knn)
        if self.symmetric:
            weights = (weights + weights.T) / 2
        return smooth(logits, weights, strength=self.strength, iterations=self.iterations)


def affinity(features: Float[Tensor, "n d"], kernel: Kernel, knn: int) -> Float[Tensor, "n n"]:
    """How strongly each point (row) is drawn to each other point."""
    points = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    n = len(points)
    if kernel == "linear":
        return points @ points.T
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    if kernel == "knn":
        nearest = distances.topk(min(knn + 1, n), largest=False).indices[:, 1:]
        return torch.zeros_like(distances).scatter_(1, nearest, 1.0)
    width = distances.topk(min(knn, n), largest=False).values[:, -1].mean()
    return torch.where(distances == 0, 1.0, (-(distances**2) / (2 * width**2)).exp())


def smooth(
    logits: Float[Tensor, "n c"], weights: Float[Tensor, "n n"], *, strength: float = 1.0, iterations: int = 100
) -> Float[Tensor, "n c"]:
    """Probabilities that minimise LAME's energy: close to softmax(logits), and alike where `weights` are large."""
    unary = -(logits.softmax(1) + 1e-10).log()
    probs = (-unary).softmax(1)
    last = torch.inf
    for iteration in range(iterations):
        pairwise = strength * (weights @ probs)
        probs = (pairwise - unary).softmax(1)
        energy = float((probs * (unary - pairwise + probs.clip(1e-20).log())).sum())
        if iteration > 1 and abs(energy - last) <= 1e-8 * abs(last):
            break
        last = energy
    return probs
