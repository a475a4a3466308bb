"""DeYO: learn from samples whose prediction falls when the object in the image is destroyed.

Reach for it where a sure prediction may be sure for the wrong reason: where colour or background went with the class in
training and does not in the stream. Like SAR it moves the layers below the top block only, and serves wild streams.

Paper: Lee, Jung, Lee, Park, Shin, Hwang, Yoon, "Entropy is not Enough for Test-Time Adaptation: From the Perspective
of Disentangled Factors", ICLR 2024 (arXiv:2403.07366). The authors' code (Jhyun17/DeYO) is followed. Departures: its
`reset` reads a state that it never stores, and fails; here it resets. Margins follow the number of classes, as its
scripts do and its defaults, made for a thousand, do not. Images need not be square, and an occlusion that reaches
outside is refused. Eval mode is used instead of ``model.train()`` (`train_mode` follows the code), and all kinds of
normalisation layers move, not three. With batch normalisation, the destroyed images are normalised by themselves: by
those of the sure images alone, and by a single image where only one is sure; where its maps are of one pixel, nothing
is learnt from it (the code stops with an error).

What we found, where a colour went with the class in training and against it in the stream (its claim): 61 % in the
worst group of class and colour, Tent 54 % and plain batch statistics 54 %, learning from a third of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, entropy
from trimtab.adaptation.batch_stats import source_statistics, use_batch_statistics
from trimtab.adaptation.destroy import check_images, shuffle_patches
from trimtab.adaptation.lower_norms import lower_norm_parameters
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import held


class DeYO(Adapter):
    """Minimises the weighted entropy of samples that are sure, and sure because of the object's shape.

    PLPD, the difference of the predicted class's probability between an image and the same with its object destroyed,
    tells whether shape mattered. Two forward passes and one backward pass a batch: the second forward pass sees the
    sure images only.

    Args:
        model: a classifier of images (n, c, h, w) with normalisation layers, logits (n, c).
        e_margin: samples whose entropy (nats) is not below it are left out, > 0; default 0.5 ln(c), the authors'. Above
            ln(c) all are kept.
        plpd_margin: samples whose PLPD is not above it are left out, in [-1, 1]; -1 keeps all. 0.2 as the authors take
            for wild streams; 0.3 on mild ones, 0.5 where two classes differ in a spurious colour.
        e_reference: a sample's weight is exp(e_reference - entropy) + exp(PLPD); default 0.4 ln(c), the authors'.
        weigh_entropy, weigh_plpd: False leaves that term of the weight out; without both all weights are one.
        destroy: makes images without their objects: ``destroy(images, generator)``. Default `shuffle_patches`, 4 x 4
            patches; `shuffle_pixels` and `occlude` are the authors' others.
        optimizer: builds the optimizer from the parameters that move. Default Adam 1e-3, for CIFAR in batches of 200;
            the authors take SGD with momentum 0.9: ``partial(SGD, lr=2.5e-4, momentum=0.9)`` for a ResNet-50 on
            ImageNet, 1e-3 for a ViT-B, in batches of 64.
        parameters_of: chooses the parameters that move, by name; weights and biases of the normalisation layers outside
            the top block, see `lower_norm_parameters`.
        generator: drawn from by `destroy`, saved with the state; a CPU generator of seed 0 by default.
        train_mode: keep dropout and stochastic depth active, as the authors' code does.
        **options: what every `Adapter` takes.

    Attributes:
        reliable, selected: samples below `e_margin` so far, and those of them that were learnt from (buffers).

    Raises:
        InputError: a setting is out of range, no normalisation layer is left outside the top block; or, at a call, the
            input is no batch of images, or `destroy` cannot serve it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> deyo = DeYO(model, e_margin=0.69, plpd_margin=0.0)
        >>> deyo(torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([16, 2])
        >>> int(deyo.selected) <= int(deyo.reliable) <= int(deyo.samples)
        True

    Reference:
        Lee et al., ICLR 2024, https://arxiv.org/abs/2403.07366
    """

    forwards = 2
    backwards = 1
    generator: torch.Generator
    reliable: Tensor
    selected: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        e_margin: float | None = None,
        plpd_margin: float = 0.2,
        e_reference: float | None = None,
        weigh_entropy: bool = True,
        weigh_plpd: bool = True,
        destroy: Callable[[Tensor, torch.Generator], Tensor] = shuffle_patches,
        optimizer: OptimizerFactory = ADAM,
        parameters_of: Choice = lower_norm_parameters,
        generator: torch.Generator | None = None,
        train_mode: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        self.e_margin = None if e_margin is None else checks.number(e_margin, "e_margin", low=0.0, low_open=True)
        self.plpd_margin = checks.number(plpd_margin, "plpd_margin", low=-1.0, high=1.0)
        self.e_reference = None if e_reference is None else checks.number(e_reference, "e_reference")
        self.weigh_entropy = weigh_entropy
        self.weigh_plpd = weigh_plpd
        self.destroy = destroy
        use_batch_statistics(self.model, train_mode=train_mode)
        self._begin(parameters_of, optimizer)
        self.generator = generator or torch.Generator().manual_seed(0)
        for name in ("reliable", "selected"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def _adapt(self, x: Inputs) -> Tensor:
        if int(self.samples) == 0:  # refused now rather than at the first batch that holds a sure image
            self._destroyed(x, torch.tensor([0]), torch.Generator())
        logits = self._call(self.model, x)
        self._descend(self._loss(x, logits))
        return logits

    def _loss(self, x: Inputs, logits: Tensor) -> Tensor | None:
        """The mean weighted entropy of the samples to learn from; None where there are none."""
        uniform = math.log(logits.shape[1])
        e_margin = 0.5 * uniform if self.e_margin is None else self.e_margin
        e_reference = 0.4 * uniform if self.e_reference is None else self.e_reference
        entropies = entropy(logits)
        # the negations let NaN through, to make a loss that is skipped and counted
        reliable = (~(entropies.detach() >= e_margin)).nonzero()[:, 0]
        if len(reliable) == 0:
            return None
        self.reliable += len(reliable)
        shown = self._destroyed(x, reliable, self.generator)
        alone = self.model if len(reliable) == 1 else nn.Identity()
        with torch.no_grad(), held(self.model), source_statistics(alone):
            try:
                destroyed = self._call(self.model, shown)
            except InputError:
                if len(reliable) > 1:
                    raise
                return None  # alone, with maps of one pixel, it has no statistics
        sure, predicted = logits.detach()[reliable].softmax(1).max(1)
        plpd = sure - destroyed.softmax(1).gather(1, predicted[:, None])[:, 0]
        on_shape = ~(plpd <= self.plpd_margin)
        self.selected += int(on_shape.sum())
        if not on_shape.any():
            return None
        h, plpd = entropies[reliable][on_shape], plpd[on_shape]
        weights = self.weigh_entropy * (e_reference - h.detach()).exp() + self.weigh_plpd * plpd.exp()
        return (weights * h).mean() if self.weigh_entropy or self.weigh_plpd else h.mean()

    def _destroyed(self, x: Inputs, chosen: Tensor, generator: torch.Generator) -> Tensor | Mapping[str, Any]:
        """The chosen inputs, what is an image among them destroyed."""
        if isinstance(x, Tensor):
            check_images(x)
            return self.destroy(x[chosen], generator)
        taken = {name: value[chosen] if isinstance(value, Tensor) else value for name, value in x.items()}
        pictures = {name: value for name, value in taken.items() if isinstance(value, Tensor) and value.ndim == 4}
        if len(pictures) != 1:
            raise InputError(f"x must hold images (n, c, h, w) under one name, it does under {list(pictures)}")
        return taken | {name: self.destroy(value, generator) for name, value in pictures.items()}
