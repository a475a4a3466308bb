import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toynet import built, seeded_net, stream

from trimtab.adaptation import BatchNormAdapt, Source
from trimtab.core.checks import InputError


def test_batch_statistics_undo_an_affine_change_of_every_channel():
    net = built(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 4)))
    adapter = BatchNormAdapt(net)
    x = stream()[0]
    factor, offset = torch.tensor([2.0, 0.5, 3.0]).view(3, 1, 1), torch.tensor([1.0, -2.0, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(adapter(x), adapter(factor * x + offset), atol=2e-3, rtol=0)
    assert int(adapter.updates) == 0


@given(st.floats(0, 1), st.sampled_from([(6, 4), (6, 4, 5), (6, 4, 3, 3), (2, 4, 2, 3, 2)]))
def test_mixture_is_the_formula(alpha, shape):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = kind(4)
    layer.running_mean += 0.3
    layer.running_var *= 1.7
    net = built(lambda: nn.Sequential(layer, nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), 2)))
    x = stream(n=shape[0], shape=shape[1:])[0]
    over = [i for i in range(x.ndim) if i != 1]
    mean = (1 - alpha) * layer.running_mean + alpha * x.mean(over)
    var = (1 - alpha) * layer.running_var + alpha * x.var(over)
    view = (-1, *[1] * (x.ndim - 2))
    y = (x - mean.view(view)) / (var.view(view) + layer.eps).sqrt()
    expected = net[2](y.flatten(1)).detach()
    torch.testing.assert_close(BatchNormAdapt(net, variant="mixed", alpha=alpha)(x), expected, atol=1e-5, rtol=1e-5)


def test_moving_average_is_two_passes():
    net = seeded_net()
    adapter = BatchNormAdapt(net, variant="ema")
    for x in stream():
        net.train()
        net(x)
        torch.testing.assert_close(adapter(x), net.eval()(x).detach())
    assert int(adapter.updates) == 4


def test_dropout_stays_off_while_statistics_move():
    net = built(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    x = stream(shape=(3,))[0]
    assert torch.equal(BatchNormAdapt(net, variant="ema")(x), BatchNormAdapt(net, variant="ema")(x))


def test_a_mixture_with_weight_zero_is_the_source_down_to_one_image():
    x = stream(n=1)[0]
    mixed = BatchNormAdapt(seeded_net(), variant="mixed", alpha=0.0)
    torch.testing.assert_close(mixed(x), Source(seeded_net())(x), atol=1e-5, rtol=1e-5)


@pytest.mark.bad_input
@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "a"])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(InputError, match="alpha must"):
        BatchNormAdapt(seeded_net(), variant="mixed", alpha=alpha)


@pytest.mark.bad_input
def test_bad_models_and_variants_are_refused():
    with pytest.raises(InputError, match="variant must be"):
        BatchNormAdapt(seeded_net(), variant="alpha")
    with pytest.raises(InputError, match="batch normalisation layer, found none"):
        BatchNormAdapt(seeded_net(norm="group"))
    bare = built(lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)))
    for variant in ("mixed", "ema"):
        with pytest.raises(InputError, match="running statistics"):
            BatchNormAdapt(bare, variant=variant)


@pytest.mark.bad_input
def test_one_value_a_channel_has_no_unbiased_variance():
    net = built(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(InputError, match="more than one value a channel"):
        BatchNormAdapt(net, variant="mixed")(torch.zeros(1, 3, 1, 1))
