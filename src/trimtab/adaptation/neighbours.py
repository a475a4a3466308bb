"""A classifier without weights: the nearest rows of a memory of features vote, each by its cosine.

`NonParametricClassifier` serves any frozen features, with or without a stream; `NonParametricLoss` trains an extractor
for it. From Zhang et al., "AdaNPC", ICML 2023 (arXiv:2304.12566); `trimtab.adaptation.AdaNPC` says where their code is
followed. For n inputs, N rows and d features a vote takes n N d multiplications, done in blocks of the memory, so that
2^24 similarities at most are held at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.precision import widened

Confidence = Literal["double_softmax", "prob"]
_SMOOTHING = 1e-5
_BLOCK = 1 << 24  # similarities held at a time: 64 MB in single precision


class NonParametricClassifier(nn.Module):
    """A classifier without weights: the k nearest rows of a memory vote, each by its cosine. For any frozen features.

    Args:
        classes: c >= 2.
        k, temperature, beta, confidence, eps_ball, max_size: as in `AdaNPC`.

    Attributes:
        memory, labels: rows of length one (N, d) and their classes (N,): buffers, whose sizes change.
        given: how many of the rows `fit` was given (buffer).

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> classifier = NonParametricClassifier(2, k=2).fit(features, torch.tensor([0, 0, 1, 1]))
        >>> classifier.predict_proba(torch.tensor([[2.0, 0.1]])).round(decimals=3)
        tensor([[1., 0.]])
        >>> _ = classifier.adapt(torch.tensor([[3.0, 1.0]]))
        >>> len(classifier.memory), len(classifier.reset().memory)
        (5, 4)

    Reference:
        Zhang et al., ICML 2023, https://arxiv.org/abs/2304.12566
    """

    memory: Tensor
    labels: Tensor
    given: Tensor

    def __init__(
        self,
        classes: int,
        *,
        k: int = 100,
        temperature: float = 0.1,
        beta: float = 0.0,
        confidence: Confidence = "double_softmax",
        eps_ball: float | None = None,
        max_size: int | None = None,
    ):
        super().__init__()
        self.classes = checks.integer(classes, "classes", low=2)
        self.k = checks.integer(k, "k", low=1)
        self.temperature = checks.number(temperature, "temperature", low=0.0, low_open=True)
        self.beta = checks.number(beta, "beta", low=0.0)
        self.confidence: Confidence = checks.one_of(confidence, "confidence", Confidence)
        self.eps_ball = None if eps_ball is None else checks.number(eps_ball, "eps_ball", low=-1.0, high=1.0)
        self.max_size = None if max_size is None else checks.integer(max_size, "max_size", low=1)
        most = math.e / (math.e + classes - 1) if confidence == "double_softmax" else 1.0
        if beta > most:
            warnings.warn(
                f"beta {beta:g} lies above {most:.3g}, the largest confidence that {classes} classes allow: "
                "nothing will join the memory",
                RuntimeWarning,
                stacklevel=2,
            )
        self.register_buffer("memory", torch.empty(0))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("given", torch.tensor(0))

    def fit(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Self:
        """Replace the memory by these rows, brought to length one. In half precision they are kept in single."""
        features = checks.matrix(features, "features")
        labels = checks.labels(labels, len(features), self.classes)
        if self.max_size is not None and self.max_size < len(features):
            raise InputError(f"max_size must be at least {len(features)}, the rows of the source, got {self.max_size}")
        self.memory = F.normalize(widened(features.detach()).to(self.memory.device), dim=1)
        self.labels = labels.to(self.memory.device)
        self.given.fill_(len(labels))
        return self

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """The vote, as `vote` returns it: differentiable, and 1e-5 above the shares of the classes."""
        return vote(
            features,
            self.memory,
            self.labels,
            self.classes,
            k=self.k,
            temperature=self.temperature,
            eps_ball=self.eps_ball,
        )

    def predict_proba(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Probabilities, whose rows sum to one."""
        return normalised(self(self._checked(features)))

    def adapt(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """`predict_proba`, and then take the sure rows into the memory."""
        features = self._checked(features)
        votes = self(features)
        self.learn(features, votes)
        return normalised(votes)

    def learn(self, features: Float[Tensor, "n d"], votes: Float[Tensor, "n c"]) -> None:
        """Take the rows in whose vote is sure, with the class that got most."""
        shares = votes.softmax(1) if self.confidence == "double_softmax" else votes
        sure, labels = shares.max(1)
        chosen = sure >= self.beta  # False where a vote is not finite
        self.memory = torch.cat((self.memory, F.normalize(features[chosen], dim=1).to(self.memory)))
        self.labels = torch.cat((self.labels, labels[chosen]))
        if self.max_size is not None and len(self.labels) > self.max_size:
            source, newest = int(self.given), len(self.labels) - (self.max_size - int(self.given))
            self.memory = torch.cat((self.memory[:source], self.memory[newest:]))
            self.labels = torch.cat((self.labels[:source], self.labels[newest:]))

    def reset(self) -> Self:
        """Forget all but what `fit` was given."""
        self.memory, self.labels = self.memory[: int(self.given)].clone(), self.labels[: int(self.given)].clone()
        return self

    def _checked(self, features: Tensor) -> Tensor:
        if not len(self.memory):
            raise InputError("features must be fitted first: the memory is empty")
        return widened(checks.matrix(features, "features", columns=self.memory.shape[1]).detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            if f"{prefix}{name}" in state_dict:  # its shape may have changed
                setattr(self, name, state_dict[f"{prefix}{name}"].to(buffer.device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class NonParametricLoss(nn.Module):
    """Trains a feature extractor for the vote: its negative log-likelihood, with a queue of recent features as memory.

    ``loss(features, labels)`` is the mean over the batch; in train mode it then takes the batch into the queue and
    counts a step. Gradients flow through `features`, not through the queue. Train the extractor alone, with Adam and,
    as the authors do, ``ReduceLROnPlateau(factor=0.5, patience=500, cooldown=500, min_lr=1e-6)``, stepped with each
    loss; then build an `AdaNPC` on it with the same k and temperature 0.1.

    Args:
        features: d, their number.
        classes: c >= 2.
        size: rows of the queue; 3500, for small images 1000.
        k: neighbours that vote; 150, for small images 10.
        temperatures: of the vote, at the first step and after `steps` steps, linear between; (1.0, 0.1).
        steps: see `temperatures`; 5000.
        generator: draws the first rows, uniform in ±sqrt(3 / d), all of class 0; seeded with 0 by default.

    Attributes:
        memory, labels, index, step: queue, place of the next row, and steps so far (buffers).

    Example:
        >>> loss = NonParametricLoss(2, 3, size=8, k=2)
        >>> [round(float(loss(torch.eye(2), torch.tensor(labels))), 2) for labels in ([1, 2], [1, 2])]
        [11.51, 0.5]
        >>> int(loss.index), int(loss.step)
        (4, 2)

    Reference:
        Zhang et al., ICML 2023, https://arxiv.org/abs/2304.12566
    """

    memory: Tensor
    labels: Tensor
    index: Tensor
    step: Tensor

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        size: int = 3500,
        k: int = 150,
        temperatures: tuple[float, float] = (1.0, 0.1),
        steps: int = 5000,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        checks.integer(features, "features", low=1)
        self.classes = checks.integer(classes, "classes", low=2)
        self.k = checks.integer(k, "k", low=1)
        for i, temperature in enumerate(temperatures):
            checks.number(temperature, f"temperatures[{i}]", low=0.0, low_open=True)
        self.temperatures = temperatures
        self.steps = checks.integer(steps, "steps", low=1)
        rows = torch.empty(checks.integer(size, "size", low=1), features)
        bound = (3 / features) ** 0.5
        generator = generator or torch.Generator().manual_seed(0)
        self.register_buffer("memory", rows.uniform_(-bound, bound, generator=generator))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("index", torch.tensor(0))
        self.register_buffer("step", torch.tensor(0))

    @property
    def temperature(self) -> float:
        """That of the next step."""
        first, last = self.temperatures
        return first + (last - first) * min(int(self.step) / self.steps, 1.0)

    def forward(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The mean negative log-likelihood of the labels."""
        features = checks.matrix(features, "features", columns=self.memory.shape[1])
        labels = checks.labels(labels, len(features), self.classes)
        votes = vote(features, self.memory, self.labels, self.classes, k=self.k, temperature=self.temperature)
        if self.training:
            self._enqueue(F.normalize(features.detach(), dim=1), labels)
        return F.nll_loss(votes.log(), labels)

    def _enqueue(self, rows: Tensor, labels: Tensor) -> None:
        """Write over the oldest rows, in new tensors: the gradient still needs the old ones."""
        size = len(self.labels)
        places = (int(self.index) + torch.arange(len(rows), device=rows.device)) % size
        last = slice(-size, None)  # of a batch larger than the queue
        self.memory = self.memory.index_copy(0, places[last], rows[last].to(self.memory))
        self.labels = self.labels.index_copy(0, places[last], labels[last])
        self.index.fill_((int(self.index) + len(rows)) % size)
        self.step += 1


def vote(
    features: Float[Tensor, "n d"],
    memory: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    classes: int,
    *,
    k: int,
    temperature: float,
    eps_ball: float | None = None,
) -> Float[Tensor, "n c"]:
    """Share of each class among the neighbours, which weigh exp(cosine / temperature), plus 1e-5, at most 1."""
    with torch.autocast(features.device.type, enabled=False):  # three digits of a cosine do not tell neighbours apart
        points = F.normalize(features.to(memory.dtype), dim=1)
        nearest, rows = nearest_rows(points, memory, k)
        if eps_ball is not None and bool(nearest[:, 0].min() > eps_ball):
            shares = ball_shares(points, memory, labels, classes, nearest[:, :1].detach(), temperature, eps_ball)
        else:
            weights = (nearest / temperature).softmax(1)
            shares = weights.new_zeros(len(points), classes).scatter_add(1, labels[rows], weights)
        return (shares + _SMOOTHING).clamp(max=1)


def nearest_rows(
    points: Float[Tensor, "n d"], memory: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest products of each point with rows of the memory, descending, and which rows those are."""
    values, rows = points.new_empty(len(points), 0), points.new_empty(len(points), 0, dtype=torch.int64)
    for start, block in _blocks(memory, len(points)):
        found, places = (points @ block.T).topk(min(k, len(block)), dim=1)
        candidates = torch.cat((values, found), 1)
        values, best = candidates.topk(min(k, candidates.shape[1]), dim=1)
        rows = torch.cat((rows, places + start), 1).gather(1, best)
    return values, rows


def ball_shares(
    points: Float[Tensor, "n d"],
    memory: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    classes: int,
    nearest: Float[Tensor, "n 1"],
    temperature: float,
    eps_ball: float,
) -> Float[Tensor, "n c"]:
    """The vote of all rows whose product with a point is at least `eps_ball`; `nearest` is the largest of them."""
    shares = points.new_zeros(len(points), classes)
    for start, block in _blocks(memory, len(points)):
        similarity = points @ block.T
        weights = ((similarity - nearest) / temperature).exp() * (similarity >= eps_ball)
        shares = shares.index_add(1, labels[start : start + len(block)], weights)
    return normalised(shares)


def _blocks(memory: Tensor, n: int) -> Iterable[tuple[int, Tensor]]:
    size = max(1, _BLOCK // n)
    return ((start, memory[start : start + size]) for start in range(0, len(memory), size))


def normalised(shares: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Rows that sum to one."""
    return shares / shares.sum(1, keepdim=True)
