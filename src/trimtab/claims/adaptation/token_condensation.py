"""Claim of TCA: past images' votes help under a shift, and what is condensed costs less than what is dropped blindly.

The reservoir is measured on handwritten digits, with a small residual network whose layers play the blocks; condensing
on Fashion-MNIST, with a vision transformer of 49 patches that was trained with all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from trimtab.adaptation import TokenCondensation, vit_blocks
from trimtab.adaptation.base import entropy
from trimtab.adaptation.condensing import condense
from trimtab.adaptation.reservoir import ReservoirCache
from trimtab.claims.base import Claim, Expectation
from trimtab.core import progress
from trimtab.data.sources import digits, fashion_mnist

CLASSES, SCALE, WIDTH = 10, 20.0, 48
DIGITS, LAYERS = 700, 4
TRAIN, TEST, EPOCHS = 6_000, 1_500, 6
CONDENSING, DEPTH, HEADS, SIDE, PATCH, RATES = (2, 4), 6, 4, 28, 4, (0.1, 0.2)


def run(seed: int) -> dict[str, float]:
    """Accuracies of both parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {**_reservoir(), **_condensing()}


def _reservoir() -> dict[str, float]:
    images = digits()[torch.randperm(1797)]
    x, y = images.tensor()[:, 0], images.labels
    model = _Layers()
    _train(model, x[:DIGITS].flatten(1), y[:DIGITS], epochs=60, rate=2e-3)
    x, y = x[DIGITS:], y[DIGITS:]
    shifted = {
        "blur": torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 1, 1))),
        "rotation": torch.from_numpy(ndimage.rotate(x.numpy(), 25, axes=(1, 2), reshape=False, order=1)),
        "noise": x + 0.35 * torch.randn(x.shape),
        "inverted": 1 - x,
    }
    measured = {}
    for name, stream in shifted.items():
        with torch.no_grad():
            layers = model.layers(stream.flatten(1))
            logits = model.logits(layers[:, -1])
        measured[f"accuracy(frozen, {name})"] = _accuracy(logits, y)
        for lam in (3, 8):
            reservoir = ReservoirCache(CLASSES, LAYERS, WIDTH, lam=lam)
            said = []
            for z, tokens in zip(logits, layers):
                reservoir.update(int(z.argmax()), entropy(z[None].double())[0], tokens)
                said.append(z + reservoir.logits(tokens))
            measured[f"accuracy(lam {lam}, {name})"] = _accuracy(torch.stack(said), y)
    return measured


def _condensing() -> dict[str, float]:
    train, test = fashion_mnist("train"), fashion_mnist("test")
    train, test = train[torch.randperm(len(train))[:TRAIN]], test[torch.randperm(len(test))[:TEST]]
    model = _Classifier()
    _train(model, train.tensor(), train.labels, epochs=EPOCHS, rate=1e-3)
    x, y = test.tensor(), test.labels
    classes = F.normalize(model.classes.detach(), dim=1)
    with torch.no_grad():
        whole = _accuracy(model(x), y)
        measured = {"accuracy(all patches)": whole}
        for rate in RATES:
            for by in ("chance", "attention"):
                measured[f"accuracy(dropped by {by}, {rate})"] = _accuracy(
                    model.logits(_dropped(model, x, rate, by)), y
                )
    for rate, anchors in ((0.1, "off"), (0.1, "available"), (0.2, "off")):
        adapter = TokenCondensation(
            vit_blocks.TowerClassifier(model.tower, classes, logit_scale=SCALE),
            blocks=CONDENSING,
            drop_rate=rate,
            anchors="off" if anchors == "off" else "available",
            lam=0.0,
        )
        measured[f"accuracy(condensed, {rate}, anchors {anchors})"] = _accuracy(adapter(x), y)
        measured[f"flops saved({rate})"] = 1 - adapter.flops(x[0]).adapted / adapter.flops(x[0]).source
    condensed, steered = (measured[f"accuracy(condensed, 0.1, anchors {anchors})"] for anchors in ("off", "available"))
    measured["half of chance's loss"] = (whole - measured["accuracy(dropped by chance, 0.1)"]) / 2
    measured["condensing's loss"] = whole - condensed
    measured["difference by anchors"] = abs(steered - condensed)
    return measured


def _dropped(model: _Classifier, images: Tensor, rate: float, by: str) -> Tensor:
    """Features where as many patches as TCA removes are left out, by chance or where the class token looks least."""
    parts = vit_blocks.take_apart(model.tower)
    tokens = parts.embed(images)
    for number, block in enumerate(parts.blocks):
        queries, keys, values = block.split(block.ln_1(tokens))
        tokens = tokens + block.gather(queries, keys, values)
        if number in CONDENSING:
            scores = vit_blocks.attention(queries[:, :, 0], keys)[:, :, 1:]
            rest = len(condense(tokens[0, 1:], scores[0], rate, start=0))
            ranks = (torch.rand_like(scores[:, 0]) if by == "chance" else scores.mean(1)).argsort(1, descending=True)
            chosen = 1 + ranks[:, :rest, None].expand(-1, -1, parts.width)
            tokens = torch.cat([tokens[:, :1], tokens.gather(1, chosen)], 1)
        tokens = tokens + block.mlp(block.ln_2(tokens))
    return parts.finish(tokens)


class _Cosine(nn.Module):
    """Scaled cosines with learnt class vectors."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.Parameter(torch.randn(CLASSES, width))

    def logits(self, features: Tensor) -> Tensor:
        return SCALE * F.normalize(features, dim=-1) @ F.normalize(self.classes, dim=1).T


class _Layers(_Cosine):
    """A residual perceptron of four layers."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.first = nn.Linear(64, WIDTH)
        self.rest = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def layers(self, x: Tensor) -> Tensor:
        """The activations after every layer (n, 4, 48)."""
        x, seen = self.first(x), []
        for layer in self.rest:
            x = x + layer(x).relu()
            seen.append(x)
        return torch.stack(seen, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.layers(x)[:, -1])


class _Classifier(_Cosine):
    """A vision transformer in the layout of OpenAI's CLIP, for images of one channel."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        tower = nn.Module()
        tower.conv1 = nn.Conv2d(1, WIDTH, PATCH, PATCH, bias=False)
        tower.class_embedding = nn.Parameter(torch.randn(WIDTH) * WIDTH**-0.5)
        tower.positional_embedding = nn.Parameter(torch.randn(1 + (SIDE // PATCH) ** 2, WIDTH) * WIDTH**-0.5)
        tower.ln_pre, tower.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        tower.proj = nn.Parameter(torch.eye(WIDTH))
        tower.transformer = nn.Module()
        tower.transformer.resblocks = nn.ModuleList(self._block() for _ in range(DEPTH))
        self.tower = tower

    @staticmethod
    def _block() -> nn.Module:
        block = nn.Module()
        block.ln_1, block.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        block.attn = nn.MultiheadAttention(WIDTH, HEADS)
        block.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        return block

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(vit_blocks.take_apart(self.tower)(images))


def _train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for epoch in progress.track(range(epochs), "train"):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - epoch / epochs)
        for rows in torch.randperm(len(x)).split(100):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    model.requires_grad_(False)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


CLAIM = Claim(
    slug="61-tca",
    statement="Votes of past images correct a frozen model under blur and rotation and do no harm under noise; where "
    "patches are condensed, at most half is lost of what dropping as many by chance loses, with anchors or without.",
    run=run,
    expectations=(
        Expectation("accuracy(lam 8, blur)", minus="accuracy(frozen, blur)", at_least=0.04, every_seed=True),
        Expectation("accuracy(lam 8, rotation)", minus="accuracy(frozen, rotation)", at_least=0.02, every_seed=True),
        Expectation("accuracy(lam 8, noise)", minus="accuracy(frozen, noise)", at_least=-0.01, every_seed=True),
        Expectation("accuracy(lam 8, inverted)", minus="accuracy(frozen, inverted)", at_most=0.03, every_seed=True),
        Expectation("condensing's loss", minus="half of chance's loss", at_most=0.0),
        Expectation("difference by anchors", at_most=0.02, every_seed=True),
        Expectation("flops saved(0.1)", at_least=0.1),
    ),
    seeds=(100, 101, 102),
    budget=400,
    reported={
        "setting": "CLIP ViT-B/16, ten datasets, one image at a time",
        "abstract": "up to 21.4 % above the strongest baseline, 12.2 % to 48.9 % fewer GFLOPs",
    },
    notes=(
        "Three seeds do not decide the part on condensing. At a drop rate of 0.1, dropping by chance costs 1.7 points "
        "of 81.0, dropping where the class token looks least 1.1, condensing 0.8: half of chance's loss on average, "
        "more than half in two seeds of three.",
        "At 0.2 (not judged) condensing costs 5.6 points, no less than chance (5.8) or attention alone (5.5). A better "
        "trained network (10 000 images, 84.3 %, seed 0) lost 1.7 points by condensing at 0.1 where chance lost 0.8, "
        "and 5.5 at 0.2 where chance lost 8.4. That run came first; the setting was made smaller after it, for time, "
        "and no bound was moved.",
        "Anchors change next to nothing: at most 0.2 points.",
        "The reservoir's votes gain 11 points under blur and 9 under rotation with lam 8, 9 and 5 with lam 3; where "
        "the model is always wrong (inverted images) they confirm its errors.",
    ),
)
