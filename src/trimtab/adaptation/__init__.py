"""After deployment, on the stream: adapters that follow a shift without labels."""

from trimtab.adaptation.adanpc import AdaNPC
from trimtab.adaptation.alpha_bn import AlphaBN, CoRe, from_prior
from trimtab.adaptation.augment import strong_augment
from trimtab.adaptation.base import Adapter
from trimtab.adaptation.batch_norm import BatchNormAdapt
from trimtab.adaptation.cafa import CAFA
from trimtab.adaptation.clipcap import ClipCap
from trimtab.adaptation.cotta import CoTTA
from trimtab.adaptation.destroy import occlude, permute_patches, permute_pixels, shuffle_patches, shuffle_pixels
from trimtab.adaptation.deyo import DeYO
from trimtab.adaptation.eata import EATA, ETA
from trimtab.adaptation.guard import Guard
from trimtab.adaptation.itta import ITTA
from trimtab.adaptation.itta_training import ITTATrainer
from trimtab.adaptation.label_shift import LabelShiftAdapter, PriorShiftCorrection
from trimtab.adaptation.lame import LAME
from trimtab.adaptation.lower_norms import lower_norm_parameters
from trimtab.adaptation.neighbours import NonParametricClassifier, NonParametricLoss
from trimtab.adaptation.objectives import symmetric_cross_entropy, view_contrast
from trimtab.adaptation.ostta import OSTTA, confidence_filter
from trimtab.adaptation.petal import PETAL
from trimtab.adaptation.prepared import Prepared
from trimtab.adaptation.rewards import ClipScoreReward, RewardEnsemble
from trimtab.adaptation.rlcf import RLCF
from trimtab.adaptation.rlcf_captioning import ClipCaptionReward, RLCFCaptioner
from trimtab.adaptation.rmt import RMT
from trimtab.adaptation.rotta import RoTTA
from trimtab.adaptation.sar import SAR
from trimtab.adaptation.slot_training import HungarianMaskLoss, occupancy_loss, train_slots
from trimtab.adaptation.slot_tta import SlotTTA
from trimtab.adaptation.slots import SlotAttention, SlotDecoder, SlotEncoder, SlotModel, slot_autoencoder
from trimtab.adaptation.source import Source
from trimtab.adaptation.stream import Step, run_stream, steps
from trimtab.adaptation.swag import SwagDiagonal
from trimtab.adaptation.tent import Tent
from trimtab.adaptation.token_condensation import TokenCondensation
from trimtab.adaptation.unmix_tns import UnMixTNS, unmix
from trimtab.adaptation.views import resized_crops
from trimtab.adaptation.vision_language import ImageQueries, PromptedClasses, TextQueries, VisionLanguage
from trimtab.adaptation.vit_blocks import TowerClassifier

ADAPTERS: tuple[type[Adapter], ...] = (
    Source,
    BatchNormAdapt,
    AlphaBN,
    UnMixTNS,
    LAME,
    AdaNPC,
    LabelShiftAdapter,
    Tent,
    EATA,
    CoRe,
    CAFA,
    OSTTA,
    DeYO,
    SAR,
    RoTTA,
    RMT,
    PETAL,
    CoTTA,
)
"""Every adapter for any classifier, the cheapest first: each works as ``adapter(model)`` or, where its `preparation` is
required, as ``adapter(model, prepared=adapter.prepare(model, source))``."""

__all__ = [
    "ADAPTERS",
    "CAFA",
    "EATA",
    "ETA",
    "ITTA",
    "LAME",
    "OSTTA",
    "PETAL",
    "RLCF",
    "RMT",
    "SAR",
    "AdaNPC",
    "Adapter",
    "AlphaBN",
    "BatchNormAdapt",
    "ClipCap",
    "ClipCaptionReward",
    "ClipScoreReward",
    "CoRe",
    "CoTTA",
    "DeYO",
    "Guard",
    "HungarianMaskLoss",
    "ITTATrainer",
    "ImageQueries",
    "LabelShiftAdapter",
    "NonParametricClassifier",
    "NonParametricLoss",
    "Prepared",
    "PriorShiftCorrection",
    "PromptedClasses",
    "RLCFCaptioner",
    "RewardEnsemble",
    "RoTTA",
    "SlotAttention",
    "SlotDecoder",
    "SlotEncoder",
    "SlotModel",
    "SlotTTA",
    "Source",
    "Step",
    "SwagDiagonal",
    "Tent",
    "TextQueries",
    "TokenCondensation",
    "TowerClassifier",
    "UnMixTNS",
    "VisionLanguage",
    "confidence_filter",
    "from_prior",
    "lower_norm_parameters",
    "occlude",
    "occupancy_loss",
    "permute_patches",
    "permute_pixels",
    "resized_crops",
    "run_stream",
    "shuffle_patches",
    "shuffle_pixels",
    "slot_autoencoder",
    "steps",
    "strong_augment",
    "symmetric_cross_entropy",
    "train_slots",
    "unmix",
    "view_contrast",
]
