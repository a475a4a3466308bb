"""Claim of ITTA: a consistency loss that learns pulls more as classification does, and its maps move where they can."""

from __future__ import annotations

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adaptation import ITTA, ITTATrainer
from trimtab.claims.base import Claim, Expectation

CLASSES, SIZE, BLOCKS = 6, 8, ("1", "3", "5", "7")
STYLES = ((1.0, 0.0), (1.6, 0.6), (0.5, -0.5), (2.2, 1.2))
"""Gain and offset of each domain; the last is not seen in training."""


def run(seed: int) -> dict[str, float]:
    """Alignment of the losses with and without learning, accuracies on an unseen domain, and how far the maps move."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = F.interpolate(torch.randn(CLASSES, 3, 3, 3, generator=generator), size=SIZE, mode="bilinear")
    measured: dict[str, float] = {}
    x, labels = _domain(prototypes, 3, 300, generator)
    for name, rate in {"learned": 2e-3, "frozen": 0.0}.items():
        network, own = _network(seed), torch.Generator().manual_seed(1000 + seed)
        trainer = ITTATrainer(network, BLOCKS, lr=5e-3, consistency_lr=rate, generator=own)
        penalties = [trainer.update(_domain(prototypes, i, 16, own) for i in range(3)).penalty for _ in range(150)]
        measured[f"penalty({name})"] = sum(penalties[-30:]) / 30
        adapter = ITTA(
            network, trainer.prepared(), loss_weight=0.1, optimizer=partial(torch.optim.Adam, lr=5e-4), generator=own
        )
        with adapter.frozen():
            measured[f"accuracy({name}, before)"] = _accuracy(adapter(x), labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for one in x[:30].split(1):
                adapter(one)
        measured[f"moved({name}, batches of 1)"] = _moved(adapter)
        outputs = torch.cat([adapter(batch) for batch in x.split(30)])
        measured[f"accuracy({name}, after)"] = _accuracy(outputs, labels)
        measured[f"moved({name}, batches of 30)"] = _moved(adapter)
    return measured


def _domain(prototypes: Tensor, style: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy prototypes in a domain's style: its gain, its offset, and waves that grow from domain to domain."""
    labels = torch.randint(CLASSES, (n,), generator=generator)
    gain, offset = STYLES[style]
    waves = 0.3 * style * torch.sin(torch.arange(SIZE) * 1.5)[:, None]
    noisy = prototypes[labels] + 0.8 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    return gain * noisy + offset + waves, labels


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for into, out, stride in ((3, 8, 1), (8, 12, 2), (12, 16, 1), (16, 16, 1)):
            layers += [nn.Conv2d(into, out, 3, stride=stride, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _moved(adapter: ITTA) -> float:
    """The largest change of a scale of the maps."""
    scales = [value for name, value in adapter.moving.items() if name.endswith("weight")]
    return max(float((scale.detach() - 1).abs().max()) for scale in scales)


CLAIM = Claim(
    slug="13-itta",
    statement="A consistency loss that learns pulls more in the direction of classification than a fixed one, and its "
    "maps move on batches of 30 images but not on single images.",
    run=run,
    expectations=(
        Expectation("penalty(frozen)", minus="penalty(learned)", at_least=0.15),
        Expectation("penalty(frozen)", minus="penalty(learned)", at_least=0.0, every_seed=True),
        Expectation("moved(learned, batches of 30)", at_least=1e-4, every_seed=True),
        Expectation("moved(learned, batches of 1)", at_most=0.0, every_seed=True),
    ),
    budget=60,
    reported={
        "low confidence": "from memory of the paper",
        "setting": "DomainBed, ResNet-18, leave one domain out, accuracy %",
        "ERM": {"PACS": 79.8, "VLCS": 75.8, "OfficeHome": 60.6, "TerraIncognita": 38.8, "DomainNet": 35.3},
        "ITTA": {"PACS": 83.8, "VLCS": 76.9, "OfficeHome": 62.0, "TerraIncognita": 43.2, "DomainNet": 34.9},
    },
    notes=(
        "It fails on one seed of five (104): there the two losses are unrelated without learning too (2.03), and "
        "learning has nothing to undo (2.04). With seeds 0 to 2, on which the experiment was set up, and 100 to 103 "
        "the learnt loss has the smaller penalty.",
        "A penalty of 2 says that the gradients have nothing in common. Learning takes away what conflicts (2.1 to 3.0 "
        "without it), down to about 2; it brings no agreement in these 150 steps.",
        "Accuracy on the unseen domain is saturated (99 to 100 %) before and after adaptation, so this world says "
        "nothing about the gain in accuracy that the paper reports.",
        "That gain was tried besides, on Fashion-MNIST at 14 x 14 in three renderings, each left out once (400 steps, "
        "seeds 0 to 2): 33.1 % of the unseen rendering right after plain training, 35.5 % with mixed styles alone, "
        "37.6 % with ITTA's training (2.2, 2.4 and 8.9 points above plain training), and as much after adaptation "
        "(37.6 %; 37.1 % with a loss weight of 0.1): what helps is the training, not the step at test time.",
    ),
)
