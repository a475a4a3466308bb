"""Every adapter, as the tests of the contract build it for a small network."""

from functools import partial

import torch
from toynet import stream

from trimtab.adaptation import EATA, ETA, LAME, BatchNormAdapt, CoTTA, RoTTA, Source, Tent


class Builder:
    """Builds an adapter for a network that takes inputs of some shape, after the preparation that it wants.

    Args:
        method: the adapter's class, or a function that returns one.
        prepare: settings of its preparation; None where there is none.
        augment: whether it takes one, which images only can be given by default.
        **settings: its own.
    """

    def __init__(self, method, prepare=None, augment=False, **settings):
        self.method = method
        self.prepare = prepare
        self.augment = augment
        self.settings = settings

    def __call__(self, model, shape=(3, 8, 8), **options):
        settings = {**self.settings, **options}
        if self.augment and len(shape) != 3:
            settings["augment"] = lambda x, generator: x + 0.01
        if self.prepare is not None:
            inner = getattr(model, "module", model)  # of a DistributedDataParallel
            settings["prepared"] = self.method.prepare(inner, source(inner, shape), **self.prepare)
        return self.method(model, **settings)


def source(model, shape):
    """Labelled batches, each with every class."""
    xs = stream(9, shape=shape)
    with torch.no_grad():
        outputs = model(xs[0])
    classes = getattr(outputs, "logits", outputs).shape[1]
    return [(x, torch.arange(len(x)) % classes) for x in xs]


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
BUILDERS = {
    "source": Builder(Source),
    "batch": Builder(BatchNormAdapt),
    "mixed": Builder(BatchNormAdapt, variant="mixed"),
    "ema": Builder(BatchNormAdapt, variant="ema"),
    "tent": Builder(Tent),
    "tent_sgd": Builder(Tent, optimizer=SGD),
    "eata": Builder(EATA, prepare={}, d_margin=0.9, e_margin=1.5),
    "eta": Builder(ETA, d_margin=0.9, e_margin=1.5),
    "cotta": Builder(CoTTA, augment=True, augmentations=3),
    "rotta": Builder(RoTTA, augment=True, capacity=16, update_every=10, nu=0.1),
    "lame": Builder(LAME),
}
LEARNERS = ("tent", "tent_sgd", "eata", "eta", "cotta", "rotta")
