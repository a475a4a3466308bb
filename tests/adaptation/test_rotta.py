import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toynet import seeded_net, stream

from trimtab.adaptation import RoTTA
from trimtab.adaptation.rotta import Item, offer
from trimtab.core.checks import InputError


@given(
    st.integers(1, 9),
    st.integers(2, 5),
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 2)), min_size=1, max_size=60),
)
def test_memory_keeps_its_bounds_and_drops_the_worst(capacity, classes, samples):
    bank = {}
    for t, (label, entropy) in enumerate(samples):
        label %= classes
        before = {item.row for items in bank.values() for item in items}
        new = Item(t, t, entropy)
        took = offer(bank, label, new, capacity=capacity, classes=classes)
        after = {item.row for items in bank.values() for item in items}
        assert (t in after) == took
        assert len(before - after) <= 1
        assert before - after == set() or took
        assert len(after) <= capacity
        assert all(len(items) <= math.ceil(capacity / classes) for items in bank.values())
        assert all(items == sorted(items, key=lambda item: item.born) for items in bank.values())


def test_a_tie_goes_against_the_later_item():
    bank = {0: [Item(0, 0, 1.0), Item(1, 0, 1.0)]}
    assert offer(bank, 0, Item(2, 5, 0.0), capacity=2, classes=2)
    assert [item.row for item in bank[0]] == [0, 2]


def test_an_input_no_better_than_the_worst_is_dropped():
    bank = {0: [Item(0, 3, 1.0)]}
    assert not offer(bank, 0, Item(1, 3, 1.0), capacity=2, classes=2)


@pytest.mark.parametrize("sizes", [[30], [7, 7, 7, 9], [1] * 30, [10, 10, 10]])
def test_updates_follow_the_count_of_inputs_whatever_the_batches(sizes):
    xs = stream(batches=1, n=30)[0]
    rotta = RoTTA(seeded_net(), capacity=8, update_every=10)
    for x in xs.split(sizes):
        rotta(x)
    assert int(rotta.updates) == 3
    assert int(rotta.offered) == 30
    assert len(rotta.memory) == len(rotta.memory_class) == len(rotta.memory_born) == len(rotta.memory_entropy) <= 8
    for x, born in zip(rotta.memory, rotta.memory_born.tolist()):
        assert torch.equal(x, xs[born])


def test_inputs_that_overflow_stay_out_of_the_memory():
    rotta = RoTTA(seeded_net(), capacity=8, update_every=6, augment=lambda x, generator: x)
    x = stream()[0]
    rotta(torch.cat((3e38 * (0.5 + x[:6] / 2), x[6:])))
    assert rotta.memory.max() <= 1
    assert min(rotta.memory_born.tolist()) >= 6
    assert all(v.isfinite().all() for v in rotta.state_dict().values())


def test_statistics_of_a_skipped_update_are_taken_back():
    rotta = RoTTA(seeded_net(), capacity=8, update_every=12, augment=lambda x, generator: 3e38 * (0.5 + x))
    before = {n: v.clone() for n, v in rotta.state_dict().items() if n.startswith(("model", "teacher"))}
    rotta(stream()[0])
    assert (int(rotta.updates), int(rotta.skipped)) == (0, 1)
    assert all(torch.equal(v, rotta.state_dict()[n]) for n, v in before.items())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"update_every": 0}, "update_every must be at least 1"),
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"nu": -0.5}, "nu must lie in"),
        ({"timeliness": -1.0}, "timeliness must lie in"),
        ({"uncertainty": -1.0}, "uncertainty must lie in"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RoTTA(seeded_net(), **options)


@pytest.mark.bad_input
def test_a_mapping_cannot_be_remembered():
    with pytest.raises(InputError, match="which the memory can hold"):
        RoTTA(seeded_net())({"x": stream()[0]})
