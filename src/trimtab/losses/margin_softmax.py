"""Margin softmax: CosFace, ArcFace and MagFace, classifiers of directions that train embeddings for open sets.

Reach for them where unknown identities will be told apart by the cosine of their embeddings: faces, speakers, products.
All three classify the training identities by scaled cosines to a weight vector a class, and make it harder for the own
class: CosFace takes a margin off its cosine, ArcFace adds it to its angle, MagFace widens that margin with the length
of the embedding, so that length comes to tell quality. `UNPG` adds the negative pairs of the batch to any of them.

Wang et al. 2018, arXiv 1801.09414 (CosFace); Deng et al. 2019, arXiv 1801.07698 (ArcFace); Meng et al. 2021, arXiv
2103.06627 (MagFace). Values are those of the heads in the code of UNPG (Jung-Jun-Uk/UNPG), which has no clamp before
the arc cosine: there a cosine of exactly 1 has no finite gradient; here cosines are held 1e-7 away from it. Two more
departures: that code never runs its MagFace head (a variable is undefined); its ArcFace lets a label of -1 pass
halfway. As in that code ArcFace has no easy margin: where angle + margin is beyond pi, its logit rises again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses.cosine_head import CosineHead, widen_angle


class CosFace(CosineHead):
    """Cross-entropy of scaled cosines, the own class's less a margin.

    Args:
        features: width of the embeddings, >= 1.
        classes: number of classes, >= 2.
        scale: factor of all cosines, > 0; 64 as in the paper.
        margin: taken off the own class's cosine, >= 0; 0.35 as in the paper, 0.5 in UNPG's configuration.
        generator: draws the weights, on the CPU. None: one with seed 0.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        >>> round(float(CosFace(8, 3, scale=16)(x, torch.arange(6) % 3).detach()), 4)
        10.6511

    Reference:
        Wang et al., CVPR 2018, https://arxiv.org/abs/1801.09414
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.35,
        generator: torch.Generator | None = None,
    ):
        super().__init__(features, classes, scale=scale, generator=generator)
        self.margin = checks.number(margin, "margin", low=0.0)

    def _shift(self, cosine: Float[Tensor, " n"], embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return torch.full_like(cosine, -self.margin)


class ArcFace(CosineHead):
    """Cross-entropy of scaled cosines, the own class's at an angle that is wider by a margin.

    Args:
        features: width of the embeddings, >= 1.
        classes: number of classes, >= 2.
        scale: factor of all cosines, > 0; 64 as in the paper.
        margin: radians added to the own class's angle, in 0..pi; 0.5 as in the paper.
        generator: draws the weights, on the CPU. None: one with seed 0.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        >>> round(float(ArcFace(8, 3, scale=16)(x, torch.arange(6) % 3).detach()), 4)
        11.2874

    Reference:
        Deng et al., CVPR 2019, https://arxiv.org/abs/1801.07698
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.5,
        generator: torch.Generator | None = None,
    ):
        super().__init__(features, classes, scale=scale, generator=generator)
        self.margin = checks.number(margin, "margin", low=0.0, high=torch.pi)

    def _shift(self, cosine: Float[Tensor, " n"], embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return widen_angle(cosine, self.margin) - cosine


class MagFace(CosineHead):
    """ArcFace with a margin that grows with the embedding's length, and a penalty that rewards length.

    The margin rises linearly from `margins` at the two `lengths`, between which the length is held. Where the own
    class's cosine is not positive there is no margin (the easy margin, always on).

    Args:
        features: width of the embeddings, >= 1.
        classes: number of classes, >= 2.
        scale: factor of all cosines, > 0; 64 as in the paper.
        lengths: shortest and longest length a that counts, 0 < shortest < longest; 10 and 110 as in the paper.
        margins: radians at these lengths, in 0..pi, ascending; 0.45 and 0.8 as in the paper.
        penalty_weight: of the mean of a / longest^2 + 1 / a, >= 0; 35 as in the paper.
        generator: draws the weights, rows of length one, on the CPU. None: one with seed 0.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> x = 16 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        >>> loss = MagFace(8, 3, scale=16)(x, torch.arange(6) % 3).detach()
        >>> round(float(loss), 4)
        9.0543

    Reference:
        Meng et al., CVPR 2021, https://arxiv.org/abs/2103.06627
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        scale: float = 64.0,
        lengths: tuple[float, float] = (10.0, 110.0),
        margins: tuple[float, float] = (0.45, 0.8),
        penalty_weight: float = 35.0,
        generator: torch.Generator | None = None,
    ):
        generator = checks.generator(generator, seed=0)
        super().__init__(features, classes, scale=scale, generator=generator)
        self.lengths = _ascending(lengths, "lengths", low_open=True)
        self.margins = _ascending(margins, "margins", high=torch.pi)
        if self.lengths[0] == self.lengths[1]:
            raise InputError(f"lengths must differ, both are {self.lengths[0]:g}")
        self.penalty_weight = checks.number(penalty_weight, "penalty_weight", low=0.0)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight.uniform_(-1, 1, generator=generator)))

    def penalty(self, embeddings: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """The weighted mean of a / longest^2 + 1 / a."""
        length = self._length(embeddings)
        return self.penalty_weight * (length / self.lengths[1] ** 2 + 1 / length).mean()

    def _shift(self, cosine: Float[Tensor, " n"], embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        (shortest, longest), (low, high) = self.lengths, self.margins
        margin = low + (high - low) / (longest - shortest) * (self._length(embeddings) - shortest)
        return torch.where(cosine > 0, widen_angle(cosine, margin) - cosine, 0)

    def _length(self, embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return torch.linalg.vector_norm(embeddings, dim=1).clamp(*self.lengths)


def _ascending(
    values: tuple[float, float], name: str, *, high: float = torch.inf, low_open: bool = False
) -> tuple[float, float]:
    first, second = (checks.number(value, name, low=0.0, high=high, low_open=low_open) for value in values)
    if first > second:
        raise InputError(f"{name} must be ascending, got {first:g}, {second:g}")
    return first, second
