"""Every Python block in the documentation, the README and CONTRIBUTING runs, and prints what is written below it."""

import doctest
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab.calibration
from trimtab.claims.base import worst

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
DECIMAL = re.compile(r"-?\d+\.\d+")
CLOSE = 0.03  # other versions and machines train slightly other networks


def same(written, printed):
    """The same words and whole numbers, and decimals close to each other."""
    numbers = [np.array(DECIMAL.findall(text), dtype=float) for text in (written, printed)]
    words = [DECIMAL.sub("0.0", text).split() for text in (written, printed)]
    return words[0] == words[1] and np.allclose(*numbers, rtol=0, atol=CLOSE)


def pages():
    with_code = [
        p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in p.read_text()
    ]
    assert len(with_code) > 4
    return with_code


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """An empty folder to write into, and random states that readers, and the trainers they call, may seed."""
    monkeypatch.chdir(tmp_path)
    numpys = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        yield
    np.random.set_state(numpys)  # noqa: NPY002


def execute(path, capsys, after=lambda namespace: None):
    """Run the page's blocks in one namespace; a text block holds what the block before it prints."""
    namespace = {"__name__": path.stem}
    printed = ""
    for kind, code in BLOCK.findall(path.read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(code, str(path), "exec", dont_inherit=True), namespace)
            after(namespace)
            printed = capsys.readouterr().out
        elif kind == "text" and printed:
            assert same(code, printed), f"printed:\n{printed}\nwritten:\n{code}"
            printed = ""
    return namespace


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.usefixtures("apart")
def test_the_page_runs(path, capsys):
    execute(path, capsys)


@pytest.mark.usefixtures("apart")
def test_the_worked_example_of_contributing_keeps_its_promises(tmp_path, monkeypatch, capsys):
    def export(namespace):
        found = namespace.get("BiasCorrectedTemperature")
        if found is not None:
            monkeypatch.setattr(trimtab.calibration, found.__name__, found, raising=False)

    example = execute(ROOT / "CONTRIBUTING.md", capsys, export)
    calibrator, loss = example["BiasCorrectedTemperature"], example["PolyLoss"]
    runner = doctest.DocTestRunner()
    for shown in (calibrator, loss):
        for test in doctest.DocTestFinder().find(shown, globs={shown.__name__: shown}):
            runner.run(test)
    assert runner.summarize() == (0, 9)
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss()(z, torch.arange(6) % 4), scores)
    example["test_a_known_distortion_is_undone"]()
    example["test_labels_out_of_range_are_named"]()
    claim = example["CLAIM"]
    assert worst([j.verdict for j in claim.judge({seed: claim.run(seed) for seed in claim.seeds})]) == "holds"
    logits = np.random.default_rng(0).normal(size=(500, 3))
    labels = ((logits + np.array([1.0, 0.0, 0.0])).argmax(1) + (np.arange(500) % 7 == 0)) % 3
    probs = calibrator().fit(logits, labels).predict_proba(logits)
    np.savez(tmp_path / "case.npz", logits=logits, labels=labels, probs=probs)
    example["test_the_authors_numbers"](tmp_path / "case.npz")
    np.savez(tmp_path / "case.npz", logits=logits, labels=labels, probs=probs[:, ::-1])
    with pytest.raises(AssertionError):
        example["test_the_authors_numbers"](tmp_path / "case.npz")


def test_no_file_names_the_machine_it_was_written_on():
    forbidden = ["/wo" + "rk/", "/ro" + "ot/", "../sha" + "red"]
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in listed if (ROOT / name).is_file()]
    assert len(files) > 50
    for path in files:
        content = path.read_bytes()
        assert not [word for word in forbidden if word.encode() in content], path
