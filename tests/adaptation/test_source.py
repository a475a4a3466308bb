import torch
from toynet import seeded_net, stream

from trimtab.adaptation import Source


def test_is_the_model_in_eval_mode():
    net = seeded_net().train()
    x = stream()[0]
    source = Source(net)
    assert torch.equal(source(x), net.eval()(x).detach())
    assert int(source.updates) == 0
    assert source.optimizer is None
