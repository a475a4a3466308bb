"""Layers and small networks that methods of the other stages are built of."""

from trimtab.nn.factored_output import FactoredOutput
from trimtab.nn.intervals import Interval, IntervalBounds, Margins
from trimtab.nn.pose_tokenizer import PoseTokenizer, TokenHead, Tokenized
from trimtab.nn.rotations import rot6d_to_matrix, rotation_angle
from trimtab.nn.vector_quantizer import EMAResetQuantizer, Quantized

__all__ = [
    "EMAResetQuantizer",
    "FactoredOutput",
    "Interval",
    "IntervalBounds",
    "Margins",
    "PoseTokenizer",
    "Quantized",
    "TokenHead",
    "Tokenized",
    "rot6d_to_matrix",
    "rotation_angle",
]
