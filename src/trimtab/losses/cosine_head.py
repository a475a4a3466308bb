"""What margin softmax heads share: a weight vector a class, scaled cosines, and the cross-entropy of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.losses.base import full_precision, same_device, widened


class CosineHead(nn.Module):
    """Cross-entropy of scale times the cosines of embeddings with class weights, the own class's less a margin.

    A head says in `_shift` what its margin adds to the own class's cosine, and may add a `penalty`. The weights are
    part of training: hand them to the optimizer and save them with the network. A network serves without them.

    Args:
        features: width of the embeddings, >= 1.
        classes: number of classes, >= 2.
        scale: factor of all cosines, > 0.
        generator: draws the weights (Xavier uniform), on the CPU. None: one with seed 0.

    Attributes:
        weight: (classes, features); only its rows' directions count.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(self, features: int, classes: int, *, scale: float, generator: torch.Generator | None = None):
        super().__init__()
        checks.integer(features, "features", low=1)
        checks.integer(classes, "classes", low=2)
        self.scale = checks.number(scale, "scale", low=0.0, low_open=True)
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.xavier_uniform_(self.weight, generator=checks.generator(generator, seed=0))

    def forward(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The mean loss.

        Args:
            embeddings: (n, features), not normalised, floating point, n >= 1. A zero row has cosine 0 to every class.
            labels: (n,), integers in 0..classes-1.

        Raises:
            InputError: shapes, types, devices or labels are wrong, or a value is not finite.
        """
        x, y = self.checked(embeddings, labels)
        return F.cross_entropy(self.logits(x, y), y) + self.penalty(x)

    def checked(self, embeddings: Tensor, labels: Tensor) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """Embeddings, at least float32, and labels that fit this head."""
        same_device(weight=self.weight, embeddings=embeddings, labels=labels)
        x = widened(checks.matrix(embeddings, "embeddings", columns=self.weight.shape[1]))
        return x, checks.labels(labels, len(x), len(self.weight))

    def logits(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, "n c"]:
        """Scale times the cosines, the own class's with its margin, of embeddings and labels that were `checked`."""
        with full_precision(embeddings):
            logits = F.linear(F.normalize(embeddings) * self.scale, F.normalize(self.weight.to(embeddings)))
        cosine = logits[torch.arange(len(labels), device=labels.device), labels] / self.scale
        shift = self.scale * self._shift(cosine, embeddings)
        return logits.scatter_add_(1, labels[:, None], shift[:, None])

    def penalty(self, embeddings: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """What is added to the cross-entropy."""
        return embeddings.new_zeros(())

    def _shift(self, cosine: Float[Tensor, " n"], embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """What the margin adds to the own class's cosine."""
        raise NotImplementedError


def widen_angle(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """cos(angle + margin). Cosines are held 1e-7 away from 1 and -1, where the arc cosine has no finite slope."""
    return (cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos() + margin).cos()
