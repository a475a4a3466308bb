"""What to see in each picture, in a sentence or two computed from its numbers."""

from __future__ import annotations

import math

from trimtab.audit.report.heat import MEAN, Heat
from trimtab.audit.report.tables import bins, risk_at
from trimtab.audit.report.verdict import UNSHIFTED, best_trained, chosen, control_of, judged, scored, uncorrected
from trimtab.audit.report.words import coverage, decimal, difference, mid_sentence, percent, plural
from trimtab.audit.result import AuditResult, Triple


def reliability(result: AuditResult, when: str) -> str:
    """How many bins, and how many predictions, contradict the confidence that they state."""
    rows = list(zip(*bins(result.reliability[when])))
    total = sum(n for _, _, n, *_ in rows)
    high = [n for _, _, n, confidence, _, _, top in rows if top < confidence]
    low = [n for _, _, n, confidence, _, bottom, _ in rows if bottom > confidence]
    if not high and not low:
        return f"All {plural(len(rows), 'bin')} agree with the diagonal within their intervals."
    text = ""
    for hits, side, meaning in ((high, "below", "too confident"), (low, "above", "not confident enough")):
        if hits:
            held = f"{len(hits)} of {plural(len(rows), 'bin')}, with {percent(sum(hits) / total)} of the predictions,"
            text += f"{held} {'lies' if len(hits) == 1 else 'lie'} clearly {side} the diagonal: {meaning}. "
    others = len(rows) - len(high) - len(low)
    if others:
        text += f"The other {others} {'agrees' if others == 1 else 'agree'} with it within the interval. "
    chance = 1 - result.level
    if (len(high) + len(low)) <= max(1, 2 * chance * len(rows)):
        text += f"About {coverage(chance)} of bins would stand out by chance alone. "
    return text.strip()


def rule(result: AuditResult) -> str:
    """The one-standard-error rule, with this audit's numbers."""
    rows = [row for row in result.ranking if scored(row)]
    if not rows:
        return "No calibrator could be fitted; the reasons are in the table."
    best, pick = rows[0], chosen(result)
    text = (
        f"Each calibrator was fitted and scored on separate parts of the fitting rows. {best.name} has the lowest log "
        "loss; whatever lies no further behind it than one standard error of the difference is as good as the data "
        "can tell. "
    )
    if pick is None:
        return text + "None was chosen."
    if pick.name == best.name:
        return text + f"Nothing simpler is, so {mid_sentence(pick.name)} itself was chosen (diamond)."
    return text + f"The simplest of those was chosen: {mid_sentence(pick.name)} (diamond)."


def trained(result: AuditResult) -> str:
    """What the table of objectives compares, and which row has the lowest log loss once it is scaled."""
    text = (
        "A copy of the model was trained on with each objective. Cross-entropy tells what the training does by itself: "
        "the log losses after scaling are held against its, on the same rows. Scaling is by one temperature, fitted on "
        "the calibration rows. "
    )
    best, control = best_trained(result.trained), control_of(result.trained)
    if best is None or best_trained(result.trained[1:]) is None:
        return f"{text}None of them could be trained; the table and the notes say why."
    how = f"training on with {best.objective}" if best.objective else "the model as it is"
    loss = best.after["log_loss"]
    text += f"After it, {how} has the lowest log loss, {_with_interval(loss)}"
    if control is None or best is control:
        return f"{text}."
    beside = control.after["log_loss"]
    words = difference(beside, loss, False, judged(control, best))["words"]
    return f"{text}; held against cross-entropy's {_with_interval(beside)}, that is {words}."


def _with_interval(value: Triple) -> str:
    return f"{decimal(value[0])} ({decimal(value[1])} to {decimal(value[2])})"


def shift(result: AuditResult, heat: Heat) -> str:
    """How often adapting clearly helped and clearly hurt, over the shifted streams."""
    base, *others = heat.adapters
    text = f"{base} is the model as it is; below each number stands its difference to it. "
    cells = [cell.verdict for name, row in heat.rows[1:] for cell in row[1:] if name != MEAN and cell.level is not None]
    if not others:
        return text
    tried = f"Of {plural(len(cells), 'pairing')} of a shift with an adapter"
    better, worse = (f"{cells.count(kind) or 'none'}" for kind in ("better", "worse"))
    counts = f"{better} did clearly better than not adapting and {worse} clearly worse."
    text = f"{text}{tried}, {counts}"
    if "LAME" in others:
        text += " Every adapter ran with its defaults; LAME is made for streams whose classes come in runs."
    return text


def risk(result: AuditResult) -> str:
    """What turning away the least confident predictions would buy."""
    whole, most = (risk_at(result.risk_coverage["before"], [level])[0] for level in (1.0, 0.8))
    if not (math.isfinite(whole) and math.isfinite(most)):
        return "How the error rate falls when the least confident predictions are turned away."
    text = (
        f"Answering everything, {percent(whole)} of the answers are wrong; answering only the most confident "
        f"{percent(0.8, 0)}, {percent(most)} are. "
    )
    if uncorrected(result):
        return text + "The steeper the curve, the better confidence tells right from wrong."
    later = risk_at(result.risk_coverage["after"], [0.8])[0]
    text += f"After the correction it is {percent(later)}"
    if abs(later - most) < 0.01:
        text += ": calibration changes how confidence reads, and only a little which predictions it doubts"
    return text + "."


def adapted(heat: Heat) -> int:
    """How many adapters ran."""
    return sum(any(row[place].level is not None for _, row in heat.rows) for place in range(1, len(heat.adapters)))


def shifted(result: AuditResult) -> int:
    """How many shifted streams there are."""
    return len({cell.shift for cell in result.shifts} - {UNSHIFTED})
