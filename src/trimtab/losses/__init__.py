"""Training objectives: losses that leave a model right, not only confident."""

from trimtab.losses.ensloss import EnsLoss, ensloss_derivatives
from trimtab.losses.episodes import EpisodeSampler
from trimtab.losses.indexed import Indexed
from trimtab.losses.mixtures import Mixtures, make_mixtures
from trimtab.losses.output_memory import OutputMemory
from trimtab.losses.prototypes import prototype_logits, prototypes
from trimtab.losses.rankmixup import MNDCG, RankMixup
from trimtab.losses.saf import MESA, SAF, trajectory_kl
from trimtab.losses.sharpness import sharpness
from trimtab.losses.spherical import SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss
from trimtab.losses.susana import ICNN, ProtoTriplet, icnn_score
from trimtab.losses.z_loss import ZLoss

__all__ = [
    "ICNN",
    "MESA",
    "MNDCG",
    "SAF",
    "EnsLoss",
    "EpisodeSampler",
    "Indexed",
    "Mixtures",
    "OutputMemory",
    "ProtoTriplet",
    "RankMixup",
    "SphericalSoftmaxLoss",
    "SquaredErrorLoss",
    "TaylorSoftmaxLoss",
    "ZLoss",
    "ensloss_derivatives",
    "icnn_score",
    "make_mixtures",
    "prototype_logits",
    "prototypes",
    "sharpness",
    "trajectory_kl",
]
