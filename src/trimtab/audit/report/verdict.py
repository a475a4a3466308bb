"""The verdict in words: a headline and a few sentences, computed from the numbers and hedged by their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trimtab.audit.report.words import Change, compare, coverage, decimal, mid_sentence, percent, plural, points, spaced
from trimtab.audit.result import CONTROL, AuditResult, Ranked, ShiftCell, TrainedModel, Triple

UNSHIFTED = "none"
_NEGLIGIBLE = 0.01  # one point: a calibration error, or a loss of accuracy, that is nothing to act on
_FEW = 50  # rows below which intervals are themselves guesses
_MOST = 2 / 3  # a correction that removes this share of the error removes "most of it"


class Verdict(NamedTuple):
    """What the first screen says: two short sentences as the headline, longer ones below."""

    headline: tuple[str, str]
    sentences: tuple[str, ...]


def verdict(result: AuditResult) -> Verdict:
    """Judge the model, the chosen correction, what training on does instead, and what shift does to both.

    The confidence gap is the mean confidence less the accuracy, with an interval that treats the two as independent;
    they are positively correlated, so the true interval is narrower.
    """
    state_head, state = _state(result)
    cure_head, cure = _cure(result)
    if any(cell.shift != UNSHIFTED for cell in result.shifts):
        sentences = [f"{state}; {cure}.", shift_sentence(result.shifts)]
    else:
        sentences = [f"{state}.", f"{cure}."]
    if result.trained:
        sentences.append(training_sentence(result.trained))
    return Verdict((f"{state_head}.", f"{_upper(cure_head)}."), tuple(map(_upper, sentences)))


def confidence_gap(headline: dict[str, Triple]) -> Triple:
    """Mean confidence less accuracy, from the headline measures before or after."""
    confidence, accuracy = headline["mean_confidence"], headline["accuracy"]
    gap = confidence[0] - accuracy[0]
    if not all(math.isfinite(x) for x in (*confidence, *accuracy)):
        return gap, math.nan, math.nan
    below = math.hypot(confidence[0] - confidence[1], accuracy[2] - accuracy[0])
    above = math.hypot(confidence[2] - confidence[0], accuracy[0] - accuracy[1])
    return gap, gap - below, gap + above


def chosen(result: AuditResult) -> Ranked | None:
    """The calibrator that the one-standard-error rule picked; None where the ranking holds none."""
    return next((row for row in result.ranking if row.chosen), None)


def scored(row: Ranked) -> bool:
    """Whether a calibrator was fitted and has a finite log loss (a probability of zero for a true label has none)."""
    return row.failed is None and math.isfinite(row.log_loss)


def uncorrected(result: AuditResult) -> bool:
    """Whether the model was best left as it is, so that before and after are the same."""
    best = chosen(result)
    return best is None or best.symbol == "Uncalibrated"


def _state(result: AuditResult) -> tuple[str, str]:
    """How the model's confidence compares with the truth: words for the headline, and a clause."""
    confidence, accuracy, ece = (result.before[key] for key in ("mean_confidence", "accuracy", "ece"))
    if not (math.isfinite(confidence[0]) and math.isfinite(accuracy[0]) and math.isfinite(ece[0])):
        return "The model's calibration could not be judged", "its confidence or its accuracy could not be measured"
    gap, low, high = confidence_gap(result.before)
    claim, truth = f"the model claims {percent(confidence[0])} confidence on average", f"{percent(accuracy[0])} of its "
    truth += "predictions are right"
    if result.n < _FEW:
        return (
            "Too few rows to tell",
            f"{claim} and {truth}, but {plural(result.n, 'row')} cannot show how far apart these are",
        )
    if _negligible(result):
        return "Well calibrated, to within one point", f"{claim} and {truth}"
    if not math.isfinite(low):
        return f"Confidence and accuracy lie {points(gap)} points apart", f"{claim} and {truth}"
    if low <= 0 <= high:
        if uncorrected(result):
            return "No miscalibration found", f"{claim} and {truth}, no further apart than chance explains"
        off = f"the calibration error is {percent(ece[0])}"
        return "Right on average, uneven in detail", f"{claim} and {truth}, but not at every level of confidence: {off}"
    ends = " to ".join(decimal(100 * end, 1) for end in sorted((abs(low), abs(high))))
    band = f"{ends} points at {coverage(result.level)} certainty"
    if gap > 0:
        return f"Overconfident by {points(gap)} points", f"{claim}, but only {truth}, an excess of {band}"
    return f"Underconfident by {points(gap)} points", f"{claim}, while {truth}, a shortfall of {band}"


def _cure(result: AuditResult) -> tuple[str, str]:
    """What the chosen calibrator achieves on the test rows: words for the headline, and a clause."""
    best = chosen(result)
    if best is None:
        return "no correction could be fitted", "no correction could be fitted"
    if uncorrected(result):
        tried = sum(row.failed is None for row in result.ranking) - 1
        if not tried:
            return "no correction could be fitted", "no correction could be fitted"
        _, low, high = confidence_gap(result.before)
        head = "no correction is needed" if low <= 0 <= high or _negligible(result) else "no correction tried helps"
        return head, f"none of the {plural(tried, 'correction')} tried is clearly better than leaving it as it is"
    name, inside = best.name, mid_sentence(best.name)
    before, after = result.before, result.after
    loss = compare(before["log_loss"], after["log_loss"], -1, result.change.get("log_loss"))
    error = compare(before["ece"], after["ece"], -1, result.change.get("ece"))
    gap = f"the calibration error from {percent(before['ece'][0])} to {percent(after['ece'][0])}"
    score = f"the log loss from {decimal(before['log_loss'][0])} to {decimal(after['log_loss'][0])}"
    if "worse" in (loss, error):
        return (
            f"{name} does not correct it",
            f"{inside} takes {gap} and {score}, clearly worse in part: do not deploy it",
        )
    if error == "better":
        part = "most" if after["ece"][0] <= (1 - _MOST) * before["ece"][0] else "part"
        clause = f"{inside} cuts {gap}, more than chance explains, {_accuracy_clause(result)}"
        return f"{name} {'still improves it' if _negligible(result) else f'corrects {part} of it'}", clause
    if loss == "better":
        clause = f"{inside} lowers {score}, more than chance explains, {_accuracy_clause(result)}"
        return f"{name} helps", f"{clause}; its effect on the calibration error is within uncertainty"
    doubt = "without intervals to judge the change by" if loss == error == "unknown" else "a change within uncertainty"
    return f"whether {inside} helps is uncertain", f"{inside} takes {gap} and {score}, {doubt}"


def _negligible(result: AuditResult) -> bool:
    """Whether the calibration error is surely too small to act on."""
    return result.before["ece"][2] < _NEGLIGIBLE


def _accuracy_clause(result: AuditResult) -> str:
    before, after = result.before["accuracy"], result.after["accuracy"]
    change = compare(before, after, 1, result.change.get("accuracy"))
    if change in ("better", "worse"):
        moves = "and raises" if change == "better" else "but lowers"
        return f"{moves} accuracy from {percent(before[0])} to {percent(after[0])}"
    return "without changing accuracy" if change == "same" else "without a clear change of accuracy"


def shift_sentence(cells: list[ShiftCell]) -> str:
    """What the shifts cost the unadapted model, and what an adapter wins back, on average over the shifts.

    That is the first in the list, which begins with the cheapest, that no other beats by more than uncertainty.
    """
    base = unadapted(cells)
    sound = {(c.shift, c.adapter): c for c in cells if c.failed is None and math.isfinite(c.accuracy[0])}
    shifts = [shift for shift in distinct(cell.shift for cell in cells) if shift != UNSHIFTED]
    if not all((shift, base) in sound for shift in (*shifts, UNSHIFTED)):
        return "what shift does could not be measured, because the unadapted model failed on a stream."
    home = sound[UNSHIFTED, base].accuracy
    plain = mean_of([sound[shift, base].accuracy for shift in shifts])
    worst = min(shifts, key=lambda shift: sound[shift, base].accuracy[0])
    name = f"the {plural(len(shifts), 'shift')} tried," if len(shifts) > 1 else f"the shift tried, {spaced(shifts[0])},"
    average = " on average" if len(shifts) > 1 else ""
    lost = home[0] - plain[0]
    if compare(home, plain, 1) != "worse" or lost < _NEGLIGIBLE:
        moved = f"from {percent(home[0])} to {percent(plain[0])}"
        return f"under {name} accuracy goes {moved}{average}, no clear loss of the unadapted model."
    deepest = f" and to {percent(sound[worst, base].accuracy[0])} under {spaced(worst)}" if len(shifts) > 1 else ""
    fall = f"under {name} accuracy falls from {percent(home[0])} to {percent(plain[0])}{average}{deepest}"
    complete = [
        adapter
        for adapter in distinct(cell.adapter for cell in cells)
        if adapter != base and all((shift, adapter) in sound for shift in shifts)
    ]
    if not complete:
        return f"{fall}; no adapter ran on all of them."
    means = {adapter: mean_of([sound[shift, adapter].accuracy for shift in shifts]) for adapter in complete}
    top = max(means.values())
    best = next(adapter for adapter in complete if means[adapter][0] >= top[1])  # the cheapest that may be as good
    verdicts = [
        compare(sound[s, base].accuracy, sound[s, best].accuracy, 1, sound[s, best].change.get("accuracy"))
        for s in shifts
    ]
    clear = verdicts.count("better")
    won = means[best][0] - plain[0]
    if clear == 0 or won <= 0:
        return f"{fall}; none of the {plural(len(complete), 'adapter')} tried clearly wins any of it back."
    where = "" if len(shifts) == 1 else " on every shift" if clear == len(shifts) else f" on {clear} of {len(shifts)}"
    back = f"adapting with {best} wins back {points(won)} of the {points(lost)} points lost"
    return f"{fall}; {back}, clearly better{where}."


def training_sentence(models: Sequence[TrainedModel]) -> str:
    """What training on with the best of the objectives achieves, beside temperature scaling alone."""
    start, *others = models
    control = control_of(others)
    best = best_trained(model for model in others if model is not control) or control
    if not others:
        return "there was no time to train the model on."
    if best is None:
        return "the model could not be trained on with any objective."
    losses = [decimal(found["log_loss"][0]) for found in (best.before, best.after, start.after)]
    against = ""
    if control is not None and best is not control:
        change = judged(control, best)
        how = f"clearly {change} than" if change in ("better", "worse") else "not told apart from"
        against = f", {how} the {decimal(control.after['log_loss'][0])} of {CONTROL}"
    return (
        f"trained on with {best.objective}, the model has a log loss of {losses[0]}, and of {losses[1]} after "
        f"temperature scaling{against}; temperature scaling alone gives {losses[2]}."
    )


def failures(models: Iterable[TrainedModel]) -> list[str]:
    """With which objectives training on failed, and why, a sentence each."""
    return [f"Training on with {m.objective} failed: {m.failed.rstrip('.')}." for m in models if m.failed]


def clear_best(models: Sequence[TrainedModel]) -> TrainedModel | None:
    """The best of them, where it is clearly better than the model as it is, the first, and than the control."""
    best = best_trained(models)
    others = [model for model in (models[0], control_of(models)) if model is not None and model is not best]
    clear = best is not None and others and all(judged(other, best) == "better" for other in others)
    return best if clear else None


def best_trained(models: Iterable[TrainedModel]) -> TrainedModel | None:
    """Of those that did not fail, the one with the lowest log loss after temperature scaling."""
    return min((m for m in models if m.failed is None), key=lambda m: m.after["log_loss"][0], default=None)


def control_of(models: Iterable[TrainedModel]) -> TrainedModel | None:
    """What the others are held against; None where that training failed or there was no time for it."""
    return next((m for m in models if m.objective == CONTROL and m.failed is None), None)


def judged(reference: TrainedModel, model: TrainedModel) -> Change:
    """Whether a model's log loss after scaling differs from the control's or the unchanged model's, by the pairs."""
    paired = model.change if reference.objective else model.gain
    return compare(reference.after["log_loss"], model.after["log_loss"], -1, paired.get("log_loss"))


def unadapted(cells: list[ShiftCell]) -> str:
    """The adapter that the others are held against: the first in the list, which is the model as it is."""
    return cells[0].adapter


def distinct(names: Iterable[str]) -> list[str]:
    """Names in the order in which they first appear."""
    return list(dict.fromkeys(names))


def mean_of(triples: Sequence[Triple]) -> Triple:
    """Mean of estimates; its ends are the means of the ends, as if the errors of all went together."""
    middle, low, high = (math.fsum(column) / len(triples) for column in zip(*triples))
    return middle, low, high


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
