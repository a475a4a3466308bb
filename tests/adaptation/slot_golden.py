"""Reads the golden vectors of the slug 21-slot-tta: the authors' names of parameters, and ours."""

import re

import numpy as np
import torch
from toynet import GOLDEN, built

from trimtab.adaptation.slots import SlotAttention, slot_autoencoder

FILES = sorted((GOLDEN / "21-slot-tta").glob("*.npz"))
NAMES = {
    r"slots_mu": "start",
    r"to_q\b": "query",
    r"to_k\b": "key",
    r"to_v\b": "value",
    r"gru\b": "renew",
    r"fc1\b": "widen",
    r"fc2\b": "narrow",
    r"norm_pre_ff": "norm_renewed",
    r"norm_input": "norm_tokens",
    r"slot_attention": "attention",
    r"encoder_cnn\.encoder_pos\.embedding": "encoder.place",
    r"encoder_cnn\.conv(\d)": lambda found: f"encoder.convolutions.{int(found[1]) - 1}",
    r"decoder_cnn\.fc_p": "decoder.place",
    r"decoder_cnn\.fc_c": "decoder.steer",
    r"decoder_cnn\.blocks\.(\d+)\.fc_0": r"decoder.inner.\1",
    r"decoder_cnn\.blocks\.(\d+)\.fc_1": r"decoder.outer.\1",
    r"decoder_cnn\.fc_out": "decoder.out",
}


def tensors(path):
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def model_of(arrays, prefix, iterations=3):
    """The model, or the slot attention alone, whose parameters begin with `prefix`."""
    weights = {}
    for name, value in arrays.items():
        if name.startswith(prefix):
            ours = name.removeprefix(prefix)
            for theirs, new in NAMES.items():
                ours = re.sub(theirs, new, ours)
            weights[ours] = value
    start = next(value for name, value in weights.items() if name.endswith("start"))
    _, slots, dim = start.shape
    if "start" in weights:
        hidden = len(weights["widen.weight"])
        model = built(lambda: SlotAttention(slots, dim, iterations=iterations, hidden=hidden))
    else:
        blocks = len([name for name in weights if re.fullmatch(r"decoder\.steer\.\d+\.weight", name)])
        convolutions = [v for n, v in weights.items() if re.fullmatch(r"encoder\.convolutions\.\d+\.weight", n)]
        settings = {"layers": len(convolutions), "kernel": convolutions[0].shape[-1], "blocks": blocks}
        model = built(lambda: slot_autoencoder(slots, dim, iterations=iterations, **settings))
    model.to(start.dtype).load_state_dict(weights)
    return model
