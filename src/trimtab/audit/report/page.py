"""The report as one HTML page that carries everything it needs."""

from __future__ import annotations

import base64
import gzip
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trimtab.audit.report import captions, tables
from trimtab.audit.report.figures import FEW, figures
from trimtab.audit.report.heat import LEVELS, MEAN, heat_maps
from trimtab.audit.report.verdict import (
    best_trained,
    chosen,
    clear_best,
    confidence_gap,
    control_of,
    uncorrected,
    verdict,
)
from trimtab.audit.report.words import (
    HEADLINE,
    Measure,
    compare,
    count,
    coverage,
    difference,
    interval,
    number,
    plural,
    visible,
)
from trimtab.audit.result import AuditResult, DetectionAudit
from trimtab.core import persist

_HERE = Path(__file__).parent


def render(result: AuditResult) -> str:
    """The report of `result` as one HTML page.

    The page fetches nothing: style, script and plotly are inside it, and its content security policy forbids the rest.
    Plotly travels gzipped, which keeps the page near 2 MB instead of 5; browsers since 2023 can unpack it. The text,
    the tables and the heat map need no script at all.
    """
    heats = heat_maps(result)
    best = clear_best(result.trained) if result.trained else None
    objective = best if best and best.objective else control_of(result.trained) or best_trained(result.trained[1:])
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            result=result,
            verdict=verdict(result),
            chosen=chosen(result),
            uncorrected=uncorrected(result),
            best=best,
            trained=objective,
            cards=[card(result, measure) for measure in HEADLINE],
            heats=heats,
            few=FEW,
            levels=LEVELS,
            mean=MEAN,
            figures=figures(result),
            captions=captions,
            tables=tables,
            trimtab=result.versions.get("trimtab", ""),
            **assets(),
        )
    )


def write(result: AuditResult, path: str | Path) -> None:
    """Write the report of `result` to `path`, whole or not at all."""
    persist.write_text(path, render(result))


class Card(NamedTuple):
    """A headline number: before and after with intervals, the mark of the change, and where both lie on a strip."""

    label: str
    meaning: str
    before: str
    before_interval: str
    after: str
    after_interval: str
    change: dict[str, Any]
    strip: list[tuple[str, float, float, float]]
    target: float | None


def card(result: AuditResult | DetectionAudit, measure: Measure) -> Card:
    """One headline number of `result`."""
    before, after = result.before[measure.key], result.after[measure.key]
    clear = compare(before, after, measure.better, result.change.get(measure.key))
    change = difference(before, after, measure.share, visible(before, after, clear) if measure.share else clear)
    target = result.after["accuracy"][0] if measure.key == "mean_confidence" else math.nan
    if change["verdict"] == "moved":
        nearer = abs(confidence_gap(result.after)[0]) < abs(confidence_gap(result.before)[0])
        change |= {"verdict": "better" if nearer else "worse"}
        change |= {"words": "closer to accuracy" if nearer else "further from accuracy"}
    ends = [x for x in (*before, *after, target) if math.isfinite(x)]
    low, width = (min(ends), max(ends) - min(ends)) if ends else (0.0, 0.0)

    def place(x: float, otherwise: float) -> float:
        return round(4 + 92 * ((x if math.isfinite(x) else otherwise) - low) / width, 2) if width else 50.0

    strip = [
        (when, place(start, middle), place(middle, middle), place(end, middle))
        for when, (middle, start, end) in (("before", before), ("after", after))
        if math.isfinite(middle)
    ]
    return Card(
        measure.label,
        measure.meaning,
        number(before[0], measure.share),
        interval(before, measure.share),
        number(after[0], measure.share),
        interval(after, measure.share),
        change,
        strip,
        place(target, target) if math.isfinite(target) else None,
    )


@cache
def environment() -> Environment:
    """The templates, with the filters that they use."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count, "coverage": coverage, "plural": plural}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "ensure_ascii": False}
    return environment


def assets() -> dict[str, Any]:
    """What every page carries: plotly, script and style."""
    return {"plotly": _plotly(), "script": Markup(_read("report.js")), "style": Markup(_read("report.css"))}


@cache
def _plotly() -> str:
    """Plotly's script as the installed package bundles it, gzipped, in base64."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
