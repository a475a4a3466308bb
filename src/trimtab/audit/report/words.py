"""Numbers as a reader meets them: one format for each kind of quantity, and the words for a difference."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from trimtab.audit.result import Triple

_NARROW = "\u202f"  # a space before a unit, no wider than it must be, at which no line breaks
MISSING = "n/a"

Change = Literal["better", "worse", "unclear", "same", "moved", "unknown"]


class Measure(NamedTuple):
    """A quantity of the report: its name, what it says, whether it is shown in percent, and which way is better."""

    key: str
    label: str
    meaning: str
    share: bool
    better: int


HEADLINE = (
    Measure("accuracy", "Accuracy", "share of predictions that are right", True, 1),
    Measure("ece", "Calibration error", "ECE: average gap of confidence and accuracy", True, -1),
    Measure("log_loss", "Log loss", "penalty for doubting what was true", False, -1),
    Measure("brier", "Brier score", "squared error of the probabilities, 0 to 2", False, -1),
    Measure("mean_confidence", "Mean confidence", "what the model claims; should equal accuracy", True, 0),
)
FURTHER = (
    Measure("ece_em", "ECE, bins of equal size", "ECE with equally many predictions in each bin", True, -1),
    Measure("mce", "Maximum calibration error", "the largest gap of any bin", True, -1),
    Measure("cw_ece", "Class-wise ECE", "calibration error of every class's probability, averaged", True, -1),
    Measure("auroc", "AUROC of confidence", "how well confidence tells right from wrong; 0.5 is chance", False, 1),
    Measure("aurc", "Area under the risk-coverage curve", "error rate, averaged over all coverages", False, -1),
)


def decimal(x: float, digits: int = 3, *, signed: bool = False) -> str:
    """``0.412``, with a real minus sign; `signed` shows a plus too."""
    if not math.isfinite(x):
        return MISSING
    text = f"{x:{'+' if signed else ''},.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "\u2212")


def percent(x: float, digits: int = 1, *, signed: bool = False) -> str:
    """``85.2 %`` of a share in 0..1."""
    return MISSING if not math.isfinite(x) else decimal(100 * x, digits, signed=signed) + f"{_NARROW}%"


def coverage(level: float) -> str:
    """The level of an interval, with as many digits as it has: ``95 %``, ``99.9 %``."""
    return f"{100 * level:.6g}{_NARROW}%"


def points(x: float, digits: int = 1) -> str:
    """The size of a difference of shares in percentage points: ``8.1``."""
    return decimal(100 * abs(x), digits)


def number(x: float, share: bool, digits: int | None = None, *, signed: bool = False) -> str:
    """A share in percent with one decimal, anything else with three, unless `digits` says otherwise."""
    if share:
        return percent(x, 1 if digits is None else digits, signed=signed)
    return decimal(x, 3 if digits is None else digits, signed=signed)


def interval(triple: Triple, share: bool, digits: int | None = None) -> str:
    """``83.9–86.4 %``; empty where there is no interval."""
    _, low, high = triple
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    joint = " to " if low < 0 else "\u2013"
    return number(low, share, digits).removesuffix(f"{_NARROW}%") + joint + number(high, share, digits)


def count(n: int) -> str:
    """``12,345``."""
    return f"{n:,}"


def plural(n: int, thing: str) -> str:
    """``1 shift``, ``3 shifts``, ``1,000 classes``."""
    ending = "" if n == 1 else "es" if thing.endswith(("s", "x")) else "s"
    return f"{count(n)} {thing}{ending}"


def seconds(s: float) -> str:
    """``0.03 s``, ``0.4 s``, ``38 s``, ``2 min 5 s``."""
    if not math.isfinite(s):
        return MISSING
    if s < 0.01:
        return f"under 0.01{_NARROW}s"
    if s < 60:
        return f"{s:.{2 if s < 0.1 else 1 if s < 10 else 0}f}{_NARROW}s"
    minutes, rest = divmod(round(s), 60)
    return f"{count(minutes)}{_NARROW}min {rest}{_NARROW}s"


def digits_for(values: list[float]) -> int:
    """Decimals of a percentage column: one, or as many more as its largest entry needs to show two digits."""
    largest = max((abs(100 * v) for v in values if math.isfinite(v)), default=1.0)
    return 1 if largest >= 1 or largest == 0 else min(5, 1 - math.floor(math.log10(largest)))


def spaced(name: str) -> str:
    """A name from code for a sentence: ``gaussian_noise`` reads ``gaussian noise``."""
    return name.replace("_", " ").strip() or name


def mid_sentence(name: str) -> str:
    """A method's name inside a sentence: ``temperature scaling``, but ``Platt scaling`` and ``EATA``."""
    return name if name[:2].isupper() or name.startswith("Platt") else name[:1].lower() + name[1:]


def compare(before: Triple, after: Triple, better: int, change: Triple | None = None) -> Change:
    """Whether `after` differs from `before` by more than their uncertainty, and in which direction.

    Judged by the interval of the paired difference where there is one; otherwise by whether the two intervals
    overlap, which is stricter: it calls fewer differences clear.

    Args:
        before, after: estimate, low, high.
        better: +1 where more is better, -1 where less is, 0 where neither is.
        change: after minus before, paired over the rows.

    Example:
        >>> compare((0.9, 0.88, 0.92), (0.95, 0.94, 0.96), better=1)
        'better'
    """
    if not (math.isfinite(before[0]) and math.isfinite(after[0])):
        return "unknown"
    if math.isclose(before[0], after[0], rel_tol=1e-6):  # the rounding of single precision
        return "same"
    if change is not None and math.isfinite(change[1]) and math.isfinite(change[2]):
        sign = (change[1] > 0) - (change[2] < 0)
    elif all(math.isfinite(end) for end in (*before, *after)):
        sign = (after[1] > before[2]) - (after[2] < before[1])
    else:
        return "unknown"
    if sign == 0:
        return "unclear"
    if better == 0:
        return "moved"
    return "better" if sign == better else "worse"


def visible(before: Triple, after: Triple, change: Change) -> Change:
    """The verdict on shares shown with one decimal: a clear difference that reads 0.0 points is none to speak of."""
    unseen = points(after[0] - before[0]) == points(0.0)
    return "unclear" if unseen and change in ("better", "worse", "moved") else change


_IN_WORDS: dict[Change, str] = {
    "better": "clearly better",
    "worse": "clearly worse",
    "moved": "clearly moved",
    "unclear": "within uncertainty",
    "same": "unchanged",
    "unknown": "no interval to judge by",
}


def difference(before: Triple, after: Triple, share: bool, verdict: Change) -> dict[str, Any]:
    """The mark of a change: an arrow, its size and the verdict in words, so that no meaning rests on colour."""
    if not (math.isfinite(before[0]) and math.isfinite(after[0])):
        return {"arrow": "", "size": "", "words": "not available", "verdict": verdict}
    delta = after[0] - before[0]
    size = f"{points(delta)} points" if share else decimal(abs(delta))
    arrow = "=" if verdict == "same" else "\u25b2" if delta > 0 else "\u25bc"
    return {"arrow": arrow, "size": "" if verdict == "same" else size, "words": _IN_WORDS[verdict], "verdict": verdict}
