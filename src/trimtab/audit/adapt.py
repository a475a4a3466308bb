"""One adapter along one stream of a setup: what it says goes to a file, how it fares to whoever watches.

A run that was killed goes on where it was: every so many batches the adapter's state and what it said since are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from trimtab.adaptation import ADAPTERS, Adapter, Guard, Prepared
from trimtab.adaptation.base import Options, entropy
from trimtab.adaptation.guard import Action
from trimtab.adaptation.stream import Step, steps
from trimtab.audit import setup as setups
from trimtab.audit.identity import marks
from trimtab.audit.setup import Setup
from trimtab.core import checks, persist
from trimtab.core.checks import InputError
from trimtab.core.persist import atomic
from trimtab.core.predictions import Predictions

PREDICTIONS, STATE, SUMMARY, PREPARED = (
    "predictions.parquet",
    "adapter.safetensors",
    "stream.json",
    "prepared.safetensors",
)


@dataclass(frozen=True)
class Leg:
    """Some batches of a stream, one after the other, and where the adapter stands after them.

    Attributes:
        batches, samples: how many, of this leg alone.
        correct: right predictions among them; None without labels.
        entropy: mean entropy of the predictions, nats.
        updates, skipped, resets: the adapter's counters after the leg.
        collapses: the guard's counter after it; None without a guard.
        seconds: time spent in the adapter.
    """

    batches: int
    samples: int
    correct: int | None
    entropy: float
    updates: int
    skipped: int
    resets: int
    collapses: int | None
    seconds: float

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions; None without labels."""
        return None if self.correct is None else self.correct / self.samples


def adapt(
    source: str | Setup,
    out: str | Path,
    *,
    method: str,
    stream: str,
    settings: Mapping[str, Any] | None = None,
    guard: str | None = None,
    guard_settings: Mapping[str, Any] | None = None,
    prepared: str | Path | None = None,
    every: int = 10,
    fresh: bool = False,
    watch: Callable[[list[Leg]], None] = lambda legs: None,
) -> list[Leg]:
    """Let an adapter follow a stream of a setup, and leave what it said and where it stands in `out`.

    Args:
        source: a setup function as ``file.py:function`` or ``package.module:function``, or a `Setup`.
        out: folder for ``predictions.parquet`` (as `Predictions.read` reads it), ``adapter.safetensors`` (the state to
            go on from), ``stream.json`` (the legs, settings and versions), and ``prepared.safetensors`` where the
            adapter takes a preparation and none is given.
        method: name of an adapter, whatever its case.
        stream: name of one of the setup's shifts, or ``"test"``.
        settings: keyword arguments of the adapter; a function may be named as the setup function is, as in
            ``{"optimizer": "mine.py:slow_sgd"}``.
        guard: watch for collapse, with this action; None does not.
        guard_settings: keyword arguments of the `Guard`, such as ``{"memory": 500}``.
        prepared: what the adapter's ``prepare`` left; made from the setup's `train` batches where it has them, else
            from its `calibration` batches, if the adapter takes any.
        every: batches a leg, >= 1; a run that is killed loses one leg at most.
        fresh: forget what an unfinished run left.
        watch: called after every leg with all legs so far.

    Returns:
        All legs.

    Raises:
        InputError: an argument names nothing, the adapter refuses a setting or a batch, or the stream is empty.
    """
    checks.integer(every, "every", low=1)
    setup = source if isinstance(source, Setup) else setups.load(source)
    spec = None if isinstance(source, Setup) else source
    out, loader, kind = Path(out), _stream(setup, stream), adapter_called(method)
    identity = {
        "method": kind.__name__,
        "stream": stream,
        "settings": {name: repr(value) for name, value in (settings or {}).items()},
        "guard": [guard, dict(guard_settings or {})],
        "every": every,
        "trimtab": metadata.version("trimtab"),
        **marks(replace(setup, shifts={}, test=loader), spec),
    }
    kept = _Kept(out / ".stream", identity, fresh)
    options = _options(kind, settings or {}, guard, guard_settings or {})
    if prepared is not None or kind.preparation != "none":
        options["prepared"] = _prepared(kind, setup, prepared, out / PREPARED, again=kept.goes_on)
    try:
        adapter = kind(setup.model, **options)
    except TypeError as error:
        raise InputError(f"settings must suit {kind.__name__}: {error}") from error
    kept.open()
    legs = kept.restore(adapter)
    part: list[Step] = []

    def close() -> None:
        legs.append(_leg(part, adapter))
        kept.keep(part, legs, adapter)
        part.clear()
        watch(legs)

    watch(legs)
    for step in steps(
        adapter, loader, first=sum(leg.batches for leg in legs), description=f"{kind.__name__}, {stream}"
    ):
        part.append(step)
        if len(part) == every:
            close()
    if part:
        close()
    if not legs:
        raise InputError(f"{stream} must yield at least one batch, it yielded none")
    kept.join(out / PREDICTIONS, len(legs))
    persist.save(out / STATE, adapter.state_dict(), {"method": kind.__name__})
    versions = {name: metadata.version(name) for name in ("trimtab", "torch", "numpy")}
    persist.write_json(out / SUMMARY, {**identity, "versions": versions, "legs": [asdict(leg) for leg in legs]})
    kept.remove()
    return legs


def adapter_called(name: str) -> type[Adapter]:
    """The adapter of that name, whatever its case."""
    for kind in ADAPTERS:
        if kind.__name__.lower() == name.lower():
            return kind
    raise InputError(f"method must be one of {', '.join(kind.__name__ for kind in ADAPTERS)}, got {name!r}")


def _stream(setup: Setup, name: str) -> Any:
    streams = {"test": setup.test, **setup.shifts}
    if name not in streams:
        raise InputError(f"stream must be one of {', '.join(streams)}, got {name!r}")
    return streams[name]


def _options(
    kind: type[Adapter], settings: Mapping[str, Any], guard: str | None, watch: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments for the adapter, those that it does not know refused."""
    names = (*signature(kind).parameters, *Options.__annotations__)
    known = [name for name in names if name not in ("model", "prepared", "guard", "inplace", "options")]
    for name in settings:
        if name not in known:
            raise InputError(f"settings must be some of {', '.join(known)} for {kind.__name__}, got {name!r}")
    options = {
        name: setups.function(value) if isinstance(value, str) and ":" in value else value
        for name, value in settings.items()
    }
    if watch and guard is None:
        raise InputError(f"guard must be given for {', '.join(watch)} of a guard to mean anything")
    if guard is not None:
        options["guard"] = Guard(checks.one_of(guard, "guard", Action), **watch)
    return options


def _prepared(kind: type[Adapter], setup: Setup, given: str | Path | None, made: Path, *, again: bool) -> Prepared:
    """What was prepared and given; else what an unfinished run had `made`; else a new one, kept there."""
    if kind.preparation == "none":
        raise InputError(f"prepared must not be given to {kind.__name__}, which needs none")
    if given is not None:
        return Prepared.load(given)
    if not (again and made.is_file()):
        kind.prepare(setup.model, setup.calibration if setup.train is None else setup.train).save(made)
    return Prepared.load(made)


def _leg(part: list[Step], adapter: Adapter) -> Leg:
    outputs = torch.cat([step.outputs for step in part])
    labels = [step.labels for step in part if step.labels is not None]
    return Leg(
        batches=len(part),
        samples=len(outputs),
        correct=int((outputs.argmax(1) == torch.cat(labels)).sum()) if labels else None,
        entropy=float(entropy(outputs).double().mean()),
        updates=int(adapter.updates),
        skipped=int(adapter.skipped),
        resets=int(adapter.resets),
        collapses=None if adapter.guard is None else int(adapter.guard.collapses),
        seconds=sum(step.seconds for step in part),
    )


class _Kept:
    """What an unfinished run leaves: one file of predictions a leg, the adapter's state after the last whole one."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], fresh: bool):
        self.folder = folder
        self.mark = json.loads(json.dumps(identity))
        known = folder / "identity.json"
        self.goes_on = not fresh and known.is_file() and json.loads(known.read_text(encoding="utf-8")) == self.mark

    def open(self) -> None:
        """Make room for this run, over whatever another one left."""
        if not self.goes_on:
            shutil.rmtree(self.folder, ignore_errors=True)
            persist.write_json(self.folder / "identity.json", self.mark)

    def restore(self, adapter: Adapter) -> list[Leg]:
        """The legs that are done, and `adapter` as it stood after them."""
        states = sorted(self.folder.glob("state-*.safetensors"))
        if not states:
            return []
        tensors, told = persist.load(states[-1])
        adapter.load_state_dict(tensors)
        return [Leg(**leg) for leg in told["legs"]]

    def keep(self, part: list[Step], legs: list[Leg], adapter: Adapter) -> None:
        """Keep one leg more: its predictions first, then the state, then away with the state before."""
        labels = [step.labels for step in part if step.labels is not None]
        said = Predictions(torch.cat([step.outputs for step in part]), torch.cat(labels) if labels else None)
        said.write(self._part(len(legs)))
        before = list(self.folder.glob("state-*"))
        path = self.folder / f"state-{len(legs):08d}.safetensors"
        persist.save(path, adapter.state_dict(), {"legs": [asdict(leg) for leg in legs]})
        for old in before:
            old.unlink()

    def join(self, path: Path, legs: int) -> None:
        """All predictions in one file, without holding them all in memory."""
        with atomic(path) as draft:
            with pq.ParquetWriter(draft, pq.read_schema(self._part(1))) as writer:
                for number in range(1, legs + 1):
                    writer.write_table(pq.read_table(self._part(number)))

    def remove(self) -> None:
        """Delete everything: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.parquet"
