"""How well one score threshold for all queries tells the right passages from those that would be retrieved.

A mean reciprocal rank sees the order within each query alone. This area pools the pairs of all queries, so it falls
where the scores of one query are not comparable with those of another; with easy negatives left out, it does not hide
that behind thousands of passages that nobody would retrieve.

Sheikholeslami et al. 2025, arXiv 2510.00137: the known positives against, for each query, its 500 passages of the
highest score, known positives removed (up to 500 negatives, fewer where positives are among the 500).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.ranking import area_of

RetrievalScores = Float[Tensor, "q d"] | Float[np.ndarray, "q d"]
Relevance = Bool[Tensor, "q d"] | Bool[np.ndarray, "q d"]


def pooled_retrieval_auc(scores: RetrievalScores, relevance: Relevance, top_k: int | None = 500) -> float:
    """Area under the ROC curve of positive pairs against the top negatives, the pairs of all queries together.

    Args:
        scores: (q, d) finite scores of queries with the passages of the corpus; tensor or array.
        relevance: (q, d) booleans, which passages answer which query.
        top_k: only negatives among a query's `top_k` passages of the highest score count, >= 1; None counts all.

    Returns:
        The area, in 0..1, ties counting half; 0.5 is chance.

    Raises:
        InputError: an argument is malformed, or no positive or no such negative pair occurs.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.1], [0.6, 0.4, 0.3]])
        >>> relevance = torch.tensor([[True, False, False], [False, True, False]])
        >>> pooled_retrieval_auc(scores, relevance), pooled_retrieval_auc(scores, relevance, top_k=1)
        (0.75, 0.5)

    Reference:
        Sheikholeslami et al. 2025, https://arxiv.org/abs/2510.00137
    """
    metric = PooledRetrievalAUC(top_k)
    metric.update(scores, relevance)
    return float(metric.compute())


class PooledRetrievalAUC(Metric):
    """`pooled_retrieval_auc` over batches of queries; its state is all positive and all top scores.

    Example:
        >>> metric = PooledRetrievalAUC()
        >>> metric.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[True, False, False]]))
        >>> metric.update(torch.tensor([[0.6, 0.4, 0.3]]), torch.tensor([[False, True, False]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    positives: list[Tensor]
    negatives: list[Tensor]

    def __init__(self, top_k: int | None = 500, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.top_k = None if top_k is None else checks.integer(top_k, "top_k", low=1)
        self.add_state("positives", [], dist_reduce_fx="cat")
        self.add_state("negatives", [], dist_reduce_fx="cat")

    def update(self, scores: RetrievalScores, relevance: Relevance) -> None:
        """Add queries: scores (q, d) and relevance (q, d); d may differ from batch to batch."""
        s = checks.matrix(scores, "scores").detach()
        relevant = checks.tensor(relevance, "relevance").to(s.device)
        if relevant.shape != s.shape or relevant.dtype != torch.bool:
            raise InputError(f"relevance must be boolean of shape {tuple(s.shape)}, got {checks.described(relevant)}")
        self.positives.append(s[relevant])
        if self.top_k is not None and self.top_k < s.shape[1]:
            s, top = s.topk(self.top_k, 1, sorted=False)
            relevant = relevant.gather(1, top)
        self.negatives.append(s[~relevant])

    def compute(self) -> Tensor:
        """The area of all queries together."""
        positives, negatives = dim_zero_cat(self.positives), dim_zero_cat(self.negatives)
        for name, pairs in (("positive", positives), ("negative", negatives)):
            if not len(pairs):
                raise InputError(f"relevance must leave a {name} pair to compare, there is none")
        kinds = torch.arange(len(positives) + len(negatives), device=positives.device) < len(positives)
        return area_of(torch.cat([positives, negatives]), kinds)[0]
