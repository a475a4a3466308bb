import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from toynet import seeded_net, stream

from trimtab.adaptation import CoTTA
from trimtab.adaptation.teacher import anchored_target, put_back, random_mask, self_training_loss, weights_and_biases
from trimtab.core.checks import InputError


def test_views_are_drawn_only_where_they_are_used():
    x, drawn = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), []

    def views():
        for shift in (1.0, 3.0):
            drawn.append(shift)
            yield x + torch.tensor([shift, 0.0])

    confidence = float((x.softmax(1).amax(1)).mean())
    target, sure = anchored_target(lambda x: x, lambda x: 2 * x, x, views(), confidence=confidence - 1e-4)
    assert torch.equal(target, 2 * x)
    assert float(sure) == pytest.approx(confidence)
    assert drawn == []
    target, _ = anchored_target(lambda x: x, lambda x: 2 * x, x, views(), confidence=confidence + 1e-4)
    assert torch.equal(target, 2 * x + torch.tensor([4.0, 0.0]))
    assert drawn == [1.0, 3.0]
    even = torch.zeros(2, 2)
    assert torch.equal(anchored_target(lambda x: x, lambda x: x + 1, even, [x], confidence=0.5)[0], even + 1)


def test_the_symmetric_loss_is_symmetric_and_least_at_the_target_s_entropy():
    a, b = stream(shape=(5,))[:2]
    one, other = self_training_loss(a, b), self_training_loss(b, a)
    torch.testing.assert_close(self_training_loss(a, b, symmetric=True), (one + other) / 2)
    assert float(self_training_loss(b, b)) < float(one)


def test_what_is_put_back():
    moving, source = {"a": torch.ones(4000), "b": torch.ones(2)}, {"a": torch.zeros(4000), "b": torch.zeros(2)}
    generator = torch.Generator().manual_seed(0)
    put_back(
        moving, source, lambda n, p: random_mask(0.25)(n, p, generator) if n == "a" else torch.tensor([True, False])
    )
    assert 0.7 < float(moving["a"].mean()) < 0.8
    assert moving["b"].tolist() == [0, 1]


def test_weights_and_biases():
    net = seeded_net()
    net.token = torch.nn.Parameter(torch.ones(2))
    assert weights_and_biases(net).keys() == {name for name, _ in net.named_parameters()} - {"token"}
    with pytest.raises(InputError, match="called weight or bias, found none"):
        weights_and_biases(torch.nn.ReLU())


def test_processes_with_batches_of_different_sizes_put_the_same_back(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        _, words = worker.communicate(timeout=300)
        assert worker.returncode == 0, words
    here, there = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not torch.equal(here.pop("generator"), there.pop("generator"))
    moved = [name for name in here if name.startswith("model.")]
    assert moved
    assert all(torch.equal(here[name], there[name]) for name in moved)


def worker(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    cotta = CoTTA(DistributedDataParallel(seeded_net()), augmentations=1, confidence=1.0, restore=0.5)
    for x in stream(seed=rank, batches=2, n=8 + rank):
        cotta(x)
    torch.save(cotta.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
