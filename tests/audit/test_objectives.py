"""The audit's training with other objectives, beside the correction after training."""

import html
import io
import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_result import audit as fake
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab.audit import Setup, audit
from trimtab.audit import objectives as module
from trimtab.audit.brief import brief
from trimtab.audit.report import render, tables
from trimtab.audit.report.captions import trained as caption
from trimtab.audit.report.verdict import failures, training_sentence
from trimtab.audit.result import NOTHING, AuditResult, TrainedModel
from trimtab.calibration import TemperatureScaling, Uncalibrated, select
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions
from trimtab.metrics import essentials

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
    result = audit(given, tmp_path, objectives=("ZLoss", "SAF", "EnsLoss"), epochs=20, learning_rate=0.01, **FAST)
    rows = {model.objective: model for model in result.trained}
    assert list(rows) == ["", "CrossEntropy", "ZLoss", "SAF", "EnsLoss"]
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())
    assert rows[""].before["log_loss"] == result.before["log_loss"]
    assert rows["CrossEntropy"].after["accuracy"][0] > rows[""].after["accuracy"][0] + 0.2
    assert rows["ZLoss"].after["log_loss"][0] < rows["ZLoss"].before["log_loss"][0]
    assert rows["EnsLoss"].failed == "classes must be 2 for EnsLoss, got 3"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Correct in training, or afterwards?" in page
    assert "failed: classes must be 2 for EnsLoss" in page
    assert training_sentence(result.trained)[1:] in page
    kept = AuditResult.from_dict(json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")))
    assert kept.trained[1:4] == result.trained[1:4]
    for name in ("CrossEntropy", "ZLoss", "SAF"):
        copy = deepcopy(given.model)
        copy.load_state_dict(load_file(tmp_path / rows[name].file))
        scaled = TemperatureScaling().fit_predictions(Predictions.collect(copy, given.calibration))
        measured = essentials(scaled(Predictions.collect(copy, given.test).logits), given.test.dataset.tensors[1])
        assert measured["log_loss"].estimate == pytest.approx(rows[name].after["log_loss"][0])
    assert not rows[""].file + rows["EnsLoss"].file
    for name in ("", "ZLoss", "SAF"):
        change = rows[name].after["log_loss"][0] - rows["CrossEntropy"].after["log_loss"][0]
        assert rows[name].change["log_loss"][0] == pytest.approx(change)
        gain = rows[name].after["log_loss"][0] - rows[""].after["log_loss"][0]
        assert not name or rows[name].gain["log_loss"][0] == pytest.approx(gain)
    assert rows["CrossEntropy"].change == rows["EnsLoss"].change == rows[""].gain == rows["EnsLoss"].gain == {}
    assert rows["CrossEntropy"].gain["log_loss"][2] < 0


def model(name, loss, *, width=0.05, change=None, gain=None, failed=None):
    """A row of the table whose log loss falls by 0.1 on scaling."""
    before, after = (
        {"accuracy": NOTHING, "ece": NOTHING, "log_loss": (x, x - width, x + width)} for x in (loss + 0.1, loss)
    )
    moved, won = ({} if pair is None else {"log_loss": pair} for pair in (change, gain))
    seconds, file = (0.03, f"trained-{name}.safetensors") if name and not failed else (float("nan"), "")
    return TrainedModel(name, before, after, seconds, failed, file, moved, won)


CLEAR, UNCLEAR = (-0.04, -0.07, -0.01), (-0.04, -0.07, 0.01)
LEFT, CONTROL = model("", 0.45, change=(0.04, 0.01, 0.07)), model("CrossEntropy", 0.41, gain=CLEAR)
FAILED = model("EnsLoss", float("nan"), failed="classes must be 2")


@pytest.mark.parametrize(
    ("other", "best", "said", "told", "mark"),
    [
        (
            model("SAF", 0.40, change=(-0.01, -0.02, -0.005), gain=CLEAR),
            "SAF",
            "trained on with SAF, the model has a log loss of 0.500, and of 0.400 after temperature scaling, clearly "
            "better than the 0.410 of CrossEntropy; temperature scaling alone gives 0.450.",
            "held against cross-entropy's 0.410 (0.360 to 0.460), that is clearly better.",
            ("\u22120.010", "clearly better"),
        ),
        (
            model("SAF", 0.40, change=(-0.01, -0.02, 0.005), gain=CLEAR),
            None,
            "not told apart from the 0.410 of CrossEntropy",
            "that is within uncertainty.",
            ("\u22120.010", "within uncertainty"),
        ),
        (
            model("SAF", 0.40, change=(-0.01, -0.02, -0.005), gain=UNCLEAR),
            None,
            "clearly better than the 0.410 of CrossEntropy",
            "held against cross-entropy's 0.410 (0.360 to 0.460), that is clearly better.",
            ("\u22120.010", "clearly better"),
        ),
        (
            model("SAF", 0.43, change=(0.02, 0.01, 0.03)),
            "CrossEntropy",
            "clearly worse than the 0.410 of CrossEntropy",
            "training on with CrossEntropy has the lowest log loss, 0.410 (0.360 to 0.460).",
            ("+0.020", "clearly worse"),
        ),
    ],
    ids=["better", "unclear", "no gain", "worse"],
)
def test_an_objective_is_judged_against_the_control(other, best, said, told, mark):
    result = replace(fake(n=200), trained=[LEFT, CONTROL, other, FAILED])
    result.settings.update(training_epochs=5, learning_rate=1e-3)
    rows = {row[0].text: row for row in tables.trained(result).rows}
    assert [name for name, row in rows.items() if row[0].badge == "best"] == [best] * (best is not None)
    assert rows["SAF"][-2][:2] == mark
    assert rows["SAF"][0].file == "trained-SAF.safetensors"
    assert [rows["CrossEntropy"][-2].text, rows["EnsLoss"][-2].text] == ["\u2013"] * 2
    assert [row[-1].text for row in rows.values()] == ["\u2013", "0.03\u202fs", "0.03\u202fs", "\u2013"]
    assert said in training_sentence(result.trained)
    assert told in caption(result)
    page = render(result)
    told_so = "Nothing is clearly better than both the model as it is and training on with cross-entropy."
    assert (told_so in page) == (best is None)
    assert ("To train on like this:" in page) == (best is not None)
    assert f'train(model, loader, "{best or "CrossEntropy"}", epochs=5, classes=10' in page
    assert f"trained-{best or 'CrossEntropy'}.safetensors" in page.partition("To take the copy")[2]
    assert page.count('<span class="badge">best</span>') == (best is not None)
    console = Console(width=2000, record=True, file=io.StringIO())
    console.print(brief(result, Path("out")))
    text = console.export_text()
    assert said[1:] in text
    assert "Training on with EnsLoss failed: classes must be 2." in text


def test_without_a_control_or_anything_trained_nothing_is_judged():
    lost = replace(FAILED, objective="CrossEntropy")
    alone = replace(fake(n=200), trained=[LEFT, lost, model("SAF", 0.40)])
    assert "scaling; temperature scaling alone gives 0.450" in training_sentence(alone.trained)
    assert {row[-2].text for row in tables.trained(alone).rows} == {"\u2013"}
    none = replace(alone, trained=[LEFT, lost, FAILED])
    assert "could not be trained on" in training_sentence(none.trained)
    assert "trimtab.losses" not in render(none)
    assert [sentence.split()[3] for sentence in failures(none.trained)] == ["CrossEntropy", "EnsLoss"]
    assert "no time to train" in training_sentence([LEFT])


def test_the_model_as_it_is_may_be_best():
    result = replace(fake(n=200), trained=[model("", 0.40, change=CLEAR), CONTROL])
    result.settings.update(training_epochs=5, learning_rate=1e-3)
    assert [row[0].badge for row in tables.trained(result).rows] == ["best", ""]
    assert "The model as it is beats training on with cross-entropy clearly." in render(result)


def test_the_code_in_the_report_runs_when_it_is_pasted(tmp_path, monkeypatch):
    given = setup()
    audit(given, tmp_path, objectives=("ZLoss",), epochs=1, **FAST)
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    blocks = re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {"model": deepcopy(given.model), "loader": given.train})
    assert ["load_state_dict" in block for block in blocks][-2:] == [False, True]


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
