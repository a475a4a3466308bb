"""The report of a detector's audit: what it says in words, its tables and pictures, and the page that holds them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trimtab.audit.report import page
from trimtab.audit.report.figures import FEW, Figure, Rung, Words, diagram, ladder
from trimtab.audit.report.tables import (
    Cell,
    Table,
    bins,
    change_cell,
    number_cell,
    seconds_cell,
    sort_key,
    span,
    triple_cell,
)
from trimtab.audit.report.tables import steps as steps_table
from trimtab.audit.report.verdict import Verdict
from trimtab.audit.report.words import (
    Measure,
    compare,
    count,
    coverage,
    decimal,
    digits_for,
    mid_sentence,
    percent,
    plural,
    points,
    seconds,
    visible,
)
from trimtab.audit.result import DetectionAudit, DetectionRow, RankedDetector
from trimtab.core import persist

HEADLINE = (
    Measure("laece", "LaECE", "gap of score and overlap, in bins, averaged over classes", True, -1),
    Measure("laace", "LaACE", "gap of score and overlap, box by box, averaged over classes", True, -1),
    Measure("dece", "D-ECE", "gap of score and precision at overlap 0.5: another meaning of the score", True, -1),
    Measure("lrp", "LRP error", "missed, false and badly placed boxes together", True, -1),
    Measure("lrp_false", "False boxes", "share of the boxes passed on that are false", True, -1),
    Measure("lrp_missed", "Missed objects", "share of the objects without a box", True, -1),
)
FURTHER = (
    Measure("lrp_localisation", "Misplacement", "mean of 1 − overlap over true boxes", True, -1),
    Measure("mean_score", "Mean score", "what the detector claims", True, 0),
    Measure("mean_overlap", "Mean overlap", "what its boxes reach; 0 for false ones", True, 1),
    Measure("gap", "Mean score − mean overlap", "positive where scores are too high", True, 0),
)
_NEGLIGIBLE = 0.01
_FEW_IMAGES = 20
_MOST = 2 / 3


def render(result: DetectionAudit) -> str:
    """The report of `result` as one HTML page that fetches nothing."""
    best = chosen(result)
    return (
        page.environment()
        .get_template("detection.html.jinja")
        .render(
            result=result,
            verdict=verdict(result),
            chosen=best,
            uncorrected=best.kind == "identity",
            cards=[page.card(result, measure) for measure in HEADLINE],
            few=FEW,
            rule=rule(result),
            reading=reading,
            headline=headline(result),
            ranking=ranking(result),
            classes=per_class(result),
            curve=curve,
            steps=steps_table(result),
            figures=pictures(result),
            trimtab=result.versions.get("trimtab", ""),
            **page.assets(),
        )
    )


def write(result: DetectionAudit, path: str | Path) -> None:
    """Write the report of `result` to `path`, whole or not at all."""
    persist.write_text(path, render(result))


def chosen(result: DetectionAudit) -> RankedDetector:
    """The calibrator that the one-standard-error rule picked."""
    return next(row for row in result.ranking if row.chosen)


def verdict(result: DetectionAudit) -> Verdict:
    """Judge the detector's scores and the chosen correction."""
    state_head, state = _state(result)
    cure_head, cure = _cure(result)
    return Verdict((f"{state_head}.", f"{cure_head}."), (f"{state}.", f"{cure}."))


def _state(result: DetectionAudit) -> tuple[str, str]:
    gap, low, high = result.before["gap"]
    if not math.isfinite(gap):
        return "No detection is above the thresholds", "Nothing is passed on, so there is nothing to judge"
    told = (
        f"Above the thresholds that serve best, boxes score {percent(result.before['mean_score'][0])} on average and "
        f"overlap their objects by {percent(result.before['mean_overlap'][0])}, false ones by 0"
    )
    if result.n < _FEW_IMAGES:
        return "Too few images to tell", f"{told}, but {plural(result.n, 'image')} cannot show how far apart these are"
    if result.before["laece"][2] < _NEGLIGIBLE:
        return "Scores match overlap, to within one point", told
    if not (math.isfinite(low) and math.isfinite(high)) or low <= 0 <= high:
        off = f"class by class and score by score they are {percent(result.before['laece'][0])} apart (LaECE)"
        return "Scores are right on average, uneven in detail", f"{told}; {off}"
    ends = " to ".join(decimal(100 * end, 1) for end in sorted((abs(low), abs(high))))
    side, word = ("high", "an excess") if gap > 0 else ("low", "a shortfall")
    band = f"{word} of {ends} points at {coverage(result.level)} certainty"
    return f"Scores are {points(gap)} points too {side}", f"{told}, {band}"


def _cure(result: DetectionAudit) -> tuple[str, str]:
    best = chosen(result)
    if best.kind == "identity":
        tried = plural(len(result.ranking) - 1, "correction")
        return "No correction tried helps", f"None of the {tried} tried is clearly better than the scores as they are"
    name = best.name.partition(",")[0]
    before, after = result.before, result.after
    moves = f"takes LaECE from {percent(before['laece'][0])} to {percent(after['laece'][0])}"
    if result.n < _FEW_IMAGES:
        doubt = f"which {plural(result.n, 'image')} cannot confirm"
        return f"Whether {mid_sentence(name)} helps is uncertain", f"{best.name}, {moves}, {doubt}"
    error = compare(before["laece"], after["laece"], -1, result.change["laece"])
    placing = compare(before["lrp"], after["lrp"], -1, result.change["lrp"])
    lrp = {
        "better": f"and lowers the LRP error from {percent(before['lrp'][0])} to {percent(after['lrp'][0])}",
        "worse": f"but raises the LRP error from {percent(before['lrp'][0])} to {percent(after['lrp'][0])}",
        "same": "without changing which boxes are passed on",
    }.get(placing, f"with the LRP error at {percent(after['lrp'][0])}, no clear change")
    if error == "better":
        part = "most" if after["laece"][0] <= (1 - _MOST) * before["laece"][0] else "part"
        return f"{name} corrects {part} of it", f"{best.name}, {moves}, more than chance explains, {lrp}"
    if error == "worse":
        return f"{name} does not correct it", f"{best.name}, {moves}, clearly worse: do not deploy it"
    return f"Whether {mid_sentence(name)} helps is uncertain", f"{best.name}, {moves}, a change within uncertainty"


def rule(result: DetectionAudit) -> str:
    """The one-standard-error rule, with this audit's numbers."""
    best, pick = result.ranking[0], chosen(result)
    text = (
        "Each was fitted and judged on separate parts of the fitting images, by how far its scores are from the "
        f"overlap, box by box. {best.name} comes closest. "
    )
    if pick is best:
        return f"{text}Nothing simpler is as good within one standard error, so it was chosen."
    return f"{text}{pick.name} is the simplest that is as good within one standard error, and was chosen."


def reading(result: DetectionAudit, when: str) -> str:
    """How many bins contradict their score."""
    rows = [(n, _finding(n, score, low, high)) for _, _, n, score, _, low, high in zip(*bins(result.reliability[when]))]
    rows = [row for row in rows if row[0] >= FEW]
    total = sum(n for n, _ in rows)
    text = ""
    for finding, meaning in (
        ("score too high", "below the diagonal: there is less overlap than the score says"),
        ("score too low", "above it: there is more overlap than the score says"),
    ):
        if hits := [n for n, found in rows if found == finding]:
            held = f"{len(hits)} of {plural(len(rows), 'bin')}, with {percent(sum(hits) / total)} of their boxes"
            text += f"{held}, {'lies' if len(hits) == 1 else 'lie'} clearly {meaning}. "
    text = text or f"All {plural(len(rows), 'bin')} agree with the diagonal within their intervals. "
    return text + f"Bins of fewer than {FEW} boxes are left out of this count."


def headline(result: DetectionAudit) -> Table:
    """Every measure, before and after."""
    rows = []
    for measure in (*HEADLINE, *FURTHER):
        before, after = result.before[measure.key], result.after[measure.key]
        change = visible(before, after, compare(before, after, measure.better, result.change.get(measure.key)))
        digits = digits_for([before[0], after[0]])
        cells = (triple_cell(x, True, digits) for x in (before, after))
        rows.append((Cell(measure.label, measure.meaning), *cells, change_cell(before, after, True, change, digits)))
    columns = (("Measure", False), ("Before", True), ("After", True), ("Change", True))
    return Table("headline", "Every measure before and after the correction, with intervals", columns, rows)


def ranking(result: DetectionAudit) -> Table:
    """Every calibrator."""
    rows = [
        (
            Cell(row.name, sort=row.name, badge="chosen" if row.chosen else ""),
            Cell(decimal(row.error), behind(row) or "the best", sort_key(row.error)),
            *(triple_cell(row.measures[key], True) for key in ("laece", "laace", "lrp", "dece")),
            seconds_cell(row.seconds),
        )
        for row in result.ranking
    ]
    labels = ("Cross-validated error", "LaECE", "LaACE", "LRP error", "D-ECE", "Time")
    columns = (("Calibrator", False), *((label, True) for label in labels))
    return Table("calibrators", "Calibrators, ranked by cross-validated error of the score", columns, rows)


def behind(row: RankedDetector) -> str:
    """How far a calibrator is behind the best; empty for the best itself."""
    if row.behind == 0:
        return ""
    error = f" ± {decimal(row.difference_error)}" if math.isfinite(row.difference_error) else ""
    return decimal(row.behind, signed=True) + error


def per_class(result: DetectionAudit) -> Table:
    """Every class, the worst calibrated first."""
    order = sorted(result.per_class, key=lambda r: -r.laece_before if math.isfinite(r.laece_before) else math.inf)
    rows = [
        (
            Cell(row.name, sort=row.name),
            Cell(count(row.objects), sort=str(row.objects)),
            _passed(row),
            _threshold(row.threshold_before),
            _threshold(row.threshold_after),
            number_cell(row.score_before, True),
            number_cell(row.overlap, True),
            number_cell(row.laece_before, True),
            number_cell(row.laece_after, True),
            number_cell(row.lrp_before, True),
            number_cell(row.lrp_after, True),
        )
        for row in order
    ]
    kept = ("Objects", "Boxes passed on", "Threshold, raw score", "Threshold, corrected", "Mean score before")
    errors = ("Mean overlap", "LaECE before", "LaECE after", "LRP before", "LRP after")
    columns = (("Class", False), *((label, True) for label in (*kept, *errors)))
    return Table("per-class", "Classes, the worst calibrated first", columns, rows, search="class")


def _passed(row: DetectionRow) -> Cell:
    note = "" if row.passed_after == row.passed_before else f"{count(row.passed_after)} after"
    return Cell(count(row.passed_before), note, str(row.passed_before))


def _threshold(x: float) -> Cell:
    return Cell(decimal(x), sort=sort_key(x)) if x >= 0 else Cell("none")


def curve(result: DetectionAudit, when: str) -> Table:
    """The bins of one reliability diagram."""
    rows = [
        (
            Cell(f"{decimal(lower, 2)}–{decimal(upper, 2)}", sort=sort_key(lower)),
            Cell(count(n), sort=str(n)),
            number_cell(score, True),
            triple_cell((overlap, low, high), True),
            Cell(_finding(n, score, low, high)),
        )
        for lower, upper, n, score, overlap, low, high in zip(*bins(result.reliability[when]))
    ]
    columns = ("Score", True), ("Boxes", True), ("Mean score", True), ("Mean overlap", True), ("Finding", False)
    return Table(f"bins-{when}", f"Bins of the reliability diagram, {when}", columns, rows)


def _finding(n: int, score: float, low: float, high: float) -> str:
    if n < FEW:
        return "too few to tell"
    # no gap that rounds to 0.0 %: where no box overlaps anything, the interval has no width
    return "score too high" if score - high > 0.0005 else "score too low" if low - score > 0.0005 else "as stated"


def pictures(result: DetectionAudit) -> dict[str, Figure]:
    """The pictures, by the id of the element that each is drawn into."""
    moments = ["before"] if chosen(result).kind == "identity" else ["before", "after"]
    return {f"reliability-{when}": _reliability(result, when) for when in moments} | {"ranking": _ranking(result)}


def _reliability(result: DetectionAudit, when: str) -> Figure:
    """Mean overlap against mean score, above the histogram of scores."""

    def point(row: tuple[Any, ...]) -> str:
        lower, upper, n, _, overlap, low, high = row
        return (
            f"{plural(n, 'box')} with a score of {span(lower, upper)}<br>"
            f"<b>overlap an object by {percent(overlap, 0)} on average</b><br>"
            f"({coverage(result.level)} interval {span(low, high)})"
        )

    def bar(n: int, total: int, where: str) -> str:
        return f"{count(n)} of {count(total)} boxes ({percent(n / max(1, total))})<br>have a score of {where}"

    words = Words("score", "overlap with an object", "score too low", "score too high", point, bar)
    return diagram(result.reliability[when], result.histogram[when], words, start=0.0, hollow=when == "before")


def _ranking(result: DetectionAudit) -> Figure:
    rungs = []
    for row in result.ranking:
        gap = f"{behind(row)} to the best" if row.behind else "the lowest"
        text = f"error {decimal(row.error)}, {gap}<br>fitted in {seconds(row.seconds)}"
        rungs.append(Rung(row.name, row.error, row.difference_error, text, row.chosen))
    return ladder(rungs, "error of the score, lower is better")
