"""The contract of training objectives, for every one of them."""

from copy import deepcopy

import pytest
import torch

from objectives import BUILDERS, Builder
from trimtab.core.checks import InputError
from trimtab.losses.base import full_precision, pair, reduced, same_device, widened

NAMES = sorted(BUILDERS)
EVERY = pytest.mark.parametrize("builder", [BUILDERS[name] for name in NAMES], ids=NAMES)
LARGE = 9


def drawn(builder: Builder, n: int = LARGE, seed: int = 0):
    return builder.batch(n, torch.Generator().manual_seed(seed))


def cast(values, dtype):
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


def value_and_gradient(builder, scores, rest, loss=None):
    loss = builder.make() if loss is None else loss
    scores = scores.clone().requires_grad_(True)
    value = builder.call(loss.to(scores.dtype), scores, *rest)
    value.backward()
    return value.detach(), scores.grad


@EVERY
def test_the_value_is_a_finite_scalar_that_trains(builder):
    scores, rest = drawn(builder)
    value, gradient = value_and_gradient(builder, scores, rest)
    assert value.shape == ()
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@EVERY
def test_the_same_batch_gives_the_same_numbers(builder):
    scores, rest = drawn(builder)
    first, second = (value_and_gradient(builder, scores, rest) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@EVERY
def test_nothing_given_is_changed(builder):
    scores, rest = drawn(builder)
    before = scores.clone(), deepcopy(rest)
    value_and_gradient(builder, scores, rest)
    assert torch.equal(scores, before[0])
    assert all(torch.equal(x, y) for x, y in zip(rest, before[1]) if isinstance(x, torch.Tensor))


@EVERY
@pytest.mark.parametrize("n", [2, 5])
def test_gradients_are_those_of_the_value(builder, n):
    n = max(n, builder.smallest)
    if not builder.differentiable:
        pytest.skip("its docstring says that the value is not what is differentiated")
    scores, rest = drawn(builder, n)
    loss = builder.make().double()
    fresh = deepcopy(loss.state_dict())

    def call(x):
        loss.load_state_dict(deepcopy(fresh))
        return builder.call(deepcopy(loss), x, *rest)

    assert torch.autograd.gradcheck(call, (scores.requires_grad_(True),), atol=1e-6, rtol=1e-4)


@EVERY
def test_under_autocast_it_is_computed_in_single_precision(builder):
    scores, rest = drawn(builder)
    narrow = scores.bfloat16()
    rest = cast(rest, torch.float32)
    expected, slope = value_and_gradient(builder, narrow.float(), rest)
    loss = builder.make()
    scores = narrow.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        value = builder.call(loss, scores, *rest)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.grad.float(), slope, rtol=0.02, atol=0.02 * float(slope.abs().max()))


@EVERY
def test_double_precision_stays(builder):
    scores, rest = drawn(builder)
    value, gradient = value_and_gradient(builder, scores, rest)
    assert value.dtype == gradient.dtype == torch.float64


@EVERY
@pytest.mark.compiled
def test_it_is_captured_whole_by_torch_compile(builder):
    if not builder.compiled:
        pytest.skip("its docstring says that it cannot be")
    scores, rest = drawn(builder)
    expected, slope = value_and_gradient(builder, scores, rest)
    torch._dynamo.reset()
    loss = builder.make().double()
    compiled = torch.compile(lambda *inputs: builder.call(loss, *inputs), backend="aot_eager", fullgraph=True)
    scores = scores.clone().requires_grad_(True)
    value = compiled(scores, *rest)
    value.backward()
    torch.testing.assert_close(value.detach(), expected)
    torch.testing.assert_close(scores.grad, slope)


@EVERY
@pytest.mark.parametrize("scale", [1e4, 1e-30, 0.0])
def test_extreme_scores_give_finite_gradients(builder, scale):
    scores, rest = drawn(builder)
    for dtype in (torch.float32, torch.float64):
        value, gradient = value_and_gradient(builder, (scale * scores).to(dtype), cast(rest, dtype))
        assert value.isfinite()
        assert gradient.isfinite().all()


@EVERY
@pytest.mark.bad_input
def test_the_smallest_batches_are_handled_or_refused(builder):
    for n in range(1, builder.smallest):
        with pytest.raises(InputError):
            value_and_gradient(builder, *drawn(builder, n))
    value, gradient = value_and_gradient(builder, *drawn(builder, builder.smallest))
    assert value.isfinite()
    assert gradient.isfinite().all()


@EVERY
@pytest.mark.bad_input
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(builder, bad):
    scores, rest = drawn(builder)
    scores[1] = bad
    with pytest.raises(InputError, match="must be finite"):
        value_and_gradient(builder, scores, rest)


@EVERY
@pytest.mark.bad_input
def test_whole_numbers_are_refused(builder):
    scores, rest = drawn(builder)
    with pytest.raises(InputError, match=r"floating point|real numbers"):
        builder.call(builder.make(), scores.long(), *rest)


@EVERY
@pytest.mark.bad_input
def test_tensors_of_two_devices_are_refused(builder):
    scores, rest = drawn(builder)
    if not any(isinstance(x, torch.Tensor) for x in rest):
        pytest.skip("it takes one tensor")
    with pytest.raises(InputError, match="device"):
        builder.call(builder.make().double(), scores.to("meta"), *rest)


@EVERY
@pytest.mark.bad_input
def test_an_empty_batch_is_refused(builder):
    scores, rest = drawn(builder)
    n = len(scores)
    rest = [x[:0] if isinstance(x, torch.Tensor) and x.ndim and len(x) == n else x for x in rest]
    with pytest.raises(InputError):
        builder.call(builder.make().double(), scores[:0], *rest)


def test_a_pair_is_checked_and_widened():
    logits, labels = pair(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 2], dtype=torch.int32))
    assert logits.dtype == torch.float32
    assert labels.dtype == torch.int64


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("logits", "labels", "told"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels must lie in 0..2, found 3 at row 1"),
        (torch.zeros(2, 3), torch.tensor([0]), "labels must have 2 entries"),
        (torch.zeros(2, 3), torch.zeros(2), "labels must be integer"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), "at least 2 columns"),
        (torch.zeros(0, 3), torch.tensor([], dtype=torch.long), "at least one row"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]), "logits must be floating point"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), "logits must be finite, found nan at row 0, column 0"),
        (
            torch.zeros(2, 3, device="meta"),
            torch.tensor([0, 1]),
            "labels must be on the device of logits, meta, got cpu",
        ),
    ],
)
def test_a_malformed_pair_is_refused_in_words(logits, labels, told):
    with pytest.raises(InputError, match=told):
        pair(logits, labels)


@pytest.mark.compiled
def test_values_are_not_looked_at_while_a_graph_is_traced():
    compiled = torch.compile(lambda x, y: pair(x, y)[0].sum(), backend="aot_eager", fullgraph=True)
    assert compiled(torch.full((2, 3), torch.nan), torch.tensor([0, 1])).isnan()


def test_half_precision_is_widened_and_the_rest_stays():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [widened(torch.zeros(1, dtype=dtype)).dtype for dtype in dtypes] == [torch.float32] * 3 + [torch.float64]


def test_products_within_full_precision_are_not_narrowed():
    x = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32


def test_reductions():
    values = torch.tensor([1.0, 3.0])
    assert [float(reduced(values, kind)) for kind in ("mean", "sum")] == [2, 4]
    assert torch.equal(reduced(values, "none"), values)


def test_one_device_is_no_offence():
    same_device(a=torch.zeros(1), b=torch.zeros(2))
