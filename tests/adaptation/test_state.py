from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trimtab.adaptation.state import Tensors, pack, unpack
from trimtab.core.checks import InputError


@pytest.mark.parametrize(
    "factory",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.Rprop(p, lr=0.1),
    ],
)
def test_optimizers_go_on_bit_by_bit(factory):
    def step(optimizer, parameter):
        parameter.grad = parameter.detach() ** 2 - 0.3
        optimizer.step()

    ours = {"a.weight": nn.Parameter(torch.linspace(-1, 1, 5))}
    optimizer = factory(ours.values())
    for _ in range(3):
        step(optimizer, ours["a.weight"])
    packed = {name: value.clone() for name, value in pack(optimizer, ours).items()}
    copy = {"a.weight": nn.Parameter(ours["a.weight"].detach().clone())}
    other = factory(copy.values())
    assert unpack(other, copy, {**packed, "b.weight.step": torch.zeros(())}) == ["b.weight.step"]
    for _ in range(3):
        step(optimizer, ours["a.weight"])
        step(other, copy["a.weight"])
        assert torch.equal(ours["a.weight"], copy["a.weight"])


@pytest.mark.bad_input
def test_state_that_is_no_tensor_is_refused():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}], state={parameter: {"step": 3}})
    with pytest.raises(InputError, match="step is int"):
        pack(optimizer, {"a": parameter})


def test_tensors_are_copies_that_move_with_the_module():
    value = torch.ones(2)
    kept = Tensors({"a.b": value, "c": torch.zeros(0)})
    value += 1
    assert kept.named()["a.b"].tolist() == [1, 1]
    assert kept.double().named()["a.b"].dtype == torch.float64
    assert not list(kept.parameters())
