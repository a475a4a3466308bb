"""AnyLoss (70-anyloss): the authors' numbers, the confusion matrix, missing classes, the door."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from trimtab.core.checks import InputError
from trimtab.losses import AnyLoss
from trimtab.losses.confusion import NAMES

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "70-anyloss").glob("*.npz"))
TOLERANCE = {"f64": 1e-9, "f32": 2e-4}
DTYPES = {"f64": torch.float64, "f32": torch.float32}
COUNTED = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "fbeta": lambda y, h: metrics.fbeta_score(y, h, beta=2),
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "gmean": lambda y, h: np.sqrt(metrics.recall_score(y, h) * metrics.recall_score(y, h, pos_label=0)),
    "precision": metrics.precision_score,
    "recall": metrics.recall_score,
}


def scored(seed=0, n=40):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, generator=generator, dtype=torch.float64)
    y = (torch.rand(n, generator=generator, dtype=torch.float64) < p).long()
    y[:2] = torch.tensor([0, 1])
    return p, y


def named(metric):
    """The settings of a golden vector's metric: ``f0.5`` is F-beta with 0.5."""
    if metric.startswith("f"):
        return {"metric": "fbeta", "beta": float(metric[1:])}
    return {"metric": metric}


@pytest.mark.golden
def test_the_authors_numbers():
    checked = 0
    for path in GOLDEN:
        with np.load(path) as arrays:
            for name in arrays.files:
                if name.endswith("/loss"):
                    _check_loss(arrays, *name.split("/")[:3])
                    checked += 1
    assert checked


def _check_loss(arrays, case, precision, metric):
    there, rtol = f"{case}/{precision}/{metric}/", TOLERANCE[precision]
    p = torch.from_numpy(arrays[f"{case}/p"]).to(DTYPES[precision]).requires_grad_()
    y = torch.from_numpy(arrays[f"{case}/y"]).long()
    loss = AnyLoss(**named(metric), amplification=float(arrays[f"{case}/L"]), on_missing_class="skip")
    value = loss(p, y)
    (gradient,) = torch.autograd.grad(value, p)
    if not np.isfinite(arrays[there + "loss"]):
        assert value == 1
        assert (gradient == 0).all()
        return
    np.testing.assert_allclose(value.item(), arrays[there + "loss"], rtol=rtol)
    expected = arrays[there + "grad_p"]
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@given(st.sampled_from(NAMES), st.integers(0, 1000))
def test_certain_probabilities_give_the_metric_itself(metric, seed):
    p, y = scored(seed)
    h = (p > 0.5).long()
    value = AnyLoss(metric=metric, beta=2)(h.double(), y)
    assert float(value) == pytest.approx(1 - COUNTED[metric](y, h), abs=2e-6)


@pytest.mark.parametrize("metric", NAMES)
def test_gradients(metric):
    p, y = scored(n=12)
    loss = AnyLoss(metric=metric, beta=0.5, amplification=20)
    assert torch.autograd.gradcheck(lambda x: loss(x, y), (p.requires_grad_(),))


def test_a_metric_of_your_own():
    p, y = scored()
    own = AnyLoss(metric=lambda tp, fp, fn, tn: 2 * tp / (2 * tp + fp + fn))
    torch.testing.assert_close(own(p, y), AnyLoss(metric="f1")(p, y))


def test_logits_of_one_and_of_both_classes():
    p, y = scored()
    z = torch.logit(p)
    loss = AnyLoss(from_logits=True)
    torch.testing.assert_close(loss(z, y), AnyLoss()(p, y))
    torch.testing.assert_close(loss(torch.stack([1 - z / 2, 1 + z / 2], 1), y), AnyLoss()(p, y))


@pytest.mark.parametrize("amplification", [1e-3, 73.0, 1e4])
@pytest.mark.parametrize("metric", [*NAMES, lambda tp, fp, fn, tn: tp / (tp + fn)])
@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 1, 0], [1]])
@pytest.mark.parametrize("certain", [0.0, 0.5, 1.0])
def test_no_batch_gives_nan(metric, labels, certain, amplification):
    p = torch.full((len(labels),), certain, requires_grad=True)
    value = AnyLoss(metric=metric, amplification=amplification, on_missing_class="skip")(p, torch.tensor(labels))
    value.backward()
    assert 0 <= value.detach() <= 1
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("metric", NAMES)
def test_a_skipped_batch_moves_nothing(metric):
    p = torch.tensor([0.4, 0.55, 0.5], requires_grad=True)
    value = AnyLoss(metric=metric, on_missing_class="skip")(p, torch.zeros(3, dtype=torch.long))
    value.backward()
    if metric == "accuracy":
        assert p.grad.all()
    else:
        assert value == 1
        assert not p.grad.any()


@pytest.mark.bad_input
@pytest.mark.parametrize("metric", [name for name in NAMES if name != "accuracy"])
def test_a_missing_class_is_named(metric):
    with pytest.raises(InputError, match="found 0 positives in 3 rows"):
        AnyLoss(metric=metric)(torch.rand(3, generator=torch.Generator()), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("metric", ["f1", "fbeta", "precision", "recall", "accuracy"])
def test_negatives_are_not_needed_where_the_metric_does_not_count_them(metric):
    assert AnyLoss(metric=metric)(torch.tensor([1.0, 1.0]), torch.tensor([1, 1])) < 1e-6


P, Y = torch.tensor([0.2, 0.7]), torch.tensor([0, 1])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("probs", "labels", "told"),
    [
        (torch.tensor([0.2, 1.7]), Y, r"scores must lie in \[0, 1\], found 1.7 at row 1"),
        (torch.tensor([-0.2, 0.7]), Y, r"scores must lie in \[0, 1\], found -0.2 at row 0"),
        (torch.tensor([0.2, torch.nan]), Y, "scores must be finite, found nan at row 1"),
        (P, torch.tensor([0, 2]), "labels must lie in 0..1, found 2 at row 1"),
        (P, Y.double(), "labels must be integer"),
        (P, Y[:1], "labels must have 2 entries"),
        (P[:, None], Y, r"scores must have shape \(n,\) with n >= 1, got \(2, 1\)"),
        (P[:0], Y[:0], "with n >= 1"),
        (Y, Y, "scores must be floating point"),
        (P, Y.to("meta"), "labels must be on the device of scores"),
    ],
)
def test_a_malformed_batch_is_refused_in_words(probs, labels, told):
    with pytest.raises(InputError, match=told):
        AnyLoss()(probs, labels)


@pytest.mark.bad_input
def test_several_classes_are_refused():
    with pytest.raises(InputError, match=r"scores must have shape \(n,\) or \(n, 2\)"):
        AnyLoss(from_logits=True)(torch.zeros(2, 3), Y)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metric": "auc"}, "metric must be one of accuracy, f1"),
        ({"amplification": 0.0}, "amplification must lie in"),
        ({"beta": -1.0}, "beta must lie in"),
        ({"on_missing_class": "ignore"}, "on_missing_class must be one of raise, skip"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        AnyLoss(**settings)


@pytest.mark.bad_input
def test_a_metric_of_your_own_must_be_a_finite_scalar():
    with pytest.raises(InputError, match=r"metric must give a scalar tensor, got 0\.5"):
        AnyLoss(metric=lambda tp, fp, fn, tn: 0.5)(P, Y)
    with pytest.raises(InputError, match="what metric gives must be finite"):
        AnyLoss(metric=lambda tp, fp, fn, tn: tp / 0)(P, Y)
