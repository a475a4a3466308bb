"""InfoNCE: each query's right passage above the other passages of its own row; the usual loss of dual encoders.

Reach for it where passages are ranked query by query. Its scores need not be comparable between queries: s(q, d) + g(q)
has the same loss for every g, so one threshold for all queries can be worthless at the best ranking. `MannWhitney`,
called in the same way, is for that.

Van den Oord, Li, Vinyals 2018, arXiv 1807.03748; here as in Eq. 4 of Sheikholeslami et al. 2025, arXiv 2510.00137: all
other passages of the batch and all hard negatives, also those of other queries, are negatives. With several positives
in a row each is compared with the row's negatives alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.losses.base import Reduction, reduced
from trimtab.losses.retrieval import Positive, judged


class InfoNCE(nn.Module):
    """-log of the positive's share of exp(score / temperature) among itself and its row's negatives.

    Args:
        temperature: of the scores, > 0; 0.01 for cosines, as in Sheikholeslami et al.
        reduction: ``"mean"`` or ``"sum"`` over the positives, or ``"none"``.

    Raises:
        InputError: the temperature or the reduction is not one of these.

    Example:
        >>> from trimtab.losses import dual_encoder_scores
        >>> generator = torch.Generator().manual_seed(0)
        >>> queries, noise = torch.randn(2, 8, 16, generator=generator)
        >>> scores = dual_encoder_scores(queries, queries + noise)
        >>> round(float(InfoNCE(temperature=0.1)(scores)), 4)
        0.0183

    Reference:
        Van den Oord, Li, Vinyals 2018, https://arxiv.org/abs/1807.03748
    """

    def __init__(self, *, temperature: float = 0.01, reduction: Reduction = "mean"):
        super().__init__()
        self.temperature = checks.number(temperature, "temperature", low=0.0, low_open=True)
        self.reduction: Reduction = checks.one_of(reduction, "reduction", Reduction)

    def forward(
        self,
        similarity: Float[Tensor, "q d"],
        positive: Positive = None,
        *,
        dropped: Bool[Tensor, "q d"] | None = None,
    ) -> Tensor:
        """The loss of a matrix of scores.

        `torch.compile` captures it whole where `positive` is no mask.

        Args:
            similarity: (q, d) scores of rows (queries) with columns (passages), as from `dual_encoder_scores`.
            positive: the column of each row's positive pair (q,), or all positive pairs (q, d), any number in a row.
                By default the diagonal.
            dropped: (q, d) pairs that shall not count as negative; a positive one stays positive.

        Returns:
            A scalar; a number for each positive with ``reduction="none"``, row by row.

        Raises:
            InputError: an argument is malformed or not finite, or there is no positive or no negative pair.
        """
        s, positive, dropped = judged(similarity, positive, dropped)
        z = s / self.temperature
        if dropped is not None:
            z = z.masked_fill(dropped, -torch.inf)
        if positive.ndim == 1:
            return F.cross_entropy(z, positive, reduction=self.reduction)
        rest = z.masked_fill(positive, -torch.inf).logsumexp(1)
        rows = positive.nonzero()[:, 0]
        return reduced(F.softplus(rest[rows] - z[positive], threshold=40.0), self.reduction)
