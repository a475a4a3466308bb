"""The measures of the top label at many bin counts from one sort: ECE, ECE of equal mass, MCE and KSCE.

Reach for it where `calibration_suite` is more than needed and a single bin count less.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics import measures
from trimtab.metrics.binning import BINS, rank
from trimtab.metrics.rows import Labels, Matrix, top_label


def top_label_errors(probs: Matrix, labels: Labels, bins: Sequence[int] = BINS) -> dict[str, float]:
    """``ECE_b``, ``ECE_em_b`` and ``MCE_b`` for every b of `bins`, and ``KSCE``.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: bin counts; the study's nine by default, which makes 28 numbers.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> errors = top_label_errors(probs, np.array([0, 0, 1, 0]), bins=[5, 15])
        >>> {name: round(value, 2) for name, value in errors.items()}
        {'ECE_5': 0.3, 'ECE_15': 0.3, 'ECE_em_5': 0.15, 'ECE_em_15': 0.15, 'MCE_5': 0.6, 'MCE_15': 0.6, 'KSCE': 0.15}

    Reference:
        Tao et al., ICLR 2024, arXiv 2308.11838.
    """
    if not bins:
        raise InputError("bins must name at least one bin count, got none")
    for i, b in enumerate(bins):
        checks.integer(b, f"bins[{i}]", low=1)
    confidence, correct = top_label(probs, labels)
    named = measures.top_label(rank(confidence[None], correct[None]), bins)
    return {name: float(value) for name, value in named.items()}
