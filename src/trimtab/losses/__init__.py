"""Training objectives: losses that leave a model right, not only confident."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.losses.anyloss import AnyLoss
from trimtab.losses.augcal import AugCal, AugCalTerms
from trimtab.losses.calibration_terms import DCA, MDCA, MMCE
from trimtab.losses.certified import CertifiedIBP, CertifiedTerms, ErrorRates, ibp_init_
from trimtab.losses.class_means import prototype_logits, prototypes
from trimtab.losses.cosine_head import CosineHead
from trimtab.losses.direct_coverage import DirectCoverage, answer_log_prob, coverage_factor, coverage_loss
from trimtab.losses.ensloss import EnsLoss, ensloss_derivatives
from trimtab.losses.episodes import EpisodeSampler
from trimtab.losses.flatness import sharpness
from trimtab.losses.indexed import Indexed
from trimtab.losses.info_nce import InfoNCE
from trimtab.losses.mann_whitney import MannWhitney
from trimtab.losses.margin_softmax import ArcFace, CosFace, MagFace
from trimtab.losses.mixtures import Mixtures, make_mixtures
from trimtab.losses.mixup import DMixup, Mixed, Mixup
from trimtab.losses.ms_ssim import MSSSIM, ExpectedLossVAE
from trimtab.losses.output_memory import OutputMemory
from trimtab.losses.pass_estimators import pass_at_n, pass_at_n_unbiased
from trimtab.losses.pasta import PASTA
from trimtab.losses.projection import camera_bias, perspective
from trimtab.losses.rankmixup import MNDCG, RankMixup
from trimtab.losses.retrieval import dual_encoder_scores
from trimtab.losses.saf import MESA, SAF, trajectory_kl
from trimtab.losses.smoothed_eps import SmoothedEps
from trimtab.losses.spherical import SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss
from trimtab.losses.susana import ICNN, ProtoTriplet, icnn_score
from trimtab.losses.threshold_adaptive import ThresholdAdaptiveScaling
from trimtab.losses.training import OBJECTIVES, Batch, Objective, Task, train
from trimtab.losses.uncertain import UncertainBatches, select_uncertain
from trimtab.losses.unpg import UNPG, pair_similarities, whisker_filter
from trimtab.losses.z_loss import ZLoss

if TYPE_CHECKING:
    from trimtab.losses.anyloss_logistic import AnyLossLogistic

__all__ = [
    "DCA",
    "ICNN",
    "MDCA",
    "MESA",
    "MMCE",
    "MNDCG",
    "MSSSIM",
    "OBJECTIVES",
    "PASTA",
    "SAF",
    "UNPG",
    "AnyLoss",
    "AnyLossLogistic",
    "ArcFace",
    "AugCal",
    "AugCalTerms",
    "Batch",
    "CertifiedIBP",
    "CertifiedTerms",
    "CosFace",
    "CosineHead",
    "DMixup",
    "DirectCoverage",
    "EnsLoss",
    "EpisodeSampler",
    "ErrorRates",
    "ExpectedLossVAE",
    "Indexed",
    "InfoNCE",
    "MagFace",
    "MannWhitney",
    "Mixed",
    "Mixtures",
    "Mixup",
    "Objective",
    "OutputMemory",
    "ProtoTriplet",
    "RankMixup",
    "SmoothedEps",
    "SphericalSoftmaxLoss",
    "SquaredErrorLoss",
    "Task",
    "TaylorSoftmaxLoss",
    "ThresholdAdaptiveScaling",
    "UncertainBatches",
    "ZLoss",
    "answer_log_prob",
    "camera_bias",
    "coverage_factor",
    "coverage_loss",
    "dual_encoder_scores",
    "ensloss_derivatives",
    "ibp_init_",
    "icnn_score",
    "make_mixtures",
    "pair_similarities",
    "pass_at_n",
    "pass_at_n_unbiased",
    "perspective",
    "prototype_logits",
    "prototypes",
    "select_uncertain",
    "sharpness",
    "train",
    "trajectory_kl",
    "whisker_filter",
]


def __getattr__(name: str) -> Any:
    if name == "AnyLossLogistic":  # it brings scikit-learn, which the losses do without
        return import_module("trimtab.losses.anyloss_logistic").AnyLossLogistic
    raise AttributeError(f"module 'trimtab.losses' has no attribute {name!r}")
