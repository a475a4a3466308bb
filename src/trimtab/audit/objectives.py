"""Train-time correction beside the post-hoc one: copies of the model, trained on with other objectives."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from trimtab.audit import setup as setups
from trimtab.audit.correct import Budget, Settings, triple
from trimtab.audit.result import CONTROL, NOTHING, TrainedModel, rebuild
from trimtab.audit.setup import Setup
from trimtab.audit.workspace import Workspace
from trimtab.calibration import TemperatureScaling
from trimtab.core import checks, persist
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions
from trimtab.core.progress import OutOfTime, in_time, limit
from trimtab.losses import OBJECTIVES, train

_MEASURES = ("accuracy", "ece", "log_loss")


@dataclass(frozen=True)
class Training:
    """Which objectives to train on with, for how long, at which learning rate (of Adam)."""

    names: tuple[str, ...]
    epochs: int
    learning_rate: float

    @classmethod
    def checked(cls, objectives: Sequence[str], epochs: int, learning_rate: float) -> Self:
        """With the control before the rest; refused where a name is unknown or a number out of range."""
        for name in objectives:
            if name not in OBJECTIVES:
                raise InputError(f"objectives must be among {', '.join(OBJECTIVES)}, got {name!r}")
        return cls(
            tuple(dict.fromkeys((CONTROL, *objectives))) if objectives else (),
            checks.integer(epochs, "epochs", low=1),
            checks.number(learning_rate, "learning_rate", low=0.0, low_open=True),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the report's settings say of it; nothing where nothing is trained."""
        return {"training_epochs": self.epochs, "learning_rate": self.learning_rate} if self.names else {}

    def compare(
        self,
        setup: Setup,
        calibration: Predictions,
        test: Predictions,
        out: Path,
        work: Workspace,
        settings: Settings,
        budget: Budget,
    ) -> tuple[list[TrainedModel], list[str]]:
        """The model as it is, and copies trained on; each with and without temperature scaling. Also notes.

        Cross-entropy is always among them: it tells what the further training does by itself. The copies' weights are
        left in `out`.
        """
        if not self.names:
            return [], []
        start = "no training"
        rows = {start: work.number(start, lambda: _measured("", calibration, test, work.file(start), settings))}
        late = []
        for name in self.names:
            piece = self._piece(name)
            train_on = partial(self._trained, setup, name, test.c, out, work.file(piece), settings)
            try:
                with limit(budget.seconds):
                    in_time()
                    rows[piece] = work.number(piece, train_on)
            except OutOfTime:
                late.append(name)
        notes = [f"Not trained with for want of time: {', '.join(late)}."] if late else []
        sound = {piece: Predictions.read(work.file(piece)) for piece, row in rows.items() if row["failed"] is None}
        for key, reference in (("change", self._piece(CONTROL)), ("gain", start)):
            for piece in sound:
                if reference in sound and piece != reference:
                    rows[piece][key] = settings.compare(sound[reference], sound[piece])
        return [rebuild(TrainedModel, row) for row in rows.values()], notes

    def _piece(self, name: str) -> str:
        return f"train with {name}, {self.epochs} epochs at {self.learning_rate:g}"

    def _trained(
        self, setup: Setup, name: str, classes: int, out: Path, scaled: Path, settings: Settings
    ) -> dict[str, Any]:
        """A copy of the model after training with one objective; a refusal or an error leaves its words."""
        assert setup.train is not None
        model, start = deepcopy(setup.model), time.perf_counter()
        adam = partial(torch.optim.Adam, lr=self.learning_rate)
        try:
            train(model, setup.train, name, epochs=self.epochs, classes=classes, optimizer=adam, seed=settings.seed)
        except OutOfTime:
            raise
        except Exception as error:
            nothing = dict.fromkeys(_MEASURES, NOTHING)
            failed = setups.told(error)
            return {"objective": name, "before": nothing, "after": nothing, "seconds": math.nan, "failed": failed}
        seconds, file = time.perf_counter() - start, f"trained-{name}.safetensors"
        how = {"objective": name, "epochs": self.epochs, "learning_rate": self.learning_rate, "seed": settings.seed}
        persist.save(out / file, model.state_dict(), how)
        calibration, test = (Predictions.collect(model, loader) for loader in (setup.calibration, setup.test))
        return {**_measured(name, calibration, test, scaled, settings), "seconds": seconds, "file": file}


def _measured(
    name: str, calibration: Predictions, test: Predictions, scaled: Path, settings: Settings
) -> dict[str, Any]:
    """A model's scores, as they are and after temperature scaling fitted on the calibration rows, kept in `scaled`."""
    temperature = TemperatureScaling().fit_predictions(calibration)
    both = {"before": test, "after": temperature.transform(test)}
    Predictions(both["after"].logits, test.labels).write(scaled)
    found = {when: settings.essentials(part) for when, part in both.items()}
    plain = {when: {key: triple(values[key]) for key in _MEASURES} for when, values in found.items()}
    return {"objective": name, **plain, "seconds": math.nan, "failed": None}
