"""Parity with the authors' packages for the slug 03-calibration-benchmark, driven by the files that are there.

cwCE comes from a package that averages over max(label) + 1 classes; names that end in ``_own`` were computed by the
definitions, over all classes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab import metrics

pytestmark = pytest.mark.golden
SLUG = "03-calibration-benchmark"
FILES = sorted((Path(__file__).parents[1] / "golden" / SLUG).glob("*.npz"))

BINNED = {
    "ECE": lambda p, y, b: metrics.expected_calibration_error(p, y, b),
    "ECE_em": lambda p, y, b: metrics.expected_calibration_error_equal_mass(p, y, b),
    "cwCE": lambda p, y, b: metrics.classwise_calibration_error(p, y, b, classes=int(y.max()) + 1),
    "cwCE_em_own": lambda p, y, b: metrics.classwise_calibration_error_equal_mass(p, y, b),
    "MCE_own": lambda p, y, b: metrics.maximum_calibration_error(p, y, b),
}
SINGLE = {
    "KSCE": (metrics.kolmogorov_smirnov_error, "KSCE"),
    "MMCE": (metrics.maximum_mean_calibration_error, "MMCE"),
    "KDECE_order1": (metrics.kernel_density_error, "KDECE"),
    "NLL": (metrics.negative_log_likelihood, "NLL"),
    "Brier_sum": (metrics.brier_score, "Brier"),
}


def tolerance(name):
    return 1e-3 if name.startswith("KDECE") else 1e-5


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_measure(path, precision):
    arrays = np.load(path, allow_pickle=False)
    checked = 0
    for prefix in [name.removesuffix("logits") for name in arrays if name.endswith("logits")]:
        logits = torch.from_numpy(arrays[f"{prefix}logits"]).to(precision)
        labels = torch.from_numpy(arrays[f"{prefix}labels"]).long()
        probs = logits.softmax(1)
        suite = metrics.calibration_suite(logits, labels, temperature=1.0)
        as_authors = metrics.calibration_suite(logits, labels, temperature=1.0, classes=int(labels.max()) + 1)
        for name, measure in BINNED.items():
            if f"{prefix}{name}" not in arrays:
                continue
            for bins, expected in zip(arrays[f"{prefix}bins"].tolist(), arrays[f"{prefix}{name}"]):
                assert measure(probs, labels, bins) == pytest.approx(expected, abs=tolerance(name)), (name, bins)
                if bins in metrics.BINS:
                    found = (as_authors if name == "cwCE" else suite)[f"pre_{name.removesuffix('_own')}_{bins}"]
                    assert found == pytest.approx(expected, abs=tolerance(name)), (name, bins)
                checked += 1
        for name, (measure, column) in SINGLE.items():
            if f"{prefix}{name}" in arrays:
                expected = float(arrays[f"{prefix}{name}"])
                assert measure(probs, labels) == pytest.approx(expected, abs=tolerance(name)), name
                assert suite[f"pre_{column}"] == pytest.approx(expected, abs=tolerance(name)), name
                checked += 1
    assert checked


def test_there_are_vectors():
    assert FILES
