"""SDM: when can a prediction be trusted? By how similar, how near and how large its evidence is.

A softmax layer is as sure of an input that resembles nothing it has seen as of any other. The SDM activation raises its
base with the number of nearest training points that were predicted rightly and alike (similarity q) and flattens with
the distance to the nearest (nearness d). `SDM` trains such a layer on a frozen model's features, and afterwards not
only gives probabilities but says of each prediction whether it is *admitted*: whether it lies where, on held-out points
of every class, predictions were right at least a share alpha of the time. For selective prediction, and for verifying
the answers of a language model from its embeddings. Needs hundreds of labelled points of every class; with too few, or
too little training, it admits nothing, by design. For probabilities alone, a temperature is cheaper.

It learns a linear layer of its own on the features: **the logits are checked for their shape and otherwise not used**,
and its prediction may differ from the model's.

Schmaltz (2025), arXiv 2502.20167; code ReexpressAI/sdm. Where they differ the code is followed: the rescaler's patience
starts anew after an improvement. Departures from both: every class is halved by itself, so that none is missing from a
half by chance (the authors shuffle all and cut); no neighbour beyond the largest class can count, so q needs no other
limit; a training point is left out of its own neighbours by its row, not by being the nearest; and nothing is sorted
(`trimtab.calibration.neighbours`). The authors' fine-tuning of a language model by this activation (their algorithm 4)
is not here.

What we found. As long as one class has no training point whose nearest neighbour is like it, d is zero for every point,
the activation is flat, and training stands still: with a learning rate of 1e-3 on 600 digits it came so on one seed of
two, and 50 epochs ended at the accuracy of 12, 0.48; 25 epochs of `warm_up` brought it to 0.94. The learning rate of
1e-5 is the authors' for embeddings of thousands of dimensions and many thousands of points; on small sets it does not
get that far, nothing is admitted, and a warning says so: 1e-3 to 2e-2 did. Effective sample sizes are counts here; the
authors' pass through a fraction, which now and then loses one, and they compare a calibration part rounded to single
precision with test points that are not. With their sizes all golden numbers agree within 1e-4; with ours, which differ
by one where similarities tie, within 0.014 at the ends of the band. The rows of `Estimate` need not sum to one: as in
the paper, the spread over rounds is taken from the predicted class alone. On 600 + 600 digits, one round of 12 epochs,
the authors' code takes 55 seconds, this one half a second.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from trimtab.calibration import adaptor, rescaling
from trimtab.calibration.adaptor import Adaptor, Support
from trimtab.calibration.base import Calibrator
from trimtab.calibration.empirical import ByClass
from trimtab.calibration.verification import Estimate, Verification
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.progress import track


class SDM(Calibrator):
    """A layer on features that knows where it can be trusted.

    `fit` shuffles and halves the points `rounds` times; each time it trains a linear adaptor on one half and reads the
    distributions of its outputs from the other. The round with the highest similarity is kept, the spread over rounds
    makes its bounds stricter. `forward(logits, features=...)` gives logarithms of the centroid estimate, normalised;
    they are steps of the features, without a gradient. `verify(features)` gives everything, `admit(features)` the
    decision.

    Args:
        alpha: the share of admitted predictions that should be right, in every class; in 0.5..1, both excluded.
        dimension: M, of the exemplar space, >= 1.
        rounds: J, >= 1; with one, the bounds know of no spread.
        epochs: of training in each round, >= 1.
        warm_up: the first so many of them, >= 1, are trained as a softmax (the paper's: one); see the module.
        lr: Adam's learning rate, > 0. See the module: small sets need far more than the authors' default.
        batch: points in a step.
        rescaler_epochs: at most so many passes over a calibration half, one point at a time: for all rounds together
            some 60 microseconds a point with ten classes, 1.4 milliseconds with a hundred.
        rescaler_lr: its learning rate.
        seed: of the halves, the starts and the order of the points.

    All defaults are the paper's.

    Attributes:
        thresholds: psi (c,), the least output that counts as support for a class.
        least_similarity: scalar, from which on all classes reach alpha in the kept round; infinite where there is none.
        bounded_similarity: the same raised by the spread over rounds: below it nothing is admitted.
        offsets: (c, 20), what the spread takes from the predicted class's output, by whole rescaled similarity.

    Example:
        >>> import torch
        >>> from trimtab.calibration import SDM
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(2).repeat(200)
        >>> features = torch.randn(400, 4, generator=generator) + 6 * labels[:, None]
        >>> sdm = SDM(alpha=0.9, dimension=8, rounds=2, epochs=10, lr=0.01, rescaler_epochs=20, rescaler_lr=0.01)
        >>> sdm = sdm.fit(torch.zeros(400, 2), labels, features=features)
        >>> seen, unseen = torch.full((1, 4), 6.0), torch.full((1, 4), 60.0)
        >>> sdm.admit(seen), sdm.admit(unseen)
        (tensor([True]), tensor([False]))

    Reference:
        Schmaltz, Similarity-Distance-Magnitude Universal Verification, 2025.
    """

    needs = frozenset({"features"})
    trains = True

    mean: Tensor
    deviation: Tensor
    embedding: Tensor
    embedding_bias: Tensor
    head: Tensor
    head_bias: Tensor
    factor: Tensor
    places: Tensor
    kinds: Tensor
    rescaler: Tensor
    thresholds: Tensor
    least_similarity: Tensor
    bounded_similarity: Tensor
    offsets: Tensor

    def __init__(
        self,
        *,
        alpha: float = 0.95,
        dimension: int = 1000,
        rounds: int = 10,
        epochs: int = 50,
        warm_up: int = 1,
        lr: float = 1e-5,
        batch: int = 50,
        rescaler_epochs: int = 1000,
        rescaler_lr: float = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.alpha = checks.number(alpha, "alpha", low=0.5, high=1, low_open=True, high_open=True)
        self.dimension = checks.integer(dimension, "dimension", low=1)
        self.rounds = checks.integer(rounds, "rounds", low=1)
        self.epochs = checks.integer(epochs, "epochs", low=1)
        self.warm_up = checks.integer(warm_up, "warm_up", low=1)
        self.lr = checks.number(lr, "lr", low=0, low_open=True)
        self.batch = checks.integer(batch, "batch", low=1)
        self.rescaler_epochs = checks.integer(rescaler_epochs, "rescaler_epochs", low=1)
        self.rescaler_lr = checks.number(rescaler_lr, "rescaler_lr", low=0, low_open=True)
        self.seed = checks.integer(seed, "seed", low=0)
        self._held_out: Tensor | None = None
        self._declare(*Adaptor._fields, *Support._fields, "rescaler", "offsets")
        self._declare("thresholds", "least_similarity", "bounded_similarity")
        for name in ("distance", "output", "similarity"):
            self._declare(f"{name}_values", f"{name}_starts")

    def fit(
        self,
        logits: Float[Tensor, "n c"] | Float[np.ndarray, "n c"],
        labels: Int[Tensor, " n"] | Integer[np.ndarray, " n"],
        *,
        weights: Float[Tensor, " n"] | Float[np.ndarray, " n"] | None = None,
        held_out: Bool[Tensor, " n"] | Bool[np.ndarray, " n"] | None = None,
        **needed: Tensor | np.ndarray,
    ) -> Self:
        """Train and calibrate on points that the model itself was not trained on.

        Args:
            logits: (n, c); only their number of columns is used.
            labels: true classes, (n,).
            weights: all equal, or zero to leave a point out: a method that counts neighbours has no weighted form.
            held_out: (n,) the points of the calibration part, the same in every round; None halves all points anew in
                every round, as the paper does.
            **needed: ``features``, (n, d).

        Returns:
            self.

        Raises:
            InputError: a shape, type or range is wrong; features do not vary; weights differ.
        """
        if held_out is not None:
            mask = checks.tensor(held_out, "held_out")
            if mask.dtype != torch.bool or mask.shape != (len(logits),):
                raise InputError(f"held_out must be {len(logits)} booleans, got {tuple(mask.shape)} of {mask.dtype}")
            kept = slice(None) if weights is None else checks.weights(weights, len(mask)).to(mask.device) > 0
            self._held_out = mask[kept]
        try:
            return super().fit(logits, labels, weights=weights, **needed)
        finally:
            self._held_out = None

    def verify(self, features: Float[Tensor, "m d"] | Float[np.ndarray, "m d"]) -> Verification:
        """What is known about each of m points, and whether its prediction is admitted.

        Raises:
            InputError: not fitted, or the features are of another width than in fit or not finite.
        """
        self._must_be_fitted()
        known = self._evidence(checks.matrix(features, "features", columns=self.embedding.shape[1]))
        centroid = self._estimate(known, known.quantiles)
        sample = self._sample("similarity")
        sizes = sample.below(centroid.similarity).minimum(sample.sizes - 1).clamp(min=0)
        lower, upper = self._ends(known, sizes)
        return Verification(
            known.predicted, known.scores, known.q, known.distance, known.d, sizes, lower, centroid, upper
        )

    def admit(self, features: Float[Tensor, "m d"] | Float[np.ndarray, "m d"]) -> Bool[Tensor, " m"]:
        """Whether each prediction is admitted, by the lower estimate, as the paper does."""
        return self.verify(features).admitted

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None, features: Tensor) -> None:
        c = logits.shape[1]
        if weights is not None and bool((weights != weights[0]).any()):
            raise InputError(
                "weights must be equal where they are not zero: SDM counts neighbours, it has no weighted form"
            )
        self._check(features, labels, c)
        x = features if features.dtype == torch.float64 else features.float()
        random = torch.Generator().manual_seed(self.seed)
        settings = {name: getattr(self, name) for name in ("dimension", "epochs", "warm_up", "lr", "batch")}
        best: adaptor.Fit | None = None
        summaries, kept = [], 0
        for number in track(range(self.rounds), "SDM: rounds"):
            train, held = self._halves(labels, random)
            fit = adaptor.train(x[train], labels[train], x[held], labels[held], c, random=random, **settings)
            summaries.append((fit.quantiles, fit.similarity, fit.labels, fit.predicted))
            if best is None or fit.score >= best.score:
                best, kept = fit, number
        assert best is not None
        v, similarity, y = (np.stack([summary[i].cpu().numpy() for summary in summaries]) for i in range(3))
        shuffle = np.random.default_rng(self.seed)
        weight = rescaling.train_rescalers(
            v, similarity, y, epochs=self.rescaler_epochs, lr=self.rescaler_lr, random=shuffle
        )
        regions = []
        for w, (quantiles, similar, true, predicted) in zip(torch.from_numpy(weight).to(best.quantiles), summaries):
            output = rescaling.rescaled(w, quantiles, similar)
            regions.append(rescaling.region(output, similar, predicted, true, self.alpha))
        self._keep(best, torch.from_numpy(weight[kept]), regions, kept)
        if math.isinf(regions[kept].similarity):
            warnings.warn(
                f"SDM found no region in which every class is right a share {self.alpha:g} of the time: nothing will "
                "be admitted. More training (lr, warm_up, epochs), more points or a smaller alpha may help",
                UserWarning,
                stacklevel=4,
            )

    def _keep(self, fit: adaptor.Fit, rescaler: Tensor, regions: list[rescaling.Region], kept: int) -> None:
        least, similarities = regions[kept].similarity, [region.similarity for region in regions]
        magnitudes = torch.stack([region.magnitudes for region in regions])
        bounded, offsets = rescaling.bounds(similarities, least, magnitudes, self.alpha)
        similarity = ByClass.of(fit.similarity, fit.labels, len(rescaler))
        for name, sample in {"distance": fit.distances, "output": fit.outputs, "similarity": similarity}.items():
            self._store(fit.quantiles, **{f"{name}_values": sample.values, f"{name}_starts": sample.starts})
        self._store(
            fit.quantiles,
            **fit.adaptor._asdict(),
            **fit.support._asdict(),
            rescaler=rescaler,
            offsets=offsets,
            thresholds=regions[kept].thresholds,
            least_similarity=torch.tensor(least, dtype=torch.float64),
            bounded_similarity=torch.tensor(bounded, dtype=torch.float64),
        )

    def _halves(self, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        if self._held_out is not None:
            held = self._held_out.to(labels.device)
            return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
        order = torch.randperm(len(labels), generator=random).to(labels.device)
        order = order[labels[order].argsort(stable=True)]
        return order[0::2], order[1::2]

    def _check(self, features: Tensor, labels: Tensor, c: int) -> None:
        halves = self._halves(labels, torch.Generator().manual_seed(self.seed))
        if min(len(rows) for rows in halves) < 2:
            raise InputError("either half must hold at least two points of weight > 0")
        counts = torch.stack([torch.bincount(labels[rows], minlength=c) for rows in halves])
        missing = (counts.amin(0) == 0).nonzero()[:, 0].tolist()
        if missing:
            warnings.warn(
                f"class {missing[0]} is missing from a half of the points: SDM will admit nothing",
                UserWarning,
                stacklevel=5,
            )
        twins = len(features) - len(torch.unique(features, dim=0))
        if twins:
            warnings.warn(
                f"features hold {twins} rows that are copies of others: each counts as a neighbour of its twin, and "
                "similarity is overstated",
                UserWarning,
                stacklevel=5,
            )

    def _log_probs(self, logits: Tensor, features: Tensor) -> Tensor:
        x = checks.matrix(features, "features", columns=self.embedding.shape[1])
        if len(x) != len(logits):
            raise InputError(f"features must have {len(logits)} rows, got {len(x)}")
        known = self._evidence(x)
        return rescaling.rescaled(self.rescaler, known.quantiles, known.similarity(known.quantiles))

    def _ends(self, known: _Evidence, sizes: Tensor) -> tuple[Estimate, Estimate]:
        """The estimates at the ends of the Dvoretzky-Kiefer-Wolfowitz band of these sample sizes."""
        band = (math.log(2 / (1 - self.alpha)) / (2 * sizes.double())).sqrt().where(sizes > 0, 1.0)
        own = known.predicted[:, None]
        band = band.scatter(1, own, -band.gather(1, own))
        lower, upper = (self._estimate(known, (known.quantiles + sign * band).clamp(0, 1)) for sign in (1, -1))
        return lower, upper

    def _evidence(self, features: Tensor) -> _Evidence:
        x = features.detach().to(self.embedding)
        layer = Adaptor(*(self.get_buffer(name) for name in Adaptor._fields))
        support = Support(*(self.get_buffer(name) for name in Support._fields))
        z = layer.scores(x)
        predicted = z.argmax(1)
        q, distance = support.runs(layer, x, predicted)
        d = self._sample("distance").share_not_below(distance).amin(1)
        output = adaptor.activation(z, q[:, None].to(z), d[:, None])
        return _Evidence(z, predicted, q, distance, d, output.argmax(1), self._sample("output").quantile(output))

    def _estimate(self, known: _Evidence, v: Tensor) -> Estimate:
        similarity = known.similarity(v)
        output = rescaling.rescaled(self.rescaler, v, similarity)
        similarity = similarity.where(output.argmax(1) == known.top, 0.0)
        bins = similarity.floor().clamp(max=rescaling.BINS - 1).long()
        own = known.predicted[:, None]
        probs = output.exp()
        lowered = (probs.gather(1, own)[:, 0] - self.offsets[known.predicted, bins]).clamp(0, 1)
        probs = probs.scatter(1, own, lowered[:, None])
        supported = probs >= self.thresholds
        alone = supported.gather(1, own)[:, 0] & (supported.sum(1) == 1)
        return Estimate(probs, similarity, alone & (bins > 0) & (similarity >= self.bounded_similarity))

    def _sample(self, name: str) -> ByClass:
        return ByClass(self.get_buffer(f"{name}_values"), self.get_buffer(f"{name}_starts"))


class _Evidence(NamedTuple):
    scores: Tensor
    predicted: Tensor
    q: Tensor
    distance: Tensor
    d: Tensor
    top: Tensor
    quantiles: Tensor

    def similarity(self, v: Tensor) -> Tensor:
        """log((2 + q)^v) at the predicted class; q counts as zero where the activation's ties chose another class."""
        q = self.q.where(self.top == self.predicted, 0)
        return v.gather(1, self.predicted[:, None])[:, 0] * (2.0 + q.to(v)).log()
