"""Which labelled examples a prompt shows: demonstrations drawn at random, balanced, or nearest to the query.

For `trimtab.calibration.LabelWords` and whatever else builds prompts. Another seed is another draw: the variation that
`trimtab.calibration.SelfEnsemble` merges.

Li et al. (2023), arXiv 2312.13772. As in the authors' code (cambridgeltl/ensembled-sicl) a draw depends on the query's
place and the seed alone, an example that equals the query is never shown, and the most similar one stands last, next to
the query. The authors find similar examples by BM25 or by sentence embeddings (all-mpnet-base-v2); here the embeddings
are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError

SamplingStrategy = Literal["random", "balanced", "nearest"]
Embeddings = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]


class DemonstrationSampler:
    """Draws n labelled examples for each query from a pool.

    Args:
        texts: the pool's texts, m of them.
        labels: their classes, (m,), integers >= 0.
        n: how many to draw for each query, 1..m. 3 in the authors' scripts.
        strategy: ``"random"``; ``"balanced"``, equally many of every class (classes drawn at random get one more where
            n is no multiple of their number), in random order; ``"nearest"``, the largest cosine similarity of the
            embeddings, ascending.
        embeddings: (m, d) of the pool, for ``"nearest"`` alone.
        seed: the draw depends on it and the query's place; ``"nearest"`` draws nothing and ignores it, so that voters
            must then differ in something else.

    Raises:
        InputError: n is larger than the pool, or embeddings and strategy do not go together.

    Example:
        >>> from trimtab.calibration import DemonstrationSampler
        >>> pool = ["good", "bad", "fine", "poor"]
        >>> sampler = DemonstrationSampler(pool, [1, 0, 1, 0], 2, strategy="balanced", seed=0)
        >>> shown = sampler(["good", "what a film"])
        >>> [sorted(label for _, label in examples) for examples in shown]
        [[0, 1], [0, 1]]
        >>> "good" in dict(shown[0])  # the query itself
        False

    Reference:
        Li et al., Large Language Models are Miscalibrated In-Context Learners, Findings of ACL 2025.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | Integer[Tensor, " m"] | Integer[np.ndarray, " m"],
        n: int,
        strategy: SamplingStrategy = "random",
        *,
        embeddings: Embeddings | None = None,
        seed: int = 0,
    ) -> None:
        self.texts = np.array(_strings(texts), dtype=object)
        self.labels = checks.labels(labels, len(self.texts), 2**31).cpu().numpy()
        self.n = checks.integer(n, "n", low=1)
        if n > len(self.texts):
            raise InputError(f"n must not exceed the pool, got {n} demonstrations of {len(self.texts)} texts")
        self.strategy = checks.one_of(strategy, "strategy", SamplingStrategy)
        self.seed = checks.integer(seed, "seed", low=0)
        if (embeddings is not None) != (strategy == "nearest"):
            raise InputError("embeddings must be given for strategy 'nearest', and for no other")
        self.embeddings = None if embeddings is None else checks.matrix(embeddings, "embeddings")
        if self.embeddings is not None and len(self.embeddings) != len(self.texts):
            raise InputError(f"embeddings must have {len(self.texts)} rows, got {len(self.embeddings)}")

    def __call__(
        self, texts: Sequence[str], *, embeddings: Embeddings | None = None, start: int = 0
    ) -> list[list[tuple[str, int]]]:
        """Demonstrations for each query: (text, class) pairs, the last one to stand next to the query.

        Args:
            texts: the queries.
            embeddings: (n, d) of the queries, for ``"nearest"`` alone.
            start: place of the first query among all, >= 0, where queries come in parts.

        Raises:
            InputError: too few examples are left without those that equal the query.
        """
        texts = _strings(texts)
        checks.integer(start, "start", low=0)
        similarities = self._similarities(len(texts), embeddings)
        out = []
        for i, text in enumerate(texts):
            others = np.flatnonzero(self.texts != text)
            random = np.random.default_rng([self.seed, start + i])
            if len(others) < self.n:
                raise InputError(f"the pool holds {len(others)} examples besides query {i}, n is {self.n}")
            if similarities is not None:
                chosen = others[np.argsort(similarities[i, others], kind="stable")[-self.n :]]
            elif self.strategy == "balanced":
                chosen = self._balanced(others, random)
            else:
                chosen = random.choice(others, self.n, replace=False)
            out.append([(str(self.texts[j]), int(self.labels[j])) for j in chosen])
        return out

    def _similarities(self, n: int, embeddings: Embeddings | None) -> np.ndarray | None:
        if (embeddings is None) != (self.embeddings is None):
            raise InputError("embeddings of the queries must be given for strategy 'nearest', and for no other")
        if self.embeddings is None:
            return None
        queries = checks.matrix(embeddings, "embeddings", columns=self.embeddings.shape[1])
        if len(queries) != n:
            raise InputError(f"embeddings must have {n} rows, got {len(queries)}")
        a, b = (F.normalize(x.detach().double().cpu()) for x in (queries, self.embeddings))
        return (a @ b.mT).numpy()

    def _balanced(self, others: np.ndarray, random: np.random.Generator) -> np.ndarray:
        classes = np.unique(self.labels)
        share, rest = divmod(self.n, len(classes))
        more = set(random.permutation(classes)[:rest])
        drawn = []
        for c in classes:
            members, wanted = others[self.labels[others] == c], share + (c in more)
            if len(members) < wanted:
                raise InputError(f"the pool holds {len(members)} examples of class {c} besides the query, not {wanted}")
            drawn.append(random.choice(members, wanted, replace=False))
        return random.permutation(np.concatenate(drawn))


def _strings(texts: Sequence[str]) -> list[str]:
    found = list(texts) if isinstance(texts, Iterable) else [texts]
    if isinstance(texts, str) or not all(isinstance(text, str) for text in found):
        raise InputError("texts must be a list of strings")
    return found
