"""What `benchmarks.adapters` measured, as tables: ``python -m benchmarks.adapters_table [FOLDER]`` prints them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters import CONTENDERS
from benchmarks.unfinished import warning
from trimtab.core.stats import bootstrap_mean

FOLDER = Path(__file__).parents[1] / "results/adapters/cifar10"
STREAMS = {
    "Dirichlet": ("B", "dirichlet", 64),
    "sorted": ("B", "sorted", 64),
    "mixed": ("B", "mixed", 64),
    "one after the other": ("B", "continual", 64),
    "batches of 16": ("B", "iid", 16),
    "single images": ("B", "iid", 1),
}
Cells = dict[tuple[str, ...], dict[str, Any]]


def read(folder: Path = FOLDER) -> dict[str, Cells]:
    """The cells of every adapter: by part, network, corruption, stream, batch size and seed."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        found[held["adapter"]] = {_key(name): cell for name, cell in held["cells"].items()}
    return found


def overview(found: dict[str, Cells], part: str) -> str:
    """Every adapter on all cells of a part that it and the unadapted model have: means, gains and costs."""
    lines = [
        "| adapter | accuracy | gain, points | ECE | log loss | time | memory | updates | resets |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = _of(found["Source"], part)
    rows = []
    for name, cells in found.items():
        mine = {key: cell for key, cell in _of(cells, part).items() if key in base and "refused" not in cell}
        if not mine:
            continue
        mean = {
            measure: statistics.fmean(cell[measure] for cell in mine.values())
            for measure in ("accuracy", "ece", "log_loss", "extra_mb", "updates", "resets")
        }
        slower = statistics.median(cell["milliseconds"] / cell["forward"] for cell in mine.values())
        gain = "" if name == "Source" else _gain([mine[key]["accuracy"] - base[key]["accuracy"] for key in mine])
        part_of = "" if len(mine) == len(base) else f" ({len(mine)} of {len(base)})"
        columns = (
            f"`{name}`{part_of}",
            f"{100 * mean['accuracy']:.1f}",
            gain,
            f"{100 * mean['ece']:.1f}",
            f"{mean['log_loss']:.2f}",
            f"{slower:.1f}",
            f"{mean['extra_mb']:.1f}",
            f"{mean['updates']:.0f}",
            f"{mean['resets']:.1f}",
        )
        rows.append((-mean["accuracy"], f"| {' | '.join(columns)} |"))
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


def measured(found: dict[str, Cells]) -> str:
    """How much of the table there is: every adapter is to have 45 cells of part A, 54 of part B and 12 of part C."""
    whole = {"A": 45, "B": 54, "C": 12}
    missing = []
    for part, cells in whole.items():
        counts = {name: len(_of(found.get(name, {}), part)) for name in CONTENDERS}
        short = [f"`{name}` {count}" for name, count in sorted(counts.items()) if count < cells]
        if short:
            missing.append(f"- Part {part}, of {cells} cells: {', '.join(short)}.")
    return warning(missing, "cells")


def streams(found: dict[str, Cells]) -> str:
    """Accuracy of every adapter on every kind of stream, and its gain over the unadapted model."""
    lines = [f"| adapter | {' | '.join(STREAMS)} |", "|---|" + "---:|" * len(STREAMS)]
    rows = []
    for name, cells in found.items():
        texts, accuracies = [], []
        for place in STREAMS.values():
            base, mine = (_at(found["Source"], place), _at(cells, place))
            shared = [key for key in mine if key in base and "refused" not in mine[key]]
            if not shared:
                texts.append("refused" if mine else "")
                continue
            accuracy = statistics.fmean(mine[key]["accuracy"] for key in shared)
            gain = _gain([mine[key]["accuracy"] - base[key]["accuracy"] for key in shared])
            accuracies.append(accuracy)
            texts.append(f"{100 * accuracy:.1f}" + ("" if name == "Source" else f" ({gain})"))
        if accuracies:
            rows.append((-statistics.fmean(accuracies), f"| `{name}` | {' | '.join(texts)} |"))
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


def _key(name: str) -> tuple[str, ...]:
    part, network, *corruption, stream, batch, seed = name.split(" ")
    return part, network, " ".join(corruption), stream, batch, seed


def _of(cells: Cells, part: str) -> Cells:
    return {key: cell for key, cell in cells.items() if key[0] == part}


def _at(cells: Cells, place: tuple[str, str, int]) -> Cells:
    part, stream, batch = place
    return {key: cell for key, cell in cells.items() if (key[0], key[3], key[4]) == (part, stream, str(batch))}


def _gain(differences: Sequence[float]) -> str:
    """The mean of paired differences in points, with its bootstrap interval over cells."""
    if len(differences) < 2:
        return f"{100 * differences[0]:+.1f}"
    interval = bootstrap_mean(100 * np.array(differences), seed=0)
    return f"{interval.estimate:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]".replace(" ", "\N{NO-BREAK SPACE}")


if __name__ == "__main__":
    cells = read(Path(sys.argv[1])) if len(sys.argv) > 1 else read()
    for part in "AC":
        print(f"Part {part}\n\n{overview(cells, part)}\n")
    print(f"Streams\n\n{streams(cells)}")
