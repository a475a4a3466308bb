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

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from trimtab.calibration.base import Fitted
from trimtab.core import checks, progress
from trimtab.core.checks import InputError
from trimtab.core.modules import evaluating

Scalarizer = Literal["linear", "square", "2-norm", "max"]
Rule = Literal["maxeig", "minvar"]
Base = Literal["lr", "mlp"] | Callable[[], nn.Module]
Matrix = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
Labels = Int[Tensor, " n"] | Integer[np.ndarray, " n"]
WeakLabels = Int[Tensor, "n m"] | Integer[np.ndarray, "n m"]
Weights = Sequence[float] | Float[Tensor, " m"] | Float[np.ndarray, " m"]

_BATCH = 4096  # rows of a prediction at a time


class ParetoLoss(nn.Module):
    """One number from the losses of several sources, such that its minimum is Pareto-optimal between them.

    With l_j the cross-entropy against source j's label, where it gave one, and w_j its weight, a sample's loss is

    - ``"linear"``: the sum of w_j l_j,
    - ``"square"``: the square of that sum,
    - ``"2-norm"``: the root of the sum of (w_j l_j)^2,
    - ``"max"``: the largest w_j l_j;

    averaged over the samples with a label. Zero where there is none.

    Args:
        scalarizer: one of the four.
        weights: (m,), >= 0, one a source; 1/m each if None, as the authors do. Not renormalised over the sources that
            voted.

    Raises:
        InputError: the scalarizer is unknown, or weights are negative or of another number than the sources.

    Example:
        >>> import torch
        >>> from trimtab.calibration import ParetoLoss
        >>> logits = torch.zeros(2, 3)
        >>> weak_labels = torch.tensor([[0, 1], [2, -1]])  # the second source abstains on the second sample
        >>> for scalarizer in ("linear", "square", "2-norm", "max"):
        ...     print(scalarizer, round(float(ParetoLoss(scalarizer)(logits, weak_labels)), 3))
        linear 0.824
        square 0.754
        2-norm 0.663
        max 0.549

    Reference:
        Zhao et al., Pareto Optimal Learning for Estimating Large Language Model Errors, ACL 2024.
    """

    weights: Tensor | None

    def __init__(self, scalarizer: Scalarizer = "linear", weights: Weights | None = None) -> None:
        super().__init__()
        if scalarizer not in get_args(Scalarizer):
            raise InputError(f"scalarizer must be one of {', '.join(get_args(Scalarizer))}, got {scalarizer!r}")
        self.scalarizer = scalarizer
        self.register_buffer("weights", None if weights is None else checks.weights(weights, len(weights)).double())

    def forward(self, logits: Float[Tensor, "n c"], weak_labels: Int[Tensor, "n m"]) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: (n, c), or (n, 1) for two classes: the log-odds of class 1.
            weak_labels: (n, m) classes, -1 where a source abstains.
        """
        log_probs = _log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        labels = _weak_labels(weak_labels, *log_probs.shape).to(logits.device)
        voted = labels >= 0
        losses = -log_probs.gather(1, labels.clamp(min=0)) * voted
        if labels.shape[1] == 1:
            return losses.sum()
        if self.weights is None:
            losses = losses / labels.shape[1]
        elif len(self.weights) == labels.shape[1]:
            losses = losses * self.weights.to(losses)
        else:
            raise InputError(f"weak_labels must have {len(self.weights)} columns as weights, got {labels.shape[1]}")
        match self.scalarizer:
            case "linear":
                each = losses.sum(1)
            case "square":
                each = losses.sum(1).square()
            case "2-norm":
                each = torch.linalg.vector_norm(losses, dim=1)  # its gradient at zero is zero
            case "max":
                each = losses.max(1).values
        return each.sum() / voted.any(1).sum().clamp(min=1)


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
            ParetoLoss(choice)
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
        labels = _weak_labels(weak_labels, len(x), self.num_classes)
        kept = (labels >= 0).any(1)
        if not bool(kept.any()):
            raise InputError("weak_labels must hold at least one vote, every source abstains everywhere")
        if weights is not None:
            weights = checks.weights(weights, labels.shape[1], "weights").tolist()
        grid = list(product(*(enumerate(_choices(c)) for c in (self.base, self.scalarizer, self.lr))))
        if (X_val is None) != (y_val is None) or (X_val is None and len(grid) > 1):
            raise InputError("X_val and y_val must be given both or neither, and to choose among several settings")
        validation = None
        if X_val is not None:
            x_val = checks.matrix(X_val, "X_val", columns=x.shape[1]).to(x)
            validation = x_val, checks.labels(y_val, len(x_val), self.num_classes, "y_val").to(x.device)
        best: tuple[float, tuple[int, ...], nn.Module] | None = None
        for (i, base), (j, scalarizer), (k, lr) in grid:
            network = self._network(base, x)
            loss = self._train(network, ParetoLoss(scalarizer, weights), lr, x, labels.to(x.device), validation)
            if len(grid) > 1 and _says_the_same(_log_probs(network, x if validation is None else validation[0])):
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
            flat=torch.cat([p.flatten() for p in parameters]) if parameters else x.new_empty(0),
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
            return _log_softmax(self.network(X))
        flat, out = self.flat.to(X.dtype), X
        ins, outs = self.sizes[:-1].tolist(), self.sizes[1:].tolist()
        for layer, (a, b) in enumerate(zip(ins, outs)):
            weight, bias, flat = flat.split([a * b, b, len(flat) - a * b - b])
            out = F.linear(out.relu() if layer else out, weight.view(b, a), bias)
        return _log_softmax(out)

    def predict_proba(self, X: Matrix) -> Matrix:
        """Probabilities of the classes (n, C): a tensor for a tensor, else a NumPy array."""
        self._must_be_fitted()
        x = _features(X)
        if self.network is None and x.shape[1] != int(self.sizes[0]):
            raise InputError(f"X must have {int(self.sizes[0])} columns as in fit, got {x.shape[1]}")
        probs = _log_probs(self, x if isinstance(X, Tensor) else x.to(self.flat.device)).exp()
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

    def _network(self, base: Base, x: Tensor) -> nn.Module:
        """A fresh network, its random weights drawn from the seed."""
        if not isinstance(base, str):
            with _seeded(self.seed, x.device):
                network = base()
            if not isinstance(network, nn.Module) or not any(p.requires_grad for p in network.parameters()):
                raise InputError(f"base must return a module with parameters to train, got {type(network).__name__}")
            return network.to(x.device)
        outs = self.num_classes if self.num_classes > 2 else 1
        widths = [x.shape[1], outs] if base == "lr" else [x.shape[1], self.hidden, outs]
        layers = [nn.utils.skip_init(nn.Linear, a, b, dtype=x.dtype) for a, b in pairwise(widths)]
        generator = torch.Generator().manual_seed(self.seed)
        for layer in layers:
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        network = nn.Sequential(*layers) if base == "lr" else nn.Sequential(layers[0], nn.ReLU(), layers[1])
        return network.to(x.device)

    def _train(
        self,
        network: nn.Module,
        loss: ParetoLoss,
        lr: float,
        x: Tensor,
        labels: Tensor,
        validation: tuple[Tensor, Tensor] | None,
    ) -> float:
        """Train in place; the log loss on the validation set at the end."""
        optimizer = torch.optim.AdamW(network.parameters(), lr)
        generator = torch.Generator().manual_seed(self.seed)
        voted = (labels >= 0).any(1)
        best, waited, current = math.inf, 0, math.nan
        for _ in progress.track(range(self.epochs), "harmonizer"):
            network.train()
            seed = int(torch.randint(2**31, (), generator=generator))  # dropout's
            with torch.enable_grad(), _seeded(seed, x.device):
                for chosen in torch.randperm(len(x), generator=generator).to(x.device).split(self.batch_size):
                    if not bool(voted[chosen].any()):
                        continue
                    optimizer.zero_grad()
                    out = network(x[chosen])
                    self._check_outputs(out, len(chosen))
                    loss(out, labels[chosen]).backward()
                    optimizer.step()
            if validation is not None:
                current = float(F.nll_loss(_log_probs(network, validation[0]).double(), validation[1]))
                waited = 0 if current < best else waited + 1
                best = min(best, current)
                if waited >= self.patience:
                    break
        if not all(bool(p.isfinite().all()) for p in network.parameters()):
            raise InputError(f"training diverged at lr {lr:g}: standardise X, or lower lr")
        network.eval()
        return current

    def _check_outputs(self, out: Tensor, n: int) -> None:
        if out.shape != (n, self.num_classes) and (self.num_classes > 2 or out.shape != (n, 1)):
            raise InputError(f"base must give logits of shape ({n}, {self.num_classes}), got {tuple(out.shape)}")


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
    y = _weak_labels(checks.tensor(answers, "answers")[:, None], len(p), p.shape[1], "answers").to(p.device)
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
    labels = _weak_labels(weak_labels, len(p), p.shape[1]).to(p.device)
    if rule not in get_args(Rule):
        raise InputError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
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


def _weak_labels(value: Any, n: int, c: int, name: str = "weak_labels") -> Tensor:
    labels = checks.tensor(value, name)
    if labels.ndim != 2 or len(labels) != n or labels.shape[1] == 0:
        raise InputError(f"{name} must have {n} rows and a column for every source, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{name} must be integer class indices, got {str(labels.dtype).removeprefix('torch.')}")
    labels = labels.long()
    bad = (labels < -1) | (labels >= c)
    if bool(bad.any()):
        where = labels.flatten()[bad.flatten().to(torch.uint8).argmax()]
        raise InputError(f"{name} must lie in 0..{c - 1}, or be -1, found {int(where)} at {checks.first_bad(bad)}")
    return labels


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What draws from the global random state starts from `seed`, and leaves that state as it was."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _choices(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _log_softmax(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
    return logits.log_softmax(1)


def _log_probs(network: nn.Module, x: Tensor) -> Tensor:
    with evaluating(network):
        out = torch.cat([network(part) for part in x.split(_BATCH)])
    return out if isinstance(network, Fitted) else _log_softmax(out)


def _says_the_same(log_probs: Tensor) -> bool:
    """As the authors: some class's probability hardly varies."""
    return bool((log_probs.exp().double().var(0, correction=0) < 1e-8).any())
