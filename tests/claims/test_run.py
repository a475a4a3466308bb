"""The runner: cells on disk, resumption after a kill, and results that say everything."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from trimtab import catalog
from trimtab.claims import run as runner
from trimtab.claims.run import ClaimError
from trimtab.core.checks import InputError

MODULE = """
import os, signal
from pathlib import Path
from trimtab.claims.base import Claim, Expectation

HERE = Path(__file__).parent

def run(seed):
    with (HERE / "log").open("a") as log:
        log.write(f"{{seed}}\\n")
    {body}
    return {{"x": seed - 98.0, "y": 1.0}}

CLAIM = Claim("{slug}", "x exceeds y", run, (Expectation("x", at_least=0.5, minus="y"),), seeds=(100, 101, 102),
              reported={{"full scale": 3}}, notes=("a note",), budget={budget})
"""


@pytest.fixture
def method(tmp_path, monkeypatch):
    """Writes a claim's module and returns its catalogue entry."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(slug="90-made-up", body="", budget=60):
        name = "claim_" + slug.replace("-", "_")
        (tmp_path / f"{name}.py").write_text(MODULE.format(slug=slug, body=body, budget=budget))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return replace(catalog.methods()[0], slug=slug, symbols=(), claim=name)

    return write


def seeds_run(tmp_path):
    log = tmp_path / "log"
    return sorted(int(line) for line in log.read_text().split()) if log.exists() else []


def test_a_result_says_everything(tmp_path, method):
    (result,) = runner.run([method()], tmp_path / "out", workers=2)
    assert result["verdict"] == "holds"
    assert {seed: values["x"] for seed, values in result["values"].items()} == {100: 2.0, 101: 3.0, 102: 4.0}
    (expectation,) = result["expectations"]
    assert expectation["text"] == "x - y >= 0.5"
    assert expectation["effect"]["estimate"] == 2.0
    assert expectation["verdict"] == "holds"
    assert set(result["versions"]) >= {"python", "torch", "trimtab"}
    assert (result["reported"], result["notes"], result["budget"]) == ({"full scale": 3}, ("a note",), 60)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["90-made-up.json"]
    assert catalog.result("90-made-up", tmp_path / "out") == json.loads(json.dumps(result))


KILLED = """
import sys
from pathlib import Path
from dataclasses import replace
from trimtab import catalog
from trimtab.claims import run as runner
if __name__ == "__main__":
    here = Path(sys.argv[1])
    sys.path.insert(0, str(here))
    runner.run([replace(catalog.methods()[0], slug="91-killed", claim="claim_91_killed")], here / "out")
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, method):
    killing = 'if seed == 102 and not (HERE / "again").exists(): os.kill(os.getppid(), signal.SIGKILL); signal.pause()'
    entry = method("91-killed", killing)
    (tmp_path / "killed.py").write_text(KILLED)
    process = subprocess.run([sys.executable, str(tmp_path / "killed.py"), str(tmp_path)], capture_output=True)
    assert process.returncode == -9
    assert seeds_run(tmp_path) == [100, 101, 102]
    assert not (tmp_path / "out" / "91-killed.json").exists()
    (tmp_path / "again").touch()
    for name, days in (("of-other-code", 2), ("of-another-run", 0)):
        folder = tmp_path / "out" / ".cells" / name
        folder.mkdir()
        os.utime(folder, 2 * (time.time() - days * 86_400,))
    (result,) = runner.run([entry], tmp_path / "out")
    assert seeds_run(tmp_path) == [100, 101, 102, 102]
    assert result["verdict"] == "holds"
    assert sorted(os.listdir(tmp_path / "out")) == [".cells", "91-killed.json"]
    assert os.listdir(tmp_path / "out" / ".cells") == ["of-another-run"], "it may still be running"


def test_what_breaks_off_is_told_and_the_rest_is_written(tmp_path, method):
    broken = method("92-broken", 'if seed == 101: raise RuntimeError("no data")')
    with pytest.raises(ClaimError, match=r"^92-broken, seed 101: RuntimeError: no data$"):
        runner.run([broken, method("93-fine")], tmp_path / "out")
    assert not (tmp_path / "out" / "92-broken.json").exists()
    assert catalog.result("93-fine", tmp_path / "out")["verdict"] == "holds"


def test_a_number_that_is_missing_is_told(tmp_path, method):
    with pytest.raises(ClaimError, match="seed 100: InputError: run must return a finite 'x', got nan"):
        runner.run([method("94-nan", 'return {"x": float("nan"), "y": 0.0}')], tmp_path / "out", seeds=1)


def test_the_number_of_seeds_can_be_chosen(tmp_path, method):
    (result,) = runner.run([method()], tmp_path / "out", seeds=1)
    assert list(result["values"]) == [100]
    assert result["verdict"] == "undecided"
    (result,) = runner.run([method()], tmp_path / "out", seeds=5, workers=2)
    assert list(result["values"]) == [100, 101, 102, 103, 104]


def test_a_check_puts_the_measured_verdict_beside_the_published(tmp_path, method):
    entry = method()
    published = tmp_path / "published"
    assert runner.check([entry], published)[0] == {"slug": "90-made-up", "published": "nothing", "measured": "holds"}
    published.mkdir()
    (published / "90-made-up.json").write_text('{"slug": "90-made-up", "verdict": "fails"}')
    assert runner.check([entry], published)[0]["published"] == "fails"


def test_only_fast_claims(method, monkeypatch):
    fast, slow = method("95-fast", budget=60), method("96-slow", budget=61)
    monkeypatch.setattr(catalog, "methods", lambda: (slow, fast))
    assert runner.chosen([]) == [slow, fast]
    assert runner.chosen([], fast=True) == [fast]
    assert runner.chosen(["96-slow", "slow"]) == [slow]


def test_a_claim_of_another_method_is_refused(method):
    entry = replace(method("97-one"), slug="98-other")
    with pytest.raises(ClaimError, match="holds the claim of 97-one, the catalogue says 98-other"):
        runner.load(entry)


@pytest.mark.bad_input
def test_bad_settings(tmp_path, method):
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        runner.run([method()], tmp_path, workers=0)
    with pytest.raises(InputError, match="seeds must be at least 1, got 0"):
        runner.run([method()], tmp_path, seeds=0)
