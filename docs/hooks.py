"""What the documentation takes from elsewhere: the catalogue, the published claims, the command line, the drawings."""

import ast
import json
import re
import sys
from functools import partial
from pathlib import Path

import griffe
import typer
from mkdocs.structure.files import File

from trimtab import catalog, cli
from trimtab.claims.table import effect, read

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import adapters_table, objectives_table  # noqa: E402

REPOSITORY_PAGES = {"add-a-method.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
ADMONITION = {"holds": "success", "undecided": "warning", "fails": "failure", "not measured": "note"}


def on_config(config):
    """Name the method pages in the navigation."""
    pages = [{"All methods": "methods/index.md"}] + [
        {short(m.symbols): f"methods/{m.slug}.md"} for m in catalog.methods()
    ]
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = pages
    return config


def on_files(files, config):
    """Add the pages that have no file of their own in this folder."""
    made = {path: (ROOT / name).read_text(encoding="utf-8") for path, name in REPOSITORY_PAGES.items()}
    made["methods/index.md"] = f"# Methods\n\n{methods('')}"
    made |= {f"methods/{method.slug}.md": method_page(method) for method in catalog.methods()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill the places that pages leave open: ``<!-- name -->``."""
    fillers = (
        journey,
        claims,
        commands,
        methods,
        choosing_log_loss,
        choosing_ece,
        choosing_seconds,
        peers,
        growth,
        adapters_measured,
        adapters_corrupted,
        adapters_streams,
        adapters_deeper,
        objectives_measured,
    )
    compared = {f"objectives_{data}": partial(objectives_table.table, data) for data in objectives_table.DATA}
    for name, filler in {**{filler.__name__: filler for filler in fillers}, **compared}.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", filler())
    return markdown


class Docstrings(griffe.Extension):
    """Docstrings say "Example:", and name attributes together; griffe knows "Examples:", and one name a line."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(
                r"^( +\w+(?:, \w+)+):", lambda m: m[0].replace(", ", ",\u00a0"), text, flags=re.M
            )


def short(symbols, limit=3):
    """The first symbols of a method, for the navigation."""
    return ", ".join(symbols[:limit]) + (", ..." if len(symbols) > limit else "")


def journey():
    """The picture of the landing page: one drawing for wide screens, one for narrow ones."""
    drawings = [
        (ROOT / "docs/assets" / f"journey-{shape}.svg").read_text(encoding="utf-8") for shape in ("wide", "tall")
    ]
    return "\n\n".join(drawings)


def methods(folder="methods/"):
    """Every method with its verdict."""
    rows = ["| method | what it does | claim |", "|---|---|---|"]
    for method, result in zip(catalog.methods(), read(), strict=True):
        symbols = ", ".join(f"`{symbol}`" for symbol in method.symbols)
        rows.append(f"| [{symbols}]({folder}{method.slug}.md) | {method.summary} | {result['verdict']} |")
    return "\n".join(rows)


SHORT = {
    "breast cancer, SVM margins": "SVM margins",
    "digits, naive Bayes": "naive Bayes",
    "digits, random forest": "forest",
    "CIFAR-10, ResNet-20": "ResNet-20",
    "CIFAR-10, ResNet-56": "ResNet-56",
    "CIFAR-10 in fog, ResNet-20": "in fog",
    "Fashion-MNIST, perceptron": "Fashion",
    "Shakespeare, next character": "characters",
    "Shakespeare, next word": "words",
}


def choosing(measure, form):
    """One measure of every calibrator on every score set, the mean over folds; the best of each set in bold."""
    found = json.loads((ROOT / "benchmarks/results/choosing.json").read_text(encoding="utf-8"))
    values = {}
    for key, cell in found["cells"].items():
        name, calibrator, _ = key.split(" | ")
        values.setdefault(calibrator, {}).setdefault(name, []).append(cell.get(measure))
    sets = list(found["sets"])
    rows = [f"| calibrator | {' | '.join(SHORT[name] for name in sets)} |", "|---|" + "---:|" * len(sets)]
    means = {
        calibrator: {name: sum(cells) / len(cells) for name, cells in of_set.items() if None not in cells}
        for calibrator, of_set in values.items()
    }
    best = {name: min(of[name] for kind, of in means.items() if name in of and kind != "chosen") for name in sets}
    for calibrator in sorted(means, key=lambda kind: kind == "chosen"):
        cells = []
        for name in sets:
            value = means[calibrator].get(name)
            text = "–" if value is None else form(value)
            cells.append(f"**{text}**" if value == best[name] and measure != "seconds" else text)
        label = "*chosen by `rank`*" if calibrator == "chosen" else f"`{calibrator}`"
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def choosing_log_loss():
    """Log loss of every calibrator on every score set."""
    return choosing("log_loss", "{:.3f}".format)


def choosing_ece():
    """Calibration error of every calibrator on every score set, in per cent."""
    return choosing("ece", lambda value: f"{100 * value:.1f}")


def choosing_seconds():
    """How long the fits took."""
    return choosing(
        "seconds", lambda value: "< 0.01" if value < 0.01 else f"{value:.2g}" if value < 10 else f"{value:.0f}"
    )


def peers():
    """Every calibrator beside the packages that have it too: a table for each size."""
    found = json.loads((ROOT / "benchmarks/results/peers.json").read_text(encoding="utf-8"))
    lines = []
    for size in dict.fromkeys(row["size"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["size"] == size]
        lines += ["", f"**{size.replace('x', ' x ')}**", ""]
        lines += ["| calibrator | package | fit | of ours | held-out log loss | peak memory |"]
        lines += ["|---|---|---:|---:|---:|---:|"]
        for row in rows:
            ours = next(r for r in rows if r["family"] == row["family"] and r["contestant"] == "trimtab")
            start = f"| {row['family']} | {row['contestant']} |"
            if "failed" in row:
                lines.append(f"{start} {row['failed'].partition(':')[0]} | | | |")
                continue
            ratio = f"{row['seconds'] / ours['seconds']:.1f}x" if "seconds" in ours else ""
            memory = f"{row['peak_mib']:.0f}&nbsp;MiB"
            lines.append(f"{start} {row['seconds']:.2g}&nbsp;s | {ratio} | {row['log_loss']:.4f} | {memory} |")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([*lines, "", f"One thread; {versions}."])


def growth():
    """Seconds of a fit for more and more samples."""
    found = json.loads((ROOT / "benchmarks/results/growth.json").read_text(encoding="utf-8"))
    lines = [f"| calibrator | {' | '.join(f'{n:,} rows' for n in found['samples'])} | grows as |"]
    lines += ["|---|" + "---:|" * (len(found["samples"]) + 1)]
    for row in found["rows"]:
        cells = [f"{cell['seconds']:.2g}&nbsp;s, {cell['peak_mib']:.0f}&nbsp;MiB" for cell in row["cells"]]
        lines.append(f"| `{row['calibrator']}` | {' | '.join(cells)} | n<sup>{row['power']:.1f}</sup> |")
    return "\n".join(lines)


def adapters_measured():
    """What is missing of the table of adapters."""
    return adapters_table.measured(adapters_table.read())


def adapters_corrupted():
    """Every adapter on fifteen corruptions."""
    return adapters_table.overview(adapters_table.read(), "A")


def adapters_streams():
    """Every adapter on every kind of stream."""
    return adapters_table.streams(adapters_table.read())


def adapters_deeper():
    """Every adapter with a deeper network."""
    return adapters_table.overview(adapters_table.read(), "C")


def objectives_measured():
    """What is missing of the comparison of objectives."""
    return objectives_table.measured()


def claims():
    """Every claim with what it expected and measured."""
    return "\n\n".join(f"## [{r['slug']}](methods/{r['slug']}.md)\n\n{verdict(r)}" for r in read())


def verdict(result):
    """One claim: the statement, the verdict, the numbers, and the paper's own beside them."""
    if not result["expectations"]:
        return '!!! note "not measured"\n'
    seeds = len(result["values"])
    lines = [
        f'!!! {ADMONITION[result["verdict"]]} "{result["verdict"]}, {seeds} seeds"',
        f"    {result['statement']}",
        "",
        "| verdict | measured | expected |",
        "|---|---|---|",
    ]
    lines += [f"| {e['verdict']} | {unbroken(effect(e))} | {code(e['text'])} |" for e in result["expectations"]]
    seconds = sum(result["cpu_seconds"].values())
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", f"The mean over seeds with its 95 % bootstrap interval; {seconds:.0f} s of CPU; {versions}."]
    if result["reported"]:
        lines += ["", "The paper, in its own full-scale setting:", "", *nested(result["reported"])]
    if result["notes"]:
        lines += ["", "What we found:", "", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines)


def unbroken(text):
    """Text that stays on one line."""
    return text.replace(" ", "&nbsp;")


def code(text):
    """Inline code in a table cell that is never too narrow for it."""
    return "`" + text.replace("|", "&#124;") + "`{ .bound }"


def nested(value, depth=0):
    """Reported data as list items; a row of plain numbers stays on one line."""
    for name, inner in value.items():
        start = f"{'    ' * depth}- {name}:"
        if not isinstance(inner, dict):
            yield f"{start} {inner}"
        elif any(isinstance(leaf, dict) for leaf in inner.values()):
            yield start
            yield from nested(inner, depth + 1)
        else:
            yield f"{start} {', '.join(f'{key} {leaf}' for key, leaf in inner.items())}"


def place(name):
    """Where griffe finds a symbol: in its module, where the module is called as the symbol is and would be shown."""
    _, *path, symbol = name.split(".")
    return f"{name}.{symbol}" if catalog.PACKAGE.joinpath(*path, f"{symbol}.py").is_file() else name


def method_page(method):
    """The page of one method: what it is, its claim, what the source tells, its interface."""
    told = "\n\n".join(
        (f"### `{file.relative_to(catalog.PACKAGE).as_posix()}`\n\n" if len(method.files) > 1 else "")
        + (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
        for file in method.files
    )
    result = next(r for r in read() if r["slug"] == method.slug)
    interface = "\n\n".join(f"::: {place(name)}" for name in method.names)
    return f"""# {method.title}

{method.summary[0].upper()}{method.summary[1:]}.

[Paper: arXiv {method.arxiv}]({method.paper}) · stage `{method.stage}` · {method.status} since {method.since}

```python
{method.imports}
```

## When to use it, and what we found

{told}

## Claim

{verdict(result)}

## Interface

{interface}
"""


def commands():
    """The help of every command."""

    def helps(command, path):
        with typer.Context(command, info_name=path) as context:
            yield f"## {path}\n\n```text\n{command.get_help(context).strip()}\n```"
        for name, inner in getattr(command, "commands", {}).items():
            yield from helps(inner, f"{path} {name}")

    return "\n\n".join(helps(typer.main.get_command(cli.app), "trimtab"))
