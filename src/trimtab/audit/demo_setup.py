"""What `trimtab demo` audits: a small network for handwritten digits, and three ways its input may change.

`setup` is all that an audit needs. Put your own model and loaders in its place and run
``trimtab audit this_file.py:setup -o out/``.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from trimtab.audit import Setup
from trimtab.core.persist import atomic
from trimtab.core.progress import track
from trimtab.data import corrupt, digits

WEIGHTS = Path(__file__).parent / "model.safetensors"
SHIFTS = {"noise": ("impulse_noise", 5), "fog": ("fog", 5), "low contrast": ("contrast", 5)}


def network() -> nn.Module:
    """Two convolutions with batch normalisation and a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 10),
    )


def parts() -> dict[str, tuple[Tensor, Tensor]]:
    """The 1 797 digits in three disjoint random parts: images in 0..1 and labels."""
    source = digits()
    images, labels = source.tensor(), source.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    sizes = {"train": 300, "calibration": 700, "test": 797}
    chosen = order.split(list(sizes.values()))
    return {name: (images[rows], labels[rows]) for name, rows in zip(sizes, chosen)}


def train(epochs: int = 300) -> None:
    """Train on 300 digits, a tenth of them labelled at random as careless people would, and keep the weights."""
    images, labels = parts()["train"]
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(labels), generator=generator) < 0.1
    labels = torch.where(wrong, torch.randint(0, 10, labels.shape, generator=generator), labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in track(range(epochs), "train the demo network"):
        for rows in torch.randperm(len(labels), generator=generator).split(50):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    with atomic(WEIGHTS) as draft:
        draft.write_bytes(save(model.state_dict()))


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch shifted by up to a pixel, with another contrast."""
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    gain = 0.7 + 0.6 * torch.rand((), generator=generator)
    return (gain * images.roll((down, right), (-2, -1))).clamp(0, 1)


def batches(images: Tensor, labels: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of 100 in a fixed order."""
    return DataLoader(TensorDataset(images, labels), batch_size=100, generator=torch.Generator())


def setup() -> Setup:
    """The trained model, data it has not seen, and the same data under three shifts."""
    if not WEIGHTS.is_file():
        train()
    model = network()
    model.load_state_dict(load_file(WEIGHTS))
    data = parts()
    images, labels = data["test"]
    shifts = {
        name: batches(corrupt(images, kind, severity, torch.Generator().manual_seed(1)), labels)
        for name, (kind, severity) in SHIFTS.items()
    }
    return Setup(
        model=model.eval(),
        calibration=batches(*data["calibration"]),
        test=batches(images, labels),
        shifts=shifts,
        augment=moved,
        classes=[str(digit) for digit in range(10)],
        title="A small network for handwritten digits",
    )
