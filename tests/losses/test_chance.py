"""What losses draw, and that it goes on where it was saved."""

import torch

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
