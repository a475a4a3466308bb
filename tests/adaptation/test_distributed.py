"""Two processes with a part of the stream each: what moves stays the same in both."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import BUILDERS, LEARNERS
from safetensors.torch import load_file
from toynet import seeded_net, stream

from trimtab.adaptation import Tent
from trimtab.adaptation.base import entropy

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What both processes know at the end of the stream, by the name of the adapter."""
    folder = tmp_path_factory.mktemp("distributed")
    names = [*LEARNERS, "tent_unsound"]
    worker = [sys.executable, str(HERE / "distributed_worker.py")]
    processes = [
        subprocess.Popen([*worker, str(rank), "2", str(folder), *names], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, words = process.communicate(timeout=300)
        assert process.returncode == 0, words
    return {name: [load_file(folder / f"{name}{rank}.safetensors") for rank in range(2)] for name in names}


@pytest.mark.parametrize("name", LEARNERS)
def test_what_moves_stays_in_sync(name, ends):
    here, there = ends[name]
    moving = BUILDERS[name](seeded_net()).moving
    assert int(here["updates"]) == int(there["updates"]) > 0
    moving = [name for name in moving if "/" not in name]
    for parameter in moving:
        assert torch.equal(here[f"model.{parameter}"], there[f"model.{parameter}"]), parameter
    start = dict(seeded_net().named_parameters())
    assert any(not torch.equal(here[f"model.{p}"], start[p]) for p in moving)
    for key in here:
        if key.startswith(("optimizer.", "teacher.")) and not key.endswith(("source_mean", "source_var")):
            assert torch.equal(here[key], there[key]), key


def test_the_gradient_is_the_mean_of_both(ends):
    here, _ = ends["tent_sgd"]
    alone = Tent(seeded_net(), optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9))
    for parts in zip(stream(seed=0, batches=4, n=12), stream(seed=1, batches=4, n=12)):
        with torch.enable_grad():
            alone._descend(sum(entropy(alone.model(x)).mean() for x in parts) / 2)
    for name in alone.moving:
        torch.testing.assert_close(here[f"model.{name}"], alone.moving[name].detach(), rtol=1e-5, atol=1e-7)


def test_what_is_not_finite_in_one_process_is_skipped_in_both(ends):
    here, there = ends["tent_unsound"]
    assert int(here["skipped"]) == int(there["skipped"]) == 1
    assert int(here["updates"]) == int(there["updates"]) == 3
    assert torch.equal(here["model.bn1.weight"], there["model.bn1.weight"])
    assert torch.equal(here["guard.ours"], there["guard.ours"]), "the guard judges all predictions"
