"""Claim of SDM: what it admits is right, also under noise, and it admits next to nothing of what it has never seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.calibration import SDM
from trimtab.claims.base import Claim, Expectation
from trimtab.data import digits

ALPHA, NOISE = 0.9, 0.35


def run(seed: int) -> dict[str, float]:
    """Admitted shares, and accuracies among the admitted, of SDM and of the softmax of the same scores."""
    generator = torch.Generator().manual_seed(seed)
    source = digits()
    pixels = source.images.flatten(1).double() / 255
    order = torch.randperm(len(pixels), generator=generator)
    fitting, testing = order[:1200], order[1200:]
    held_out = torch.arange(1200) >= 600
    sdm = SDM(
        alpha=ALPHA, dimension=32, rounds=1, epochs=12, lr=2e-2, rescaler_epochs=12, rescaler_lr=1e-2, seed=seed
    ).fit(torch.zeros(1200, 10), source.labels[fitting], features=pixels[fitting], held_out=held_out)

    test, labels = pixels[testing], source.labels[testing]
    inputs = {
        "test": test,
        "noise": test + NOISE * torch.randn(test.shape, generator=generator, dtype=test.dtype),
        "permuted": test[:, torch.randperm(64, generator=generator)],
    }
    measured = {"finite(least similarity)": float(math.isfinite(sdm.least_similarity))}
    for name, features in inputs.items():
        seen = sdm.verify(features)
        right = seen.predicted == labels
        measured[f"accuracy({name})"] = float(right.double().mean())
        chosen = {"sdm": seen.admitted, "softmax": seen.scores.softmax(1).amax(1) >= ALPHA}
        for method, admitted in chosen.items():
            measured[f"admitted({method}, {name})"] = float(admitted.double().mean())
            measured[f"accuracy({method}, {name})"] = _share(right, admitted)
    measured["0.3 admitted(softmax, permuted)"] = 0.3 * measured["admitted(softmax, permuted)"]
    return measured


def _share(right: Tensor, admitted: Tensor) -> float:
    """The accuracy among the admitted; where none is admitted no promise is broken."""
    return float(right[admitted].double().mean()) if bool(admitted.any()) else 1.0


CLAIM = Claim(
    slug="64-sdm",
    statement="Predictions that SDM admits are right at least a share alpha of the time, also under a noise under "
    "which softmax breaks that promise, and of inputs that resemble nothing it has seen it admits at most a third of "
    "what softmax does.",
    run=run,
    expectations=(
        Expectation("finite(least similarity)", at_least=1, every_seed=True),
        Expectation("accuracy(sdm, test)", at_least=ALPHA),
        Expectation("accuracy(sdm, noise)", at_least=ALPHA),
        Expectation("accuracy(softmax, noise)", at_most=ALPHA),
        Expectation("0.3 admitted(softmax, permuted)", minus="admitted(sdm, permuted)", at_least=0),
        Expectation("admitted(sdm, test)", at_least=0.05),
    ),
    budget=60,
    reported={
        "setting": "alpha 0.95; accuracy of the admitted (share admitted)",
        "Sentiment": {"all": 0.968, "softmax": "0.989 (0.87)", "sdm": "0.996 (0.65)"},
        "Sentiment, shifted": {"all": 0.693, "softmax": "0.861 (0.46)", "sdm": "none admitted"},
        "Factcheck": {"all": 0.629, "softmax": "0.828 (0.40)", "sdm": "1.00 (0.13)"},
    },
    notes=(
        "Digits, 600 to train on, 600 to calibrate, the rest to test; on the same set-up the authors' code admitted "
        "0.26 to 0.29 of the test points, 0.01 under noise and none permuted, all rightly.",
        "Under noise SDM admits nothing on four seeds of five: there the promise is kept by silence, and the accuracy "
        "counted as one.",
        "The price is the share admitted: 0.04 to 0.29 of the test points, of which softmax keeps nine tenths and is "
        "right often enough.",
    ),
)
