"""The audit's training with other objectives, beside the correction after training."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab.audit import Setup, audit
from trimtab.audit import objectives as module
from trimtab.audit.report import render
from trimtab.audit.result import AuditResult
from trimtab.calibration import TemperatureScaling, Uncalibrated, select
from trimtab.core.checks import InputError

FAST = {"resamples": 20, "folds": 2, "onnx": False}


@pytest.fixture(autouse=True)
def _two_calibrators(monkeypatch):
    """The ranking of all of them takes most of an audit, and is not what is looked at here."""
    monkeypatch.setattr(select, "able", lambda predictions: (Uncalibrated, TemperatureScaling))


def setup() -> Setup:
    """A small network, hardly trained, and three parts of one data set."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(450, 5, generator=generator)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    train, calibration, test = (
        DataLoader(TensorDataset(x[rows], labels[rows]), batch_size=50, generator=torch.Generator())
        for rows in torch.arange(450).chunk(3)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    return Setup(model.eval(), calibration=calibration, test=test, train=train)


def test_every_objective_has_its_row_and_the_model_stays(tmp_path):
    given = setup()
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    result = audit(given, tmp_path, objectives=("ZLoss", "EnsLoss"), epochs=20, learning_rate=0.01, **FAST)
    rows = {model.objective: model for model in result.trained}
    assert list(rows) == ["", "CrossEntropy", "ZLoss", "EnsLoss"]
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())
    assert rows[""].before["log_loss"] == result.before["log_loss"]
    assert rows["CrossEntropy"].after["accuracy"][0] > rows[""].after["accuracy"][0] + 0.2
    assert rows["ZLoss"].after["log_loss"][0] < rows["ZLoss"].before["log_loss"][0]
    assert rows["EnsLoss"].failed == "classes must be 2 for EnsLoss, got 3"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Correct in training, or afterwards?" in page
    assert "failed: classes must be 2 for EnsLoss" in page
    kept = AuditResult.from_dict(json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")))
    assert kept.trained[:3] == result.trained[:3]


def test_without_objectives_there_is_no_section(tmp_path):
    result = audit(setup(), tmp_path, max_minutes=1e-3, **FAST)
    assert result.trained == []
    assert 'id="training"' not in render(result)


def test_what_there_is_no_time_for_is_named(tmp_path):
    result = audit(setup(), tmp_path, objectives=("MDCA",), max_minutes=1e-3, **FAST)
    assert [model.objective for model in result.trained] == [""]
    assert "Not trained with for want of time: CrossEntropy, MDCA." in result.notes


def test_a_killed_audit_does_not_train_again(tmp_path, monkeypatch):
    given = setup()
    options = {**FAST, "objectives": ("MDCA",), "epochs": 2}
    trained = []

    def dies_the_second_time(model, loader, name, **rest):
        trained.append(name)
        if trained == ["CrossEntropy", "MDCA"]:
            raise KeyboardInterrupt
        return real(model, loader, name, **rest)

    real = module.train
    monkeypatch.setattr(module, "train", dies_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        audit(given, tmp_path, **options)
    result = audit(given, tmp_path, **options)
    assert trained == ["CrossEntropy", "MDCA", "MDCA"]
    assert [model.objective for model in result.trained] == ["", "CrossEntropy", "MDCA"]


@pytest.mark.bad_input
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path):
    table = tmp_path / "scores.csv"
    table.write_text("label,prob_0,prob_1\n0,0.9,0.1\n1,0.2,0.8\n")
    for source, options, told in (
        (setup(), {"objectives": ("ZLos",)}, "objectives must be among CrossEntropy, .*, got 'ZLos'"),
        (replace(setup(), train=None), {"objectives": ("ZLoss",)}, "the setup must bring train"),
        (table, {"objectives": ("ZLoss",)}, "objectives go with a setup"),
        (setup(), {"objectives": ("ZLoss",), "epochs": 0}, "epochs must be at least 1"),
        (setup(), {"objectives": ("ZLoss",), "learning_rate": 0.0}, r"learning_rate must lie in \(0, inf\)"),
    ):
        with pytest.raises(InputError, match=told):
            audit(source, tmp_path / "out", **options)
