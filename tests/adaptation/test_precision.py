"""Every adapter under mixed precision, and on models in half precision."""

import pytest
import torch
from builders import BUILDERS, LEARNERS
from torch import nn
from toynet import seeded_net, stream

from trimtab.adaptation import AdaNPC
from trimtab.core.checks import InputError

HALVES = {"bfloat16": (torch.bfloat16, 0.05), "float16": (torch.float16, 0.005)}
halves = pytest.mark.parametrize(("half", "tolerance"), HALVES.values(), ids=HALVES)


def floats(adapter):
    return {name: value for name, value in adapter.state_dict().items() if value.is_floating_point()}


def half_but_for_norms(dtype):
    """Half-precision convolutions around normalisation layers in float32, as mixed-precision checkpoints hold them."""
    net = seeded_net().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return net


@pytest.mark.parametrize("name", BUILDERS)
def test_autocast_leaves_the_state_in_single_precision(name):
    adapter, plain = BUILDERS[name](seeded_net()), BUILDERS[name](seeded_net())
    for x in stream(n=20):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = adapter(x)
        expected = plain(x)
        assert outputs.dtype == torch.float32
        assert outputs.isfinite().all()
        if not isinstance(plain, AdaNPC):  # whose nearest neighbours change one by one
            torch.testing.assert_close(outputs, expected, rtol=0, atol=0.05)
    assert int(adapter.updates) == int(plain.updates) >= (name in LEARNERS)
    assert int(adapter.skipped) == 0
    assert {key: v.dtype for key, v in floats(adapter).items()} == {key: v.dtype for key, v in floats(plain).items()}
    assert all(value.isfinite().all() for value in floats(adapter).values())


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in LEARNERS])
@halves
def test_a_model_in_half_precision_predicts_in_single_precision(name, half, tolerance):
    adapter, plain = BUILDERS[name](seeded_net().to(half)), BUILDERS[name](seeded_net())
    for x in stream(n=20):
        outputs = adapter(x.to(half))
        assert outputs.dtype == torch.float32
        assert outputs.isfinite().all()
        if not isinstance(plain, AdaNPC):
            torch.testing.assert_close(outputs, plain(x), rtol=0, atol=tolerance)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", LEARNERS)
@halves
def test_what_moves_must_be_in_single_precision(name, half, tolerance):
    with pytest.raises(InputError, match=r"model must hold .* in float32.*: small updates would be lost"):
        BUILDERS[name](seeded_net().to(half))


@pytest.mark.parametrize("name", BUILDERS)
@halves
def test_norm_layers_in_single_precision_are_enough(name, half, tolerance):
    if name in ("rmt", "petal", "cotta"):  # which move all parameters
        with pytest.raises(InputError, match="small updates would be lost"):
            BUILDERS[name](half_but_for_norms(half))
        return
    adapter = BUILDERS[name](half_but_for_norms(half))
    for x in stream(n=20):
        outputs = adapter(x.to(half))
        assert outputs.dtype == torch.float32
        assert outputs.isfinite().all()
    assert int(adapter.updates) >= (name in LEARNERS)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.moving.values())
