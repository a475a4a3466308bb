"""What an adapter knows before the stream: kept on disk, and refused wherever it does not belong."""

import json
from copy import deepcopy

import pytest
import torch
from builders import BUILDERS, source
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from toynet import built, seeded_net, stream

from trimtab.adaptation import Prepared
from trimtab.core.checks import InputError

PREPARED = [name for name, build in BUILDERS.items() if build.prepare is not None]


def example(model=None):
    tensors = {"rows": torch.arange(6.0).view(2, 3), "labels": torch.tensor([0, 1]), "none": torch.empty(0, 3)}
    return Prepared("Example", tensors, seeded_net() if model is None else model)


@pytest.mark.parametrize("name", PREPARED)
def test_a_file_does_what_the_preparation_does(name, tmp_path):
    build = BUILDERS[name]
    prepared = build.prepared(seeded_net())
    prepared.save(tmp_path / "it.safetensors")
    again = Prepared.load(tmp_path / "it.safetensors")
    assert again.method == prepared.method == build.method.__name__
    assert again.keys() == prepared.keys()
    assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in prepared.items())
    one, other = (build.method(seeded_net(), **{**build.settings, "prepared": known}) for known in (prepared, again))
    for x in stream():
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("name", PREPARED)
def test_preparing_leaves_the_model_as_it_is(name):
    build, net = BUILDERS[name], seeded_net().train()
    net.fc.requires_grad_(False)
    before = deepcopy(net)
    build.method.prepare(net, source(seeded_net(), (3, 8, 8)), **build.prepare)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in net.parameters())
    assert all(module.training for module in net.modules())


def test_it_is_a_mapping_of_detached_tensors():
    weight = nn.Parameter(torch.ones(2))
    prepared = Prepared("Example", {"weight": weight}, nn.Module())
    assert dict(prepared) == {"weight": prepared["weight"]}
    assert not prepared["weight"].requires_grad
    assert "bias" not in prepared
    assert prepared.get("bias") is None
    assert repr(prepared) == "Prepared('Example', {weight: (2,)})"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_copy_in_another_precision_is_the_same_model(dtype):
    prepared = example()
    assert prepared.check("Example", seeded_net().to(dtype)) is prepared


@given(st.integers(0, 10**6))
def test_half_precision_is_no_other_model_whatever_the_weights(seed):
    linear = nn.Linear(300, 40, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    example(linear).check("Example", deepcopy(linear).bfloat16())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: seeded_net(seed=1), r"'conv1\.weight' holds other numbers"),
        (lambda: seeded_net(classes=4), r"'fc\.weight' is \(4, 10\) here, \(5, 10\) there"),
        (lambda: seeded_net(norm="group"), r"'bn1\.running_mean' is not here"),
        (lambda: nn.Sequential(seeded_net()), r"'0\.bn1\.bias' is not there"),
    ],
)
def test_another_model_is_refused(other, message):
    with pytest.raises(InputError, match=f"prepared was made for another model: {message}"):
        example().check("Example", other())


@pytest.mark.bad_input
def test_large_layers_of_other_numbers_are_told_apart_though_their_norms_are_alike():
    one = built(lambda: nn.Linear(400, 400, bias=False))
    other = deepcopy(one)
    with torch.no_grad():
        other.weight.copy_(one.weight.flip(0))
    with pytest.raises(InputError, match="'weight' holds other numbers"):
        example(one).check("Example", other)


@pytest.mark.bad_input
def test_another_method_is_refused():
    with pytest.raises(InputError, match=r"must come from Tent\.prepare, it was made by Example"):
        example().check("Tent", seeded_net())


@pytest.mark.bad_input
def test_what_is_not_finite_is_refused():
    with pytest.raises(InputError, match="rows must be finite, found nan at row 1"):
        Prepared("Example", {"rows": torch.tensor([0.0, float("nan")])}, nn.Module())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def swap(path):
    save_file({**load_file(path), "rows": torch.zeros(2, 3)}, path)


def rename(path):
    tensors = load_file(path)
    save_file({"lines": tensors.pop("rows"), **tensors}, path)


def described_as(told):
    return lambda path: path.with_suffix(".json").write_text(json.dumps(told))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.with_suffix(".json").unlink(), "cannot be read"),
        (lambda path: path.with_suffix(".json").write_text("{"), "cannot be read"),
        (swap, "holds other tensors than were saved"),
        (rename, "holds other tensors than were saved"),
        (described_as([1]), "does not hold the preparation of an adapter"),
        (described_as({}), "does not hold the preparation of an adapter"),
        (described_as({"method": "Example", "tensors": "", "model": {"a": 3}}), "does not hold the preparation"),
        (described_as({"method": "Example", "tensors": "", "model": 3}), "does not hold the preparation"),
        (described_as({"method": "Example", "tensors": "", "model": {}}), "holds other tensors"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    path = tmp_path / "it.safetensors"
    example().save(path)
    damage(path)
    with pytest.raises(InputError, match=message):
        Prepared.load(path)
