"""What `benchmarks.objectives` measured, as tables: ``python -m benchmarks.objectives_table [FOLDER]`` prints them."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.unfinished import warning
from trimtab.losses import OBJECTIVES

FOLDER = Path(__file__).parents[1] / "results/objectives"
DATA = ("fashion", "cifar10", "cancer", "diabetes")
SEEDS = 3
Cells = dict[str, list[dict[str, Any]]]
COLUMNS = {
    "accuracy": ("accuracy", 100, ".1f"),
    "AUC": ("auc", 100, ".1f"),
    "ECE": ("ece_before", 100, ".1f"),
    "ECE, scaled": ("ece_after", 100, ".1f"),
    "log loss": ("log_loss_before", 1, ".3f"),
    "log loss, scaled": ("log_loss_after", 1, ".3f"),
}


def read(data: str, folder: Path = FOLDER) -> Cells:
    """The runs of every objective on a data set, one a seed."""
    path = folder / f"{data}.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    found: Cells = {}
    for key, cell in cells.items():
        found.setdefault(key.rpartition(" ")[0], []).append(cell)
    return found


def times(data: str, folder: Path = FOLDER) -> dict[str, float]:
    """Milliseconds of a step with each objective."""
    path = folder / f"{data}.json"
    return json.loads(path.read_text(encoding="utf-8")).get("milliseconds", {}) if path.is_file() else {}


def table(data: str, folder: Path = FOLDER) -> str:
    """Every objective that was not refused: means over its seeds, the lowest scaled log loss first."""
    found, clock = read(data, folder), times(data, folder)
    lines = [f"| objective | {' | '.join(COLUMNS)} | time |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    base = clock.get("CrossEntropy", math.nan)
    rows = []
    for name, cells in found.items():
        if any("refused" in cell for cell in cells):
            continue
        mean = {key: statistics.fmean(cell[key] for cell in cells) for key, _, _ in COLUMNS.values()}
        texts = [f"{scale * mean[key]:{form}}" for key, scale, form in COLUMNS.values()]
        rows.append(
            (
                mean["log_loss_after"],
                f"| `{name}` | {' | '.join(texts)} | {clock.get(name, math.nan) / base:.2f} |",
            )
        )
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


def measured(folder: Path = FOLDER) -> str:
    """What of the study is missing, in words; empty where nothing is."""
    missing = []
    for data in DATA:
        found = read(data, folder)
        short = [f"`{name}` {len(found.get(name, []))}" for name in OBJECTIVES if len(found.get(name, [])) < SEEDS]
        if short:
            missing.append(f"- {data}, of {SEEDS} seeds: {', '.join(short)}.")
    return warning(missing, "seeds")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for data in DATA:
        print(f"{data}\n\n{table(data, place)}\n")
