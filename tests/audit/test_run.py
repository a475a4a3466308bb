"""The audit from its input to its files: what is left, what is the same, what survives a kill, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import wraps

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab.adaptation import ADAPTERS
from trimtab.audit import Setup, audit, identity
from trimtab.audit import run as run_module
from trimtab.audit import setup as setups
from trimtab.audit.result import AuditResult
from trimtab.calibration import load, select
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions

FAST = {"resamples": 20, "folds": 2, "onnx": False}
TABLE_FILES = {"audit.json", "calibrator.json", "calibrator.safetensors", "metrics.parquet", "report.html"}


def overconfident(n: int = 600, c: int = 4, seed: int = 0) -> Predictions:
    """Scores whose logits are twice what the truth is drawn from."""
    generator = torch.Generator().manual_seed(seed)
    truth = 1.5 * torch.randn(n, c, generator=generator)
    labels = truth.softmax(1).multinomial(1, generator=generator)[:, 0]
    return Predictions(2 * truth, labels)


def small_setup(model: nn.Module | None = None) -> Setup:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    parts = [
        DataLoader(TensorDataset(x[a:b], y[a:b]), batch_size=50, generator=torch.Generator())
        for a, b in ((0, 150), (150, 300))
    ]
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    shifted = DataLoader(TensorDataset(x[150:] + 1, y[150:]), batch_size=50, generator=torch.Generator())
    return Setup(model, calibration=parts[0], test=parts[1], shifts={"moved": shifted}, classes=["a", "b", "c"])


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "scores.parquet"
    overconfident().write(path)
    return path


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_table_leaves_its_files_and_a_calibrator_that_works(table, tmp_path):
    out = tmp_path / "out"
    result = audit(table, out, **FAST)
    assert files(out) == TABLE_FILES
    assert result.n == result.n_fit == 300
    assert result.after["ece"][0] < result.before["ece"][0]
    assert result.change["log_loss"][2] < 0
    assert len(result.measures) == 100
    assert sum(row.chosen for row in result.ranking) == 1
    calibrator = load(out / "calibrator.safetensors")
    predictions = overconfident(seed=1)
    probs = calibrator.predict_proba(predictions.logits)
    nll = -probs.gather(1, predictions.labels[:, None]).log().mean()
    assert nll < nn.functional.cross_entropy(predictions.logits, predictions.labels)


def test_what_is_written_is_what_is_returned(table, tmp_path):
    out = tmp_path / "out"
    result = audit(table, out, **FAST)
    assert AuditResult.from_dict(json.loads((out / "audit.json").read_text())) == result
    rows = pq.read_table(out / "metrics.parquet").to_pylist()
    suite = {row["measure"]: row["estimate"] for row in rows if row["section"] == "suite"}
    assert suite["pre_ECE_15"] == result.measures["pre_ECE_15"][0]
    headline = {(row["section"], row["measure"]): row for row in rows if row["section"] in ("before", "after")}
    assert headline["after", "log_loss"]["low"] == result.after["log_loss"][1]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(table, tmp_path):
    first, second = (audit(table, tmp_path / name, seed=3, **FAST) for name in ("a", "b"))
    other = audit(table, tmp_path / "c", seed=4, **FAST)
    assert first.before == second.before
    assert first.measures == second.measures
    assert first.before != other.before


def test_a_calibration_table_is_fitted_on_and_the_whole_other_table_measured(table, tmp_path):
    fit = tmp_path / "fit.csv"
    overconfident(200, seed=5).write(fit)
    result = audit(table, tmp_path / "out", calibration=fit, **FAST)
    assert (result.n, result.n_fit) == (600, 200)
    assert "fit.csv" in result.notes[0]


def test_a_streamed_table_has_the_estimates_of_one_in_memory(table, tmp_path, monkeypatch):
    fit = tmp_path / "fit.parquet"
    overconfident(500, seed=5).write(fit)
    whole = audit(table, tmp_path / "whole", calibration=fit, **FAST)
    monkeypatch.setattr(run_module, "SCORES_IN_MEMORY", 100)
    streamed = audit(table, tmp_path / "streamed", calibration=fit, **FAST)
    assert files(tmp_path / "streamed") == TABLE_FILES
    for state in ("before", "after"):
        mine, theirs = getattr(streamed, state), getattr(whole, state)
        assert {k: v[0] for k, v in mine.items()} == pytest.approx({k: v[0] for k, v in theirs.items()}, abs=1e-6)
    assert streamed.per_class == whole.per_class or all(
        a.ece_after == pytest.approx(b.ece_after, abs=1e-6) for a, b in zip(streamed.per_class, whole.per_class)
    )
    assert "streamed" in streamed.notes[0]


def test_a_model_is_measured_corrected_exported_and_followed_under_shift(tmp_path):
    out = tmp_path / "out"
    setup = small_setup()
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    result = audit(setup, out, **FAST)
    assert files(out) >= TABLE_FILES
    assert {(cell.shift, cell.adapter) for cell in result.shifts} >= {("none", "Source"), ("moved", "Tent")}
    assert {cell.adapter for cell in result.shifts if cell.failed} == {
        "CoTTA",
        "DeYO",
        "PETAL",
        "RMT",
        "RoTTA",
    }  # they augment or destroy images
    assert result.classes == [row.name for row in result.per_class] == ["a", "b", "c"]
    assert "auc_moved" in result.measures
    assert all(torch.equal(value, before[name]) for name, value in setup.model.state_dict().items())
    source = next(cell for cell in result.shifts if (cell.shift, cell.adapter) == ("none", "Source"))
    assert source.accuracy == result.before["accuracy"]


def test_the_exported_model_says_what_the_calibrated_model_says(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    setup = small_setup()
    audit(setup, tmp_path, **{**FAST, "onnx": True})
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(tmp_path / "model_calibrated.onnx")
    (said,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    calibrator = load(tmp_path / "calibrator.safetensors")
    with torch.no_grad():
        wanted = calibrator(setup.model(x)).numpy()
    np.testing.assert_allclose(said, wanted, atol=1e-5)


def test_an_adapter_that_refuses_the_model_leaves_its_words_in_the_report(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bare = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    result = audit(small_setup(bare), tmp_path, **FAST)
    refused = {cell.adapter: cell.failed for cell in result.shifts if cell.failed}
    assert "normalisation layer" in refused["Tent"]
    assert "Source" not in refused
    assert "normalisation layer" in (tmp_path / "report.html").read_text()


SLOW_SETUP = """
import time, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trimtab.audit import Setup
from pathlib import Path
HERE = Path(__file__).parent
class Slow(TensorDataset):
    def __init__(self, name, *tensors):
        super().__init__(*tensors)
        self.name = name
    def log(self, word):
        with open(HERE / "read.log", "a") as log:
            log.write(word + "\\n")
    def __getitem__(self, i):
        if i == 60 and self.name == "second" and (HERE / "wait").exists():
            self.log("waiting")
            time.sleep(600)
        if i == 119:
            self.log(self.name)
        return super().__getitem__(i)
def setup():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=g)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    make = lambda name: DataLoader(Slow(name, x, y), batch_size=40, generator=torch.Generator())
    return Setup(model, calibration=make("calibration"), test=make("test"), shifts={"second": make("second")})
"""


def start(folder, *extra):
    command = [sys.executable, "-m", "trimtab", "audit", f"{folder}/slow.py:setup", "-o", f"{folder}/out", "-q"]
    return subprocess.Popen(
        [*command, "--resamples", "20", "--folds", "2", "--no-onnx", *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(folder, word):
    log = folder / "read.log"
    for _ in range(600):
        if log.exists() and word in log.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"the audit never read {word}")


def test_an_audit_that_was_killed_goes_on_where_it_was(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_SETUP)
    (tmp_path / "wait").touch()
    killed = start(tmp_path)
    wait_for(tmp_path, "waiting")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert files(tmp_path / "out") == {".work"}
    (tmp_path / "wait").unlink()
    again = start(tmp_path)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "holds an unfinished run" in errors
    read = (tmp_path / "read.log").read_text().split()
    # calibration and test were collected before the kill, and the shifted stream is what comes next
    assert read[:4] == ["calibration", "test", "waiting", "second"]
    assert files(tmp_path / "out") >= TABLE_FILES
    assert ".work" not in files(tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new"), [("manual_seed(0)\n    x", "manual_seed(1)\n    x"), ("y = (x[:, 0] > 0)", "y = (x[:, 1] > 0)")]
)
def test_an_audit_whose_data_changed_starts_over(tmp_path, old, new):
    (tmp_path / "slow.py").write_text(SLOW_SETUP)
    changed = SLOW_SETUP.replace(old, new)
    assert changed != SLOW_SETUP
    first = identity.marks(setups.load(f"{tmp_path}/slow.py:setup"), None)
    (tmp_path / "slow.py").write_text(changed)
    second = identity.marks(setups.load(f"{tmp_path}/slow.py:setup"), None)
    assert first["model"] == second["model"]
    assert first["data"] != second["data"]


def test_an_interrupt_says_so_in_one_line_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_SETUP)
    (tmp_path / "wait").touch()
    running = start(tmp_path)
    wait_for(tmp_path, "waiting")
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 2
    assert errors.startswith("trimtab: interrupted; ")
    assert errors.count("\n") == 1
    assert files(tmp_path / "out") == {".work"}


def test_workers_give_the_cells_of_one_process(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_SETUP)
    finished = start(tmp_path, "--workers", "2")
    _, errors = finished.communicate()
    assert finished.returncode == 0, errors
    both = AuditResult.from_dict(json.loads((tmp_path / "out" / "audit.json").read_text()))
    one = audit(f"{tmp_path}/slow.py:setup", tmp_path / "one", **FAST)
    assert [(cell.shift, cell.adapter) for cell in both.shifts] == [(cell.shift, cell.adapter) for cell in one.shifts]
    for mine, theirs in zip(both.shifts, one.shifts):
        assert mine.log_loss == pytest.approx(theirs.log_loss, abs=1e-4, nan_ok=True)


def bad_table(folder, name, **columns):
    path = folder / name
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"logit_0": [0.0, 1.0], "logit_1": [1.0, float("nan")], "label": [0, 1]}, "finite.*row 1, column 1"),
        ({"logit_0": [0.0, float("inf")], "logit_1": [1.0, 0.0], "label": [0, 1]}, "finite.*row 1, column 0"),
        ({"logit_0": [0.0, 1.0], "logit_1": [1.0, 0.0], "label": [0, 2]}, r"0\.\.1, found 2 at row 1"),
        ({"logit_0": [0.0, 1.0], "logit_1": [1.0, 0.0], "label": [0.0, 1.0]}, "integer"),
        ({"prob_0": [0.5, 0.9], "prob_1": [0.5, 0.9], "label": [0, 1]}, "sum to one.*row 1"),
        ({"logit_0": [0.0, 1.0], "logit_1": [1.0, 0.0]}, "label"),
        ({"logit_0": [0.0, 1.0], "logit_2": [1.0, 0.0], "label": [0, 1]}, "'logit_1' is missing"),
        ({"score": [0.0, 1.0], "label": [0, 1]}, "logit_0"),
        ({"logit_0": [0.0] * 40, "logit_1": [1.0] * 40, "label": [1] * 40}, "at least two classes, found only class 1"),
        ({"logit_0": [0.0, 1.0], "logit_1": [1.0, 0.0], "label": [0, 1]}, "at least|at most"),
        ({"logit_0": pa.array([], pa.float32()), "logit_1": pa.array([], pa.float32())}, "at least one row"),
    ],
)
def test_a_bad_table_is_refused_in_words_and_nothing_is_left(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        audit(bad_table(tmp_path, "scores.parquet", **columns), tmp_path / "out", **FAST)
    left = tmp_path / "out"
    assert not left.exists() or files(left) <= {".work"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be at least 0"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"resamples": 3}, "resamples must be at least 20"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"level": 1.0}, "level must lie in"),
        ({"calibration": "nowhere.parquet"}, "no such file"),
    ],
)
def test_bad_options_are_named(table, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        audit(table, tmp_path / "out", **options)


@pytest.mark.bad_input
def test_files_that_are_no_tables_are_refused(table, tmp_path):
    truncated = tmp_path / "truncated.parquet"
    truncated.write_bytes(table.read_bytes()[:-100])
    empty = tmp_path / "empty.parquet"
    empty.touch()
    for path, message in (
        (truncated, "cannot be read as parquet"),
        (empty, "is empty"),
        (tmp_path / "x.xlsx", "ending"),
    ):
        with pytest.raises(InputError, match=message):
            audit(path, tmp_path / "out", **FAST)


@pytest.mark.bad_input
def test_a_setup_whose_classes_do_not_fit_is_refused_before_anything_is_fitted(tmp_path):
    setup = small_setup()
    with pytest.raises(InputError, match="classes must name 3 classes, got 2"):
        audit(Setup(setup.model, setup.calibration, setup.test, classes=["a", "b"]), tmp_path, **FAST)
    assert files(tmp_path) == {".work"}


def test_a_full_disk_is_said_and_leaves_nothing_half_written(table, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        audit(table, tmp_path / "out", **FAST)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


# calibrators that need more than logits, and a limit on the time


def richer(**more) -> Setup:
    plain = small_setup()
    return Setup(plain.model, plain.calibration, plain.test, **more)


def blurred(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=generator)


def test_an_augmentation_lets_calibrators_read_how_the_model_wavers(tmp_path):
    result = audit(richer(augment=blurred, views=2), tmp_path, **FAST)
    row = next(row for row in result.ranking if row.symbol == "CorrectnessAware")
    assert row.failed is None
    assert np.isfinite([row.log_loss, *row.test_log_loss]).all()
    assert any("SDM (features)" in note and "CorrectnessAware" not in note for note in result.notes)


def test_features_let_calibrators_train_on_them_and_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    from trimtab.calibration import SDM, TemperatureScaling
    from trimtab.calibration.select import Score

    def only_sdm(predictions, **_):
        assert predictions.features.shape == (150, 8)
        return [Score(SDM, (0.5, 0.5), 0.5, 0.0, 1.0), Score(TemperatureScaling, (0.9, 0.9), 0.9, 0.0, 1.0)]

    monkeypatch.setattr("trimtab.calibration.select.rank", only_sdm)
    init = SDM.__init__
    quick = {"dimension": 8, "rounds": 1, "epochs": 3, "lr": 1e-2, "rescaler_epochs": 2}
    monkeypatch.setattr(SDM, "__init__", wraps(init)(lambda self, **given: init(self, **{**quick, **given})))
    result = audit(richer(features=True), tmp_path, **{**FAST, "onnx": True})
    assert [row.symbol for row in result.ranking if row.chosen] == ["SDM"]
    assert isinstance(load(tmp_path / "calibrator.safetensors"), SDM)
    assert "No ONNX file was written: SDM needs features beside the logits." in result.notes
    assert not (tmp_path / "model_calibrated.onnx").exists()


def test_what_there_is_no_time_for_is_left_out_and_named(tmp_path):
    result = audit(small_setup(), tmp_path, max_minutes=1e-9, **FAST)
    sound = [row for row in result.ranking if row.failed is None]
    assert [row.symbol for row in sound] == ["Uncalibrated"]
    assert all("had together" in row.failed for row in result.ranking if row.failed)
    assert result.shifts == []
    every = 2 * len(ADAPTERS)
    assert any(f"Not run for want of time: {every} of {every} runs" in note for note in result.notes)
    assert (tmp_path / "report.html").is_file()
    again = audit(small_setup(), tmp_path, **FAST)
    assert len(again.shifts) == every
    assert sum(row.failed is None for row in again.ranking) == 10


def test_what_was_ranked_but_not_measured_is_named(table, tmp_path, monkeypatch):
    rank = select.rank
    monkeypatch.setattr(select, "rank", lambda rows, **options: rank(rows, **{**options, "max_seconds": np.inf}))
    result = audit(table, tmp_path, max_minutes=1e-6, **FAST)
    assert all(row.failed is None for row in result.ranking)
    (note,) = [note for note in result.notes if "not measured" in note]
    chosen = next(row for row in result.ranking if row.chosen)
    assert np.isfinite(chosen.test_log_loss).all()
    assert chosen.name not in note


@pytest.mark.bad_input
@pytest.mark.parametrize("minutes", [0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(table, tmp_path, minutes):
    with pytest.raises(InputError, match="max_minutes must be > 0"):
        audit(table, tmp_path, max_minutes=minutes)


@pytest.mark.bad_input
def test_views_of_nothing_are_refused():
    with pytest.raises(InputError, match="augment must be a function"):
        richer(augment=3)
    with pytest.raises(InputError, match="views must"):
        richer(augment=blurred, views=0)
