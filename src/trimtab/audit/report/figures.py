"""The interactive pictures as plotly specifications: plain data whose colours are names of CSS variables.

The page resolves ``var(--name)`` when it draws, and again when the theme changes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from trimtab.audit.report.tables import behind, bins, span
from trimtab.audit.report.verdict import scored, uncorrected
from trimtab.audit.report.words import count, coverage, decimal, percent, plural, seconds
from trimtab.audit.result import AuditResult, Curve

Figure = dict[str, Any]

_SUFFIX = {"ticksuffix": "\u202f%", "rangemode": "tozero"}
FEW = 10  # predictions; a bin with fewer is drawn faint
_POINTS = 300  # of a curve; more cannot be told apart on a screen


def figures(result: AuditResult) -> dict[str, Figure]:
    """Every picture that the result has data for, by the id of the element it is drawn into."""
    moments = ["before"] if uncorrected(result) else ["before", "after"]
    found = {f"reliability-{when}": reliability(result, when) for when in moments}
    if any(scored(row) for row in result.ranking):
        found["ranking"] = ranking(result)
    found["risk"] = risk_coverage(result, moments)
    return found


class Words(NamedTuple):
    """What a reliability diagram says: its axes, its two corners, and the hover texts of a point and of a bar."""

    across: str
    upwards: str
    above: str
    below: str
    point: Callable[[tuple[Any, ...]], str]
    bar: Callable[[int, int, str], str]


def reliability(result: AuditResult, when: str) -> Figure:
    """Accuracy against confidence with its band for each bin, above the histogram of confidence."""
    words = Words(
        "confidence",
        "share right",
        "not confident enough",
        "too confident",
        lambda row: _bin_text(row, result.level),
        lambda n, total, where: (
            f"{count(n)} of {count(total)} predictions ({percent(n / max(1, total))})<br>"
            f"were made with {where} confidence"
        ),
    )
    start = 0.5 if result.c == 2 else 0.0
    return diagram(result.reliability[when], result.histogram[when], words, start=start, hollow=when == "before")


def diagram(curve: Curve, cells: list[int], words: Words, *, start: float, hollow: bool) -> Figure:
    """What was reached against what was stated, with a whisker for each bin, above the histogram of statements."""
    colour = "var(--before)" if hollow else "var(--accent)"
    firm = [(c, a) for c, a, n in zip(curve.confidence, curve.accuracy, curve.count) if n >= FEW]
    gaps = [(x, y) for c, a in firm for x, y in ((c, c), (c, a), (None, None))]
    width = 1 / len(cells)
    total = sum(cells)
    data = [
        _line([start, 1], [start, 1], "var(--muted)", dash="dot"),
        _line([x for x, _ in gaps], [y for _, y in gaps], "var(--gap)", width=7),
        *_points(curve, words.point, colour, hollow=hollow),
        {
            "type": "bar",
            "x": [width * (i + 0.5) for i in range(len(cells))],
            "y": [100 * n / max(1, total) for n in cells],
            "width": width * 0.86,
            "yaxis": "y2",
            "marker": {"color": colour, "opacity": 0.75},
            "hovertext": [words.bar(n, total, span(width * i, width * (i + 1))) for i, n in enumerate(cells)],
            "hoverinfo": "text",
        },
    ]
    layout = {
        "xaxis": {**_axis(words.across), **_percents(), "range": [start - 0.02, 1.02], "anchor": "y2"},
        "yaxis": {**_axis(words.upwards), **_percents(), "range": [-0.02, 1.02], "domain": [0.27, 1]},
        "yaxis2": {**_axis("share of all"), **_SUFFIX, "domain": [0, 0.2], "nticks": 3},
        "annotations": [
            _note(words.above, x=start + 0.04 * (1 - start), y=0.96, xanchor="left"),
            _note(words.below, x=0.98, y=0.05, xanchor="right"),
        ],
    }
    return _figure(data, layout)


def _points(curve: Curve, text: Callable[[tuple[Any, ...]], str], colour: str, *, hollow: bool) -> list[Figure]:
    """Points with whiskers and hover texts; bins of few predictions in a trace of their own, which is faint."""
    traces = []
    for faint in (False, True):
        rows = [row for row in zip(*bins(curve)) if (row[2] < FEW) == faint]
        if not rows:
            continue
        _, _, _, confidence, accuracy, low, high = (list(column) for column in zip(*rows))
        whisker = {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 4}
        whisker["array"] = [top - a for a, top in zip(accuracy, high)]
        whisker["arrayminus"] = [a - bottom for a, bottom in zip(accuracy, low)]
        fill = "var(--paper)" if hollow else colour
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": confidence,
                "y": accuracy,
                "error_y": whisker,
                "marker": {"size": 9, "color": fill, "line": {"color": colour, "width": 2}},
                "opacity": 0.35 if faint else 1,
                "hovertext": [text(row) for row in rows],
                "hoverinfo": "text",
            }
        )
    return traces


def _bin_text(row: tuple[Any, ...], level: float) -> str:
    lower, upper, n, _, accuracy, low, high = row
    digits = 1 if high - low < 0.02 else 0
    return (
        f"Of {plural(n, 'prediction')} made with {span(lower, upper)} confidence,<br>"
        f"<b>{percent(accuracy, digits)} were right</b><br>"
        f"({coverage(level)} interval {percent(low, digits)[:-2]}\u2013{percent(high, digits)})"
    )


class Rung(NamedTuple):
    """One row of a ranking: its name, its number with a standard error, its hover text."""

    name: str
    value: float
    error: float
    text: str
    chosen: bool


def ranking(result: AuditResult) -> Figure:
    """Cross-validated log loss of every calibrator, best on top; the whiskers that reach its line are ties."""
    rows = [row for row in result.ranking if scored(row)]
    best = rows[0]
    rungs = []
    for row in rows:
        gap = f"{behind(row, best)} to the best" if row is not best else "the lowest"
        text = f"log loss {decimal(row.log_loss)}, {gap}<br>fitted in {seconds(row.seconds)}"
        rungs.append(Rung(row.name, row.log_loss, row.difference_error, text, row.chosen))
    return ladder(rungs, "log loss, lower is better")


def ladder(rungs: list[Rung], title: str) -> Figure:
    """A ranking, best on top; the whiskers that reach the dotted line of the best are ties."""
    best = rungs[0].value
    marks = [_marks([rung for rung in rungs if rung.chosen == chosen], chosen=chosen) for chosen in (False, True)]
    spread = max(rung.value for rung in rungs) > 3 * best > 0
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": best, "x1": best}
    layout = {
        "xaxis": {**_axis(title), "type": "log" if spread else "linear"},
        "yaxis": {
            "categoryorder": "array",
            "categoryarray": [_label(rung.name) for rung in reversed(rungs)],
            "automargin": True,
            "ticks": "",
            "showgrid": True,
            "gridcolor": "var(--line)",
            "fixedrange": True,
        },
        "shapes": [{**line, "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"}, "layer": "below"}],
        "margin": {"l": 10, "r": 22, "t": 8, "b": 48},
    }
    return _figure([mark for mark in marks if mark["x"]], layout)


def _marks(rungs: list[Rung], *, chosen: bool) -> Figure:
    colour = "var(--accent)" if chosen else "var(--before)"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [rung.value for rung in rungs],
        "y": [_label(rung.name) for rung in rungs],
        "error_x": {
            "type": "data",
            "array": [rung.error if math.isfinite(rung.error) else 0.0 for rung in rungs],
            "color": colour,
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {
            "size": 13 if chosen else 9,
            "symbol": "diamond" if chosen else "circle",
            "color": colour if chosen else "var(--paper)",
            "line": {"color": colour, "width": 2},
        },
        "hovertext": [f"<b>{html.escape(r.name)}</b>{', chosen' if chosen else ''}<br>{r.text}" for r in rungs],
        "hoverinfo": "text",
    }


def _label(name: str) -> str:
    """A name on the axis, broken into lines of about twenty characters so that a phone has room for the plot."""
    lines = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + len(word) > 20:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(html.escape(line if len(line) <= 24 else line[:23] + "\u2026") for line in lines[:3]) + " "


def risk_coverage(result: AuditResult, moments: list[str]) -> Figure:
    """Error rate among the most confident predictions, against how many are answered."""
    data = []
    style = {"before": ("var(--before)", "dash"), "after": ("var(--accent)", "solid")}
    for when in moments:
        curve = [pair for pair in result.risk_coverage[when] if math.isfinite(pair[1])]
        step = max(1, len(curve) // _POINTS)
        curve = curve[::step] + (curve[-1:] if (len(curve) - 1) % step else [])
        whole = percent(curve[-1][1]) if curve else ""
        colour, dash = style[when]
        texts = [
            f"<b>{when}</b>: answering only the {percent(coverage)} most confident,<br>"
            f"{percent(risk)} of the answers are wrong (of all: {whole})"
            for coverage, risk in curve
        ]
        line = _line([c for c, _ in curve], [100 * r for _, r in curve], colour, dash=dash, width=2.5)
        data.append({**line, "name": when, "hovertext": texts, "hoverinfo": "text"})
    layout = {
        "xaxis": {**_axis("share answered, the most confident first"), **_percents(), "range": [0, 1.02]},
        "yaxis": {**_axis("wrong among them"), **_SUFFIX},
        "showlegend": len(moments) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemclick": False},
        "margin": {"l": 58, "r": 22, "t": 34 if len(moments) > 1 else 8, "b": 48},
    }
    return _figure(data, layout)


def _figure(data: list[Figure], layout: Figure) -> Figure:
    common = {
        "showlegend": False,
        "hovermode": "closest",
        "hoverdistance": 40,
        "dragmode": False,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 58, "r": 22, "t": 8, "b": 48},
        "hoverlabel": {
            "bgcolor": "var(--ink)",
            "bordercolor": "var(--ink)",
            "align": "left",
            "font": {"color": "var(--paper)"},
        },
    }
    return {"data": data, "layout": {**common, **layout}}


def _line(x: list[Any], y: list[Any], colour: str, *, dash: str = "solid", width: float = 1.5) -> Figure:
    style = {"color": colour, "dash": dash, "width": width}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": style, "hoverinfo": "skip"}


def _axis(title: str) -> Figure:
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 13, "color": "var(--muted)"}},
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "fixedrange": True,
    }


def _percents() -> Figure:
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    return {"tickvals": ticks, "ticktext": [percent(tick, 0) for tick in ticks]}


def _note(text: str, **place: Any) -> Figure:
    return {
        "text": text,
        "showarrow": False,
        "bgcolor": "var(--paper)",
        "font": {"color": "var(--muted)", "size": 12},
        **place,
    }
