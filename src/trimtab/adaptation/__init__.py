"""After deployment, on the stream: adapters that follow a shift without labels."""

from trimtab.adaptation.augment import strong_augment
from trimtab.adaptation.base import Adapter
from trimtab.adaptation.batch_norm import BatchNormAdapt
from trimtab.adaptation.cotta import CoTTA
from trimtab.adaptation.eata import EATA, ETA
from trimtab.adaptation.guard import Guard
from trimtab.adaptation.lame import LAME
from trimtab.adaptation.ostta import OSTTA, confidence_filter
from trimtab.adaptation.prepared import Prepared
from trimtab.adaptation.rotta import RoTTA
from trimtab.adaptation.source import Source
from trimtab.adaptation.stream import run_stream
from trimtab.adaptation.tent import Tent

ADAPTERS: tuple[type[Adapter], ...] = (Source, BatchNormAdapt, Tent, EATA, CoTTA, RoTTA, LAME)
"""Every adapter; each works as ``adapter(model)``."""

__all__ = [
    "ADAPTERS",
    "EATA",
    "ETA",
    "LAME",
    "OSTTA",
    "Adapter",
    "BatchNormAdapt",
    "CoTTA",
    "Guard",
    "Prepared",
    "RoTTA",
    "Source",
    "Tent",
    "confidence_filter",
    "run_stream",
    "strong_augment",
]
