"""Weeks on a stream: what an adapter holds does not grow. Tensors, their bytes and autograd nodes are counted."""

import gc

import pytest
import torch
from builders import BUILDERS, LEARNERS
from torch import nn
from toynet import built, seeded_net, stream

from trimtab.adaptation import EATA, ETA, AdaNPC, Guard


def held():
    """How many tensors are alive, how many bytes they hold, and how many autograd nodes hang on them."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    nodes, left = set(), [t.grad_fn for t in tensors if t.grad_fn is not None]
    while left:
        node = left.pop()
        if node not in nodes:
            nodes.add(node)
            left += [before for before, _ in node.next_functions if before is not None]
    return len(tensors), sum(storages.values()), len(nodes)


def guarded(build, model, **options):
    """The adapter with a guard that keeps states to roll back to and sees no collapse, and bounded memories."""
    if build.method is AdaNPC:
        options["max_size"] = 64
    if build.method in (EATA, ETA):
        options["d_margin"] = 1.0  # so that it does not stop learning from inputs that come again
    watch = Guard("roll back", every=1, memory=50, min_entropy=0.0, min_agreement=-1.0)
    return build(model, guard=watch, **options)


def walk(adapter, xs, batches):
    for number in range(batches):
        adapter(xs[number % len(xs)])


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_grows_between_batch_100_and_300(name):
    adapter = guarded(BUILDERS[name], seeded_net())
    xs = stream(batches=5, n=4)
    walk(adapter, xs, 100)
    before = held()
    walk(adapter, xs, 200)
    assert held() == before
    assert len(adapter.guard.kept) == 2
    assert int(adapter.updates) >= 100 * (name in LEARNERS)


def test_what_grows_is_seen():
    class Hoarder(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(3))
            self.register_buffer("all", torch.zeros(0))
            self.one_by_one = []
            self.weight = nn.Parameter(torch.ones(3))

    hoarder = Hoarder()
    tensors, size, nodes = held()
    hoarder.one_by_one.append(torch.zeros(2))
    assert held() == (tensors + 1, size + 8, nodes)
    hoarder.all = torch.zeros(5)
    assert held() == (tensors + 1, size + 28, nodes)
    hoarder.total = hoarder.total + hoarder.weight
    assert held()[2] > nodes


def tiny():
    return built(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, build in BUILDERS.items() if not build.images])
def test_nothing_grows_over_100_000_batches(name):
    options = {"augment": lambda x, generator: 0.9 * x} if BUILDERS[name].augment else {}
    if BUILDERS[name].prepare is not None:
        options["prepared"] = BUILDERS[name].prepared(tiny(), (4,))
    adapter = guarded(BUILDERS[name], tiny(), shape=(4,), **options)
    xs = stream(batches=7, n=4, shape=(4,))
    walk(adapter, xs, 1000)
    before = held()
    walk(adapter, xs, 99_000)
    assert held() == before
    assert int(adapter.samples) == 400_000
    assert int(adapter.updates) >= 30_000 * (name in LEARNERS)
    assert all(value.isfinite().all() for value in adapter.state_dict().values())
