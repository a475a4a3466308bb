import torch

from trimtab.claims.adaptation.tta_baselines import BATCH, _balanced
from trimtab.claims.adaptation.world import CLASSES, DIMENSIONS, World, jitter


def test_everything_follows_from_the_seed():
    def numbers(seed):
        world = World(seed, spread=0.5)
        x, y = world.samples(50, world.domain()).tensors
        return torch.cat((x.flatten(), y.float()))

    assert torch.equal(numbers(3), numbers(3))
    assert not torch.equal(numbers(3), numbers(4))


def test_the_network_knows_the_source_and_is_troubled_by_a_domain():
    world = World(100, spread=0.5)
    network = world.network()
    accuracies = []
    for domain in (None, world.domain()):
        x, y = world.samples(1000, domain).tensors
        assert x.shape == (1000, DIMENSIONS, 1, 1)
        accuracies.append(float((network(x).argmax(1) == y).double().mean()))
    assert accuracies[0] > 0.97 > accuracies[1]


def test_balanced_batches_hold_every_class_equally_often():
    labels = torch.randint(CLASSES, (1000,), generator=torch.Generator().manual_seed(0))
    order = _balanced(labels)
    assert len(order.unique()) == len(order) > 700
    for batch in labels[order].split(BATCH):
        assert batch.bincount().tolist() == [BATCH // CLASSES] * CLASSES


def test_jitter_comes_from_its_generator():
    x = torch.zeros(100, 1, 1, 1)
    views = [jitter(x, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(views[0], views[1])
    assert 0.04 < float(views[0].std()) < 0.06
