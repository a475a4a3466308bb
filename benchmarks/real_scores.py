"""Score sets to compare calibrators on: what real models said about real data that they had not seen.

Each is made once and kept as an NPZ file of `Predictions` (logits, labels; features and views where the model is at
hand). Those of CIFAR-10 and of text need a folder named by the environment variable ``TRIMTAB_DATA``; the others need
nothing but scikit-learn's data and the Debian package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_predict
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cifar10 import data_folder, resnet
from trimtab.core.predictions import Predictions
from trimtab.data import corrupt, fashion_mnist, parquet_images


def shifted_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """A small random shift and a random change of contrast and brightness."""
    dx, dy = (int(torch.randint(-2, 3, (), generator=generator)) for _ in range(2))
    gain = 0.7 + 0.6 * float(torch.rand((), generator=generator))
    moved = torch.roll(images, (dy, dx), (-2, -1))
    return (gain * (moved - 0.5) + 0.5).clamp(0, 1)


def cifar(layers: int, corruption: str | None = None, severity: int = 3, n: int = 10_000) -> Predictions:
    images = parquet_images(data_folder() / "cifar10", "test")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
    x, y = images[order].tensor(), images.labels[order]
    if corruption:
        x = corrupt(x, corruption, severity, torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, y), batch_size=250, generator=torch.Generator())
    return Predictions.collect(resnet(layers), loader, features=True, views=3, augment=shifted_views)


def trained(
    model: nn.Module, data: TensorDataset, epochs: int, lr: float, batch: int = 100, decay: float = 0.0
) -> nn.Module:
    """AdamW on the cross-entropy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for inputs, labels in DataLoader(data, batch, shuffle=True, generator=generator):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model.eval()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def fashion() -> Predictions:
    """A network with two hidden layers, trained too long on 6 000 images."""
    source = fashion_mnist("train")[torch.arange(6000)]
    model = seeded(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )
    )
    trained(model, TensorDataset(source.tensor(), source.labels), 25, 1e-3)
    test = fashion_mnist("test")
    loader = DataLoader(TensorDataset(test.tensor(), test.labels), 500, generator=torch.Generator())
    return Predictions.collect(model, loader, features=True, views=3, augment=shifted_views)


def cross_validated(model: object, x: np.ndarray, y: np.ndarray) -> Predictions:
    """What a scikit-learn model says of rows that it was not fitted on: log-probabilities."""
    probs = cross_val_predict(model, x, y, cv=5, method="predict_proba")
    return Predictions(torch.from_numpy(np.log(np.clip(probs, 1e-12, 1))), torch.from_numpy(y))


def digits_naive_bayes() -> Predictions:
    return cross_validated(GaussianNB(var_smoothing=1e-3), *load_digits(return_X_y=True))


def digits_forest() -> Predictions:
    forest = RandomForestClassifier(200, min_samples_leaf=3, random_state=0)
    return cross_validated(forest, *load_digits(return_X_y=True))


def cancer_margins() -> Predictions:
    """Margins of a support vector machine, which are no log-odds."""
    x, y = load_breast_cancer(return_X_y=True)
    margins = cross_val_predict(SVC(gamma=1e-4), x, y, cv=5, method="decision_function")
    return Predictions(torch.from_numpy(np.stack([np.zeros_like(margins), margins], 1)), torch.from_numpy(y))


def next_character(n: int = 20_000) -> Predictions:
    """A small network that names the next of 65 characters of Shakespeare from the last eight, trained too long."""
    text = (data_folder() / "text" / "tinyshakespeare.txt").read_text()
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    codes = torch.tensor([index[letter] for letter in text])
    return language(codes, len(letters), context=8, train=60_000, n=n, epochs=15)


def next_word(n: int = 20_000) -> Predictions:
    """The same for the next of the 1 000 commonest words (all others are one) from the last three."""
    text = (data_folder() / "text" / "tinyshakespeare.txt").read_text().lower().split()
    common = [word for word, _ in Counter(text).most_common(999)]
    index = {word: i for i, word in enumerate(common)}
    codes = torch.tensor([index.get(word, 999) for word in text])
    return language(codes, 1000, context=3, train=120_000, n=n, epochs=8)


def language(codes: Tensor, classes: int, *, context: int, train: int, n: int, epochs: int) -> Predictions:
    windows = codes.unfold(0, context + 1, 1)
    model = seeded(
        lambda: nn.Sequential(
            nn.Embedding(classes, 32),
            nn.Flatten(),
            nn.Linear(32 * context, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )
    )
    trained(model, TensorDataset(windows[:train, :-1], windows[:train, -1]), epochs, 2e-3, batch=256)
    test = windows[-n:]
    loader = DataLoader(TensorDataset(test[:, :-1], test[:, -1]), 1000, generator=torch.Generator())
    return Predictions.collect(model, loader, features=True)


SETS: dict[str, Callable[[], Predictions]] = {
    "CIFAR-10, ResNet-20": partial(cifar, 20),
    "CIFAR-10, ResNet-56": partial(cifar, 56),
    "CIFAR-10 in fog, ResNet-20": partial(cifar, 20, "fog", 5),
    "Fashion-MNIST, perceptron": fashion,
    "digits, naive Bayes": digits_naive_bayes,
    "digits, random forest": digits_forest,
    "breast cancer, SVM margins": cancer_margins,
    "Shakespeare, next character": next_character,
    "Shakespeare, next word": next_word,
}
NEED_DATA = tuple(name for name in SETS if name.startswith(("CIFAR", "Shakespeare")))


def score_set(name: str, folder: str | Path) -> Predictions:
    """The score set called `name`, kept in `folder` once it is made."""
    path = Path(folder) / ("".join(ch if ch.isalnum() else "_" for ch in name.lower()) + ".npz")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        SETS[name]().write(path)
    return Predictions.read(path)
