"""Direct Coverage Optimization (07-dco): the authors' numbers, the paper's gradient, the forms, the door."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import DirectCoverage, answer_log_prob, coverage_factor, coverage_loss

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "07-dco").glob("*.npz"))
TOLERANCE = {"f64": 1e-9, "f32": 2e-5}
DTYPES = {"f64": torch.float64, "f32": torch.float32}


def sequences(seed=0, n=5, s=6, v=7, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, s, v, generator=generator, dtype=torch.float64)
    labels = torch.randint(v, (n, s), generator=generator)
    labels[:, 0] = -100
    labels[0, 4:] = -100
    return logits, labels


def assert_near(actual, expected, rtol):
    expected = torch.as_tensor(expected).double()
    atol = rtol * float(expected.abs().max()) * 1e-3
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.golden
def test_the_authors_numbers():
    seen = set()
    for path in GOLDEN:
        with np.load(path) as arrays:
            for name in arrays.files:
                if name.startswith("factor_N"):
                    factor = coverage_factor(torch.from_numpy(arrays["p"]), int(name.removeprefix("factor_N")))
                    np.testing.assert_allclose(factor.numpy(), arrays[name], rtol=1e-12, atol=1e-300)
                    seen.add("factor")
                if name.endswith("/per_sample"):
                    _check_loss(arrays, *name.split("/")[:2])
                    seen.add("loss")
    assert seen == {"factor", "loss"}


def _check_loss(arrays, case, precision):
    there, rtol = f"{case}/{precision}/", TOLERANCE[precision]
    logits = torch.from_numpy(arrays[f"{case}/logits"]).to(DTYPES[precision]).requires_grad_()
    labels, samples = torch.from_numpy(arrays[f"{case}/labels"]), int(arrays[f"{case}/N"])
    log_p = answer_log_prob(logits, labels).detach()
    assert_near(log_p, arrays[there + "seq_logprob"], rtol)
    assert_near(coverage_factor(log_p.double().exp(), samples), arrays[there + "factor"], 10 * rtol)
    values = DirectCoverage(samples=samples, length_normalize=True, reduction="none")(logits, labels)
    assert_near(values.detach(), arrays[there + "per_sample"], 10 * rtol)
    (gradient,) = torch.autograd.grad(values.mean(), logits)
    assert_near(gradient, arrays[there + "grad_logits_of_mean"], 10 * rtol)
    assert_near(DirectCoverage(samples=samples)(logits, labels).detach(), arrays[there + "loss2_sum_mean"], 10 * rtol)


@given(st.integers(0, 1000), st.integers(1, 5000))
def test_the_gradient_is_that_of_the_coverage(seed, samples):
    logits, labels = sequences(seed)
    logits.requires_grad_()
    (surrogate,) = torch.autograd.grad(DirectCoverage(samples=samples)(logits, labels), logits)
    log_p = answer_log_prob(logits, labels)
    exact = -torch.log(-torch.expm1(samples * torch.log1p(-log_p.exp()))).mean()
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(surrogate, expected, rtol=2e-4, atol=1e-12)


@given(st.floats(-30, -1e-6), st.integers(1, 5000))
def test_the_exact_loss(log_p, samples):
    log_p = torch.tensor([log_p], dtype=torch.float64, requires_grad=True)
    value = coverage_loss(log_p, samples)
    missed = samples * torch.log1p(-log_p.detach().exp())
    torch.testing.assert_close(value.detach(), -torch.log(-torch.expm1(missed)), rtol=1e-9, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: coverage_loss(x, samples), (log_p,), eps=1e-8, atol=1e-4, rtol=1e-3)


def test_the_exact_loss_at_both_ends():
    log_p = torch.tensor([-1e5, -700.0, 0.0], requires_grad=True)
    value = coverage_loss(log_p, 256)
    torch.testing.assert_close(value[:2].detach(), torch.tensor([1e5, 700.0]) - np.log(256))
    assert value[2] == 0
    value.sum().backward()
    torch.testing.assert_close(log_p.grad, torch.tensor([-1.0, -1.0, 0.0]))


@given(st.integers(1, 10_000))
def test_the_factor_falls_from_one_to_zero(samples):
    p = torch.cat([torch.zeros(1), torch.logspace(-12, 0, 200)]).double()
    factor = coverage_factor(p, samples)
    assert factor[0] == 1
    assert factor[-1] == (1 if samples == 1 else 0)
    assert ((factor >= 0) & (factor <= 1)).all()
    assert all(later <= earlier + 2e-4 for earlier, later in pairwise(factor.tolist()))


@given(st.integers(2, 10_000), st.floats(1e-6, 0.0999))
def test_the_series_is_near_the_closed_form(samples, expected_hits):
    p = expected_hits / samples
    missed = np.log1p(-p)
    closed = samples * p * np.exp((samples - 1) * missed) / -np.expm1(samples * missed)
    assert abs(float(coverage_factor(torch.tensor([p], dtype=torch.float64), samples)) / closed - 1) < 1.4e-4


def test_one_sample_is_cross_entropy():
    logits, labels = sequences()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(DirectCoverage(samples=1, reduction="sum")(logits, labels), loss)


def test_classes_are_answers_of_one_token():
    logits, labels = torch.eye(3)[[0, 1]], torch.tensor([0, 2])
    loss = DirectCoverage(samples=8)
    sequence = DirectCoverage(samples=8, shift=False)(logits[:, None], labels[:, None])
    torch.testing.assert_close(loss(logits, labels), sequence)


def test_labels_may_be_in_place_already_and_another_one_ignored():
    logits, labels = sequences()
    loss, own = DirectCoverage(samples=8), {"shift": False, "ignore_index": -1}
    moved = labels[:, 1:].where(labels[:, 1:] != -100, -1)
    torch.testing.assert_close(DirectCoverage(samples=8, **own)(logits[:, :-1], moved), loss(logits, labels))
    torch.testing.assert_close(answer_log_prob(logits[:, :-1], moved, **own), answer_log_prob(logits, labels))


def test_the_steps_of_an_answer_share_its_factor():
    logits, labels = sequences(n=4)
    loss = DirectCoverage(samples=64, length_normalize=True, reduction="none")
    answers = torch.tensor([2, 0, 2, 0])
    log_p = answer_log_prob(logits, labels)
    whole = torch.stack([log_p[[0, 2]].sum(), log_p[[1, 3]].sum()])[[0, 1, 0, 1]]
    tokens = (labels[:, 1:] != -100).sum(1)
    expected = -log_p / tokens * coverage_factor(whole.exp(), 64)
    torch.testing.assert_close(loss(logits, labels, answers=answers), expected)
    alone = loss(logits, labels, answers=torch.arange(4))
    torch.testing.assert_close(alone, loss(logits, labels))


def test_estimated_chances_take_the_place_of_p():
    logits, labels = sequences()
    chances = torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0], dtype=torch.bfloat16)
    values = DirectCoverage(samples=16, reduction="none")(logits, labels, chances=chances)
    torch.testing.assert_close(values, -answer_log_prob(logits, labels) * coverage_factor(chances, 16))


def test_a_vocabulary_may_be_masked():
    logits, labels = sequences()
    labels[labels == 0] = 1
    masked = logits.clone()
    masked[..., 0] = -torch.inf
    masked.requires_grad_()
    DirectCoverage(samples=16)(masked, labels).backward()
    assert masked.grad.isfinite().all()


LOGITS, LABELS = torch.zeros(2, 3, 4), torch.tensor([[-100, 1, 2], [-100, 0, 3]])
BAD = LABELS.clone()
BAD[1, 2] = 4
EMPTY = LABELS.clone()
EMPTY[1] = -100
FIRST = EMPTY.clone()
FIRST[1, 0] = 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("logits", "labels", "told"),
    [
        (LOGITS, BAD, r"labels must lie in 0..3 or be -100, found 4 at row 1"),
        (LOGITS, LABELS[:1], r"labels must have shape \(2, 3\), got \(1, 3\)"),
        (LOGITS, LABELS.double(), "labels must be integers, got float64"),
        (LOGITS, EMPTY, "labels must have one that counts in every row, found none at row 1"),
        (LOGITS, FIRST, "labels must have one that counts in every row, found none at row 1"),
        (LOGITS.long(), LABELS, "logits must be floating point, got int64"),
        (LOGITS[None], LABELS[None], "logits must have 2 or 3 axes"),
        (LOGITS[:0], LABELS[:0], "at least one row"),
        (LOGITS / 0, LABELS, "logits give to labels must be finite, found nan at row 0, column 0"),
        (LOGITS, LABELS.to("meta"), "labels must be on the device of logits"),
    ],
)
def test_a_malformed_batch_is_refused_in_words(logits, labels, told):
    with pytest.raises(InputError, match=told):
        DirectCoverage(samples=4)(logits, labels)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"chances": torch.tensor([0.1])}, r"chances must have shape \(2,\)"),
        ({"chances": torch.tensor([0.1, 1.5])}, r"chances must lie in \[0, 1\], found 1.5 at row 1"),
        ({"chances": torch.tensor([0.1, torch.nan])}, "chances must be finite"),
        ({"chances": torch.tensor([0, 1])}, "chances must be floating point"),
        ({"chances": torch.zeros(2, device="meta")}, "chances must be on the device of logits"),
        ({"answers": torch.tensor([0, 2])}, r"answers must lie in 0..1, found 2 at row 1"),
        ({"answers": torch.tensor([0, 0]), "chances": torch.zeros(2)}, "must not be given together"),
    ],
)
def test_malformed_companions_are_refused_in_words(extra, told):
    with pytest.raises(InputError, match=told):
        DirectCoverage(samples=4)(LOGITS, LABELS, **extra)


@pytest.mark.bad_input
@pytest.mark.parametrize("samples", [0, -1, 1.5, float("inf"), float("nan"), True, 10**30])
def test_the_number_of_samples_is_a_positive_integer(samples):
    for call in (
        lambda: DirectCoverage(samples=samples),
        lambda: coverage_factor(torch.zeros(1), samples),
        lambda: coverage_loss(torch.zeros(1), samples),
    ):
        with pytest.raises(InputError, match="samples must be"):
            call()


@pytest.mark.bad_input
def test_impossible_probabilities_are_refused():
    with pytest.raises(InputError, match=r"p must lie in \[0, 1\], found -0.1 at row 1"):
        coverage_factor(torch.tensor([0.5, -0.1]), 4)
    with pytest.raises(InputError, match=r"log_p must lie in \[-inf, 0\], found 0.1 at row 0"):
        coverage_loss(torch.tensor([0.1]), 4)
    with pytest.raises(InputError, match="log_p must be finite"):
        coverage_loss(torch.tensor([-torch.inf]), 4)
    with pytest.raises(InputError, match="reduction must be one of"):
        DirectCoverage(samples=4, reduction="max")
