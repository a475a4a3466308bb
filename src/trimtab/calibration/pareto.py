"""Pareto self-supervision: how likely is each answer of a language model wrong, without a single gold label?

For answers whose right ones nobody knows, where cheap and fallible sources of supervision exist: rules, keywords,
knowledge bases, other models, each allowed to abstain. A small network, the harmonizer, learns from features of the
inputs to agree with all sources at once, the language model among them; the probability that it leaves to the other
classes is the risk of an answer. Answers of high risk can be flagged, replaced by the harmonizer's, or asked again
(`trimtab.calibration.reask`).

Zhao, Wei, Preston, Poon (2023), arXiv 2306.16564 (POLAR). Where paper and authors' code (microsoft/POLAR) differ, the
code is followed: the sources' weights are not renormalised over those that voted, so that a sample with few votes
counts less; with a single source the loss is the sum over the batch, not the mean, and the scalarizer plays no part;
the weight decay is AdamW's own 0.01; training stops after 5 epochs without a lower validation loss and keeps its last
weights, not its best. A batch without any vote is passed over. The paper favours the squared sum of the losses; the
released tables bear that out for a fine-tuned BERT alone (mean error of calibration .046 against .063 for the plain
sum): for logistic regression and small networks the plain sum is better (.064 against .107, .056 against .097), and it
is the default here.

What we found on synthetic rules (the claim): the risk ranks wrong answers higher than the share of rules that
contradict them does (AUROC .98 against .91), and answering by the harmonizer on the riskiest fifth removes 55 % of the
errors. The risk's size is overstated, since rules that are right 60 to 85 % of the time teach the harmonizer their
noise: its calibration error is .24 with ``"linear"``, .30 with ``"square"``, .35 with ``"2-norm"`` and .47 with
``"max"``, against .23 for the share of rules. Take it as a ranking unless the sources are good, and leave ``"max"``,
which removed 12 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from trimtab.calibration import harmonizer
from trimtab.calibration.base import Fitted
from trimtab.calibration.harmonizer import Base
from trimtab.calibration.scalarisers import Scalarizer, Weights, log_probs, scalarised, source_labels
from trimtab.core import checks
from trimtab.core.checks import InputError

Rule = Literal["maxeig", "minvar"]
Matrix = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
Labels = Int[Tensor, " n"] | Integer[np.ndarray, " n"]
WeakLabels = Int[Tensor, "n m"] | Integer[np.ndarray, "n m"]


class ParetoSelfSupervision(Fitted):
    """The harmonizer: class probabilities learnt from features and the answers of fallible sources.

    `base`, `scalarizer` and `lr` may each be a list of choices: every combination is trained, and the one with the
    lowest log loss on the validation set is kept, leaving out those that give every sample the same probabilities.

    Args:
        num_classes: C >= 2.
        base: ``"lr"`` (logistic regression), ``"mlp"`` (one hidden layer with ReLU), or a function without arguments
            that returns a new module from X to logits: (n, C), or (n, 1) for two classes.
        scalarizer: how the sources' losses become one, as in `ParetoLoss`.
        lr: learning rate of AdamW, > 0. The authors try 1e-4, 1e-5 and 1e-6, on embeddings of a language model.
        hidden: width of ``"mlp"``; 100 as the authors have it.
        epochs: passes over the data at most; 100, the authors'.
        patience: epochs without a lower validation loss after which training stops; 5, the authors'. Without
            validation data all epochs are run.
        batch_size: 16, the authors'.
        seed: of initial weights and of the order of the data.

    Attributes:
        chosen: index of the chosen base, scalarizer and learning rate among their choices, (3,).
        validation_loss: log loss on the validation set, a scalar; nan without one.
        network: the trained module, if `base` is the caller's own; it is the caller's to save.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> import torch
        >>> from trimtab.calibration import ParetoSelfSupervision
        >>> generator = torch.Generator().manual_seed(0)
        >>> X = torch.randn(600, 2, generator=generator)
        >>> truth = (X[:, 0] > 0).long()
        >>> wrong = torch.rand(600, 3, generator=generator) < torch.tensor([0.3, 0.3, 0.1])
        >>> answers = torch.where(wrong, 1 - truth[:, None], truth[:, None])  # two rules, and the language model
        >>> model = ParetoSelfSupervision(2, lr=0.05, epochs=10).fit(X, answers)
        >>> risk = model.risk(X, answers[:, 2])
        >>> bool(risk[wrong[:, 2]].mean() > 2 * risk[~wrong[:, 2]].mean())
        True

    Reference:
        Zhao et al., Pareto Optimal Learning for Estimating Large Language Model Errors, ACL 2024.
    """

    flat: Tensor
    sizes: Tensor
    chosen: Tensor
    validation_loss: Tensor

    def __init__(
        self,
        num_classes: int,
        base: Base | Sequence[Base] = "lr",
        scalarizer: Scalarizer | Sequence[Scalarizer] = "linear",
        lr: float | Sequence[float] = 1e-4,
        *,
        hidden: int = 100,
        epochs: int = 100,
        patience: int = 5,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = checks.integer(num_classes, "num_classes", low=2)
        self.base, self.scalarizer, self.lr = base, scalarizer, lr
        for choice in _choices(base):
            if choice not in ("lr", "mlp") and not callable(choice):
                raise InputError(f"base must be 'lr', 'mlp' or a function that returns a module, got {choice!r}")
        for choice in _choices(scalarizer):
            checks.one_of(choice, "scalarizer", Scalarizer)
        for choice in _choices(lr):
            checks.number(choice, "lr", low=0, low_open=True)
        if not (_choices(base) and _choices(scalarizer) and _choices(lr)):
            raise InputError("base, scalarizer and lr must leave something to choose, one is empty")
        self.hidden = checks.integer(hidden, "hidden", low=1)
        self.epochs = checks.integer(epochs, "epochs", low=1)
        self.patience = checks.integer(patience, "patience", low=1)
        self.batch_size = checks.integer(batch_size, "batch_size", low=1)
        self.seed = checks.integer(seed, "seed", low=0)
        self.network: nn.Module | None = None
        self._declare("flat", "sizes", "chosen", "validation_loss")

    def fit(
        self,
        X: Matrix,
        weak_labels: WeakLabels,
        X_val: Float[Tensor, "v d"] | Float[np.ndarray, "v d"] | None = None,
        y_val: Int[Tensor, " v"] | Integer[np.ndarray, " v"] | None = None,
        *,
        weights: Weights | None = None,
    ) -> Self:
        """Train the harmonizer.

        Args:
            X: features (n, d), finite; frozen embeddings of the texts in the paper. Not standardised here.
            weak_labels: (n, m) answers of m >= 1 sources, -1 where one abstains; the language model is a source.
            X_val, y_val: features and gold labels that decide when to stop, and which combination to keep.
            weights: (m,), of the sources; 1/m each if None. `reweight` proposes some.

        Raises:
            InputError: no source ever voted; there is something to choose and no validation set; a label is out of
                range; training diverged or, of every combination, learnt to say the same of all samples.
        """
        x = _features(X)
        labels = source_labels(weak_labels, len(x), self.num_classes).to(x.device)
        if not bool((labels >= 0).any()):
            raise InputError("weak_labels must hold at least one vote, every source abstains everywhere")
        w = None if weights is None else checks.weights(weights, labels.shape[1]).to(x)
        grid = list(product(*(enumerate(_choices(c)) for c in (self.base, self.scalarizer, self.lr))))
        if (X_val is None) != (y_val is None) or (X_val is None and len(grid) > 1):
            raise InputError("X_val and y_val must be given both or neither, and to choose among several settings")
        validation = None
        if X_val is not None:
            x_val = checks.matrix(X_val, "X_val", columns=x.shape[1]).to(x)
            validation = x_val, checks.labels(y_val, len(x_val), self.num_classes, "y_val").to(x.device)
        best: tuple[float, tuple[int, ...], nn.Module] | None = None
        for (i, base), (j, scalarizer), (k, lr) in grid:
            network = harmonizer.build(base, x, self.num_classes, self.hidden, self.seed)
            loss = harmonizer.train(
                network,
                partial(scalarised, scalarizer=scalarizer, weights=w),
                x,
                labels,
                validation,
                lr=lr,
                epochs=self.epochs,
                patience=self.patience,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            if validation is not None and len(grid) > 1 and _says_the_same(network, validation[0]):
                continue
            if best is None or loss < best[0]:
                best = loss, (i, j, k), network
        if best is None:
            raise InputError("every combination learnt to give all samples the same probabilities: try a larger lr")
        loss, chosen, network = best
        own = not isinstance(_choices(self.base)[chosen[0]], str)
        parameters = [] if own else [p.detach() for p in network.parameters()]
        self.network = network if own else None
        self._store(
            x,
            flat=torch.cat([x.new_empty(0), *(p.flatten() for p in parameters)]),
            sizes=torch.tensor([x.shape[1], *[len(p) for p in parameters[1::2]]]),
            chosen=torch.tensor(chosen),
            validation_loss=torch.tensor(loss),
        )
        return self

    def forward(self, X: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Log-probabilities of the classes (n, C), differentiable.

        Raises:
            InputError: not fitted.
        """
        self._must_be_fitted()
        if self.network is not None:
            return log_probs(self.network(X))
        return log_probs(harmonizer.layers(self.flat.to(X.dtype), self.sizes, X))

    def predict_proba(self, X: Matrix) -> Float[Tensor, "n c"] | Float[np.ndarray, "n c"]:
        """Probabilities of the classes (n, C): a tensor for a tensor, else a NumPy array."""
        self._must_be_fitted()
        x = _features(X)
        if self.network is None and x.shape[1] != int(self.sizes[0]):
            raise InputError(f"X must have {int(self.sizes[0])} columns as in fit, got {x.shape[1]}")
        probs = harmonizer.log_probs(self, x if isinstance(X, Tensor) else x.to(self.flat.device)).exp()
        return probs if isinstance(X, Tensor) else probs.cpu().numpy()

    def risk(self, X: Matrix, answers: Labels) -> Float[Tensor, " n"] | Float[np.ndarray, " n"]:
        """The probability that each answer of a source is wrong (the POLAR score), as `risk_score` has it."""
        return risk_score(self.predict_proba(X), answers)

    def reweight(self, X: Matrix, weak_labels: WeakLabels, rule: Rule = "maxeig") -> Float[np.ndarray, " m"]:
        """Weights of the sources to fit again with, as `reweight_sources` has them."""
        return reweight_sources(self.predict_proba(X), weak_labels, rule)

    def save(self, path: str | Path) -> None:
        """Write the state to `path` (safetensors) and the description beside it (``.json``), for `load`.

        Raises:
            InputError: a base is the caller's own function: save ``network.state_dict()`` instead.
        """
        if not all(isinstance(choice, str) for choice in _choices(self.base)):
            raise InputError("base must be 'lr' or 'mlp' to be saved: of your own module, save network.state_dict()")
        super().save(path)


def risk_score(probs: Matrix, answers: Labels) -> Float[Tensor, " n"] | Float[np.ndarray, " n"]:
    """The POLAR score of answers: the probability that a harmonizer leaves to the other classes.

    Args:
        probs: the harmonizer's probabilities (n, c).
        answers: a source's classes (n,), -1 where it abstained.

    Returns:
        (n,) in 0..1, in the container of `probs`; zero where there is no answer.

    Raises:
        InputError: probabilities or answers are out of range.

    Example:
        >>> import torch
        >>> from trimtab.calibration import risk_score
        >>> risk_score(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]]), torch.tensor([0, 1, -1]))
        tensor([0.1000, 0.9000, 0.0000])
    """
    p = checks.probabilities(probs)
    y = source_labels(checks.tensor(answers, "answers")[:, None], len(p), p.shape[1], "answers").to(p.device)
    others = p.scatter(1, y.clamp(min=0), 0).sum(1)  # not 1 - p: a small risk keeps its digits
    risk = others.clamp(max=1) * (y[:, 0] >= 0)
    return risk if isinstance(probs, Tensor) else risk.numpy()


def reweight_sources(
    probs: Matrix, weak_labels: WeakLabels, rule: Rule = "maxeig", *, floor: float = 0.5
) -> Float[np.ndarray, " m"]:
    """Weights of sources from how their errors, as the harmonizer sees them, go together.

    Args:
        probs: the harmonizer's probabilities (n, c).
        weak_labels: (n, m), -1 where a source abstains.
        rule: ``"maxeig"`` weighs sources that agree with the others (the leading eigenvector of the correlation of
            their residuals, by ten steps of power iteration), ``"minvar"`` those that are independent of the others.
        floor: share of the weight that is dealt out equally, in [0, 1]; 0.5, the authors'.

    Returns:
        (m,), >= floor / m, summing to one.

    Raises:
        InputError: a source never votes, or the correlations leave nothing to weigh by.

    Example:
        >>> import torch
        >>> from trimtab.calibration import reweight_sources
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.randint(0, 3, (500, 3), generator=generator)
        >>> labels[:, 1] = labels[:, 0]  # a copy
        >>> int(reweight_sources(torch.full((500, 3), 1 / 3), labels, "minvar").argmax())
        2
    """
    p = checks.probabilities(probs).detach().double()
    labels = source_labels(weak_labels, len(p), p.shape[1]).to(p.device)
    checks.one_of(rule, "rule", Rule)
    checks.number(floor, "floor", low=0, high=1)
    m = labels.shape[1]
    hot = F.one_hot(labels.clamp(min=0), p.shape[1]).double()
    residuals = (hot - p[:, None]) * (labels >= 0)[:, :, None]
    residuals = residuals - residuals.mean(0)
    covariance = torch.einsum("njc,nkc->jk", residuals, residuals) / len(p)
    sd = covariance.diagonal().sqrt()
    if bool((sd < 1e-12).any()):
        j = int(sd.argmin())
        raise InputError(f"weak_labels must vary in every column, source {j} never votes or never disagrees")
    correlation = (covariance / sd[:, None] / sd).cpu().numpy()
    w = np.ones(m)
    if rule == "maxeig":
        for _ in range(10):
            w = correlation @ w
    else:
        w = np.linalg.pinv(correlation, hermitian=True) @ w  # copies of a source share its weight
    least = floor / m
    beyond = np.maximum(0, w / w.sum() - least) if w.sum() > 1e-9 else np.zeros(m)
    if not beyond.any():
        raise InputError(f"weak_labels: the correlations of the {m} sources leave nothing to weigh by")
    return beyond / beyond.sum() * (1 - floor) + least


def _features(X: Any) -> Tensor:
    x = checks.matrix(X, "X").detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _choices(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _says_the_same(network: nn.Module, x: Tensor) -> bool:
    """As the authors: some class's probability hardly varies."""
    return bool((harmonizer.log_probs(network, x).exp().double().var(0, correction=0) < 1e-8).any())
