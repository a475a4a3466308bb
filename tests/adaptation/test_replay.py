from itertools import islice

import pytest
import torch

from trimtab.adaptation.replay import Replay, rounds
from trimtab.core.checks import InputError


def test_replay_goes_round_and_round_from_any_position():
    def take(start, count):
        return [pair for pair, _ in zip(rounds("abc", "source", start), range(count))]

    assert take(0, 5) == [(1, "a"), (2, "b"), (3, "c"), (1, "a"), (2, "b")]
    assert take(2, 2) == [(3, "c"), (1, "a")]
    assert take(3, 2) == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("cut", range(5))
def test_a_place_is_saved_and_set(cut):
    straight = Replay("abc")
    for _ in range(cut):
        straight.next()
    other = Replay("abc")
    other.next()
    other.load_state_dict({name: value.clone() for name, value in straight.state_dict().items()})
    assert [other.next() for _ in range(4)] == [straight.next() for _ in range(4)]
    other.taken.fill_(2)
    assert other.next() == "c"


@pytest.mark.bad_input
@pytest.mark.parametrize("batches", [(), iter("a"), torch.zeros(0)], ids=["none", "once", "rows"])
def test_batches_that_end_are_refused(batches):
    with pytest.raises(InputError, match="those must yield batches every time"):
        list(islice(rounds(batches, "those"), 2))
