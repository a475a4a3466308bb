import torch
from torch import nn
from toynet import built, seeded_net, stream

from trimtab.adaptation.batch_stats import MixedBatchNorm, mix_statistics, source_statistics, use_batch_statistics


def test_following_layer_stores_in_train_mode_and_looks_up_in_eval_mode():
    bn = nn.BatchNorm2d(3)
    layer = MixedBatchNorm(bn, 0.3, unbiased=False, follow=True)
    assert layer.weight is bn.weight
    x = stream()[0]
    y = layer.train()(x)
    torch.testing.assert_close(layer.source_mean, 0.3 * x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.source_var, 0.7 + 0.3 * x.var((0, 2, 3), correction=0))
    stored = layer.source_mean.clone()
    torch.testing.assert_close(layer.eval()(x), y.detach(), atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.source_mean, stored)
    assert bn.running_mean.abs().max() == 0


def test_gradient_flows_through_the_batch_s_part():
    x = stream().double()[0][:2, :, :2, :2].requires_grad_()
    bn = nn.BatchNorm2d(3).double()
    bn.running_mean += 0.4
    layer = MixedBatchNorm(bn, 0.3, unbiased=True, follow=False)
    assert torch.autograd.gradcheck(layer, (x,))


def test_layers_without_affine_parameters():
    net = built(lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)))
    x = stream(shape=(3,))[0]
    mixed = mix_statistics(
        built(lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))), 0.0, unbiased=True, follow=False
    )
    torch.testing.assert_close(mixed(x), net(x))


def test_batch_statistics_do_not_depend_on_mode_or_order():
    net = use_batch_statistics(seeded_net())
    x = stream()[0]
    expected = net(x)
    assert torch.equal(net.train()(x), expected)
    torch.testing.assert_close(net.eval()(x.flip(0)).flip(0), expected)


def test_half_precision_inputs_are_summed_in_the_statistics_precision():
    layer = MixedBatchNorm(nn.BatchNorm2d(3), 1.0, unbiased=False, follow=True).train()
    x = stream(n=64, shape=(3, 32, 32))[0].bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer.source_var, x.double().var((0, 2, 3), correction=0).float())


def test_source_statistics_return_every_layer_to_its_own_mode():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval(), nn.BatchNorm2d(3))
    with source_statistics(net):
        assert [layer.training for layer in net] == [False, False, True]
    assert [layer.training for layer in net] == [True, False, True]
