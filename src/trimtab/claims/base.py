"""What a claim is: one sentence, a small experiment that can refute it, and what its numbers must show.

A claim lives in ``claims/<stage>/<method>.py`` as the constant ``CLAIM``. Its expectations are data, so that the
results, the documentation and a reader all see the same bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from trimtab.core import stats
from trimtab.core.errors import InputError

Verdict = Literal["holds", "undecided", "fails"]
_BY_SEVERITY: tuple[Verdict, ...] = ("holds", "undecided", "fails")


@dataclass(frozen=True)
class Expectation:
    """A bound on one measured number, or on the difference of two.

    Args:
        value: the key of the number in what the claim's `run` returns, such as ``"accuracy(eata)"``.
        at_least: the smallest effect that meets the expectation; None leaves that side open.
        at_most: the largest effect that meets it; None leaves that side open.
        minus: the key of a number to subtract, such as ``"accuracy(source)"``.
        every_seed: the bound must be met by every single seed, not only by the interval of the mean.

    Raises:
        InputError: neither bound is given, or they leave nothing between them.

    Example:
        >>> gain = Expectation("accuracy(eata)", at_least=0.05, minus="accuracy(source)")
        >>> str(gain)
        'accuracy(eata) - accuracy(source) >= 0.05'
        >>> gain.judge([0.07, 0.08, 0.06]).verdict
        'holds'
    """

    value: str
    at_least: float | None = None
    at_most: float | None = None
    minus: str | None = None
    every_seed: bool = False

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise InputError(f"expectation on {self.value!r} must have at_least or at_most, got neither")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise InputError(f"at_least must not exceed at_most, got {self.at_least} > {self.at_most}")

    def __str__(self) -> str:
        effect = self.value if self.minus is None else f"{self.value} - {self.minus}"
        if self.at_least is None:
            bound = f"{effect} <= {self.at_most:g}"
        elif self.at_most is None:
            bound = f"{effect} >= {self.at_least:g}"
        else:
            bound = f"{self.at_least:g} <= {effect} <= {self.at_most:g}"
        return f"{bound}, every seed" if self.every_seed else bound

    def effect(self, values: Mapping[str, float]) -> float:
        """The number that the bound is about, from what one seed measured."""
        for key in (self.value, self.minus):
            if key is not None and not math.isfinite(values.get(key, math.nan)):
                raise InputError(f"run must return a finite {key!r}, got {values.get(key, 'nothing')}")
        return values[self.value] - (0.0 if self.minus is None else values[self.minus])

    def judge(self, effects: list[float]) -> Judgement:
        """Hold the mean effect over seeds, with its bootstrap interval, against the bound."""
        interval = stats.bootstrap_mean(np.array(effects), seed=0)
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        missed = self.every_seed and not all(low <= effect <= high for effect in effects)
        if interval.high < low or interval.low > high or missed:
            return Judgement(self, interval, "fails")
        whole = low <= interval.low and interval.high <= high
        return Judgement(self, interval, "holds" if whole else "undecided")


@dataclass(frozen=True)
class Judgement:
    """An expectation, the effect that was measured, and whether it meets the bound."""

    expectation: Expectation
    effect: stats.Interval
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """A statement about a method, and the small experiment that can refute it.

    Args:
        slug: the method's slug in the catalogue.
        statement: what the paper says happens, in one sentence.
        run: ``run(seed)`` measures the method and its baselines side by side and returns named numbers; it depends on
            nothing but the seed.
        expectations: what the numbers must show.
        seeds: the seeds that the published verdict rests on; the defaults start at 100, away from those used while
            a method was developed. One seed says that the experiment has nothing random.
        budget: seconds on one core that all seeds together may take.
        reported: what the paper reports in its own full-scale setting, for readers.
        notes: what else a reader should know: deviations, and, where the claim fails, what was tried.

    Raises:
        InputError: no expectation, no seed, or a seed twice.
    """

    slug: str
    statement: str
    run: Callable[[int], Mapping[str, float]]
    expectations: tuple[Expectation, ...]
    seeds: tuple[int, ...] = tuple(range(100, 105))
    budget: float = 60.0
    reported: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.expectations:
            raise InputError(f"claim {self.slug} must have at least one expectation")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"claim {self.slug} must have distinct seeds, got {self.seeds}")

    def judge(self, values: Mapping[int, Mapping[str, float]]) -> list[Judgement]:
        """One judgement an expectation, from what each seed measured; one seed of several decides nothing."""
        judged = [e.judge([e.effect(measured) for measured in values.values()]) for e in self.expectations]
        if len(values) < 2 <= len(self.seeds):
            return [replace(judgement, verdict="undecided") for judgement in judged]
        return judged


def worst(verdicts: list[Verdict]) -> Verdict:
    """The verdict of a whole claim: its weakest expectation decides.

    Example:
        >>> worst(["holds", "undecided", "holds"])
        'undecided'
    """
    return max(verdicts, key=_BY_SEVERITY.index)
