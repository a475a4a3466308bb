"""The command line: light, one line an error, and exit codes that mean something."""

import json
import os
import subprocess
import sys

import pytest
import typer

from trimtab import catalog, cli
from trimtab.claims import run as runner
from trimtab.core.checks import InputError

LIGHT = """
import sys
from trimtab import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as left:
    assert left.code == 0, left.code
heavy = {"torch", "numpy", "scipy", "sklearn", "pyarrow", "plotly"} & set(sys.modules)
assert not heavy, heavy
"""


def python(*arguments, **settings):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **settings)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], [], ["list"], ["show", "eata"], ["claims", "table"], ["claims", "run", "--help"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments):
    done = python("-c", LIGHT, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_importing_trimtab_is_light():
    done = python("-c", "import sys, trimtab; assert not {'torch', 'numpy'} & set(sys.modules); trimtab.metrics")
    assert done.returncode == 0, done.stderr


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return left.value.code, out, err


def commands(group, path=()):
    if hasattr(group, "commands"):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))
    else:
        yield path


def test_every_command_has_help(capsys):
    found = list(commands(typer.main.get_command(cli.app)))
    assert ("claims", "run") in found
    for path in found:
        code, out, _ = run(capsys, *path, "--help")
        assert code == 0
        assert f"Usage: trimtab {' '.join(path)}" in out


def test_list_names_every_method(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert all(method.slug in out for method in catalog.methods())
    _, out, _ = run(capsys, "list", "--format", "json")
    assert [entry["slug"] for entry in json.loads(out)] == [method.slug for method in catalog.methods()]


@pytest.mark.parametrize("name", ["24-eata", "eata", "EATA", "eta"])
def test_show_tells_one_method(capsys, name):
    code, out, _ = run(capsys, "show", name)
    assert code == 0
    assert "from trimtab.adaptation import EATA, ETA" in out
    assert "https://arxiv.org/abs/2204.02610" in out
    _, out, _ = run(capsys, "show", name, "--format", "json")
    assert json.loads(out)["names"] == ["trimtab.adaptation.EATA", "trimtab.adaptation.ETA"]


def test_the_claims_table(capsys, tmp_path):
    code, out, _ = run(capsys, "claims", "table", "--results", str(tmp_path))
    assert code == 0
    assert out.count("not measured") == len(catalog.methods())
    _, out, _ = run(capsys, "claims", "table", "--format", "json", "--results", str(tmp_path))
    assert [row["verdict"] for row in json.loads(out)] == ["not measured"] * len(catalog.methods())


def test_a_check_that_says_no_leaves_with_one(capsys, monkeypatch):
    row = {"slug": "24-eata", "published": "holds", "measured": "holds"}
    monkeypatch.setattr(runner, "check", lambda *_, **__: [row])
    assert run(capsys, "claims", "check", "eata")[0] == 0
    row["measured"] = "fails"
    code, out, _ = run(capsys, "claims", "check", "eata", "-q")
    assert (code, out) == (1, "24-eata: published holds, measured fails\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "eeta"], "trimtab: no method is called 'eeta': did you mean eta or eata or petal?\n"),
        (["show", "zzz"], "trimtab: no method is called 'zzz': `trimtab list` shows what there is\n"),
        (["claims", "run", "zzz"], "trimtab: no method is called 'zzz': `trimtab list` shows what there is\n"),
        (["show"], "`trimtab show --help` says more"),
        (["nonsense"], "`trimtab --help` says more"),
        (["list", "--format", "xml"], "`trimtab list --help` says more"),
        (["claims", "run", "--workers", "0"], "`trimtab claims run --help` says more"),
        (["claims"], "`trimtab claims --help` says more"),
        (["audit", "scores.csv", "--epochs", "3"], "--epochs and --learning-rate go with --objective NAME"),
        (["audit", "scores.csv", "--learning-rate", "0.1"], "--epochs and --learning-rate go with --objective NAME"),
        (["audit", "--coco", "a", "b", "--objective", "SAF"], "--objective goes with a setup"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("trimtab: ")
    assert err.count("\n") == 1


def test_a_damaged_result_is_bad_input(capsys, tmp_path):
    (tmp_path / "24-eata.json").write_text("{")
    code, _, err = run(capsys, "claims", "table", "--results", str(tmp_path))
    assert code == 2
    assert "is not a result of `trimtab claims run`" in err
    (tmp_path / "24-eata.json").write_text("{}")
    assert run(capsys, "claims", "table", "--results", str(tmp_path))[0] == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("logits must be finite,\nfound nan"), 2, "trimtab: logits must be finite, found nan\n"),
        (RuntimeError("lost"), 1, "trimtab: RuntimeError: lost (--debug shows where)\n"),
        (
            KeyboardInterrupt(),
            2,
            "trimtab: interrupted; what is finished is kept, and the same command goes on from there\n",
        ),
    ],
)
def test_errors_become_exit_codes(capsys, monkeypatch, error, code, message):
    def find(_):
        raise error

    monkeypatch.setattr(catalog, "find", find)
    assert run(capsys, "show", "eata") == (code, "", message)


def test_debug_shows_where(monkeypatch):
    monkeypatch.setattr(catalog, "find", lambda _: 1 / 0)
    for arguments in (["--debug", "show", "eata"], ["show", "eata", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            cli.main(arguments)


def test_a_reader_that_leaves_early_is_no_fault():
    process = subprocess.Popen(
        [sys.executable, "-c", "from trimtab.cli import main; main(['list', '--format', 'json'])"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert errors == b""
