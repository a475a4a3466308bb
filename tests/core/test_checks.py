"""The door: good input passes unchanged, bad input is named with its first bad place."""

import math
from typing import Literal

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trimtab.core import checks
from trimtab.core.checks import InputError

pytestmark = pytest.mark.bad_input

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 5))
FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
BAD = st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def place(draw, shape):
    return tuple(draw(st.integers(0, size - 1)) for size in shape)


@given(SHAPES, FLOATS)
def test_logits_come_back_as_they_are(shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    assert checks.logits(x) is x


def test_numpy_is_shared_unless_it_is_read_only():
    x = np.zeros((2, 3))
    assert checks.logits(x).data_ptr() == x.ctypes.data
    x.flags.writeable = False
    copy = checks.logits(x)
    copy += 1
    assert (x == 0).all()


@given(SHAPES, FLOATS, BAD, st.data())
def test_the_first_value_that_is_not_finite_is_named(shape, dtype, bad, data):
    x = torch.zeros(shape, dtype=dtype)
    places = data.draw(st.lists(place(shape), min_size=1, max_size=3))
    for where in places:
        x[where] = bad
    row, column = min(places)
    with pytest.raises(InputError, match=rf"^scores must be finite, found {bad} at row {row}, column {column}$"):
        checks.logits(x, "scores")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"must have shape \(n, c\), got \(3,\)"),
        (torch.zeros(2, 3, 4), r"must have shape \(n, c\), got \(2, 3, 4\)"),
        (torch.zeros(0, 3), r"must have at least one row, got \(0, 3\)"),
        (torch.zeros(3, 1), r"must have at least 2 columns, got 1"),
        (torch.zeros(3, 2, dtype=torch.int64), r"must be floating point, got int64"),
        (torch.zeros(3, 2, dtype=torch.bool), r"must be floating point, got bool"),
        (torch.zeros(3, 2, dtype=torch.complex64), r"must be floating point, got complex64"),
        (np.array([["a", "b"]]), r"must be numeric, got an array of dtype <U1"),
        (np.array([[None, 1.0]]), r"must be numeric, got an array of dtype object"),
        ([[1.0], [1.0, 2.0]], r"must be a numeric tensor or array, got list"),
        ("logits", r"must be a numeric tensor or array, got str"),
        (None, r"must be a numeric tensor or array, got NoneType"),
        ({"a": 1}, r"must be a numeric tensor or array, got dict"),
    ],
)
def test_logits_of_wrong_shape_or_type(value, message):
    with pytest.raises(InputError, match=message):
        checks.logits(value)


def test_the_number_of_classes_can_be_fixed():
    with pytest.raises(InputError, match="logits must have 4 columns, got 3"):
        checks.logits(torch.zeros(2, 3), classes=4)


@given(hnp.arrays(np.float64, SHAPES, elements=st.floats(-20, 20)))
def test_probabilities_pass(scores):
    p = torch.from_numpy(scores).softmax(1)
    assert checks.probabilities(p) is p
    assert checks.probabilities(p.half()).dtype == torch.float16


@given(SHAPES, st.floats(2e-3, 0.3), st.data())
def test_the_first_row_that_does_not_sum_to_one_is_named(shape, error, data):
    p = torch.full(shape, 1 / shape[1], dtype=torch.float64)
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1))
    p[rows, 0] += error
    with pytest.raises(InputError, match=f"must sum to one in every row .* row {min(rows)} sums to"):
        checks.probabilities(p)


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_probabilities_outside_the_unit_interval(bad):
    p = torch.tensor([[0.5, 0.5], [bad, 1 - bad]])
    with pytest.raises(InputError, match=r"probs must lie in \[0, 1\], found .* at row 1, column 0"):
        checks.probabilities(p)


@given(st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]), st.integers(1, 9))
def test_labels_of_any_integer_type_become_int64(dtype, n):
    y = torch.arange(n, dtype=dtype)
    checked = checks.labels(y, n, n)
    assert checked.dtype == torch.int64
    assert torch.equal(checked, torch.arange(n))


@given(st.integers(1, 6), st.integers(2, 5), st.data())
def test_the_first_label_out_of_range_is_named(n, c, data):
    y = torch.zeros(n, dtype=torch.int64)
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1))
    bad = data.draw(st.one_of(st.integers(-5, -1), st.integers(c, c + 5)))
    y[rows] = bad
    with pytest.raises(InputError, match=rf"labels must lie in 0..{c - 1}, found {bad} at row {min(rows)}$"):
        checks.labels(y, n, c)


def test_labels_without_an_end_are_any_that_are_not_negative():
    y = torch.tensor([0, torch.iinfo(torch.int64).max])
    assert torch.equal(checks.labels(y, 2, None), y)
    with pytest.raises(InputError, match="labels must be >= 0, found -2 at row 1"):
        checks.labels(torch.tensor([0, -2, -3]), 3, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), "must be integer class indices, got float32"),
        (torch.zeros(3, dtype=torch.bool), "must be integer class indices, got bool"),
        (torch.zeros(2, dtype=torch.int64), "must have 3 entries, one for each row, got 2"),
        (torch.zeros(3, 1, dtype=torch.int64), r"must have shape \(n,\), got \(3, 1\)"),
    ],
)
def test_labels_of_wrong_shape_or_type(value, message):
    with pytest.raises(InputError, match=message):
        checks.labels(value, 3, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), r"must have shape \(3,\), got \(2,\)"),
        (torch.tensor([1.0, -2.0, -3.0]), "must be >= 0, found -2 at row 1"),
        (torch.zeros(3), "must not be all zero"),
        (torch.tensor([1.0, math.nan, 1.0]), "must be finite, found nan at row 1"),
        (torch.ones(3, dtype=torch.bool), "must be real numbers, got bool"),
        (torch.ones(3, dtype=torch.complex64), "must be real numbers, got complex64"),
    ],
)
def test_bad_weights(value, message):
    with pytest.raises(InputError, match=f"weights {message}"):
        checks.weights(value, 3)


def test_integer_weights_become_float64():
    assert checks.weights([1, 2, 0], 3).dtype == torch.float64


@pytest.mark.parametrize("shape", [(3, 2), (3, 0, 2), (2, 4, 2), (3, 4, 3)])
def test_views_of_wrong_shape(shape):
    with pytest.raises(InputError, match=r"views must have shape \(3, v, 2\) with v >= 1"):
        checks.views(torch.zeros(shape), 3, 2)


def test_views_name_the_axes_of_a_bad_value():
    x = torch.zeros(3, 4, 2)
    x[1, 2, 0] = math.nan
    with pytest.raises(InputError, match="found nan at axis 0 index 1, axis 1 index 2, axis 2 index 0"):
        checks.views(x, 3, 2)
    with pytest.raises(InputError, match="must be floating point, got int64"):
        checks.views(torch.zeros(3, 4, 2, dtype=torch.int64), 3, 2)


@given(st.floats(0, 1))
def test_numbers_inside_pass(value):
    assert checks.number(value, "alpha", low=0, high=1) == value


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0.0, {"low": 0, "low_open": True}, r"must lie in \(0, inf\), got 0"),
        (1.0, {"high": 1, "high_open": True}, r"must lie in \(-inf, 1\), got 1"),
        (2.0, {"low": 0, "high": 1}, r"must lie in \[0, 1\], got 2"),
        (math.nan, {}, r"must lie in \(-inf, inf\), got nan"),
        (math.inf, {"low": 0}, r"must lie in \[0, inf\), got inf"),
        (True, {}, "must be a number, got bool"),
        ("1", {}, "must be a number, got str"),
    ],
)
def test_numbers_outside(value, bounds, message):
    with pytest.raises(InputError, match=f"alpha {message}"):
        checks.number(value, "alpha", **bounds)


def test_integers():
    assert checks.integer(3, "bins", low=1, high=3) == 3
    for value, message in [
        (0, "bins must be at least 1, got 0"),
        (4, "bins must be at most 3, got 4"),
        (2.0, "bins must be an integer, got float"),
        (True, "bins must be an integer, got bool"),
    ]:
        with pytest.raises(InputError, match=message):
            checks.integer(value, "bins", low=1, high=3)


def test_numbers_of_numpy_pass_where_types_are_checked():
    jaxtyping.config.update("jaxtyping_disable", False)
    assert checks.integer(np.int32(3), "bins", low=1, high=3) == 3
    for value in (np.float32(0.5), np.float64(0.5), np.int64(0)):
        found = checks.number(value, "alpha", low=0, high=1)
        assert found == value
        assert type(found) is float


def test_one_of():
    assert checks.one_of("up", "way", Literal["up", "down"]) == "up"
    with pytest.raises(InputError, match="way must be one of up, down, got 'left'"):
        checks.one_of("left", "way", Literal["up", "down"])


def test_generators():
    given = torch.Generator()
    assert checks.generator(given) is given
    assert checks.generator(None, seed=3).initial_seed() == 3
    with pytest.raises(InputError, match=r"generator must be a torch.Generator, got int"):
        checks.generator(0, seed=3)


def test_functions():
    assert checks.function(torch.relu, "loss") is torch.relu
    for value, message in ((torch.nn.ReLU, "loss must be a function or a module, got the class ReLU"), (3, "got int")):
        with pytest.raises(InputError, match=message):
            checks.function(value, "loss")


def test_loaders():
    assert checks.loader([]) == []
    with pytest.raises(InputError, match="data must yield batches, as a DataLoader does, got int"):
        checks.loader(7, "data")
