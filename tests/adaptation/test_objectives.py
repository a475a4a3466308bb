"""Losses without labels, against the authors' numbers for the slug 42-rmt and their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toynet import golden_files

from trimtab.adaptation.objectives import symmetric_cross_entropy, view_contrast
from trimtab.core.checks import InputError


def close(value, expected, tolerance):
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=tolerance)


def losses_of(arrays):
    found = {}
    for name in arrays:
        if name.endswith("_loss"):
            found[name.removesuffix("_loss")] = name
    return found


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("42-rmt", "sce_*_loss", "cont*_loss"))
def test_the_authors_losses(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    tolerance = 1e-10 if arrays["cont_f"].dtype == torch.float64 else 1e-5
    for case in losses_of(arrays):
        if case.startswith("sce_"):
            x, target = (arrays[f"{case}_{name}"].clone().requires_grad_() for name in ("x", "ema"))
            alpha = float(case[5:]) if case.startswith("sce_a") else 0.5
            loss = symmetric_cross_entropy(x, target, alpha)
            close(loss, arrays[f"{case}_loss"], tolerance * max(1.0, float(loss.detach().abs().max())))
            pairs = {"gx": x, "gema": target}
        else:
            base = case.removesuffix("_sup")
            x = arrays[f"{base}_f"].clone().requires_grad_()
            loss = view_contrast(x, 0.1, arrays[f"{base}_labels"] if case.endswith("_sup") else None)
            close(loss, arrays[f"{case}_loss"], tolerance)
            pairs = {"grad": x}
        loss.mean().backward()
        for name, tensor in pairs.items():
            if f"{case}_{name}" in arrays:
                close(tensor.grad, arrays[f"{case}_{name}"], tolerance)


@given(st.integers(2, 6), st.floats(0, 1), st.integers(0, 10**6))
def test_the_gradient_of_the_symmetric_cross_entropy_is_the_paper_s(classes, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    x, target = (3 * torch.randn(4, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    symmetric_cross_entropy(x, target, alpha).sum().backward()
    p, q = x.detach().softmax(1), target.softmax(1)
    mirrored = p * ((p * q.log()).sum(1, keepdim=True) - q.log())
    torch.testing.assert_close(x.grad, (1 - alpha) * (p - q) + alpha * mirrored)


@given(st.integers(1, 5), st.integers(2, 4), st.booleans(), st.integers(0, 10**6))
def test_the_contrast_is_that_of_a_loop_over_pairs(n, v, by_label, seed):
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(n, v, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (n,), generator=generator) if by_label else torch.arange(n)
    cosine = [
        [float(torch.cosine_similarity(a, b, dim=0)) / 0.3 for b in views.flatten(0, 1)] for a in views.flatten(0, 1)
    ]
    total = 0.0
    for i, row in enumerate(cosine):
        others = torch.tensor([s for j, s in enumerate(row) if j != i], dtype=torch.float64)
        positives = [s for j, s in enumerate(row) if j != i and labels[j // v] == labels[i // v]]
        total -= sum(s - float(others.logsumexp(0)) for s in positives) / len(positives)
    found = view_contrast(views, 0.3, labels if by_label else None)
    assert float(found) == pytest.approx(total / (n * v))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: symmetric_cross_entropy(torch.zeros(3, 2), torch.zeros(1, 2)),
            r"one shape \(n, c\), got \(3, 2\) and \(1, 2\)",
        ),
        (lambda: symmetric_cross_entropy(torch.zeros(3, 2), torch.zeros(3, 2), 1.5), "alpha must lie in"),
        (lambda: view_contrast(torch.ones(3, 1, 2)), r"views must have shape \(n, v, d\) with v >= 2"),
        (lambda: view_contrast(torch.ones(3, 2, 2), 0.0), "temperature must lie in"),
        (lambda: view_contrast(torch.ones(3, 2, 2), labels=torch.arange(2)), r"labels must have shape \(3,\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
