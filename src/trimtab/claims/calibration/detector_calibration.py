"""Claim of `trimtab.calibration.DetectionCalibrator`: isotonic regression and Platt scaling beat a temperature.

A synthetic detector whose quality is known: boxes of good objects lie closer, and its scores are pushed through
sigmoid(2 z + 1), so that they are overconfident and shifted. A temperature can take back the factor, not the shift. How
far boxes lie off was measured on the golden vectors' detections: 2 to 24 % of the object's size.
"""

from __future__ import annotations

import numpy as np
import torch

from trimtab.calibration import DetectionCalibrator
from trimtab.calibration.detection import Kind
from trimtab.claims.base import Claim, Expectation
from trimtab.core.detections import Detections, GroundTruth
from trimtab.metrics import laece, lrp, match_detections

KINDS: tuple[Kind, ...] = ("identity", "temperature", "platt", "linear", "isotonic")


def scene(random: np.random.Generator, images: int = 250, classes: int = 2) -> tuple[GroundTruth, Detections]:
    """Images with one to four objects, 85 % of them found, and up to three false boxes each."""
    n = int((objects := random.integers(1, 5, images)).sum())
    image, label = np.repeat(np.arange(images), objects), random.integers(0, classes, n)
    boxes = np.concatenate([random.uniform(0, 250, (n, 2)), random.uniform(20, 80, (n, 2))], 1)
    quality = random.uniform(0, 1, n)
    found = random.uniform(size=n) < 0.85
    jitter = (0.02 + 0.22 * (1 - quality))[:, None] * np.tile(boxes[:, 2:], 2)
    near = boxes + random.normal(size=(n, 4)) * jitter
    near[:, 2:] = np.maximum(near[:, 2:], 2)
    scores = np.clip(0.25 + 0.7 * quality + random.normal(0, 0.08, n), 0.01, 0.99)
    m = int((false := random.integers(0, 4, images)).sum())
    boxes_false = np.concatenate([random.uniform(0, 250, (m, 2)), random.uniform(20, 80, (m, 2))], 1)
    stated = np.concatenate([scores[found], random.beta(1.5, 5, m).clip(0.01, 0.99)])
    truth = GroundTruth(
        torch.from_numpy(image),
        torch.from_numpy(label),
        torch.from_numpy(boxes),
        torch.zeros(n, dtype=torch.bool),
        range(images),
        range(classes),
    )
    detections = Detections(
        torch.from_numpy(np.concatenate([image[found], np.repeat(np.arange(images), false)])),
        torch.from_numpy(np.concatenate([label[found], random.integers(0, classes, m)])),
        torch.from_numpy(np.concatenate([near[found], boxes_false])),
        (2 * torch.from_numpy(stated).logit() + 1).sigmoid(),
        images,
        classes,
    )
    return truth, detections


def run(seed: int) -> dict[str, float]:
    """LaECE_0 and LRP, in percent, of every kind of calibrator on fresh images."""
    random = np.random.default_rng(seed)
    validation, (truth, detections) = scene(random), scene(random)
    out = {}
    for kind in KINDS:
        calibrated = DetectionCalibrator(kind).fit(*validation).transform(detections)
        matches = match_detections(truth, calibrated)
        out[f"laece({kind})"] = 100 * float(laece(matches))
        out[f"lrp({kind})"] = 100 * float(lrp(matches).mean["error"])
    for kind in ("isotonic", "platt"):
        for other in ("temperature", "identity"):
            out[f"laece({kind}) / laece({other})"] = out[f"laece({kind})"] / out[f"laece({other})"]
    return out


CLAIM = Claim(
    slug="08-detector-calibration",
    statement="On validation detections, class-wise isotonic regression and Platt scaling calibrate a detector far "
    "better than a temperature, and leave its accuracy as it is.",
    run=run,
    expectations=(
        *(
            Expectation(f"laece({kind}) / laece({other})", at_most=bound, every_seed=True)
            for kind in ("isotonic", "platt")
            for other, bound in (("temperature", 0.65), ("identity", 0.4))
        ),
        *(
            Expectation(f"lrp({kind})", minus="lrp(identity)", at_most=0.5, every_seed=True)
            for kind in ("isotonic", "platt")
        ),
    ),
    budget=20,
    reported={
        "setting": "COCO, Deformable DETR",
        "isotonic regression against Cal-DETR, trained to be calibrated": "better by more than 7 points of D-ECE",
    },
)
