"""Training objectives: losses that leave a model right, not only confident."""

from trimtab.losses.ensloss import EnsLoss, ensloss_derivatives
from trimtab.losses.mixtures import Mixtures, make_mixtures
from trimtab.losses.rankmixup import MNDCG, RankMixup

__all__ = ["MNDCG", "EnsLoss", "Mixtures", "RankMixup", "ensloss_derivatives", "make_mixtures"]
