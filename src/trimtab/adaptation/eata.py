"""EATA: adapt on reliable, non-redundant inputs only, and stay close to what mattered for the source.

Reach for it where Tent works but is too eager: it learns from fewer samples, each worth more, and with its Fisher term
it runs for long without forgetting the source domain. It lives on batch statistics, so batches must be large and mixed.
`ETA` is the same without the Fisher term, and needs no source data.

Paper: Niu, Wu, Zhang, Chen, Zheng, Zhao, Tan, "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022
(arXiv:2204.02610). Where code and paper differ the authors' code (mr-eggplant/EATA) is followed: the loss is a mean
over the *selected* samples, not over the batch; the entropy margin is 0.4 ln(c), not the class's own default
ln(1000) / 2 - 1; the Fisher weight is 2000, not the 50 of an unused default; Fisher values are squares of
batch-mean gradients. Departures: `reset` clears the moving average of probabilities too (the authors' does not);
eval mode is used instead of ``model.train()`` (`train_mode` follows the code); all normalisation layers move, not
BatchNorm2d alone; and `d_margin`, where it is not given, follows the number of classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, entropy
from trimtab.adaptation.batch_stats import use_batch_statistics
from trimtab.adaptation.prepared import Prepared, check_prepared
from trimtab.adaptation.state import Tensors
from trimtab.core import checks, modules, progress
from trimtab.core.checks import InputError
from trimtab.core.predictions import logits_of, take_apart

_D_MARGINS = {2: 0.9, 10: 0.4, 100: 0.1, 1000: 0.05}
_LONG = 1000


class EATA(Adapter):
    """Minimises the weighted entropy of reliable, non-redundant samples, with a Fisher pull to the source.

    One forward and one backward pass a batch; none backward where nothing is selected.

    Args:
        model: a classifier with normalisation layers, logits (n, c).
        prepared: what `EATA.prepare` returned for this model, its Fisher values; None leaves the Fisher term out.
        fisher_weight: weight of the Fisher term, >= 0. 2000 in the authors' script for ImageNet-C; later benchmarks
            take 1 for CIFAR-10-C and CIFAR-100-C.
        e_margin: samples whose entropy (nats) is not below it are left out, > 0. Default 0.4 ln(c), the authors'.
        d_margin: samples whose |cosine| with the moving average of probabilities is not below it are left out, in
            (0, 1]. Default by the number of classes, log-linear between 0.9 at 2, 0.4 at 10 (CIFAR-10-C), 0.1 at 100
            (CIFAR-100-C) and 0.05 at 1000 (ImageNet-C): the cosine of any two probability vectors is large when
            classes are few.
        optimizer: builds the optimizer from the parameters that move. Default Adam 1e-3, for CIFAR in batches of 200;
            for ImageNet in batches of 64 the authors take ``partial(SGD, lr=2.5e-4, momentum=0.9)``.
        parameters_of: chooses the parameters that move, by name; weights and biases of all normalisation layers.
        train_mode: keep dropout and stochastic depth active, as the authors' code does.
        **options: what every `Adapter` takes.

    Attributes:
        reliable, selected: samples below `e_margin` so far, and those of them that were learnt from (buffers).
        mean_probs: moving average of the selected probabilities (c,); empty before the first.

    Raises:
        InputError: a margin is out of range, or `prepared` belongs to another model or to other parameters than those
            that move.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> source = [torch.randn(16, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        >>> eata = EATA(model, prepared=EATA.prepare(model, source))
        >>> eata(source[0] + 2).shape
        torch.Size([16, 2])
        >>> int(eata.selected) <= int(eata.reliable) <= int(eata.samples)
        True

    Reference:
        Niu et al., ICML 2022, https://arxiv.org/abs/2204.02610
    """

    backwards = 1
    preparation = "optional"
    reliable: Tensor
    selected: Tensor
    mean_probs: Tensor
    passed_over: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        prepared: Prepared | None = None,
        fisher_weight: float = 2000.0,
        e_margin: float | None = None,
        d_margin: float | None = None,
        optimizer: OptimizerFactory = ADAM,
        parameters_of: Choice = modules.norm_parameters,
        train_mode: bool = False,
        **options: Unpack[Options],
    ):
        if prepared is not None:
            check_prepared(prepared, "EATA", model)
        super().__init__(model, **options)
        self.fisher_weight = checks.number(fisher_weight, "fisher_weight", low=0.0)
        self.e_margin = None if e_margin is None else checks.number(e_margin, "e_margin", low=0.0, low_open=True)
        self.d_margin = (
            d_margin if d_margin is None else checks.number(d_margin, "d_margin", low=0.0, high=1.0, low_open=True)
        )
        use_batch_statistics(self.model, train_mode=train_mode)
        self._begin(parameters_of, optimizer)
        self.fishers = Tensors({} if prepared is None else self._fitting(prepared))
        for name in ("reliable", "selected", "passed_over"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_probs", torch.empty(0, device=modules.device_of(self.model)))

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        n: int = 2000,
        *,
        parameters_of: Choice = modules.norm_parameters,
        train_mode: bool = False,
    ) -> Prepared:
        """How much each parameter matters for the source: squared gradients of the loss on the model's own labels.

        To be run before the stream, with the same `parameters_of` and `train_mode` as the adapter.

        Args:
            model: a classifier with normalisation layers; it stays as it is.
            loader: batches of inputs from the source's domain, 64 each in the authors' script; labels are ignored.
            n: how many inputs to take, at most; 2000 as the authors do.
            parameters_of: chooses the parameters, by name.
            train_mode: as in `EATA`.

        Returns:
            For each parameter's name the mean over batches of the squared gradient of the batch's mean loss.

        Raises:
            InputError: the loader is empty, an input is not finite, or a gradient is not.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
            >>> EATA.prepare(model, [torch.randn(16, 3, generator=torch.Generator().manual_seed(0))])
            Prepared('EATA', {1.weight: (8,), 1.bias: (8,)})
        """
        checks.integer(n, "n", low=1)
        network = use_batch_statistics(deepcopy(modules.bare(model)), train_mode=train_mode).requires_grad_(False)
        parameters = {name: parameter.requires_grad_(True) for name, parameter in parameters_of(network).items()}
        totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        device = modules.device_of(network)
        batches = seen = 0
        for batch in progress.track(loader, "Fisher values"):
            x, _ = take_apart(batch, device)
            left = n - seen
            x = {k: v[:left] for k, v in x.items()} if isinstance(x, Mapping) else checks.finite(x, "x")[:left]
            with torch.enable_grad():
                logits = logits_of(network, x)
                loss = F.cross_entropy(logits, logits.detach().argmax(1))
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            for total, gradient in zip(totals.values(), gradients):
                total += gradient.square()
            batches, seen = batches + 1, seen + len(logits)
            if seen >= n:
                break
        if batches == 0:
            raise InputError("loader must yield at least one batch, it yielded none")
        fishers = {name: checks.finite(total / batches, f"the gradient of {name}") for name, total in totals.items()}
        return Prepared(cls.__name__, fishers, model)

    def reset(self) -> None:
        """Return to the source model; the moving average of probabilities is cleared too."""
        super().reset()
        self.mean_probs = self.mean_probs.new_empty(0)

    def _adapt(self, x: Inputs) -> Tensor:
        logits = self._call(self.model, x)
        entropies = entropy(logits)
        chosen = self._select(logits.detach(), entropies.detach())
        loss = None
        if len(chosen):
            kept = entropies[chosen]
            e_margin = self._margins(logits.shape[1])[0]
            loss = ((e_margin - kept.detach()).exp() * kept).mean() + self._distance()
        elif not bool(entropies.isfinite().all()):
            self.skipped += 1
        self._descend(loss)
        return logits

    def _select(self, logits: Tensor, entropies: Tensor) -> Tensor:
        """Indices of the samples to learn from; the counters and the moving average take note of them."""
        e_margin, d_margin = self._margins(logits.shape[1])
        reliable = (entropies < e_margin).nonzero()[:, 0]
        probs = logits[reliable].softmax(1)
        chosen = reliable
        if self.mean_probs.numel():
            different = F.cosine_similarity(self.mean_probs[None], probs, dim=1).abs() < d_margin
            chosen, probs = reliable[different], probs[different]
        self.reliable += len(reliable)
        self.selected += len(chosen)
        if len(chosen):
            mean = probs.mean(0)
            self.mean_probs = 0.9 * self.mean_probs + 0.1 * mean if self.mean_probs.numel() else mean
            self.passed_over.zero_()
        else:
            self._pass_over(len(reliable), d_margin)
        return chosen

    def _margins(self, classes: int) -> tuple[float, float]:
        e_margin = 0.4 * math.log(classes) if self.e_margin is None else self.e_margin
        if self.d_margin is not None:
            return e_margin, self.d_margin
        known, margins = np.log([*_D_MARGINS]), np.log([*_D_MARGINS.values()])
        return e_margin, float(np.exp(np.interp(math.log(classes), known, margins)))

    def _distance(self) -> Tensor | float:
        """The Fisher term: fisher_weight * sum of w (theta - theta_source)^2."""
        source = self.source.named()
        terms = [(w * (self.moving[name] - source[name]).square()).sum() for name, w in self.fishers.named().items()]
        return self.fisher_weight * sum(terms)

    def _pass_over(self, reliable: int, d_margin: float) -> None:
        before = int(self.passed_over)
        self.passed_over += reliable
        if before < _LONG <= before + reliable:
            warnings.warn(
                f"EATA has selected none of the last {before + reliable} reliable samples: "
                f"d_margin {d_margin:g} is too small for this stream",
                RuntimeWarning,
                stacklevel=2,
            )

    def _fitting(self, fishers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if set(fishers) != set(self.moving):
            odd = sorted(set(fishers) ^ set(self.moving))
            raise InputError(f"prepared must hold the names of the parameters that move, they differ in {odd[:4]}")
        return {name: value.to(self.moving[name]) for name, value in fishers.items()}


def ETA(model: nn.Module, **settings: Any) -> EATA:
    """EATA without its Fisher term: needs no source data, and may forget the source on a long stream.

    Args:
        model: a classifier with normalisation layers, logits (n, c).
        **settings: those of `EATA`, without `prepared` and `fisher_weight`.

    Example:
        >>> eta = ETA(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), d_margin=0.5)
        >>> eta(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([16, 2])

    Reference:
        Niu et al., ICML 2022, https://arxiv.org/abs/2204.02610
    """
    return EATA(model, prepared=None, **settings)
