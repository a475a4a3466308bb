"""Mixed styles, against the authors' numbers for the slug 13-itta and their own laws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toynet import DTYPE, golden_files

from trimtab.adaptation.mixstyle import draw_style, mixstyle


@pytest.mark.golden
@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("path", golden_files("13-itta", "*.lmda", "*.perm"))
def test_the_authors_mixed_styles(path, precision):
    arrays, dtype = np.load(path), DTYPE[precision]
    cases = [name.removesuffix(".lmda") for name in arrays.files if name.endswith(".lmda")]
    for case in cases:
        x = torch.from_numpy(arrays[f"{case}.x"]).to(dtype).requires_grad_()
        shares, order = (torch.from_numpy(arrays[f"{case}.{name}"]) for name in ("lmda", "perm"))
        out = mixstyle(x, shares, order)
        (grad,) = torch.autograd.grad(out, x, torch.from_numpy(arrays[f"{case}.grad_out"]).to(dtype))
        for name, value in (("out", out), ("grad_x", grad)):
            expected = arrays[f"{case}.{precision}.{name}"]
            np.testing.assert_allclose(
                value.detach(), expected, rtol=0, atol=1e-8 if precision == "f64" else 2e-5, err_msg=name
            )
    assert cases


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_mixed_styles_have_the_mixed_means_and_spreads(n, axes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, *(3,) * axes, generator=generator, dtype=torch.float64)
    style = draw_style(n, generator)
    assert style.after in (0, 1)
    assert bool(((style.shares >= 0) & (style.shares <= 1)).all())
    flat, out = x.flatten(2), mixstyle(x, style.shares, style.order, eps=0.0).flatten(2)
    share = style.shares[:, None]
    torch.testing.assert_close(out.mean(2), share * flat.mean(2) + (1 - share) * flat.mean(2)[style.order])
    torch.testing.assert_close(out.std(2), share * flat.std(2) + (1 - share) * flat.std(2)[style.order])


def test_shares_follow_their_law():
    generator = torch.Generator().manual_seed(0)
    shares = draw_style(20000, generator).shares
    assert abs(float(shares.mean()) - 0.5) < 0.02
    assert abs(float(shares.var()) - 0.25 / 1.2) < 0.01
    after = [draw_style(1, generator).after for _ in range(400)]
    assert 150 < sum(after) < 250
