"""Around a risk score: weak labels from plain functions, how true scores are, examples to show, questions to repeat.

For the scores of `trimtab.calibration.ParetoSelfSupervision`, and any other estimate of how likely an answer is wrong.

Zhao, Wei, Preston, Poon (2023), arXiv 2306.16564, and the authors' code (microsoft/POLAR), whose analysis this follows:
scores below 1e-8 (answers that were never given score zero) are left out, bins are ten and equally wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from trimtab.core import checks, progress
from trimtab.core.checks import InputError

Scores = Float[Tensor, " n"] | Float[np.ndarray, " n"]
Labels = Int[Tensor, " n"] | Integer[np.ndarray, " n"]
_NO_RISK = 1e-8
_BINS = 10


def apply_sources(sources: Sequence[Callable[[Any], int | None]], inputs: Iterable[Any]) -> Integer[np.ndarray, "n m"]:
    """The answers of supervision sources: plain functions from an input to a class, or to None (or -1) to abstain.

    Returns:
        (n, m) classes, -1 where a source abstains: the `weak_labels` of `ParetoSelfSupervision.fit`.

    Raises:
        InputError: there is no source or no input, or a source answers with something else.

    Example:
        >>> from trimtab.calibration import apply_sources
        >>> spam = lambda text: 1 if "prize" in text else None
        >>> ham = lambda text: 0 if "tomorrow" in text else None
        >>> apply_sources([spam, ham], ["a prize", "see you tomorrow", "hello"]).tolist()
        [[1, -1], [-1, 0], [-1, -1]]
    """
    rows = []
    for i, x in enumerate(progress.track(inputs, "sources")):
        answers = ((j, source(x)) for j, source in enumerate(sources))
        rows.append([_class(answer, f"the answer of source {j} to input {i}") for j, answer in answers])
    if not rows or not rows[0]:
        raise InputError("sources and inputs must hold at least one each")
    return np.array(rows, dtype=np.int64)


class ErrorCalibration(NamedTuple):
    """How true risk scores are.

    Attributes:
        ece: expected calibration error of the risk: mean |share of wrong answers - mean risk| of ten bins, by size.
        r2: squared correlation of share and mean risk over blocks of answers with similar risk; nan where fewer than
            two blocks differ.
        bin_error, bin_risk, bin_sd, bin_counts: (10,), share of wrong answers, mean risk, standard error of the share
            and number of answers in each bin; zero where it is empty.
        block_error, block_risk: share and mean risk of blocks of floor(sqrt(n)) answers, descending by risk; what is
            left at the end is dropped.
        order: answers by descending risk; those without risk are left out.
    """

    ece: float
    r2: float
    bin_error: Float[np.ndarray, " bins"]
    bin_risk: Float[np.ndarray, " bins"]
    bin_sd: Float[np.ndarray, " bins"]
    bin_counts: Integer[np.ndarray, " bins"]
    block_error: Float[np.ndarray, " blocks"]
    block_risk: Float[np.ndarray, " blocks"]
    order: Integer[np.ndarray, " kept"]


def error_calibration(risk: Scores, wrong: Bool[Tensor, " n"] | Bool[np.ndarray, " n"] | Labels) -> ErrorCalibration:
    """Compare risk scores with what turned out wrong.

    Args:
        risk: (n,) in [0, 1], such as `ParetoSelfSupervision.risk`; below 1e-8 an answer is left out.
        wrong: (n,), whether each answer was wrong, or 0 and 1.

    Raises:
        InputError: shapes differ, a score is out of range, or every score is zero.

    Example:
        >>> import numpy as np
        >>> from trimtab.calibration import error_calibration
        >>> random = np.random.default_rng(0)
        >>> risk = random.random(20000)
        >>> truth = error_calibration(risk, random.random(20000) < risk)
        >>> truth.ece < 0.02, truth.r2 > 0.95
        (True, True)
    """
    r, n = _risk(risk)
    w = checks.tensor(wrong, "wrong")
    mistakes = checks.labels(w.long() if w.dtype == torch.bool else w, n, 2, "wrong").cpu().numpy()
    kept = np.flatnonzero(r >= _NO_RISK)
    if not len(kept):
        raise InputError("risk must be above 1e-8 somewhere, it is zero for every answer")
    order = kept[np.argsort(-r[kept], kind="stable")]
    score, error = r[order], mistakes[order]
    counts = np.bincount(bins := np.minimum((_BINS * score).astype(np.int64), _BINS - 1), minlength=_BINS)
    bin_error, bin_risk = (np.bincount(bins, x, _BINS) / np.maximum(counts, 1) for x in (error, score))
    size = math.isqrt(len(order))
    block_error, block_risk = (x[: len(x) // size * size].reshape(-1, size).mean(1) for x in (error, score))
    return ErrorCalibration(
        ece=float(np.abs(bin_error - bin_risk) @ counts / len(order)),
        r2=_squared_correlation(block_error, block_risk),
        bin_error=bin_error,
        bin_risk=bin_risk,
        bin_sd=np.sqrt(bin_error * (1 - bin_error) / np.maximum(counts, 1)),
        bin_counts=counts,
        block_error=block_error,
        block_risk=block_risk,
        order=order,
    )


class Examples(NamedTuple):
    """Indices of examples, (c,) arrays each: those that are likely wrong, and those that are likely right."""

    hard: list[Integer[np.ndarray, " k"]]
    confirmed: list[Integer[np.ndarray, " k"]]


def choose_examples(predicted: Labels, risk: Scores, k: int, *, temperature: float = 0.01, seed: int = 100) -> Examples:
    """Few-shot examples for every class: k of high risk and k of low risk, drawn without replacement.

    Args:
        predicted: (n,), the harmonizer's classes.
        risk: (n,) in [0, 1]; answers below 1e-8 are left out.
        k: how many of each kind a class gets, fewer where it has fewer.
        temperature: hard ones are drawn with probability ~ exp(risk / temperature), confirmed ones with
            ~ exp((1 - risk) / temperature), > 0; 0.01 is the authors'.
        seed: of the draw; 100 is the authors'.

    Raises:
        InputError: shapes differ or a value is out of range.

    Example:
        >>> import numpy as np
        >>> from trimtab.calibration import choose_examples
        >>> examples = choose_examples(np.array([0, 0, 0, 1, 1]), np.array([0.9, 0.1, 0.5, 0.2, 0.8]), 1)
        >>> [int(i[0]) for i in examples.hard], [int(i[0]) for i in examples.confirmed]
        ([0, 4], [1, 3])
    """
    r, n = _risk(risk)
    y = checks.labels(predicted, n, 2**31, "predicted").cpu().numpy()
    checks.integer(k, "k", low=1)
    checks.number(temperature, "temperature", low=0, low_open=True)
    random = np.random.default_rng(seed)
    out = Examples([], [])
    for c in range(int(y.max()) + 1):
        members = np.flatnonzero((y == c) & (r >= _NO_RISK))
        for kind, score in ((out.hard, r[members]), (out.confirmed, 1 - r[members])):
            # Gumbel's trick: drawing one by one without replacement, also where exp(score / temperature) overflows
            kind.append(members[np.argsort(-(score / temperature + random.gumbel(size=len(members))))[:k]])
    return out


@dataclass(frozen=True)
class Question:
    """What `reask` hands to its callback.

    Args:
        index, input: which input it is about.
        answer: the answer so far, -1 if there was none.
        risk: the answer's risk.
        votes: the sources that voted, and their classes.
    """

    index: int
    input: Any
    answer: int
    risk: float
    votes: dict[str, int]


class Reasked(NamedTuple):
    """The answers after `reask`, (n,), and the indices of those that were asked again."""

    answers: Integer[np.ndarray, " n"]
    asked: Integer[np.ndarray, " asked"]


def reask(
    inputs: Sequence[Any] | Tensor | np.ndarray,
    answers: Labels,
    risk: Scores,
    ask: Callable[[Question], int | None],
    *,
    weak_labels: Int[Tensor, "n m"] | Integer[np.ndarray, "n m"] | None = None,
    names: Sequence[str] | None = None,
    threshold: float = 0.5,
) -> Reasked:
    """Dynamic prompting: ask again where the risk exceeds a threshold, with what the sources say as evidence.

    Args:
        inputs: the n inputs.
        answers: (n,), the language model's classes, -1 where it gave none.
        risk: (n,) in [0, 1].
        ask: called with a `Question`, riskiest first; returns the new answer, which replaces the old; None or -1: none.
            It may put the question again ("are you sure?"), or show the model the evidence.
        weak_labels: (n, m), -1 where a source abstains; the evidence.
        names: of the m sources; their numbers if None.
        threshold: 0.5, the authors'.

    Returns:
        All answers, and the indices of those asked again, riskiest first.

    Raises:
        InputError: shapes differ, or `ask` answers with something that is no class.

    Example:
        >>> import numpy as np
        >>> from trimtab.calibration import reask
        >>> def ask(question):
        ...     print(question.input, question.votes)
        ...     return question.votes["rule"]
        >>> risk, weak_labels = np.array([0.1, 0.8]), np.array([[-1, 0], [1, 0]])
        >>> reask(["a", "b"], np.array([0, 0]), risk, ask, weak_labels=weak_labels, names=["rule", "model"]).answers
        b {'rule': 1, 'model': 0}
        array([0, 1])
    """
    r, n = _risk(risk)
    if len(inputs) != n:
        raise InputError(f"inputs must have {n} entries as risk, got {len(inputs)}")
    new = _answers(answers, "answers", (n,)).copy()
    votes = np.empty((n, 0), np.int64) if weak_labels is None else _answers(weak_labels, "weak_labels", (n, None))
    called = [str(j) for j in range(votes.shape[1])] if names is None else list(names)
    if len(called) != votes.shape[1]:
        raise InputError(f"names must have {votes.shape[1]} entries, one a source, got {len(called)}")
    checks.number(threshold, "threshold", low=0, high=1)
    risky = np.flatnonzero(r > threshold)
    asked = risky[np.argsort(-r[risky], kind="stable")]
    for i in progress.track(asked.tolist(), "asking again"):
        evidence = {name: int(vote) for name, vote in zip(called, votes[i]) if vote >= 0}
        answer = ask(Question(i, inputs[i], int(new[i]), float(r[i]), evidence))
        new[i] = _class(answer, f"the new answer to input {i}")
    return Reasked(new, asked)


def _class(answer: Any, name: str) -> int:
    if answer is None:
        return -1
    return checks.integer(answer.item() if hasattr(answer, "item") else answer, name, low=-1)


def _risk(value: Any) -> tuple[np.ndarray, int]:
    risk = checks.tensor(value, "risk")
    if risk.ndim != 1 or len(risk) == 0 or not risk.is_floating_point():
        raise InputError(f"risk must be n >= 1 floating-point numbers, got shape {tuple(risk.shape)}")
    bad = ~((risk >= 0) & (risk <= 1))
    if bool(bad.any()):
        raise InputError(f"risk must lie in [0, 1], found {float(risk[bad][0]):.6g} at {checks.first_bad(bad)}")
    return risk.detach().double().cpu().numpy(), len(risk)


def _answers(value: Any, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    answers = checks.tensor(value, name).cpu().numpy()
    fits = answers.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, answers.shape))
    if not fits or answers.dtype.kind not in "iu" or (answers < -1).any():
        raise InputError(f"{name} must be integer classes or -1, {shape[0]} rows of them, got {answers.shape}")
    return answers.astype(np.int64)


def _squared_correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1] ** 2)
