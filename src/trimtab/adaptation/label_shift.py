"""Label shift adapter: the classifier's last layer follows the stream's class mix, under any other adapter.

Reach for it where the source was long-tailed and the mix of classes changes from one deployment to the next: most
adapters correct what the inputs look like and keep the source's bias towards its frequent classes. Before deployment a
small network learns, on the frozen model's source features, which change of the last layer suits which class mix; on
the stream the mix is estimated from the predictions, and the changed model runs inside the `host`, any adapter.

Paper: Park, Yang, Choo, Yun, "Label Shift Adapter for Test-Time Adaptation under Covariate and Label Shifts", ICCV 2023
(arXiv:2308.08810). The authors left no code. What the network is told (one number, the degree of imbalance), what it
puts out (a change of weight and bias, scale and shift of the features), the three mixes it is trained on and the loss
are the paper's; the form of the number, the size of the network, the momentum and the uniform start are inferred. The
inverse mix hands the most frequent class's share to the rarest and so on; notes on the paper have the loss as cross
entropy of the logits + t log prior with t = 0, 1, 2 for the three mixes, which is the same where shares fall
geometrically. One number cannot say *which* classes are frequent, only how far the mix leans to the source's frequent
classes or away from them; and from a balanced source it says nothing, which is refused. For mixes of any other kind
`PriorShiftCorrection` adjusts every class by itself, and needs no training.

What we found: each batch makes (1 - momentum) of one step of expectation maximisation towards the mix under which the
stream is most likely (Saerens et al. 2002), so the estimate is on its way for several times 1 / (1 - momentum) batches,
longer where classes overlap. In the claim's world, ten overlapping classes, the plain correction does as well as the
trained adapter on all three mixes; and part of the adapter's gain on the inverse mix is only that the last layer was
trained for longer: it is there with the source's mix too, and cross entropy alone gives the source model as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from jaxtyping import Real
from torch import Tensor, nn

from trimtab.adaptation.base import Adapter, Inputs, Options
from trimtab.adaptation.batch_stats import use_batch_statistics
from trimtab.adaptation.changed_linear import Change, ChangedLinear
from trimtab.adaptation.label_shift_training import log_ratio, source_mix, train, trained_change
from trimtab.adaptation.prepared import Prepared, check_prepared
from trimtab.adaptation.state import Tensors
from trimtab.core import checks, modules
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions


class BatchStatistics(Adapter):
    """The plainest host: normalises by the batch, and learns nothing."""

    def __init__(self, model: nn.Module, **options: Unpack[Options]):
        super().__init__(model, **options)
        use_batch_statistics(self.model)
        self._begin()

    def _adapt(self, x: Inputs) -> Tensor:
        return self._predict(x)


class LabelShiftAdapter(Adapter):
    """Estimates the class mix of the stream, and changes the last layer of the model inside its host accordingly.

    The host's passes, by default one forward pass a batch.

    Args:
        model: a classifier that ends in a linear layer, logits (n, c).
        prepared: what `LabelShiftAdapter.prepare` returned for this model.
        host: the adapter that the changed model runs in, called as ``host(model, inplace=True)``: an adapter's class,
            or a `functools.partial` of one, such as ``partial(Tent, optimizer=...)``. It adapts as it would alone; the
            change of the last layer lies beyond its reach. By default batch statistics alone.
        momentum: share of the estimate that a batch leaves, in [0, 1]. 0.9; up to 0.99 for small batches, lower
            where the mix changes fast, 1 where `target` is known and shall stay.
        floor: smallest share that a class keeps in the estimate before it is normalised, in [0, 1 / c). An estimate
            feeds on predictions that it shapes itself; 1e-3, say, lets a class come back that was given up.
        target: class mix (c,) to begin with, in any scale; uniform by default.
        head: name of the linear layer that classifies; the model's last one by default.
        **options: what every `Adapter` takes; the host has its own.

    Attributes:
        target: the estimate (c,), a buffer. Each batch is predicted with the one before it.
        host: the adapter inside.

    Raises:
        InputError: `prepared` belongs to another model or another layer, the head is no plain linear layer, an
            argument is out of range, or `host` does not give an adapter.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        >>> source = [(x, (torch.arange(16) > 11).long())]
        >>> adapter = LabelShiftAdapter(model, LabelShiftAdapter.prepare(model, source, steps=10))
        >>> adapter(x + 2).shape, round(float(adapter.target.sum()), 4)
        (torch.Size([16, 2]), 1.0)

    Reference:
        Park et al., ICCV 2023, https://arxiv.org/abs/2308.08810
    """

    preparation = "required"
    target: Tensor
    start: Tensor

    def __init__(
        self,
        model: nn.Module,
        prepared: Prepared,
        *,
        host: Callable[..., Adapter] = BatchStatistics,
        momentum: float = 0.9,
        floor: float = 0.0,
        target: Real[Tensor, " c"] | None = None,
        head: str | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        check_prepared(prepared, "LabelShiftAdapter", self.model)
        layer = modules.head(self.model, head)
        c, d = layer.out_features, layer.in_features
        if len(prepared["prior"]) != c or len(prepared.get("output.bias", ())) not in (0, c * d + c + 2 * d):
            raise InputError(f"prepared must fit the head ({c} classes, {d} features), got {prepared}")
        self.momentum = checks.number(momentum, "momentum", low=0.0, high=1.0)
        self.floor = checks.number(floor, "floor", low=0.0, high=1 / c, high_open=True)
        self._dtype = layer.weight.dtype
        precise = layer.weight.new_empty(0, dtype=torch.promote_types(self._dtype, torch.float32))
        mix = precise.new_ones(c) if target is None else checks.weights(target, c, "target").to(precise)
        self.register_buffer("start", mix / mix.sum())
        self.register_buffer("target", self.start.clone())
        self.network = Tensors({name: tensor.to(precise) for name, tensor in prepared.items()})
        self.model = modules.replace(self.model, nn.Linear, lambda m: ChangedLinear(layer) if m is layer else m)
        self._begin()
        if isinstance(host, nn.Module):
            raise InputError(f"host must build an adapter, as the class {type(host).__name__} does; this is built")
        inside = host(self.model, inplace=True)
        if not isinstance(inside, Adapter):
            raise InputError(f"host must give an Adapter, it gave {type(inside).__name__}")
        inside._group, self._rows_interact = self._group, inside._rows_interact
        self.forwards, self.backwards = inside.forwards, inside.backwards
        self.model = inside

    @property
    def host(self) -> Adapter:
        """The adapter inside."""
        assert isinstance(self.model, Adapter)
        return self.model

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        head: str | None = None,
        hidden: int = 100,
        tau: float = 1.0,
        steps: int = 1500,
        batch: int = 128,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> Prepared:
        """Train the network on the source's features: one pass of the frozen model in eval mode, then Adam.

        Args:
            model: as for `LabelShiftAdapter`; it stays as it is.
            loader: batches of (inputs, labels) from the source, in its own class mix, every class included. All
                features are held at once.
            head: as for `LabelShiftAdapter`.
            hidden: units of the network, >= 1. It holds (hidden + 1) (c d + c + 2 d) numbers: for a thousand classes
                of two thousand features take a few.
            tau: weight of the class mixes in the loss, > 0; 1 is right where the model's probabilities are.
            steps: of Adam, >= 1.
            batch: source samples a step, drawn with replacement, >= 1.
            lr: Adam's learning rate, > 0.
            seed: of the network's start and of what is drawn.

        Returns:
            ``prior`` (c,), the source's class mix, and the two layers of the network.

        Raises:
            InputError: the loader is empty, has no labels or misses a class; the classes are balanced (their shares
                vary by less than a tenth); a feature is not finite; the model does more after the head.

        Example:
            >>> import torch
            >>> model = nn.Linear(2, 2)
            >>> source = [(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]))]
            >>> LabelShiftAdapter.prepare(model, source, steps=1, hidden=4)["prior"]
            tensor([0.6667, 0.3333], dtype=torch.float64)
        """
        model = modules.bare(model)
        layer = modules.head(model, head)
        checks.number(tau, "tau", low=0.0, low_open=True)
        checks.number(lr, "lr", low=0.0, low_open=True)
        for name, value in {"hidden": hidden, "steps": steps, "batch": batch}.items():
            checks.integer(value, name, low=1)
        source = Predictions.collect(model, loader, features=head or True, description="source features")
        if source.labels is None:
            raise InputError("loader must yield (inputs, labels), it yields no labels")
        prior = source_mix(source.labels, source.c)
        network = train(layer, source, prior, hidden=hidden, tau=tau, steps=steps, batch=batch, lr=lr, seed=seed)
        return Prepared(cls.__name__, {"prior": prior, **network}, model)

    def _adapt(self, x: Inputs) -> Tensor:
        updates, skipped = int(self.host.updates), int(self.host.skipped)
        logits = self._say(x)
        sound = self._estimate(logits.softmax(1))
        self.updates += int(self.host.updates) - updates
        self.skipped += int(not sound or int(self.host.skipped) > skipped)
        return logits

    def _predict(self, x: Inputs) -> Tensor:
        with self.host.frozen():
            return self._say(x)

    def _restore(self, network: nn.Module) -> None:
        self.host.reset()
        self.target = self.start.clone()

    def _say(self, x: Inputs) -> Tensor:
        """What the host says, its last layers changed to suit the estimate."""
        change = self._change()
        for layer in self.model.modules():
            if isinstance(layer, ChangedLinear):  # a host may keep copies of the model: teachers, anchors
                layer.change = change
        return self.host(x) if self.host.outputs == "logits" else self.host.log_probs(x)

    def _change(self) -> Change:
        network = self.network.named()
        make = _plain_change if "tau" in network else trained_change
        with torch.autocast(self.target.device.type, enabled=False):
            change = make(network, self.target, network["prior"])
        return Change(*(tensor.to(self._dtype) for tensor in change))

    def _estimate(self, probs: Tensor) -> bool:
        """Move the estimate towards the mean of the rows that are finite; whether all are."""
        finite = probs.isfinite().all(1)
        totals = self.summed(torch.cat((probs[finite].sum(0), finite.sum()[None].to(probs))))
        if totals[-1] > 0:
            mean = (totals[:-1] / totals[-1]).to(self.target)
            mix = (self.momentum * self.target + (1 - self.momentum) * mean).clamp_min(self.floor)
            self.target = mix / mix.sum()
        return bool(finite.all())


def PriorShiftCorrection(
    model: nn.Module, prior: Real[Tensor, " c"], *, tau: float = 1.0, **settings: Any
) -> LabelShiftAdapter:
    """The correction without training: adds tau (log estimate - log prior) to the logits.

    It is Bayes' rule where only the class mix differs from the source's and the model's probabilities are right. It
    follows any mix, from a balanced source too.

    Args:
        model: as for `LabelShiftAdapter`.
        prior: the source's class mix (c,), or its counts, > 0.
        tau: how much of the correction to make, > 0.
        **settings: those of `LabelShiftAdapter`, without `prepared`.

    Raises:
        InputError: `prior` has another length than the classes, or an entry that is not positive.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> x = torch.zeros(4, 2)
        >>> known = PriorShiftCorrection(model, torch.tensor([1, 1]), target=torch.tensor([1.0, 3.0]), momentum=1.0)
        >>> odds = (known(x) - model(x)).detach().exp()
        >>> torch.allclose(odds[:, 1] / odds[:, 0], torch.full((4,), 3.0))
        True

    Reference:
        Park et al., ICCV 2023, https://arxiv.org/abs/2308.08810
    """
    checks.number(tau, "tau", low=0.0, low_open=True)
    counts = checks.weights(prior, modules.head(model, settings.get("head")).out_features, "prior").double()
    if bool((counts == 0).any()):
        raise InputError(f"prior must be > 0 for every class, it is 0 at {checks.first_bad(counts == 0)}")
    tensors = {"prior": counts / counts.sum(), "tau": torch.tensor(tau, dtype=torch.float64)}
    return LabelShiftAdapter(model, Prepared("LabelShiftAdapter", tensors, model), **settings)


def _plain_change(network: dict[str, Tensor], mix: Tensor, prior: Tensor) -> Change:
    none = torch.zeros_like(network["tau"])
    return Change(none, network["tau"] * log_ratio(mix, prior), none, none)
