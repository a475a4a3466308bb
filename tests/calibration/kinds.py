"""Every calibrator as the contract makes it: quick to fit, with what it needs beside the logits, and what it lacks."""

import numpy as np
import pytest
import torch

from trimtab.calibration import CALIBRATORS, SDM, CorrectnessAware, HCalibration

# so little training that the result need not be good
SETTINGS = {
    HCalibration: {"epochs": 4},
    CorrectnessAware: {"epochs": 3},
    SDM: {"dimension": 4, "rounds": 2, "epochs": 2, "lr": 0.01, "rescaler_epochs": 2},
}

# every row from its own row, so that rows may be chosen, reordered and repeated
FIELDS = {
    "features": lambda z: 0.5 * z,
    "views": lambda z: torch.stack([0.7 * z, 3 * z.sin(), -z], 1),
}

# what a calibrator does not promise, and why
LACKS = {
    SDM: {
        "gradient": "its answers are steps of the features, and the logits are not used",
        "tracing": "it looks neighbours up and checks the features on the way",
        "order of rows": "the points are shuffled, halved and taken one by one",
        "order of classes": "the start of its layer is drawn class by class",
        "weights": "it counts neighbours: unequal weights are refused",
        "another precision": "quantiles and neighbours are steps, across which a rounding may lead",
    },
}

# words in which a fit may refuse, and warn of, a calibration set that the others take
REFUSES = {
    SDM: "weights must be equal where they are not zero|features must vary, by a finite amount"
    "|either half must hold at least two points",
}
WARNS = {
    SDM: "class . is missing from a half of the points|features hold .* copies of others|SDM found no region",
}


def having(promise):
    """Parametrise over the calibrators that promise this."""
    kinds = [kind for kind in CALIBRATORS if promise not in LACKS.get(kind, {})]
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


every = pytest.mark.parametrize("kind", CALIBRATORS, ids=lambda kind: kind.__name__)
on_logits_alone = pytest.mark.parametrize(
    "kind", [kind for kind in CALIBRATORS if not kind.needs], ids=lambda kind: kind.__name__
)


def make(kind):
    """One that was never fitted."""
    return kind(**SETTINGS.get(kind, {}))


def needed(kind, logits):
    """What it needs beside the logits, in their container."""
    x = torch.as_tensor(logits)
    made = {name: FIELDS[name](x) for name in kind.needs}
    return {name: value.numpy() for name, value in made.items()} if isinstance(logits, np.ndarray) else made


def fit(kind, logits, labels, weights=None):
    """One fitted to these scores."""
    return make(kind).fit(logits, labels, weights=weights, **needed(kind, logits))


class OfLogits(torch.nn.Module):
    """A calibrator, called or asked for probabilities with logits alone: what else it needs is made of them."""

    def __init__(self, calibrator):
        super().__init__()
        self.calibrator = calibrator

    def forward(self, logits):
        return self.calibrator(logits, **needed(type(self.calibrator), logits))

    def predict_proba(self, logits):
        return self.calibrator.predict_proba(logits, **needed(type(self.calibrator), logits))


def fitted(kind, logits, labels, weights=None):
    """As `fit`, to be called with logits alone."""
    return OfLogits(fit(kind, logits, labels, weights))


def quick(kind):
    """The class with quick defaults, for those who make calibrators themselves."""
    settings = SETTINGS.get(kind)
    return (
        type(kind.__name__, (kind,), {"__init__": lambda self: kind.__init__(self, **settings)}) if settings else kind
    )
