"""DCA, MDCA, MMCE: slug 01-augcal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from trimtab.core.checks import InputError
from trimtab.losses import DCA, MDCA, MMCE
from trimtab.metrics import maximum_mean_calibration_error

GOLDEN = Path(__file__).parents[1] / "golden" / "01-augcal"
TERMS = pytest.mark.parametrize("kind", [DCA, MDCA, MMCE])
BATCH = {"seed": st.integers(0, 10_000), "n": st.integers(1, 30), "c": st.integers(2, 6)}


def some(n=12, c=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return logits, torch.randint(c, (n,), generator=generator)


def by_pairs(logits, labels, width, weighted):
    """MMCE from the matrix of all pairs."""
    confidence, predicted = logits.softmax(1).max(1)
    hits = (predicted == labels).double()
    shares = torch.full_like(hits, 1 / len(hits))
    if weighted:
        shares = hits / hits.sum().clamp(min=1) + (1 - hits) / (1 - hits).sum().clamp(min=1)
    gaps = shares * (hits - confidence)
    kernel = (-(confidence[:, None] - confidence).abs() / width).exp()
    return (gaps[:, None] * gaps * kernel).sum().sqrt()


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    cases = sorted({name.split("/")[0] for name in arrays if name.endswith("/dca")})
    if not cases:
        pytest.skip(f"{path.name} is not of this loss")
    for case in cases:
        get = {name.removeprefix(f"{case}/"): a for name, a in arrays.items() if name.startswith(f"{case}/")}
        dtype = get["grad_total"].dtype
        logits = get["logits"].to(dtype).requires_grad_()
        ce, dca = cross_entropy(logits, get["targets"]), DCA()(logits, get["targets"])
        total = ce + get["beta"].item() * dca
        total.backward()
        rtol = 1e-9 if dtype == torch.float64 else 1e-5
        averaged = 6e-8  # the authors average hits in single precision
        for name, found in {"ce": ce, "dca": dca, "total": total, "grad_total": logits.grad}.items():
            atol = averaged if name in ("dca", "total") else rtol / 10
            np.testing.assert_allclose(found.detach(), get[name], rtol=rtol, atol=atol, err_msg=f"{case} {name}")


def test_some_golden_case_is_of_this_loss():
    assert any(name.endswith("/dca") for path in GOLDEN.glob("*.npz") for name in np.load(path).files)


@given(**BATCH)
def test_the_definitions_of_dca_and_mdca(seed, n, c):
    logits, labels = some(n, c, seed)
    probs = logits.softmax(1)
    accuracy = (probs.argmax(1) == labels).double().mean()
    torch.testing.assert_close(DCA()(logits, labels), (probs.amax(1).mean() - accuracy).abs())
    torch.testing.assert_close(MDCA()(logits, labels), (probs - one_hot(labels, c)).mean(0).abs().mean())


@given(**BATCH, width=st.floats(0.01, 10), weighted=st.booleans())
def test_prefix_sums_are_the_sum_over_all_pairs(seed, n, c, width, weighted):
    logits, labels = some(n, c, seed)
    found, expected = (logits.clone().requires_grad_() for _ in range(2))
    value = MMCE(width=width, weighted=weighted)(found, labels)
    direct = by_pairs(expected, labels, width, weighted)
    value.backward()
    direct.backward()
    torch.testing.assert_close(value, direct, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-8)


@given(**BATCH)
def test_mmce_is_the_metric(seed, n, c):
    logits, labels = some(n, c, seed)
    metric = maximum_mean_calibration_error(logits.softmax(1), labels)
    assert float(MMCE()(logits, labels)) == pytest.approx(metric, abs=1e-7)


def test_mmce_needs_no_matrix_of_pairs():
    logits, labels = some(200_000, 2)  # its pairs would take 320 GB
    assert MMCE()(logits.requires_grad_(), labels).isfinite()


@TERMS
@given(seed=st.integers(0, 1000), ignored=st.integers(-300, -1) | st.just(255))
def test_pixels_are_samples_and_ignored_ones_do_not_count(kind, seed, ignored):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(3, (2, 4, 5), generator=generator)
    counts = torch.rand(2, 4, 5, generator=generator) < 0.7
    counts[0, 0, 0] = True
    value = kind(ignore_index=ignored)(logits, labels.where(counts, ignored))
    torch.testing.assert_close(value, kind()(logits.movedim(1, -1)[counts], labels[counts]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient.movedim(1, -1)[~counts].abs() < 1e-12).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_certain_and_right_predictions_have_no_error_and_no_slope(weighted):
    labels = torch.tensor([0, 1, 2, 0])
    logits = (1e4 * one_hot(labels, 3)).float().requires_grad_()
    for term in (DCA(), MDCA(), MMCE(weighted=weighted)):
        value = term(logits, labels)
        assert value == 0
        (gradient,) = torch.autograd.grad(value, logits)
        assert (gradient == 0).all()


def test_weighting_counts_a_certain_hit_as_right():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    torch.testing.assert_close(MMCE(weighted=True)(logits, labels), by_pairs(logits, labels, 0.4, True))


@TERMS
@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([-1, -1]), "labels must not all be ignore_index, -1"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels must lie in 0..2, found 3 at row 1"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), r"labels must have shape \(2, 4\), got \(2, 3\)"),
        (torch.zeros(2, 3, 0), torch.zeros(2, 0, dtype=torch.long), "at least one row"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), "logits must be finite"),
    ],
)
def test_bad_input_is_refused(kind, logits, labels, message):
    with pytest.raises(InputError, match=message):
        kind(ignore_index=-1)(logits, labels)


@pytest.mark.bad_input
def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="width must lie in"):
        MMCE(width=0.001)
    with pytest.raises(InputError, match="ignore_index must be an integer"):
        DCA(ignore_index=0.5)
