"""UnMix-TNS: normalise each input by itself and by a few remembered kinds of inputs, whatever the batch holds.

Reach for it where labels are correlated in time (video, one class after the other), where batches are tiny, or where
images come one by one: batch statistics then describe the class and wipe it out. Alone it learns nothing and costs one
forward pass; `unmix` puts it below an adapter that learns: ``Tent(unmix(model))``.

Paper: Tomar, Vray, Thiran, Bozorgtabar, "Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal
Correlation", ICLR 2024 (arXiv:2401.08328). The authors' code (devavratTomar/unmixtns) is followed: the variance of a
component mixed with an input leaves out the squared distance of their means, which is commented out there; components
move in every forward pass, in both modes, after the output was computed from where they stood.

Departures: the code corrects the momentum once, for a batch size set by hand; here each batch counts by its own size,
so that a short last batch, or sizes that change, move the components by as much an image. BatchNorm1d goes by the
source's statistics there; here only where its input is (n, c), which has no statistics of one input: a series (n, c, l)
has, and is un-mixed, as BatchNorm3d is, which the code leaves out. Layers without affine parameters work (the code
crashes). A batch whose statistics are not finite moves no component. Initial components come from a generator, in
float64. Inside `frozen`, and between the updates of a `window`, components stay.

What we found: it saves the unadapted model's accuracy rather than beating it. A small network on Fashion-MNIST, 600
images sorted by class in batches of 20, three seeds (source / batch statistics / UnMix-TNS, %): noise 48.6 / 18.3 /
47.1, low contrast 24.9 / 18.7 / 34.7, impulses 61.7 / 18.1 / 53.7; single seeds lie up to 15 points below the source
or 24 above. With one component it is instance normalisation, and at chance there: averages over maps, which the
classifier sees, say nothing then. It needs thousands of images to leave the source: ResNet-20 on CIFAR-10, sorted by
class, goes from 18 % right to 40 under Gaussian noise within 6 000, and stays there within 1 000. On a CPU the layer
takes as long as PyTorch's own batch statistics or less.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.adaptation.base import Adapter, Inputs, Options
from trimtab.adaptation.batch_stats import squares
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import BATCH_NORMS, BatchNormStandIn, put_back, remembered, replace


class UnMixTNS(Adapter):
    """Swaps batch normalisation for `UnmixedBatchNorm`, whose components follow the stream; no parameter moves.

    One forward pass a batch. `updates` counts the batches that moved the components, `skipped` those that did not
    because a prediction was not finite. In a distributed stream all processes keep the mean of their components.

    Args:
        model: a model with batch normalisation layers that keep running statistics, logits (n, c) or (n, c, ...).
        components: K, how many kinds of inputs each layer remembers, >= 1; 16, and 128 in the paper for streams that
            mix domains. 1 is instance normalisation.
        temperature: of the softmax over cosine similarities that assigns inputs to components, > 0; 0.07.
        spread: share of the source's variance that lies between the components at the start, in [0, 1); 0.5.
        momentum: by how much a batch of `batch_size_max` inputs moves the components it belongs to, in (0, 1]. None
            takes each layer's own, which is 0.1 where it was left alone.
        batch_size_max: the size that `momentum` belongs to, >= 1: a batch of n inputs moves the components by
            1 - (1 - momentum)^(n / batch_size_max). 64 for CIFAR-C, 16 for ImageNet-C.
        generator: draws the first components; seeded with 0 by default.
        **options: what every `Adapter` takes.

    Raises:
        InputError: the model has no batch normalisation layer, or one without running statistics; an argument is out of
            range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
        >>> adapter = UnMixTNS(model)
        >>> x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> with adapter.frozen():
        ...     alone, together = adapter(x[:1]), adapter(x)
        >>> torch.allclose(alone, together[:1], atol=1e-5)
        True

    Reference:
        Tomar et al., ICLR 2024, https://arxiv.org/abs/2401.08328
    """

    dense = True

    def __init__(
        self,
        model: nn.Module,
        *,
        components: int = 16,
        temperature: float = 0.07,
        spread: float = 0.5,
        momentum: float | None = None,
        batch_size_max: int = 64,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        self.model = unmix(
            self.model,
            components=components,
            temperature=temperature,
            spread=spread,
            momentum=momentum,
            batch_size_max=batch_size_max,
            generator=generator,
            inplace=True,
        )
        self._begin()

    def _adapt(self, x: Inputs) -> Tensor:
        before = remembered(self.model)
        with torch.no_grad():
            logits = self._predict(x)
        if self.summed((~logits.isfinite()).any().float()):
            put_back(before)
            self.skipped += 1
            return logits
        self.updates += 1
        if self._group is not None:
            self._average_components()
        return logits

    def _average_components(self) -> None:
        """Give every process of a distributed stream the mean of their components."""
        layers = [module for module in self.model.modules() if isinstance(module, UnmixedBatchNorm)]
        processes = self.summed(torch.ones((), device=layers[0].means.device))
        for layer in layers:
            layer.means = self.summed(layer.means.clone()) / processes
            layer.variances = self.summed(layer.variances.clone()) / processes


def unmix(
    model: nn.Module,
    *,
    components: int = 16,
    temperature: float = 0.07,
    spread: float = 0.5,
    momentum: float | None = None,
    batch_size_max: int = 64,
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> nn.Module:
    """A copy of `model`, in eval mode, with `UnmixedBatchNorm` for batch normalisation: the model for another adapter.

    The arguments are those of `UnMixTNS`; `inplace` changes the model itself. For an adapter that learns on top, the
    authors take hundredfold smaller steps than usual: Adam 1e-5 for CIFAR-C, 2.5e-6 for ImageNet-C.

    Example:
        >>> from functools import partial
        >>> from trimtab.adaptation import Tent
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
        >>> tent = Tent(unmix(model), optimizer=partial(torch.optim.Adam, lr=1e-5))
        >>> sorted(tent.moving)
        ['1.bias', '1.weight']
    """
    checks.integer(components, "components", low=1)
    checks.number(temperature, "temperature", low=0.0, low_open=True)
    checks.number(spread, "spread", low=0.0, high=1.0, high_open=True)
    checks.integer(batch_size_max, "batch_size_max", low=1)
    if momentum is not None:
        checks.number(momentum, "momentum", low=0.0, high=1.0, low_open=True)
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise InputError("model must have a batch normalisation layer, found none")
    generator = generator or torch.Generator().manual_seed(0)

    def build(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, _BatchNorm)
        own = layer.momentum if momentum is None else momentum
        if own is None:
            raise InputError(f"momentum must be given for {layer}, which has none of its own")
        return UnmixedBatchNorm(
            layer,
            components=components,
            temperature=temperature,
            spread=spread,
            momentum=own,
            batch_size_max=batch_size_max,
            generator=generator,
        )

    return replace(model if inplace else deepcopy(model), BATCH_NORMS, build).eval()


class UnmixedBatchNorm(BatchNormStandIn):
    """Normalises each input by the even mixture of K components, each of them mixed with the input as far as it fits.

    Args:
        layer: the batch normalisation layer whose statistics, weight and bias (the same parameters) are taken over.
        generator: draws the first components around the source's mean, such that their mixture has its mean and
            variance.
        components, temperature, spread, momentum, batch_size_max: as in `UnMixTNS`.

    Attributes:
        means, variances: of the components, (K, c), in single precision at least (buffers).
    """

    means: Tensor
    variances: Tensor

    def __init__(
        self,
        layer: _BatchNorm,
        *,
        components: int,
        temperature: float,
        spread: float,
        momentum: float,
        batch_size_max: int,
        generator: torch.Generator,
    ):
        super().__init__(layer)
        self.temperature = temperature
        self.momentum = momentum
        self.batch_size_max = batch_size_max
        k, share = components, spread if components > 1 else 0.0
        mean, var = self.source_mean.double(), self.source_var.double()
        draws = torch.randn(k, len(mean), generator=generator, device=generator.device, dtype=torch.float64)
        means = mean + (share * k / max(k - 1, 1) * var).sqrt() * draws.to(mean.device)
        dtype = torch.promote_types(self.source_mean.dtype, torch.float32)
        self.register_buffer("means", means.to(dtype))
        self.register_buffer("variances", ((1 - share) * var).to(dtype).repeat(k, 1))

    def _normalised(self, x: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n c *rest"]:
        """Normalise, then let the components follow."""
        if x.ndim == 2:
            return F.batch_norm(x, self.source_mean, self.source_var, self.weight, self.bias, eps=self.eps)
        with torch.autocast(x.device.type, enabled=False):  # its half precision is too coarse for statistics
            values = x.to(self.means.dtype)
            mean = values.flatten(2).mean(2)
            var = squares(values, mean) / (x.numel() // mean.numel())
            share = self._shares(mean)
            out = self._normalise(values, *self._mixed(mean, var, share)).to(x.dtype)
            self._follow(mean, var, share)
        return out

    @torch.no_grad()
    def _shares(self, mean: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
        """How far each input belongs to each component."""
        cosines = F.normalize(mean, dim=1) @ F.normalize(self.means, dim=1).T
        return (cosines / self.temperature).softmax(1)

    def _mixed(
        self, mean: Float[Tensor, "n c"], var: Float[Tensor, "n c"], share: Float[Tensor, "n k"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """Mean and variance of the even mixture over k of (1 - share) x component k + share x the input.

        Written as products of matrices, with means counted from the source's: an (n, k, c) tensor of the mixed
        statistics would outweigh the maps of deep layers.
        """
        k, kept = share.shape[1], 1 - share
        means, own = self.means - self.source_mean, mean - self.source_mean
        first = (kept @ means + own) / k
        second = kept.square() @ means.square() + 2 * own * ((kept * share) @ means)
        second = (second + own.square() * share.square().sum(1, keepdim=True)) / k
        within = (kept @ self.variances + var) / k
        return first + self.source_mean, within + (second - first.square()).clamp_min(0)

    @torch.no_grad()
    def _follow(self, mean: Float[Tensor, "n c"], var: Float[Tensor, "n c"], share: Float[Tensor, "n k"]) -> None:
        """Move each component towards the inputs that belong to it."""
        n = len(mean)
        momentum = 1 - (1 - self.momentum) ** (n / self.batch_size_max)
        pull, weight = momentum / n * share.T, momentum * share.mean(0)[:, None]
        means = self.means + pull @ mean - weight * self.means
        variances = self.variances + pull @ var - weight * self.variances
        sound = means.isfinite().all() & variances.isfinite().all()
        self.means = torch.where(sound, means, self.means)
        self.variances = torch.where(sound, variances, self.variances)
