"""Slots: a picture taken apart into a few vectors, each of which draws its own part of it.

The parts of a slot-centric model: an encoder makes tokens of the input, `SlotAttention` lets a few slots compete for
them, a decoder draws every slot by itself, and what the slots have drawn is fused into one prediction. `SlotModel` puts
any four such parts together; `slot_autoencoder` builds the one for images.

Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020 (arXiv:2006.15055), in the form of
Prabhudesai et al., "Test-time Adaptation with Slot-Centric Models", ICML 2023 (arXiv:2203.11194), whose code
(mihirp1998/Slot-TTA) is followed: slots begin at learnt vectors, one each, and not at random ones; the decoder is a
residual network over coordinates. That code scales both axes of a picture by its height; here each axis is scaled by
its own length, which is the same for square pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError

Drawn = tuple[Float[Tensor, "n slots c *where"], Float[Tensor, "n slots *where"]]
Fused = tuple[Float[Tensor, "n _ *where"], Float[Tensor, "n slots *where"]]


class Scene(NamedTuple):
    """What a slot model says about n inputs.

    Attributes:
        prediction: the input again, or what is to be predicted of it; (n, 3, height, width) for images.
        masks: (n, slots, ...) how much of each place belongs to each slot; they sum to one over the slots, which have
            no fixed order.
        slots: (n, slots, dim) the slots themselves.
    """

    prediction: Float[Tensor, "n c *where"]
    masks: Float[Tensor, "n slots *where"]
    slots: Float[Tensor, "n slots dim"]


class SlotModel(nn.Module):
    """Encoder, slot attention, decoder and fusion, each of which may be your own.

    Args:
        encoder: ``encoder(x)`` gives tokens (n, tokens, dim).
        attention: ``attention(tokens)`` gives slots (n, slots, dim).
        decoder: ``decoder(slots, x)`` gives what every slot draws (n, slots, c, ...) and how strongly it claims each
            place (n, slots, ...). It is given the input to learn where to draw: an image's size, the points or the
            rays of a mapping.
        fuse: makes the prediction and the masks of that; `blend` for colours, `union` for occupancy.

    Example:
        >>> model = slot_autoencoder(slots=3, dim=8)
        >>> scene = model(torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0)))
        >>> scene.prediction.shape, scene.masks.shape, scene.slots.shape
        (torch.Size([2, 3, 8, 10]), torch.Size([2, 3, 8, 10]), torch.Size([2, 3, 8]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        attention: nn.Module,
        decoder: nn.Module,
        fuse: Callable[[Tensor, Tensor], Fused] | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.attention = attention
        self.decoder = decoder
        self.fuse = fuse or blend

    def forward(self, x: Any) -> Scene:
        """Take n inputs apart and draw them again."""
        slots = self.attention(self.encoder(x))
        return Scene(*self.fuse(*self.decoder(slots, x)), slots)


def slot_autoencoder(
    slots: int = 11,
    dim: int = 64,
    *,
    iterations: int = 3,
    layers: int = 4,
    kernel: int = 5,
    blocks: int = 4,
    channels: int = 3,
) -> SlotModel:
    """The slot model of images that the authors train on CLEVR; the defaults are theirs.

    Args:
        slots: how many parts a picture has, at most; the background is one.
        dim: width of everything.
        iterations: rounds of slot attention.
        layers, kernel: convolutions of the encoder, and their odd size.
        blocks: residual blocks of the decoder.
        channels: of the picture.

    Example:
        >>> sum(parameter.numel() for parameter in slot_autoencoder().parameters())
        409796
    """
    return SlotModel(
        SlotEncoder(dim, layers=layers, kernel=kernel, channels=channels),
        SlotAttention(slots, dim, iterations=iterations),
        SlotDecoder(dim, blocks=blocks, channels=channels),
    )


class SlotEncoder(nn.Module):
    """Convolutions with ReLU, and a linear map of every pixel's place added at the end.

    Args:
        dim: width.
        layers: how many convolutions.
        kernel: their size, odd.
        channels: of the picture.
    """

    def __init__(self, dim: int = 64, *, layers: int = 4, kernel: int = 5, channels: int = 3):
        super().__init__()
        checks.integer(layers, "layers", low=1)
        if checks.integer(kernel, "kernel", low=1) % 2 == 0:
            raise InputError(f"kernel must be odd, got {kernel}")
        widths = (channels, *(dim for _ in range(layers)))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(into, out, kernel, padding=kernel // 2) for into, out in pairwise(widths)
        )
        self.place = nn.Linear(4, dim)

    def forward(self, x: Float[Tensor, "n c height width"]) -> Float[Tensor, "n tokens dim"]:
        """One token a pixel."""
        places = _places(x).to(x.dtype)
        for convolution in self.convolutions:
            x = convolution(x).relu()
        return x.flatten(2).mT + self.place(torch.cat((places, 1 - places), 1))


class SlotAttention(nn.Module):
    """Slots compete for tokens: each token is shared out among them, and each slot is renewed by what it was given.

    Args:
        slots: how many.
        dim: width of tokens and slots.
        iterations: rounds; gradients flow through all of them.
        hidden: width of the network that follows each renewal; `dim` if larger.
        eps: added to every share; 1e-8.

    Example:
        >>> attention = SlotAttention(4, 8)
        >>> attention(torch.rand(2, 25, 8, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([2, 4, 8])

    Reference:
        Locatello et al., NeurIPS 2020, https://arxiv.org/abs/2006.15055
    """

    def __init__(self, slots: int, dim: int, *, iterations: int = 3, hidden: int = 0, eps: float = 1e-8):
        super().__init__()
        self.iterations = checks.integer(iterations, "iterations", low=1)
        self.eps = eps
        self.start = nn.Parameter(torch.randn(1, checks.integer(slots, "slots", low=1), dim))
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.renew = nn.GRUCell(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, max(dim, hidden)), nn.Linear(max(dim, hidden), dim)
        self.norm_tokens, self.norm_slots, self.norm_renewed = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, tokens: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n slots dim"]:
        """The slots after the last round."""
        tokens = self.norm_tokens(tokens)
        keys, values = self.key(tokens), self.value(tokens)
        slots = self.start.expand(len(tokens), -1, -1)
        for _ in range(self.iterations):
            shares = self.shares(slots, keys)
            given = shares / shares.sum(2, keepdim=True) @ values
            slots = self.renew(given.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.narrow(self.widen(self.norm_renewed(slots)).relu())
        return slots

    def shares(
        self, slots: Float[Tensor, "n slots dim"], keys: Float[Tensor, "n tokens dim"]
    ) -> Float[Tensor, "n slots tokens"]:
        """How much of each token each slot takes: softmax over the slots."""
        queries = self.query(self.norm_slots(slots))
        return (queries @ keys.mT * keys.shape[2] ** -0.5).softmax(1) + self.eps


class SlotDecoder(nn.Module):
    """A residual network over coordinates that every slot steers by itself.

    Args:
        dim: width of the slots and of the network.
        blocks: residual blocks.
        channels: what is drawn at each place, besides the claim on it; 0 draws the claim alone (occupancy).
        coordinates: of a place; 2 in a picture.
    """

    def __init__(self, dim: int = 64, *, blocks: int = 4, channels: int = 3, coordinates: int = 2):
        super().__init__()
        self.place = nn.Linear(coordinates, dim)
        self.steer = nn.ModuleList(nn.Linear(dim, dim) for _ in range(checks.integer(blocks, "blocks", low=1)))
        self.inner = nn.ModuleList(nn.Linear(dim, dim) for _ in range(blocks))
        outer = [nn.Linear(dim, dim) for _ in range(blocks)]
        for layer in outer:
            nn.init.zeros_(layer.weight)
        self.outer = nn.ModuleList(outer)
        self.out = nn.Linear(dim, channels + 1)

    def forward(self, slots: Float[Tensor, "n slots dim"], x: Float[Tensor, "n c height width"]) -> Drawn:
        """What each slot draws in a picture of the size of x, and its claims."""
        height, width = x.shape[-2:]
        size = x.new_tensor([height, width])
        pixels = (_places(x) * (size - 1).float()).to(x.dtype)
        drawn = self.at(slots, (pixels / size - 0.5)[None]).mT.unflatten(3, (height, width))
        return drawn[:, :, :-1], drawn[:, :, -1]

    def at(
        self, slots: Float[Tensor, "n slots dim"], places: Float[Tensor, "#n places coordinates"]
    ) -> Float[Tensor, "n slots places out"]:
        """What each slot draws at any places, given by their coordinates; its claim comes last."""
        net = self.place(places)[:, None]
        for steer, inner, outer in zip(self.steer, self.inner, self.outer):
            net = net + steer(slots)[:, :, None]
            net = net + outer(inner(net.relu()).relu())
        return self.out(net.relu())


def blend(values: Float[Tensor, "n slots c *where"], claims: Float[Tensor, "n slots *where"]) -> Fused:
    """Every place shows the slots' values, mixed by the softmax of their claims."""
    masks = claims.softmax(1)
    return (masks.unsqueeze(2) * values).sum(1), masks


def union(values: Float[Tensor, "n slots c *where"], claims: Float[Tensor, "n slots *where"]) -> Fused:
    """A place is occupied as far as any slot says: the largest claim; what else is drawn is left out.

    The fusion for occupancy of point clouds, with `occupancy_loss`.
    """
    return claims.amax(1, keepdim=True), claims.softmax(1)


def _places(x: Float[Tensor, "n c height width"]) -> Float[Tensor, "places 2"]:
    """Row and column of every pixel in 0..1, row by row, in single precision."""
    # in single precision as in the authors' code: a network in double precision draws the same picture
    axes = (torch.linspace(0, 1, size, dtype=torch.float64, device=x.device).float() for size in x.shape[-2:])
    return torch.cartesian_prod(*axes)
