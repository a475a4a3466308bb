"""AugCal: slug 01-augcal."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from trimtab.core.checks import InputError
from trimtab.losses import DCA, MMCE, PASTA, AugCal


def some():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    return source, torch.tensor([0, 1, 2, 0, 1, 2]), target[:4]


def mean_square(model, source, target):
    return model(target).square().mean() + source.mean()


def built(**settings):
    return AugCal(**{"adaptation": mean_square, "augment": lambda x: 0.5 * x, "calibration": DCA()} | settings)


def test_it_is_the_weighted_sum_over_augmented_sources():
    source, labels, target = some()
    loss = built(calibration=MMCE(), weight=0.5, adaptation_weight=0.1)
    x = 0.5 * source
    expected = cross_entropy(x, labels) + 0.1 * (target.square().mean() + x.mean()) + 0.5 * MMCE()(x, labels)
    torch.testing.assert_close(loss(nn.Identity(), source, labels, target), expected)
    task, adaptation, calibration = loss.terms(nn.Identity(), source, labels, target)
    torch.testing.assert_close(task + 0.1 * adaptation + 0.5 * calibration, expected)
    own = built(task=lambda logits, labels: logits[0, labels[1]])
    torch.testing.assert_close(own.terms(nn.Identity(), source, labels, target).task, x[0, 1])


def test_labels_of_minus_100_do_not_count():
    source, labels, target = some()
    labels[0] = -100
    task = built(calibration=DCA(ignore_index=-100)).terms(nn.Identity(), source, labels, target).task
    torch.testing.assert_close(task, cross_entropy(0.5 * source[1:], labels[1:]))


def test_the_source_passes_the_model_once():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    source, labels, target = some()
    built()(Spy(), source, labels, target)
    assert len(seen) == 2
    assert torch.equal(seen[0], 0.5 * source)
    assert torch.equal(seen[1], target)


def test_pixels_are_labelled_one_by_one():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 2, 3, 4, 5, generator=generator)
    labels = torch.randint(3, (2, 4, 5), generator=generator)
    loss = built(calibration=DCA(ignore_index=-100))
    ignored = labels.clone()
    ignored[0] = -100
    value, rest = loss(nn.Identity(), source, ignored, target), built()
    assert value.isfinite()
    torch.testing.assert_close(
        loss.terms(nn.Identity(), source, ignored, target).calibration,
        rest.terms(nn.Identity(), source[1:], labels[1:], target).calibration,
    )


@pytest.mark.bad_input
def test_bad_input_is_refused():
    source, labels, target = some()
    for arguments, message in [
        ((source.long(), labels, target), "source must be floating point"),
        ((source[:0], labels[:0], target), r"source must be .* with at least one row, got float64 \(0, 3\)"),
        ((source, labels, target[:0]), "target must be floating point with at least one row"),
        ((source * torch.nan, labels, target), "source must be finite"),
        ((source, labels, target * torch.inf), "target must be finite"),
        ((source, labels, target.to("meta")), "target must be on the device of source"),
    ]:
        with pytest.raises(InputError, match=message):
            built()(nn.Identity(), *arguments)
    for settings, message in [
        ({"augment": lambda x: x[1:]}, r"augment must keep the shape \(6, 3\), got \(5, 3\)"),
        (
            {"adaptation": lambda model, source, target: target},
            r"adaptation must return a scalar tensor, got float64 \(4, 3\)",
        ),
        ({"calibration": lambda logits, labels: logits}, "calibration must return a scalar"),
        ({"calibration": lambda logits, labels: 0.5}, "calibration must return a scalar tensor, got float"),
    ]:
        with pytest.raises(InputError, match=message):
            built(**settings)(nn.Identity(), source, labels, target)
    scored = built(calibration=lambda logits, labels: logits.mean())
    for labels_, message in [
        (labels + 1, "labels must lie in 0..2, found 3 at row 2"),
        (labels[:3], r"labels must have shape \(6,\), got \(3,\)"),
        (labels.double(), "labels must be integer class indices, got float64"),
    ]:
        with pytest.raises(InputError, match=message):
            scored(nn.Identity(), source, labels_, target)
    for outputs, message in [
        ("model", "model must be a function or a module, got str"),
        (lambda x: {"scores": x}, r"model must give logits \(n, c\), floating point, got dict"),
        (lambda x: x[:, 0], r"model must give logits \(n, c\), floating point, got float64 \(6,\)"),
    ]:
        with pytest.raises(InputError, match=message):
            scored(outputs, source, labels, target)
    for settings, message in [
        ({"calibration": DCA}, "calibration must be a function or a module, got the class DCA"),
        ({"augment": PASTA}, "augment must be a function or a module, got the class PASTA"),
        ({"adaptation": None}, "adaptation must be a function or a module, got NoneType"),
        ({"task": nn.CrossEntropyLoss}, "task must be a function or a module, got the class CrossEntropyLoss"),
    ]:
        with pytest.raises(InputError, match=message):
            built(**settings)
    for name in ("weight", "adaptation_weight"):
        with pytest.raises(InputError, match=f"{name} must lie in"):
            built(**{name: -1})
