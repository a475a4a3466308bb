"""UNPG: the authors' numbers (golden vectors of 57-unpg, head by head), and the literal form with appended columns."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import UNPG, ArcFace, CosFace, MagFace, pair_similarities, unpg, whisker_filter

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "57-unpg").glob("*.npz"))
CASES = [(path, name.split("/")[0]) for path in GOLDEN for name in np.load(path) if name.endswith("/x")]
TOLERANCE = {np.dtype("float64"): 1e-9, np.dtype("float32"): 2e-4}


def head_of(golden, case):
    """The case's head with its weights: MagFace's lie transposed and bring a penalty, the others' names tell."""
    scale, weight = float(golden["s"]), torch.from_numpy(golden["weight"])
    if "lambda_loss_g" in golden:
        weight = weight.T
        head = MagFace(weight.shape[1], weight.shape[0], scale=scale)
    else:
        kind = {"cos": CosFace, "arc": ArcFace}[case[:3]]
        head = kind(weight.shape[1], weight.shape[0], scale=scale, margin=float(golden["m"]))
    head.weight = torch.nn.Parameter(weight.clone())
    return head


@pytest.mark.golden
@pytest.mark.parametrize(("path", "case"), CASES, ids=[f"{path.stem}/{case}" for path, case in CASES])
def test_the_authors_numbers(path, case):
    with np.load(path) as arrays:
        golden = {name.split("/")[1]: arrays[name] for name in arrays if name.startswith(f"{case}/")}
    head, wisk = head_of(golden, case), float(golden["wisk"])
    x, y = torch.from_numpy(golden["x"]).requires_grad_(True), torch.from_numpy(golden["labels"])
    loss = UNPG(head, wisk=wisk)(x, y)
    loss.backward()
    with torch.no_grad():
        positive, negative = pair_similarities(x, y)
        found = {
            "cosine": head.logits(x, y) / head.scale,
            "sp": positive,
            "sn": negative,
            "sn_filtered": whisker_filter(negative, wisk),
            "loss": loss,
            "loss_head_only": head(x, y),
            "lambda_loss_g": head.penalty(x),
            "grad_x": x.grad,
            "grad_weight": head.weight.grad,
        }
    tolerance = TOLERANCE[golden["x"].dtype]
    checked = golden.keys() & found
    assert {"loss", "cosine", "grad_x"} <= checked
    for name in checked:
        expected, ours = golden[name], found[name].detach().numpy()
        assert ours.shape == expected.shape, name
        largest = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance * largest, err_msg=name)


def batch(seed, n, classes, width=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(2, 9), st.sampled_from([0.0, 0.5, 1.5, 100.0]))
def test_it_is_cross_entropy_with_appended_columns(seed, n, wisk):
    x, y = batch(seed, n, 3)
    x.requires_grad_(True)
    head = CosFace(6, 3, scale=8.0).double()
    found = UNPG(head, wisk=wisk)(x, y)
    kept = whisker_filter(pair_similarities(x, y)[1], wisk)
    unified = torch.cat([head.logits(x, y), head.scale * kept.expand(n, -1)], 1)
    expected = F.cross_entropy(unified, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))


@pytest.mark.parametrize("pairs", [1, 50, 200])
def test_blocks_do_not_matter(pairs, monkeypatch):
    x, y = batch(0, 21, 3)
    x.requires_grad_(True)
    loss = UNPG(CosFace(6, 3, scale=8.0).double())
    whole = loss(x, y)
    monkeypatch.setattr(unpg, "_PAIRS_AT_ONCE", pairs)
    parts = loss(x, y)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (parts, whole)))


@given(st.lists(st.floats(-1, 1), max_size=30), st.sampled_from([0.0, 0.5, 1.5]))
def test_the_whiskers(values, wisk):
    found = whisker_filter(torch.tensor(values, dtype=torch.float64), wisk).tolist()
    ordered = sorted(values)
    if not ordered:
        assert found == []
        return
    first, third = ordered[int(0.25 * len(ordered))], ordered[int(0.75 * len(ordered))]
    reach = wisk * (third - first)
    assert found == [v for v in ordered if first - reach <= v <= third + reach]


@pytest.mark.parametrize("head", [CosFace, ArcFace, MagFace])
def test_a_batch_of_one_class_has_the_loss_of_its_head(head):
    x, _ = batch(0, 5, 1)
    y = torch.ones(5, dtype=torch.long)
    loss = UNPG(head(6, 3).double())
    x.requires_grad_(True)
    assert torch.equal(loss(x, y), loss.head(x, y))
    slopes = [torch.autograd.grad(value, (x, loss.head.weight)) for value in (loss(x, y), loss.head(x, y))]
    for ours, theirs in zip(*slopes):
        assert torch.equal(ours, theirs)


def test_the_head_is_saved_with_the_loss():
    loss, other = UNPG(CosFace(4, 3)), UNPG(CosFace(4, 3, generator=torch.Generator().manual_seed(1)))
    assert list(dict(loss.named_parameters())) == ["head.weight"]
    assert not torch.equal(loss.head.weight, other.head.weight)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss.head.weight, other.head.weight)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    x, y = torch.ones(3, 4), torch.tensor([0, 1, 2])
    loss = UNPG(CosFace(4, 3))
    for arguments, message in (
        ((x[:1], y[:1]), "embeddings must have at least 2 rows to form a pair, got 1"),
        ((x, y - 1), r"labels must lie in 0..2, found -1 at row 0"),
        ((x, y.float()), "labels must be integer class indices, got float32"),
        ((x * torch.nan, y), "embeddings must be finite, found nan at row 0"),
        ((x[:, :3], y), "embeddings must have 4 columns, got 3"),
        ((x, y[:2]), "labels must have 3 entries"),
        ((x, y.to("meta")), "labels must be on the device of weight, cpu, got meta"),
    ):
        with pytest.raises(InputError, match=message):
            loss(*arguments)
        if "3 columns" not in message and "0..2" not in message and "4 columns" not in message:
            with pytest.raises(InputError, match=message.replace("weight", "embeddings")):
                pair_similarities(*arguments)
    for wisk in (-1.0, float("nan")):
        with pytest.raises(InputError, match="wisk must lie in"):
            UNPG(CosFace(4, 3), wisk=wisk)
        with pytest.raises(InputError, match="wisk must lie in"):
            whisker_filter(x[0], wisk)
    with pytest.raises(InputError, match="head must be a CosineHead, such as CosFace, got Identity"):
        UNPG(torch.nn.Identity())
    with pytest.raises(InputError, match=r"similarities must be floating point of shape \(m,\)"):
        whisker_filter(x)
    with pytest.raises(InputError, match="similarities must be finite, found inf at row 1"):
        whisker_filter(torch.tensor([0.0, torch.inf]))
