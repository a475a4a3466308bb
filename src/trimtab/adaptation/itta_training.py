"""The training that ITTA needs: a classifier, and a consistency loss that learns to pull where classification pulls.

Chen, Zhang, Song, Shan, Liu, "Improved Test-Time Adaptation for Domain Generalization", CVPR 2023 (arXiv:2304.04494).
The authors' code (liangchen527/ITTA) is followed where it differs from the paper: mean squares instead of norms, the
features' difference is mixed minus clean, and the gap between the gradients is weighted by 0.1, which Adam divides
away.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from trimtab.adaptation.mixstyle import StyleDraw, draw_style, in_two_styles
from trimtab.adaptation.prepared import Prepared
from trimtab.core import checks, modules
from trimtab.core.checks import InputError
from trimtab.core.predictions import logits_of, take_apart

_PENALTY_WEIGHT = 0.1  # next to Adam's eps alone


class Elementwise(nn.Module):
    """A network without mixing: every entry goes through its own chain of scale, shift and ReLU.

    Starts as the identity on what is not negative. No ReLU follows the last scale and shift.

    Args:
        shape: of one input, or a shape that broadcasts to it: ``(c, 1, 1)`` learns one chain a channel.
        depth: scales in the chain, >= 1.

    Example:
        >>> Elementwise((2,), depth=3)(torch.tensor([[1.0, -1.0]]))
        tensor([[1., 0.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, shape: Sequence[int], depth: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(checks.integer(depth, "depth", low=1), *shape))
        self.bias = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """The value of the chain."""
        *inner, last = zip(self.weight, self.bias)
        for weight, bias in inner:
            x = (weight * x + bias).relu()
        return last[0] * x + last[1]


class Losses(NamedTuple):
    """What one update measured, after the classifier's step and before the consistency's."""

    classification: float
    consistency: float
    penalty: float


class ITTATrainer:
    """Trains a classifier together with its learnable consistency loss, on several domains at once.

    For loops of your own; `ITTA.prepare` runs one. Each update takes two passes of the classifier (each over clean and
    mixed features) and, for the consistency loss, derivatives of second order. Normalisation layers keep their running
    statistics, as in the authors' code: begin with a pretrained model.

    Args:
        model: a classifier, logits (n, c); it stays as it is. What does not ask for gradients is not trained.
        blocks: names of two or more submodules, in the order in which they run, that return feature maps (n, c, ...);
            styles are mixed after the first or the second. For a ResNet ``("layer1", "layer2", "layer3", "layer4")``.
        head: name of the linear layer that makes logits of features; the last one by default.
        depth: scales in the consistency loss's chain; 10.
        lr: Adam's learning rate. 5e-5 for pretrained ResNets, 1e-3 on 28 x 28 images.
        consistency_lr: that of the consistency loss; a tenth of `lr`. 0 leaves the loss a plain mean square.
        weight_decay: of the classifier; 0.
        draw: ``draw(n, generator)`` gives the style that n images are mixed by.
        generator: a CPU generator for the styles; seeded with 0 by default.

    Attributes:
        network: the classifier in training.
        consistency: the learnable loss's chain over features.
        skipped: steps left out because a loss or gradient was not finite, or the consistency loss had none.

    Raises:
        InputError: fewer than two blocks, a name that is not there, a setting out of range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        ...                       nn.Linear(64, 2))
        >>> trainer = ITTATrainer(model, ("1", "3"))
        >>> generator = torch.Generator().manual_seed(0)
        >>> domains = [(torch.rand(6, 3, 8, 8, generator=generator) + i, torch.arange(6) % 2) for i in range(3)]
        >>> losses = trainer.update(domains)
        >>> list(trainer.prepared())[-2:]
        ['blocks.0.1', 'blocks.1.3']

    Reference:
        Chen et al., CVPR 2023, https://arxiv.org/abs/2304.04494
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        *,
        head: str | None = None,
        depth: int = 10,
        lr: float = 5e-5,
        consistency_lr: float | None = None,
        weight_decay: float = 0.0,
        draw: StyleDraw = draw_style,
        generator: torch.Generator | None = None,
    ):
        if isinstance(blocks, str) or len(set(blocks)) < max(2, len(blocks)):
            raise InputError(f"blocks must name at least two submodules, each once, got {blocks!r}")
        self._given = model
        self.network = deepcopy(modules.bare(model)).eval()
        self.blocks = {name: modules.submodule(self.network, name) for name in blocks}
        self.head = modules.head(self.network, head)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.consistency = Elementwise((self.head.in_features,), depth).to(self.head.weight)
        self.draw = draw
        self.generator = generator or torch.Generator().manual_seed(0)
        self.skipped = 0
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        own = set(self.head.parameters())
        self.extractor = [parameter for parameter in trained if parameter not in own]
        if not self.extractor:
            raise InputError("model must have parameters before its head that ask for gradients, found none")
        lr = checks.number(lr, "lr", low=0.0, low_open=True)
        slow = lr / 10 if consistency_lr is None else checks.number(consistency_lr, "consistency_lr", low=0.0)
        decay = checks.number(weight_decay, "weight_decay", low=0.0)
        self.optimizer = torch.optim.Adam(trained, lr=lr, weight_decay=decay)
        self.consistency_optimizer = torch.optim.Adam(self.consistency.parameters(), lr=slow)

    def update(self, minibatches: Iterable[Any]) -> Losses:
        """One step of the classifier, then one of the consistency loss.

        Args:
            minibatches: one labelled batch a domain, (inputs, labels).

        Returns:
            Classification loss (clean plus mixed), consistency loss, and the squared gap between their normalised
            gradients: 0 where they are parallel, 2 where they have nothing in common, NaN where one vanishes.

        Raises:
            InputError: labels are missing or out of range, inputs are not finite, or a block returns no feature maps.
        """
        x, labels = self._together(minibatches)
        if not self.shapes:
            self._dry_run(x)
        classification, consistency = self._losses(x, labels)
        gradients = torch.autograd.grad(
            classification + consistency, self.optimizer.param_groups[0]["params"], allow_unused=True
        )
        self._step(self.optimizer, gradients)

        classification, consistency = self._losses(x, labels)
        penalty = gradient_alignment_penalty(consistency, classification, self.extractor)
        self._step(
            self.consistency_optimizer,
            torch.autograd.grad(_PENALTY_WEIGHT * penalty, list(self.consistency.parameters()), allow_unused=True),
        )
        return Losses(*(float(value.detach()) for value in (classification, consistency, penalty)))

    def prepared(self) -> Prepared:
        """What `ITTA` takes: the trained network, the consistency loss, and the shapes of the blocks' maps."""
        if not self.shapes:
            raise InputError("prepared must follow at least one update")
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"consistency.{name}": tensor for name, tensor in self.consistency.state_dict().items()}
        tensors |= {f"blocks.{i}.{name}": torch.tensor(shape) for i, (name, shape) in enumerate(self.shapes.items())}
        return Prepared("ITTA", {name: tensor.clone() for name, tensor in tensors.items()}, self._given)

    def _together(self, minibatches: Iterable[Any]) -> tuple[Shaped[Tensor, "n ..."], Tensor]:
        device = self.head.weight.device
        xs, ys = [], []
        for i, batch in enumerate(minibatches):
            x, labels = take_apart(batch, device)
            if labels is None or not isinstance(x, Tensor):
                raise InputError(f"minibatches[{i}] must be (inputs, labels), two tensors")
            xs.append(checks.finite(x, f"minibatches[{i}]"))
            ys.append(checks.labels(labels, len(x), self.head.out_features, f"labels of minibatches[{i}]"))
        if not xs:
            raise InputError("minibatches must hold at least one batch, got none")
        return torch.cat(xs), torch.cat(ys)

    def _dry_run(self, x: Tensor) -> None:
        """Note the shapes of the blocks' maps."""
        outputs: dict[str, list[Tensor]] = {}
        with ExitStack() as stack, torch.no_grad():
            for name, block in self.blocks.items():
                stack.callback(block.register_forward_hook(partial(_note, outputs, name)).remove)
            logits_of(self.network, x[:1])
        if list(outputs) != list(self.blocks):
            raise InputError(f"blocks must be named in the order in which they run, {list(outputs)}")
        for name, seen in outputs.items():
            shapes = [tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__ for maps in seen]
            if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim < 3 or seen[0][0, 0].numel() < 2:
                raise InputError(
                    f"block {name!r} must return feature maps (n, c, ...) once a pass, it returned {shapes}"
                )
            if bool((seen[0] < 0).any()):
                warnings.warn(
                    f"block {name!r} returns negative values, which ITTA's maps will cut off at test time: "
                    "name a block that ends in a ReLU",
                    RuntimeWarning,
                    stacklevel=3,
                )
            self.shapes[name] = tuple(seen[0].shape[1:])

    def _losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classification and consistency loss of one pass over clean and mixed features."""
        style = self.draw(len(x), self.generator)
        block = list(self.blocks.values())[style.after]
        clean, mixed, logits = in_two_styles(self.network, block, self.head, x, style)
        classification = sum(F.cross_entropy(part, labels) for part in logits.chunk(2))
        return torch.as_tensor(classification), self.consistency(mixed - clean).square().mean()

    def _step(self, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
        if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
            self.skipped += 1
            return
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def _note(seen: dict[str, list[Tensor]], name: str, _: nn.Module, __: object, output: Tensor) -> None:
    seen.setdefault(name, []).append(output)


def gradient_alignment_penalty(
    loss: Float[Tensor, ""], target: Float[Tensor, ""], parameters: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """Mean squared gap between the gradients of two losses, each standardised over all entries.

    Gradients flow into whatever makes `loss`, through derivatives of second order; means and standard deviations are
    constants.

    Args:
        loss: the loss whose gradient shall follow.
        target: the loss that it shall follow.
        parameters: with respect to which the gradients are taken.

    Returns:
        2 (1 - correlation of the gradients), up to the factor (k - 1) / k of k entries. NaN where a gradient is
        constant, of zeros for instance.

    Example:
        >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> float(gradient_alignment_penalty((w**2).sum(), (w**2).sum() * 7, [w]).detach())
        0.0
    """

    def flat(gradients: Sequence[Tensor]) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients])

    ours = flat(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))
    theirs = flat(torch.autograd.grad(target, parameters, materialize_grads=True))
    standard = [(g - g.detach().mean()) / g.detach().std() for g in (ours, theirs)]
    return (standard[0] - standard[1]).square().mean()
