from functools import partial

import torch
from torch import nn
from toynet import built, seeded_net, stream

from trimtab.adaptation import Tent
from trimtab.adaptation.base import entropy

SGD = partial(torch.optim.SGD, lr=0.05)


def test_one_step_is_a_gradient_step_down_the_mean_entropy():
    x = stream()[0]
    tent = Tent(seeded_net(norm="group"), optimizer=SGD)
    net = seeded_net(norm="group")
    entropy(net(x)).mean().backward()
    tent(x)
    for name, parameter in tent.moving.items():
        start = dict(net.named_parameters())[name]
        torch.testing.assert_close(parameter, start - 0.05 * start.grad)


def test_entropy_falls_along_a_stream():
    xs = stream(batches=40)
    tent = Tent(seeded_net(), optimizer=partial(torch.optim.Adam, lr=0.01))
    entropies = [float(entropy(tent(x)).mean()) for x in xs]
    assert sum(entropies[-10:]) < sum(entropies[:10])


def test_dropout_is_active_in_train_mode_only():
    net = built(lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)))
    x = stream(shape=(3,))[0]
    with torch.random.fork_rng(devices=[]):
        quiet, loud = Tent(net), Tent(net, train_mode=True)
        assert torch.equal(quiet(x), Tent(net)(x))
        assert not torch.equal(loud(x), Tent(net, train_mode=True)(x))
