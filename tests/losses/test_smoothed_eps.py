"""The schedule of the radius, of 39-fast-certified-ibp; its golden vectors are in test_certified.py."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import SmoothedEps


@given(
    start=st.integers(1, 4), length=st.integers(1, 12), batches=st.integers(1, 9), middle=st.floats(0, 1),
    power=st.floats(1, 5),
)  # fmt: skip
def test_the_schedule_never_falls_and_ends_at_the_full_radius(start, length, batches, middle, power):
    schedule = SmoothedEps(0.3, start=start, length=length, batches=batches, middle=middle, power=power)
    radii = [schedule.step() for _ in range((start + length) * batches + 1)]
    assert all(a <= b + 1e-12 for a, b in pairwise(radii))
    assert all(radius == 0 for radius in radii[: (start - 1) * batches + 1])
    assert radii[(start + length - 1) * batches] == 0.3


def test_a_schedule_goes_on_where_it_was():
    first, second = (SmoothedEps(0.3, start=1, length=4, batches=5) for _ in range(2))
    for _ in range(7):
        first.step()
    second.load_state_dict(first.state_dict())
    assert [first.step() for _ in range(9)] == [second.step() for _ in range(9)]


@pytest.mark.bad_input
def test_an_epoch_without_batches_is_refused():
    with pytest.raises(InputError, match="batches must be at least 1"):
        SmoothedEps(0.1, batches=0)
