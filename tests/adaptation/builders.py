"""Every adapter, as the tests of the contract build it for a small network."""

from functools import partial

import torch
from toynet import stream

from trimtab.adaptation import (
    CAFA,
    EATA,
    ETA,
    LAME,
    OSTTA,
    PETAL,
    RMT,
    SAR,
    AdaNPC,
    AlphaBN,
    BatchNormAdapt,
    CoRe,
    CoTTA,
    DeYO,
    LabelShiftAdapter,
    RoTTA,
    Source,
    Tent,
    UnMixTNS,
)


class Builder:
    """Builds an adapter for a network that takes inputs of some shape, after the preparation that it wants.

    Args:
        method: the adapter's class, or a function that returns one.
        prepare: settings of its preparation; None where there is none.
        augment: whether it takes one, which images only can be given by default.
        images: whether it takes nothing but square images.
        **settings: its own.
    """

    def __init__(self, method, prepare=None, augment=False, images=False, **settings):
        self.method = method
        self.prepare = prepare
        self.augment = augment
        self.images = images
        self.settings = settings

    def __call__(self, model, shape=(3, 8, 8), **options):
        settings = {**self.settings, **options}
        if self.augment and len(shape) != 3:
            settings["augment"] = lambda x, generator: x + 0.01
        if self.prepare is not None:
            settings["prepared"] = self.prepared(model, shape)
        return self.method(model, **settings)

    def prepared(self, model, shape=(3, 8, 8)):
        model = getattr(model, "module", model)  # of a DistributedDataParallel
        return self.method.prepare(model, source(model, shape), **self.prepare)


def source(model, shape):
    """Labelled batches, each with every class, the first ones more often."""
    xs = stream(9, shape=shape).to(next(model.parameters()).dtype)
    with torch.no_grad():
        outputs = model(xs[0])
    classes = getattr(outputs, "logits", outputs).shape[1]
    return [(x, (classes * (torch.arange(len(x)) / len(x)).square()).long()) for x in xs]


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
BUILDERS = {
    "source": Builder(Source),
    "batch": Builder(BatchNormAdapt),
    "mixed": Builder(BatchNormAdapt, variant="mixed"),
    "ema": Builder(BatchNormAdapt, variant="ema"),
    "alpha": Builder(AlphaBN),
    "unmix": Builder(UnMixTNS),
    "lame": Builder(LAME),
    "adanpc": Builder(AdaNPC, prepare={}, k=5),
    "adanpc_bn": Builder(AdaNPC, prepare={}, k=5, batch_norm=True),
    "label_shift": Builder(LabelShiftAdapter, prepare={"steps": 5}),
    "tent": Builder(Tent),
    "tent_sgd": Builder(Tent, optimizer=SGD),
    "eata": Builder(EATA, prepare={}, d_margin=0.9, e_margin=1.5),
    "eta": Builder(ETA, d_margin=0.9, e_margin=1.5),
    "core": Builder(CoRe),
    "cafa": Builder(CAFA, prepare={}),
    "ostta": Builder(OSTTA),
    "deyo": Builder(DeYO, images=True, e_margin=2.0, plpd_margin=-1.0),
    "sar": Builder(SAR, e_margin=2.0),
    "rotta": Builder(RoTTA, augment=True, capacity=16, update_every=10, nu=0.1),
    "rmt": Builder(RMT, prepare={}, augment=True),
    "petal": Builder(PETAL, prepare={"epochs": 3}, augment=True, augmentations=3),
    "cotta": Builder(CoTTA, augment=True, augmentations=3),
}
LEARNERS = ("tent", "tent_sgd", "eata", "eta", "core", "cafa", "ostta", "deyo", "sar", "rotta", "rmt", "petal", "cotta")
