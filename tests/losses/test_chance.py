"""What losses draw, and that it goes on where it was saved."""

import pytest
import torch
from torch import nn

from trimtab.core.checks import InputError
from trimtab.losses import PASTA, ArcFace, DMixup, EnsLoss, MagFace, Mixup, ibp_init_, make_mixtures
from trimtab.losses.chance import Chance, numpy_generator, permutations


def test_a_saved_state_continues_and_is_part_of_the_module_around_it():
    first = torch.nn.ModuleDict({"chance": Chance()})
    first["chance"].normal([5])
    second = torch.nn.ModuleDict({"chance": Chance(torch.Generator().manual_seed(7))})
    assert not torch.equal(Chance().normal([5]), second["chance"].normal([5]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first["chance"].normal([5]), second["chance"].normal([5]))


def test_numpy_draws_follow_the_generator_and_move_it_on():
    generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
    first, second = (numpy_generator(generator).beta(1, 1) for _ in range(2))
    assert first != second
    assert [numpy_generator(twin).beta(1, 1) for _ in range(2)] == [first, second]


def test_every_order_is_one():
    orders = permutations(3, 50, torch.Generator().manual_seed(0))
    assert torch.equal(orders.sort().values, torch.arange(50).expand(3, 50))
    assert len({tuple(order) for order in orders.tolist()}) == 3
    assert permutations(0, 4, torch.Generator()).shape == (0, 4)


NETWORK = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
DRAWS = {
    "make_mixtures": lambda generator: make_mixtures(torch.eye(2), torch.arange(2), classes=2, generator=generator),
    "ArcFace": lambda generator: ArcFace(4, 3, generator=generator),
    "MagFace": lambda generator: MagFace(4, 3, generator=generator),
    "ibp_init_": lambda generator: ibp_init_(NETWORK, generator=generator),
    **{
        kind.__name__: lambda generator, kind=kind: kind(generator=generator)
        for kind in (DMixup, EnsLoss, Mixup, PASTA)
    },
}


@pytest.mark.bad_input
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_in_the_place_of_a_generator_is_refused(draw, seed):
    with pytest.raises(InputError, match=r"generator must be a torch.Generator, got int"):
        draw(seed)


@pytest.mark.bad_input
def test_mixtures_want_a_generator():
    with pytest.raises(InputError, match=r"generator must be a torch.Generator, got NoneType"):
        DRAWS["make_mixtures"](None)
