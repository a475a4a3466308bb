"""A linear adaptor that is trained against its own neighbours: the network of the SDM activation.

It maps features to M exemplar coordinates and those to one score a class, both linearly. After every epoch each
training point is told how many of its nearest neighbours agree (q) and how near the first one is (d), and the next
epoch's activation is the sharper for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.calibration.empirical import ByClass
from trimtab.calibration.neighbours import runs
from trimtab.core.checks import InputError
from trimtab.core.progress import track

_OFFSET = 2.0
_EPS = torch.finfo(torch.float32).eps


def activation(z: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """(2 + q)^(d z) over its sum: z (n, c), q and d (n, 1)."""
    return ((_OFFSET + q).log() * d * z).softmax(1)


def log_activation(z: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """The logarithm of `activation` to the base 2 + q, with the authors' guard against log 0."""
    base = (_OFFSET + q).log()
    powers = (base * d * (z - z.amax(1, keepdim=True))).exp()
    return ((powers + _EPS).log() - (powers.sum(1, keepdim=True) + _EPS).log()) / base


class Adaptor(NamedTuple):
    """The weights, and the scalar mean and deviation that features are standardised by.

    Attributes:
        mean, deviation: scalars, over all entries of the training features.
        embedding, embedding_bias: (m, d) and (m,), features to exemplar coordinates.
        head, head_bias: (c, m) and (c,), exemplar coordinates to scores.
    """

    mean: Tensor
    deviation: Tensor
    embedding: Tensor
    embedding_bias: Tensor
    head: Tensor
    head_bias: Tensor

    @classmethod
    def start(cls, features: Tensor, c: int, m: int, random: torch.Generator) -> Self:
        """Uniform weights within one over the root of the inputs, as PyTorch's linear layers start."""

        def uniform(inputs: int, *shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=random, dtype=torch.float64).to(features)
            return ((2 * drawn - 1) / math.sqrt(inputs)).requires_grad_()

        d = features.shape[1]
        deviation, mean = torch.std_mean(features.double())
        if not 0 < deviation < math.inf:
            raise InputError(
                "features must vary, by a finite amount, in every training half: their standard deviation is "
                f"{float(deviation):g}"
            )
        return cls(mean, deviation, uniform(d, m, d), uniform(d, m), uniform(m, c, m), uniform(m, c))

    def exemplars(self, features: Tensor) -> Tensor:
        """Features (n, d) in exemplar coordinates (n, m)."""
        return self.standard(features) @ self.embedding.mT + self.embedding_bias

    def standard(self, features: Tensor) -> Tensor:
        """Features less their mean, by their deviation."""
        return (features - self.mean) / self.deviation

    def scores(self, features: Tensor) -> Tensor:
        """One score z a class, (n, c)."""
        return self.exemplars(features) @ self.head.mT + self.head_bias

    def doubled(self) -> Self:
        """A copy in double precision that needs no gradient."""
        return type(self)(*(tensor.detach().double().clone() for tensor in self))


class Support(NamedTuple):
    """The training half, as neighbours: places have the exemplars' distances in no more dimensions than features have.

    Attributes:
        factor: (r, d), r = min(m, d): the triangular factor of the embedding. Its distances are the embedding's, since
            the other factor only rotates.
        places: (n, r).
        kinds: (n,) the class of the points that the adaptor predicts rightly, else -1.
    """

    factor: Tensor
    places: Tensor
    kinds: Tensor

    @classmethod
    def of(cls, adaptor: Adaptor, features: Tensor, labels: Tensor) -> Self:
        """Make it from the training half."""
        predicted = adaptor.scores(features).argmax(1)
        factor = torch.linalg.qr(adaptor.embedding, mode="r").R
        return cls(factor, adaptor.standard(features) @ factor.mT, predicted.where(predicted == labels, -1))

    def runs(self, adaptor: Adaptor, features: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """q and the squared distance to the nearest, of points with these predictions."""
        return runs(adaptor.standard(features) @ self.factor.mT, predicted, self.places, self.kinds)


class Fit(NamedTuple):
    """An adaptor, its support, and what the calibration half says about it; all in double precision.

    Attributes:
        adaptor, support: the weights, and the training half under them.
        distances: of calibration points with q > 0 to their nearest neighbour, by true class.
        outputs: the activation at the true class, by true class.
        predicted, quantiles, similarity: of the calibration points: the predicted class, v (n, c), and
            v of the predicted class times log(2 + q).
        labels: of the calibration points.
        score: the mean over classes of the median q of the calibration points.
    """

    adaptor: Adaptor
    support: Support
    distances: ByClass
    outputs: ByClass
    predicted: Tensor
    quantiles: Tensor
    similarity: Tensor
    labels: Tensor
    score: float


def train(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    held_features: Float[Tensor, "m d"],
    held_labels: Int[Tensor, " m"],
    c: int,
    *,
    dimension: int,
    epochs: int,
    warm_up: int,
    lr: float,
    batch: int,
    random: torch.Generator,
) -> Fit:
    """Adam on the activation's log loss; of all epochs the last with the highest score on the calibration half.

    The first `warm_up` epochs take the place of the paper's first: q = e - 2 and d = 1, a softmax.
    """
    adaptor = Adaptor.start(features, c, dimension, random)
    optimizer = torch.optim.Adam(adaptor[2:], lr=lr)
    q = features.new_full((len(features), 1), math.e - _OFFSET)
    d = torch.ones_like(q)
    wide, held_wide = features.double(), held_features.double()
    best: Fit | None = None
    for epoch in track(range(epochs), "SDM"):
        for rows in torch.randperm(len(features), generator=random).to(labels.device).split(batch):
            with torch.enable_grad():
                log_probs = log_activation(adaptor.scores(features[rows]), q[rows], d[rows])
                loss = torch.nn.functional.nll_loss(log_probs, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = adaptor.doubled()
        support = Support.of(weights, wide, labels)
        if epoch >= warm_up - 1:
            q, d = (found.to(features) for found in against_itself(weights, support, wide, labels))
        fit = against_support(weights, support, held_wide, held_labels)
        if best is None or fit.score >= best.score:
            best = fit
    assert best is not None
    return best


def against_itself(adaptor: Adaptor, support: Support, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """q and d (n, 1) of the training half's own points."""
    z = adaptor.scores(features)
    q, nearest = runs(support.places, z.argmax(1), support.places, support.kinds, itself=True)
    d = ByClass.of(nearest[q > 0], labels[q > 0], z.shape[1]).share_not_below(nearest).amin(1, keepdim=True)
    return unless_flipped(z, q, d), d


def against_support(adaptor: Adaptor, support: Support, features: Tensor, labels: Tensor) -> Fit:
    """What a calibration half says about an adaptor and its support."""
    z = adaptor.scores(features)
    if not bool(z.isfinite().all()):
        raise InputError("lr must be smaller: training diverged")
    c, predicted = z.shape[1], z.argmax(1)
    q, nearest = support.runs(adaptor, features, predicted)
    distances = ByClass.of(nearest[q > 0], labels[q > 0], c)
    d = distances.share_not_below(nearest).amin(1, keepdim=True)
    output = activation(z, q[:, None].to(z), d)
    outputs = ByClass.of(output.gather(1, labels[:, None])[:, 0], labels, c)
    quantiles = outputs.quantile(output)
    q = unless_flipped(z, q, d)
    similarity = (quantiles.gather(1, predicted[:, None]) * (_OFFSET + q).log())[:, 0]
    by_class = [q[labels == k].cpu().numpy() for k in range(c)]
    score = float(np.mean([np.median(values) if len(values) else 0.0 for values in by_class]))
    return Fit(adaptor, support, distances, outputs, predicted, quantiles, similarity, labels, score)


def unless_flipped(z: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """q (n, 1), and zero where the activation ties so that another class comes first."""
    q = q[:, None].to(z)
    return q.where(activation(z, q, d).argmax(1, keepdim=True) == z.argmax(1, keepdim=True), 0.0)
