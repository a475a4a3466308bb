"""Which calibrator for what: all of them on the score sets of `benchmarks.real_scores`, by nested cross-validation.

Three outer folds: every calibrator is fitted to two of them (at most 4 000 rows) and measured on the third. The choice
that `trimtab.calibration.select` makes from those same rows, by three inner folds, is measured beside them. Finished
pieces are kept in the output file, so that a run that was killed goes on.

    python -m benchmarks.choosing [--sets NAME ...] [--scores out/score_sets] [--write benchmarks/results/choosing.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_scores import SETS, score_set
from trimtab.calibration import SDM, Calibrator
from trimtab.calibration.select import able, one_standard_error, rank
from trimtab.core.checks import InputError
from trimtab.core.persist import write_json
from trimtab.core.predictions import Predictions
from trimtab.metrics import expected_calibration_error

FOLDS, ROWS, INNER = 3, 4000, 3
LEFT_OUT = (SDM,)
"""The paper's settings for SDM are for embeddings of language models: here they learn nothing (see its page)."""


def measured(kind: type[Calibrator], fit: Predictions, test: Predictions) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        fitted = kind().fit_predictions(fit)
    except InputError as error:
        return {"failed": str(error)}
    seconds = time.perf_counter() - start
    after = fitted.transform(test)
    labels = after.needed("labels")
    loss = -float(after.logits.double().log_softmax(1).gather(1, labels[:, None]).mean())
    probs = after.probs
    ece = float(expected_calibration_error(probs, labels, bins=15))
    return {"log_loss": loss, "ece": ece, "accuracy": after.accuracy, "seconds": seconds}


def outer_folds(predictions: Predictions) -> list[tuple[Predictions, Predictions]]:
    pairs = []
    for number, (fit, test) in enumerate(predictions.folds(FOLDS, 0)):
        if fit.n > ROWS:
            fit = fit.split(ROWS / fit.n, seed=number)[0]
        pairs.append((fit, test))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), metavar="NAME")
    parser.add_argument("--scores", type=Path, default=Path("out/score_sets"))
    parser.add_argument("--write", type=Path, default=Path("benchmarks/results/choosing.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = json.loads(options.write.read_text()) if options.write.is_file() else {"sets": {}, "cells": {}}

    def keep() -> None:
        found["versions"] = {name: metadata.version(name) for name in ("trimtab", "torch", "numpy", "scipy")}
        write_json(options.write, found)

    for name in options.sets:
        predictions = score_set(name, options.scores)
        kinds = [kind for kind in able(predictions) if kind not in LEFT_OUT]
        pairs = outer_folds(predictions)
        found["sets"][name] = {"n": predictions.n, "fitted_on": pairs[0][0].n, "classes": predictions.c}
        for fold, (fit, test) in enumerate(pairs):
            for kind in kinds:
                key = f"{name} | {kind.__name__} | {fold}"
                if key not in found["cells"]:
                    found["cells"][key] = measured(kind, fit, test)
                    keep()
            key = f"{name} | chosen | {fold}"
            if key not in found["cells"]:
                start = time.perf_counter()
                chosen = one_standard_error(rank(fit, kinds, folds=INNER, seed=fold)).calibrator
                seconds = time.perf_counter() - start
                cell = found["cells"][f"{name} | {chosen.__name__} | {fold}"]
                found["cells"][key] = {**cell, "seconds": seconds + cell["seconds"], "calibrator": chosen.__name__}
                keep()
        losses = {
            kind.__name__: math.fsum(
                found["cells"][f"{name} | {kind.__name__} | {fold}"].get("log_loss", math.nan) for fold in range(FOLDS)
            )
            / FOLDS
            for kind in kinds
        }
        best = min(losses, key=lambda kind: losses[kind])
        choices = [found["cells"][f"{name} | chosen | {fold}"]["calibrator"] for fold in range(FOLDS)]
        print(f"{name}: best {best} {losses[best]:.4f}; chosen {', '.join(choices)}", flush=True)


if __name__ == "__main__":
    main()
