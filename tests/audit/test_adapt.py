"""An adapter along a stream of a setup: what is left, and what happens after a kill."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trimtab import cli
from trimtab.adaptation import EATA, Tent, run_stream
from trimtab.audit import Setup, adapt
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions

HERE = Path(__file__).parent
X = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(70) % 3


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()


def loader(x, y):
    return list(zip(x.split(8), y.split(8)))


def setup():
    calm = loader(X, Y)
    return Setup(
        network(), calibration=calm, test=calm, shifts={"bright": loader(2 * X + 1, Y), "bare": list(X.split(8))}
    )


class Slow(list):
    """Batches that take their time."""

    def __iter__(self):
        for item in super().__iter__():
            time.sleep(0.1)
            yield item


def plain(legs):
    """Everything but the time."""
    return [{**asdict(leg), "seconds": 0} for leg in legs]


def test_it_leaves_predictions_state_and_summary(tmp_path):
    seen = []
    legs = adapt(setup(), tmp_path, method="tent", stream="bright", every=4, watch=lambda legs: seen.append(len(legs)))
    assert seen == [0, 1, 2, 3]
    assert [leg.batches for leg in legs] == [4, 4, 1]
    assert sum(leg.samples for leg in legs) == 70
    tent = Tent(network())
    expected = run_stream(tent, setup().shifts["bright"])
    found = Predictions.read(tmp_path / "predictions.parquet")
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.labels, expected.labels)
    assert sum(leg.correct for leg in legs) / 70 == pytest.approx(expected.accuracy)
    assert legs[-1].accuracy is not None
    assert legs[-1].updates == int(tent.updates) == 9
    state = load_file(tmp_path / "adapter.safetensors")
    assert all(torch.equal(state[name], value) for name, value in tent.state_dict().items())
    summary = json.loads((tmp_path / "stream.json").read_text())
    assert [leg["batches"] for leg in summary["legs"]] == [4, 4, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "predictions.parquet",
        "stream.json",
    ]


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, killed_after):
    straight = adapt(setup(), tmp_path / "straight", method="tent", stream="bright", every=3)

    def kill(legs):
        if len(legs) == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(setup(), tmp_path / "killed", method="tent", stream="bright", every=3, watch=kill)
    begun = []
    again = adapt(
        setup(),
        tmp_path / "killed",
        method="tent",
        stream="bright",
        every=3,
        watch=lambda legs: begun.append(len(legs)),
    )
    assert begun[0] == killed_after
    assert plain(again) == plain(straight)
    a, b = (Predictions.read(tmp_path / name / "predictions.parquet") for name in ("straight", "killed"))
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("change", ["setting", "method", "data", "fresh"])
def test_it_starts_over_when_something_changed(tmp_path, change):
    def kill(legs):
        if legs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(setup(), tmp_path, method="tent", stream="bright", every=3, watch=kill)
    other, options = setup(), {"method": "tent"}
    if change == "setting":
        options["settings"] = {"steps": 2}
    if change == "method":
        options["method"] = "source"
    if change == "data":
        other = replace(other, shifts={"bright": loader(3 * X, Y)})
    begun = []
    adapt(
        other,
        tmp_path,
        stream="bright",
        every=3,
        fresh=change == "fresh",
        watch=lambda legs: begun.append(len(legs)),
        **options,
    )
    assert begun[0] == 0


def test_a_stream_without_labels(tmp_path):
    legs = adapt(setup(), tmp_path, method="Tent", stream="bare")
    assert [leg.correct for leg in legs] == [None]
    assert legs[0].accuracy is None
    assert Predictions.read(tmp_path / "predictions.parquet").labels is None


def test_preparation_and_guard(tmp_path):
    EATA.prepare(network(), setup().calibration).save(tmp_path / "fisher.safetensors")
    adapt(setup(), tmp_path, method="eata", stream="bright", prepared=tmp_path / "fisher.safetensors", guard="warn")
    state = load_file(tmp_path / "adapter.safetensors")
    assert any(name.startswith("fishers.") for name in state)
    assert int(state["guard.batches"]) == 9


def test_a_preparation_is_made_anew_for_every_run_but_one_that_goes_on(tmp_path):
    def kill(legs):
        if legs:
            raise KeyboardInterrupt

    made = tmp_path / "prepared.safetensors"
    options = {"settings": {"k": 5}, "stream": "bright", "every": 3}
    with pytest.raises(KeyboardInterrupt):
        adapt(setup(), tmp_path, method="adanpc", watch=kill, **options)
    first = made.stat().st_mtime_ns
    adapt(setup(), tmp_path, method="adanpc", **options)
    assert made.stat().st_mtime_ns == first
    other = replace(setup(), calibration=loader(X[:40], Y[:40]))
    adapt(other, tmp_path, method="adanpc", **options)
    assert len(load_file(made)["features"]) == 40
    adapt(other, tmp_path, method="cafa", stream="bright")


def test_a_setting_may_name_a_function(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch.optim import SGD\n\ndef still(parameters):\n    return SGD(parameters, lr=0.0)\n"
    )
    settings = {"optimizer": f"{tmp_path}/mine.py:still"}
    legs = adapt(setup(), tmp_path / "out", method="tent", stream="bright", settings=settings)
    assert legs[-1].updates == 9
    state = load_file(tmp_path / "out" / "adapter.safetensors")
    assert torch.equal(state["model.1.weight"], network()[1].weight)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tant"}, "method must be one of Source, .*Tent"),
        ({"stream": "night"}, "stream must be one of test, bright, bare, got 'night'"),
        ({"settings": {"stepz": 1}}, "settings must be some of optimizer, .*steps, .* for Tent, got 'stepz'"),
        ({"settings": {"optimizer": "sgd"}}, "optimizer must be a function of the parameters that move, .*, got str"),
        ({"settings": {"optimizer": "nowhere.py:sgd"}}, "nowhere.py: no such file"),
        ({"settings": {"steps": 0}}, "steps must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"guard": "panic"}, "guard must be one of reset, roll back, warn, got 'panic'"),
        ({"prepared": "nowhere.safetensors"}, "prepared must not be given to Tent, which needs none"),
        ({"method": "eata", "prepared": "nowhere.safetensors"}, "nowhere.safetensors .* cannot be read"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        adapt(setup(), tmp_path, **{"method": "tent", "stream": "bright", **options})
    assert not list(tmp_path.iterdir()), "what is refused leaves nothing"


@pytest.mark.bad_input
def test_an_empty_stream_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one batch"):
        adapt(replace(setup(), shifts={"none at all": []}), tmp_path, method="tent", stream="none at all")


def test_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("from test_adapt import setup\n")
    arguments = [
        "adapt",
        f"{tmp_path}/mine.py:setup",
        "--method",
        "tent",
        "--stream",
        "bright",
        "-o",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--set", "steps=2", "--every", "4", "--guard", "warn"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "tent on bright" in shown
    assert "9 to 9" in shown
    assert f"{tmp_path}/o/predictions.parquet" in shown
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--format", "json"])
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["method"] == "Tent"
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--set", "steps"])
    assert left.value.code == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_killed_and_called_again_it_goes_on(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom dataclasses import replace\nfrom test_adapt import Slow\n"
        "from test_adapt import setup as calm\n\ndef setup():\n"
        "    given = calm()\n    return replace(given, shifts={'slow': Slow(given.shifts['bright'])})\n"
    )
    command = [sys.executable, "-m", "trimtab", "adapt", f"{tmp_path}/mine.py:setup", "--method", "tent"]
    command += ["--stream", "slow", "--every", "2", "-o", f"{tmp_path}/o"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("o/.stream/state-*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert not (tmp_path / "o" / "predictions.parquet").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "holds an unfinished run" in done.stderr
    expected = run_stream(Tent(network()), setup().shifts["bright"])
    assert torch.equal(Predictions.read(tmp_path / "o" / "predictions.parquet").logits, expected.logits)
    assert not (tmp_path / "o" / ".stream").exists()
