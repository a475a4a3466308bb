import pytest
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


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (4, 3, 2, 3)])
@pytest.mark.parametrize(("affine", "unbiased", "alpha"), [(True, True, 0.3), (False, True, 1.0), (True, False, 0.0)])
def test_the_gradient_is_that_of_the_formula(shape, affine, unbiased, alpha):
    generator = torch.Generator().manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    layer = kind(3, affine=affine, dtype=torch.float64)
    for statistic in (layer.running_mean, layer.running_var):
        statistic.copy_(torch.rand(3, generator=generator) + 0.5)
    mixed = MixedBatchNorm(layer, alpha, unbiased=unbiased).eval()
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def formula(x):
        over = [axis for axis in range(x.ndim) if axis != 1]
        mean = (1 - alpha) * layer.running_mean + alpha * x.mean(over)
        var = (1 - alpha) * layer.running_var + alpha * x.var(over, correction=int(unbiased))
        by_channel = (-1, *(1,) * (x.ndim - 2))
        y = (x - mean.view(by_channel)) / (var + layer.eps).sqrt().view(by_channel)
        return y * layer.weight.view(by_channel) + layer.bias.view(by_channel) if affine else y

    torch.testing.assert_close(mixed(x), formula(x))
    moving = [x, *mixed.parameters()]
    ours, theirs = (torch.autograd.grad(f(x).sin().sum(), moving) for f in (mixed, formula))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(mixed, (x,))
