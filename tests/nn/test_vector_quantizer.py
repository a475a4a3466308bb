"""The quantizer (60-tokenhmr): parity with the authors' code, resets, resuming, and several processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from trimtab.core.checks import InputError
from trimtab.nn import EMAResetQuantizer, vector_quantizer

GOLDEN = Path(__file__).parents[1] / "golden" / "60-tokenhmr"


def cases():
    found = []
    for path in sorted(GOLDEN.glob("*.npz")):
        with np.load(path) as arrays:
            found += [(path, key.removesuffix("/codebook")) for key in arrays.files if key.endswith("/codebook")]
    assert found
    return [pytest.param(path, case, id=f"{path.stem}-{case}") for path, case in found]


def latents(seed=0, n=4, dim=3, t=8):
    return torch.randn(n, dim, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(**settings):
    return EMAResetQuantizer(5, 3, **settings).double()


@pytest.mark.golden
@pytest.mark.parametrize(("path", "case"), cases())
def test_codebook_and_gradients_are_the_authors(path, case):
    with np.load(path) as arrays:
        g = {k.removeprefix(f"{case}/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(f"{case}/")}
    near = {"rtol": 1e-7, "atol": 1e-12} if g["x"].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    quantizer = EMAResetQuantizer(*g["codebook"].shape[1:]).to(g["x"].dtype)

    def same(value, key, step=None):
        expected = g[key] if step is None else g[key][step]
        torch.testing.assert_close(value.detach(), expected, **near, check_dtype=False)

    for step, x in enumerate(g["x"]):
        x.requires_grad_()
        found = quantizer(x)
        (found.output.square().sum() + found.commitment).backward()
        same(found.output, "out", step)
        same(found.commitment, "commit", step)
        same(found.perplexity, "perplexity", step)
        same(quantizer.codebook, "codebook", step)
        same(quantizer.code_count, "code_count", step)
        if f"grad_x_{step}" in g:
            same(x.grad, f"grad_x_{step}")
    found = quantizer.eval()(g["eval_x"])
    for value, key in zip(found, ("eval_out", "eval_commit", "eval_perplexity")):
        same(value, key)
    assert torch.equal(found.codes.flatten(), g["eval_codes"])
    assert torch.equal(quantizer.quantize(g["eval_x"]), found.codes)
    same(quantizer.dequantize(found.codes), "eval_out")
    same(quantizer.soft_dequantize(g["soft_probs"]).transpose(1, 2), "soft_decoded")


@given(st.integers(0, 1000))
def test_each_latent_takes_the_nearest_code_in_whatever_blocks(seed):
    quantizer, x = small(), latents(seed)
    quantizer(x)
    quantizer.eval()
    rows = x.transpose(1, 2).reshape(-1, 3)
    nearest = torch.cdist(rows, quantizer.codebook).argmin(1).view(4, 8)
    assert torch.equal(quantizer(x).codes, nearest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_quantizer, "_ROWS", 7)
        assert torch.equal(quantizer(x).codes, nearest)


def test_fewer_latents_than_codes_begin_with_noisy_copies():
    x = latents(n=1, t=2)
    first, second = small(), small()
    first(x)
    second(x)
    assert torch.equal(first.codebook, second.codebook)
    away = first.code_sum - torch.cat([x[0].T, x[0].T, x[0].T])[:5]
    assert 0 < away.abs().max() < 0.1


def test_a_dead_code_lands_on_its_row_and_a_live_one_does_not():
    quantizer, x = small(), latents()
    quantizer(x)
    quantizer.code_count = torch.tensor([0.1, 9.0, 0.2, 9.0, 9.0], dtype=torch.float64)
    quantizer(x)
    dead = quantizer.code_count < 1
    assert dead.tolist() == [True, False, True, False, False]
    assert torch.equal(quantizer.codebook[dead], x.transpose(1, 2).reshape(-1, 3)[:5][dead])
    means = quantizer.code_sum / quantizer.code_count[:, None]
    assert torch.equal(quantizer.codebook[~dead], means[~dead])


def test_a_resumed_training_is_the_same_training():
    first, second = small(), small()
    for seed in range(3):
        first(latents(seed))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(latents(9)).output, second(latents(9)).output)
    assert torch.equal(first.codebook, second.codebook)


def test_eval_mode_changes_nothing():
    quantizer = small()
    quantizer(latents())
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()(latents(1))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_two_processes_with_the_same_latents_are_one_with_twice_as_many(monkeypatch):
    alone, together, x = small(), small(), latents()
    alone(torch.cat([x, x]))
    monkeypatch.setattr(vector_quantizer, "_together", lambda: True)
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, source: None)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    together(x)
    torch.testing.assert_close(alone.code_count, together.code_count)
    torch.testing.assert_close(alone.codebook, together.codebook)


def test_half_precision_is_quantized_in_single():
    quantizer, x = EMAResetQuantizer(5, 3), latents().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(x)
    expected = EMAResetQuantizer(5, 3)(x.float())
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.commitment, expected.commitment)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    quantizer = small()
    for x, message in (
        (latents(dim=4), r"x must have shape \(n, 3, t\), n and t >= 1, got \(4, 4, 8\)"),
        (torch.full((1, 3, 1), torch.nan), "x must be finite, found nan"),
        (torch.zeros(1, 3, 1, dtype=torch.int64), "x must be floating point, got int64"),
    ):
        with pytest.raises(InputError, match=message):
            quantizer(x)
    codes, probs = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1, 5), 0.2)
    for early in (
        lambda: small().eval()(latents()),
        lambda: quantizer.quantize(latents()),
        lambda: quantizer.dequantize(codes),
        lambda: quantizer.soft_dequantize(probs),
    ):
        with pytest.raises(InputError, match="must see a batch in train mode first"):
            early()
    quantizer(latents())
    with pytest.raises(InputError, match=r"codes must lie in 0..4, found 5 at row 1"):
        quantizer.dequantize(torch.tensor([[0, 5]]))
    with pytest.raises(InputError, match=r"probs must have shape \(n, t, 5\), got \(1, 1, 4\)"):
        quantizer.soft_dequantize(torch.zeros(1, 1, 4))
    for settings, message in (
        ({"codes": 1}, "codes must be at least 2"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\)"),
        ({"alive": 0.0}, r"alive must lie in \(0, inf\)"),
        ({"generator": 7}, r"generator must be a torch.Generator, got int"),
    ):
        with pytest.raises(InputError, match=message):
            EMAResetQuantizer(**settings)
