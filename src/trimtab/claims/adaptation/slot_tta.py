"""Claim of Slot-TTA: drawing a strange scene better cuts it better, and it is the slots that make it so."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trimtab.adaptation import SlotTTA
from trimtab.adaptation.slot_training import train_slots
from trimtab.adaptation.slots import Drawn, SlotEncoder, SlotModel, slot_autoencoder
from trimtab.claims.base import Claim, Expectation
from trimtab.metrics import adjusted_rand_index

SIZE, SLOTS, WIDTH, SCENES = 14, 4, 32, 24


def run(seed: int) -> dict[str, float]:
    """Adjusted Rand index and reconstruction error before and after, of a slot model and of one without slots."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        slots = slot_autoencoder(SLOTS, WIDTH, layers=3, kernel=3, blocks=2)
        joint = SlotModel(SlotEncoder(WIDTH, layers=3, kernel=3), nn.Identity(), JointDecoder())
    measured: dict[str, float] = {}
    familiar, strange = squares(SCENES, generator), squares(SCENES, generator, strange=True)
    for name, model in {"slots": slots, "joint": joint}.items():
        train_slots(model, Scenes(seed), steps=900, lr=1e-3, warmup=100, mask_weight=0.05, max_norm=1.0)
        adapter = SlotTTA(model, steps=60)
        with adapter.frozen():
            measured[f"ari({name}, as in training)"] = _ari(adapter(familiar[0]), familiar[1])
            measured[f"ari({name}, before)"] = _ari(adapter(strange[0]), strange[1])
        measured[f"ari({name}, after)"] = _ari(adapter(strange[0]), strange[1])
        measured[f"gain({name})"] = measured[f"ari({name}, after)"] - measured[f"ari({name}, before)"]
        measured[f"error ratio({name})"] = float(adapter.after.mean() / adapter.before.mean())
    return measured


class Scenes:
    """A loader of fresh training scenes, 16 a batch: coloured squares, and the masks of background and squares."""

    def __init__(self, seed: int):
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 + self.seed)
        while True:
            images, segments = squares(16, generator)
            yield images, nn.functional.one_hot(segments, SLOTS).movedim(3, 1).float()


class JointDecoder(nn.Module):
    """Colours and claims of all masks from the token of each pixel: what is left of the model without slots."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * SLOTS)

    def forward(self, tokens: Tensor, x: Tensor) -> Drawn:
        """Values (n, slots, 3, height, width) and claims (n, slots, height, width)."""
        drawn = self.out(self.inner(tokens).relu()).mT.unflatten(1, (SLOTS, 4)).unflatten(3, x.shape[2:])
        return drawn[:, :, :3], drawn[:, :, 3]


def squares(n: int, generator: torch.Generator, strange: bool = False) -> tuple[Tensor, Tensor]:
    """n pictures of two or three squares, and which square (0: none) every pixel shows.

    In training the background is dark and the squares are red, green and blue; strange scenes have a bright background,
    squares of any hue, and more noise.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    low, high, noise = (0.25, 0.5, 0.06) if strange else (0.0, 0.15, 0.02)
    images = (low + (high - low) * uniform(n, 3, 1, 1)).repeat(1, 1, SIZE, SIZE)
    segments = torch.zeros(n, SIZE, SIZE, dtype=torch.int64)
    for image, segment in zip(images, segments):
        count = 2 + int(uniform(1) < 0.5)
        hues = uniform(3) if strange else torch.randperm(3, generator=generator) / 3
        for i in range(count):
            side = 4 + int(uniform(1) < 0.5)
            top, left = (uniform(2) * (SIZE - side + 1)).long().tolist()
            place = (slice(top, top + side), slice(left, left + side))
            image[(slice(None), *place)] = _colour(hues[i])[:, None, None]
            segment[place] = i + 1
    images += noise * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1), segments


def _colour(hue: Tensor) -> Tensor:
    """The fully saturated colour of a hue in 0..1: red, green, blue at 0, 1/3, 2/3."""
    return (((hue * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs() - 1).clamp(0, 1)


def _ari(masks: Tensor, truth: Tensor) -> float:
    return float(adjusted_rand_index(masks.argmax(1), truth).nanmean())


CLAIM = Claim(
    slug="21-slot-tta",
    statement="On scenes unlike those of the training, adapting a slot model to each by its reconstruction error "
    "makes its masks better, and a model without slots gains less by the same.",
    run=run,
    expectations=(
        Expectation("gain(slots)", at_least=0.1),
        Expectation("gain(slots)", at_least=0.0, every_seed=True),
        Expectation("error ratio(slots)", at_most=0.5),
        Expectation("gain(slots)", minus="gain(joint)", at_least=0.05),
    ),
    seeds=(100, 101, 102),
    budget=600,
    reported={
        "low confidence": "from memory of the paper",
        "MultiShapeNet easy to hard, ARI": {"Mask2Former": 0.74, "before": 0.70, "after": 0.84},
        "CLEVR to CLEVRTex": "ARI improves strongly over the model's own result and over Mask2Former with "
        "self-supervised adaptation",
    },
    notes=(
        "The gain itself holds with every seed (0.35 to 0.50), while the reconstruction error falls to an eighth.",
        "Undecided is the control, which the paper does not have: a network that draws all masks together, without "
        "slots, gains 0.10, 0.18 and 0.56 by the same adaptation, where slots gain 0.45, 0.35 and 0.50.",
        "Without slots the network is right on scenes as in training (1.00; slots 0.55 to 0.71) and as wrong on "
        "strange ones (0.20 to 0.34; slots 0.18 to 0.33).",
        "Training slots is chaotic: with the decoder's coordinates rounded in another way, by 1e-8, the same seeds "
        "gained 0.47, 0.28 and 0.54.",
    ),
)
