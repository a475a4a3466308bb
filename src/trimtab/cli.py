"""The command line. Everything heavy is imported inside the command that needs it, so that ``--help`` is instant.

Every command follows the same rules: results on standard output, progress and errors on standard error;
``--format json`` for machines; exit code 0 when done, 2 for input that the user can mend and for an interrupt, and 1
for a fault (or for a check that says no).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import trimtab
from trimtab import catalog
from trimtab.core.errors import InputError


class Format(StrEnum):
    """How results are written to standard output."""

    text = "text"
    json = "json"


def _cores() -> int:
    return os.cpu_count() or 1


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Silent = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no summary: the files tell.")]
Form = Annotated[Format, typer.Option("--format", help="Text for people, or JSON for machines.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same numbers.")]
Workers = Annotated[
    int,
    typer.Option("--workers", min=1, default_factory=_cores, show_default="all cores", help="Processes to use."),
]
Slugs = Annotated[
    list[str] | None, typer.Argument(metavar="METHOD", help="Methods, such as eata; all where none is named.")
]
Fast = Annotated[bool, typer.Option("--fast", help="Only claims that take a minute or less.")]

# typer 0.20 escapes "[default: ...]" for rich markup in plain help, too
vars(typer.core)["HAS_RICH"] = False

app = typer.Typer(
    name="trimtab",
    help="Small corrections that keep big models true: measure how far a model's confidence is from reality, "
    "correct it, prove the correction.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
claims_app = typer.Typer(help="Measure, check and read the methods' claims.")
app.add_typer(claims_app, name="claims")


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of a fault.")] = False,
) -> None:
    if version:
        typer.echo(trimtab.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and its numbers.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what an unfinished run left in the folder.")]
Onnx = Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write the calibrated model as ONNX, if installed.")]
AuditWorkers = Annotated[int, typer.Option("--workers", min=1, help="Processes for the runs over shifted streams.")]
Resamples = Annotated[int, typer.Option("--resamples", min=20, help="Bootstrap resamples behind every interval.")]
MaxTime = Annotated[
    float | None,
    typer.Option(
        "--max-time",
        metavar="MINUTES",
        help="Leave out calibrators and runs over shifted streams that would take longer; the report says which.",
    ),
]
Objectives = Annotated[
    list[str] | None,
    typer.Option(
        "--objective",
        metavar="NAME",
        help="For a setup with train: train a copy of the model on with this objective of trimtab.losses. Repeatable.",
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option("--epochs", min=1, help="For --objective: how often to go through train; 5 if not given."),
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", help="For --objective: of Adam; 0.001 if not given.")
]
Folds = Annotated[int, typer.Option("--folds", min=2, help="Folds of the cross-validation that ranks calibrators.")]


@app.command()
def audit(
    source: Annotated[
        str | None,
        typer.Argument(help="Table of scores (Parquet, Feather, CSV, NPZ), or FILE.py:FUNCTION."),
    ] = None,
    out: Out = Path("out"),
    coco: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--coco", metavar="GT.json DETS.json", help="A detector: ground truth and detections, as COCO."),
    ] = None,
    coco_calibration: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--coco-calibration",
            metavar="GT.json DETS.json",
            help="For --coco: another pair to fit the corrections on, else half of the images.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="For a table: another table to fit the corrections on.")
    ] = None,
    seed: Seed = 0,
    workers: AuditWorkers = 1,
    resamples: Resamples = 200,
    folds: Folds = 5,
    max_time: MaxTime = None,
    objective: Objectives = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    onnx: Onnx = True,
    fresh: Fresh = False,
    quiet: Silent = False,
    form: Form = Format.text,
) -> None:
    """Measure a model, a table or a detector, correct it, and report."""
    from trimtab import audit as job

    given = {"epochs": epochs, "learning_rate": learning_rate}
    training = {name: value for name, value in given.items() if value is not None}
    if training and not objective:
        raise InputError("--epochs and --learning-rate go with --objective NAME")
    if objective and coco is not None:
        raise InputError("--objective goes with a setup that brings a model and train, not with --coco")
    if coco is not None and source is None:
        if calibration is not None:
            raise InputError(
                "--calibration goes with a table; for a detector, give --coco-calibration GT.json DETS.json"
            )
        settings = {"seed": seed, "resamples": resamples, "folds": folds}
        _run(partial(job.audit_detections, *coco, calibration=coco_calibration), out, quiet, form, settings)
        return
    if source is None or coco is not None:
        raise InputError("audit needs a SOURCE or --coco GT.json DETS.json, one of the two")
    if coco_calibration is not None:
        raise InputError("--coco-calibration goes with --coco")
    options = {
        "objectives": tuple(objective or ()),
        **training,
        "seed": seed,
        "workers": workers,
        "resamples": resamples,
        "folds": folds,
        "onnx": onnx,
        "fresh": fresh,
        "max_minutes": float("inf") if max_time is None else max_time,
    }
    _run(partial(job.audit, source, calibration=calibration), out, quiet, form, options)


@app.command()
def demo(
    out: Out = Path("out/demo"),
    seed: Seed = 0,
    workers: AuditWorkers = 1,
    resamples: Resamples = 200,
    folds: Folds = 5,
    max_time: MaxTime = None,
    onnx: Onnx = True,
    fresh: Fresh = False,
    quiet: Silent = False,
    form: Form = Format.text,
) -> None:
    """Audit a small network that is trained on the spot."""
    from trimtab import audit as job

    options = {
        "seed": seed,
        "workers": workers,
        "resamples": resamples,
        "folds": folds,
        "onnx": onnx,
        "fresh": fresh,
        "max_minutes": float("inf") if max_time is None else max_time,
    }
    _run(job.demo, out, quiet, form, options)


@app.command()
def adapt(
    source: Annotated[str, typer.Argument(help="FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION that returns a Setup.")],
    method: Annotated[str, typer.Option("--method", help="An adapter, such as sar.")],
    stream: Annotated[str, typer.Option("--stream", help="A shift of the setup, or test.")] = "test",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write to; by default out/adapt/STREAM-METHOD.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An argument of the adapter: JSON, or FILE.py:FUNCTION."),
    ] = None,
    guard: Annotated[
        str | None, typer.Option("--guard", help="On a collapse: reset, 'roll back' or warn. Not watched by default.")
    ] = None,
    guard_memory: Annotated[
        int | None, typer.Option("--guard-memory", min=2, help="How many inputs the guard's judgement reaches back.")
    ] = None,
    guard_every: Annotated[
        int | None, typer.Option("--guard-every", min=1, help="Look at every so-many-th batch.")
    ] = None,
    prepared: Annotated[
        Path | None, typer.Option("--prepared", help="What the adapter's prepare left; made anew where it is needed.")
    ] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Batches a row of the table.")] = 10,
    fresh: Fresh = False,
    quiet: Silent = False,
    form: Form = Format.text,
) -> None:
    """Let an adapter follow a stream, watch it, and keep what it said."""
    from trimtab import audit as jobs
    from trimtab.audit.legs import watching

    settings = dict(_setting(pair) for pair in set_ or [])
    watched = {"memory": guard_memory, "every": guard_every}
    out = Path("out/adapt") / f"{stream}-{method}".replace(" ", "-") if out is None else out
    unfinished = (out / ".stream").is_dir() and not fresh
    shown = not quiet and form is Format.text
    with watching(f"{method} on {stream}", shown) as show:

        def watch(legs: Any) -> None:
            nonlocal unfinished
            if unfinished:
                done = sum(leg.batches for leg in legs)
                how = f"it goes on after batch {done}" if done else "something changed since, so it starts over"
                typer.echo(f"trimtab: {out} holds an unfinished run; {how}", err=True)
                unfinished = False
            show(legs)

        jobs.adapt(
            source,
            out,
            method=method,
            stream=stream,
            settings=settings,
            guard=guard,
            guard_settings={name: value for name, value in watched.items() if value is not None},
            prepared=prepared,
            every=every,
            fresh=fresh,
            watch=watch,
        )
    if form is Format.json:
        typer.echo((out / "stream.json").read_text(encoding="utf-8"), nl=False)
    elif shown:
        typer.echo(f"what it said: {out / 'predictions.parquet'}; where it stands: {out / 'adapter.safetensors'}")


def _setting(pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise InputError(f"--set must have the form NAME=VALUE, got {pair!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _run(job: Callable[..., Any], out: Path, quiet: bool, form: Format, options: dict[str, Any]) -> None:
    """Audit, show progress, and print what was found."""
    from trimtab.core import progress

    if (out / ".work").is_dir() and not options.get("fresh", True):
        typer.echo(f"trimtab: {out} holds an unfinished run; its pieces serve again where nothing changed", err=True)
    with progress.display(not quiet):
        result = job(out=out, **options)
    if form is Format.json:
        typer.echo((out / "audit.json").read_text(encoding="utf-8"), nl=False)
    elif not quiet:
        from trimtab.audit.brief import brief

        _print(brief(result, out))


@app.command("list")
def list_(form: Form = Format.text) -> None:
    """List the methods."""
    if form is Format.json:
        _print_json([asdict(method) for method in catalog.methods()])
        return
    from rich.box import SIMPLE
    from rich.table import Column, Table

    table = Table(Column("method", no_wrap=True), "symbols", "what it does", box=SIMPLE, pad_edge=False)
    for method in catalog.methods():
        table.add_row(method.slug, ", ".join(method.symbols), method.summary)
    _print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="METHOD", help="Slug or symbol: 24-eata, eata, Tent.")],
    form: Form = Format.text,
) -> None:
    """Show one method, how it is used and what its claim found."""
    method = catalog.find(name)
    result = catalog.result(method.slug)
    if form is Format.json:
        _print_json({**asdict(method), "names": method.names, "paper": method.paper, "result": result})
        return
    typer.echo(f"{method.title}\n{method.summary}\n")
    typer.echo(f"paper   {method.paper}\nstatus  {method.status}, since {method.since}")
    imports = method.imports.replace("\n", "\n        ")
    typer.echo(f"import  {imports}\n")
    for symbol in (name.rpartition(".")[2] for name in method.names):
        opening = method.docstring(symbol).partition("\n\n")[0]
        typer.echo(f"{symbol}: {opening}")
    if result is not None:
        from trimtab.claims.table import table

        typer.echo()
        _print(table([result]))


@claims_app.command("run")
def claims_run(
    workers: Workers,
    slugs: Slugs = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="How many seeds; else those of the claim.")
    ] = None,
    results: Annotated[Path, typer.Option("--results", help="Folder to write results into.")] = Path("results"),
    fast: Fast = False,
    quiet: Quiet = False,
    form: Form = Format.text,
) -> None:
    """Measure claims and write their results.

    A run that was killed goes on where it stopped.
    """
    from trimtab.claims import run as runner
    from trimtab.claims.table import table
    from trimtab.core import progress

    with progress.display(not quiet):
        measured = runner.run(runner.chosen(slugs or [], fast=fast), results, workers=workers, seeds=seeds)
    _print_json(measured) if form is Format.json else _print(table(measured))


@claims_app.command("check")
def claims_check(
    workers: Workers,
    slugs: Slugs = None,
    results: Annotated[Path | None, typer.Option("--results", help="Folder to compare with.")] = None,
    fast: Fast = False,
    quiet: Quiet = False,
    form: Form = Format.text,
) -> None:
    """Measure claims again and compare.

    The exit code is 1 where a verdict is not the published one.
    """
    from trimtab.claims import run as runner
    from trimtab.core import progress

    with progress.display(not quiet):
        rows = runner.check(runner.chosen(slugs or [], fast=fast), results, workers=workers)
    if form is Format.json:
        _print_json(rows)
    else:
        for row in rows:
            typer.echo(f"{row['slug']}: published {row['published']}, measured {row['measured']}")
    if any(row["published"] != row["measured"] for row in rows):
        raise typer.Exit(1)


@claims_app.command("table")
def claims_table(
    results: Annotated[Path | None, typer.Option("--results", help="Folder to read; else the published one.")] = None,
    form: Form = Format.text,
) -> None:
    """Print what every claim expected and what was measured."""
    from trimtab.claims.table import read, table

    found = read(results)
    _print_json(found) if form is Format.json else _print(table(found))


def _print(table: Any) -> None:
    from rich.console import Console

    Console(soft_wrap=False).print(table)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


_UsageError: Any = typer.BadParameter.__base__  # typer brings its own click, or uses the installed one


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; the one place where errors become a line on standard error and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        code = command.main([a for a in given if a != "--debug"], prog_name="trimtab", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except _UsageError as error:
        place = error.ctx.command_path if error.ctx else "trimtab"
        _leave(f"{error.format_message()} (`{place} --help` says more)", 2)
    except InputError as error:
        if "--debug" in given:
            traceback.print_exc()
        _leave(str(error), 2)
    except Exception as error:
        if "--debug" in given:
            raise
        _leave(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    if code == 130:
        _leave("interrupted; what is finished is kept, and the same command goes on from there", 2)
    sys.exit(code or 0)


def _leave(message: str, code: int) -> NoReturn:
    typer.echo("trimtab: " + " ".join(message.split()), err=True)
    sys.exit(code)
