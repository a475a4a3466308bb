"""Threshold-adaptive scaling (60-tokenhmr): the authors' five terms, what it promises, and what it refuses."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import ThresholdAdaptiveScaling
from trimtab.nn import rotation_angle

GOLDEN = Path(__file__).parents[1] / "golden" / "60-tokenhmr"
THRESHOLDS = {"kp2d": "kp2d", "body_pose": "body", "global_orient": "root"}
TOTAL = {"kp3d": 0.05, "kp2d": 0.01, "global_orient": 0.001, "body_pose": 0.001, "betas": 0.0005}


def cases():
    found = []
    for path in sorted(GOLDEN.glob("*.npz")):
        with np.load(path) as arrays:
            found += [(path, key.removesuffix("/mask2d")) for key in arrays.files if key.endswith("/mask2d")]
    assert found
    return [pytest.param(path, case, id=f"{path.stem}-{case}") for path, case in found]


def read(path, case):
    with np.load(path) as arrays:
        chosen = {k.removeprefix(f"{case}/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(case)}
        limits = {k.removeprefix("thresholds/"): torch.from_numpy(arrays[k]) for k in arrays.files if "thresh" in k}
    return chosen, limits


@pytest.mark.golden
@pytest.mark.parametrize(("path", "case"), cases())
def test_the_authors_loss_is_a_sum_of_five(path, case):
    g, limits = read(path, case)
    near = {"rtol": 1e-7, "atol": 1e-12} if g["gt_kp2d"].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    same = partial(torch.testing.assert_close, **near, check_dtype=False)
    weak = g["loose_weight"].item()
    trusted, labelled = g["trusted3d"], g["has_smpl"]
    said = {key: g[f"pred_{key}"].clone().requires_grad_() for key in ("kp2d", "kp3d", "rotmat", "betas")}
    losses = {}

    plane, c2 = ThresholdAdaptiveScaling(limits["kp2d"], weak=weak), g["gt_kp2d"][..., 2]
    target = g["gt_kp2d"][..., :2]
    gross = plane.gross(said["kp2d"], target, confidence=c2)
    assert torch.equal(gross, g["mask2d"].bool())
    losses["kp2d"] = plane(said["kp2d"], target, confidence=c2)

    pelvis = slice(39, 40)
    space = ThresholdAdaptiveScaling(0.5, weak=0.0)
    centred = [x - x[:, pelvis] for x in (said["kp3d"], g["gt_kp3d"][..., :3])]
    losses["kp3d"] = space(*centred, confidence=g["gt_kp3d"][..., 3], error=c2 * gross, trusted=trusted)

    # the authors' code trains on trusted samples without pose labels too
    counted = torch.maximum(labelled, trusted)
    for name, part, joints in (("global_orient", "root", slice(0, 1)), ("body_pose", "body", slice(1, None))):
        turn = ThresholdAdaptiveScaling(limits[name], weak=weak, distance="mse")
        poses = said["rotmat"][:, joints], g["gt_rotmat"][:, joints]
        angle = rotation_angle(*(x.detach() for x in poses))
        same(angle, g[f"angle_err_{part}"])
        full = turn.gross(*poses, error=angle, trusted=trusted) & (counted > 0)[:, None]
        assert torch.equal(full, g[f"mask_{part}"] > 0)
        if f"weak_{part}" in g:
            assert torch.equal(~full & (labelled > 0)[:, None], g[f"weak_{part}"] > 0)
        losses[name] = turn(*poses, confidence=counted, error=angle, trusted=trusted)

    shape = ThresholdAdaptiveScaling(0.0, weak=0.0, distance="mse")
    betas = said["betas"][:, None], g["gt_betas"][:, None]
    losses["betas"] = shape(*betas, confidence=labelled, error=torch.zeros_like(trusted), trusted=trusted)

    for name, loss in losses.items():
        same(loss.detach(), g[f"loss_{name}"])
    total = sum(weight * losses[name] for name, weight in TOTAL.items())
    same(total.detach(), g["loss_total"])
    total.backward()
    for key, x in said.items():
        same(x.grad, g[f"grad_{key}"])


def batch(seed, n=5, k=4, d=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, k, d, generator=generator, dtype=torch.float64)


@given(st.integers(0, 1000), st.sampled_from(["l1", "mse"]), st.floats(0, 1), st.floats(0, 5))
def test_it_lies_between_the_weak_and_the_full_loss(seed, distance, weak, threshold):
    said, label = batch(seed)
    full = (said - label).abs().sum() if distance == "l1" else (said - label).square().sum()
    loss = ThresholdAdaptiveScaling(threshold, weak=weak, distance=distance)
    assert weak * full - 1e-9 <= loss(said, label) <= full + 1e-9
    torch.testing.assert_close(loss(said, label, trusted=torch.ones(5)), full)
    error = (said - label).square().sum(-1)
    assert torch.equal(loss.gross(said, label), error > threshold)


@pytest.mark.parametrize("distance", ["l1", "mse"])
def test_gradients_are_those_of_the_value(distance):
    said, label = batch(0, 3, 2, 2)
    loss = ThresholdAdaptiveScaling(torch.tensor([0.5, 2.0]), distance=distance).double()
    confidence = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    call = partial(loss, confidence=confidence, trusted=torch.tensor([False, False, True]))
    assert torch.autograd.gradcheck(call, (said.requires_grad_(), label))


def test_a_sample_without_labels_never_counts_even_if_it_is_trusted():
    said, label = batch(0)
    said.requires_grad_()
    confidence = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    ThresholdAdaptiveScaling(0.1)(said, label, confidence=confidence, trusted=torch.ones(5)).backward()
    assert (said.grad[confidence == 0] == 0).all()
    assert (said.grad[confidence > 0].abs() == 1).all()


def test_reductions_and_the_callers_tensors():
    said, label = batch(3)
    confidence, before = torch.full((5, 4), 0.5), torch.full((5, 4), 0.5)
    values = {
        kind: ThresholdAdaptiveScaling(1.0, reduction=kind)(said, label, confidence=confidence)
        for kind in ("none", "mean", "sum")
    }
    assert values["none"].shape == (5, 4)
    torch.testing.assert_close(values["none"].mean(), values["mean"])
    torch.testing.assert_close(values["none"].sum(), values["sum"])
    assert torch.equal(confidence, before)


BAD = [
    ({"thresholds": torch.tensor([0.1, -0.2])}, "thresholds must be >= 0, found -0.2"),
    ({"thresholds": torch.tensor([[0.1]])}, r"thresholds must be a number or have shape \(k,\), got \(1, 1\)"),
    ({"thresholds": torch.tensor([torch.nan])}, "thresholds must be finite"),
    ({"thresholds": None}, "thresholds must be a numeric tensor or array, got NoneType"),
    ({"thresholds": "x"}, "thresholds must be a numeric tensor or array, got str"),
    ({"weak": 1.5}, r"weak must lie in \[0, 1\]"),
    ({"distance": "l2"}, "distance must be one of l1, mse, got 'l2'"),
    ({"reduction": "max"}, "reduction must be one of mean, sum, none, got 'max'"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ThresholdAdaptiveScaling(**{"thresholds": 0.1, **settings})


@pytest.mark.bad_input
def test_bad_batches_are_refused():
    (said, label), loss = batch(0), ThresholdAdaptiveScaling(torch.ones(4))
    for args, named, message in (
        ((said[:, :3], label[:, :3]), {}, r"prediction must have shape \(n, 4, ...\), none of it 0, got \(5, 3, 3\)"),
        ((said, label[:4]), {}, r"target must have the shape \(5, 4, 3\), got \(4, 4, 3\)"),
        ((said, label), {"error": torch.zeros(4)}, r"error must have shape \(5, 4\) or \(5,\), got \(4,\)"),
        (
            (said, label),
            {"confidence": -torch.ones(5)},
            r"confidence must lie in \[0, inf\], found -1 at row 0, column 0",
        ),
        ((said, label), {"error": -torch.eye(5, 4)}, r"error must lie in \[0, inf\], found -1 at row 0, column 0"),
        ((said, label), {"error": torch.full((5,), torch.nan)}, "error must be finite, found nan at row 0"),
        ((said, label), {"trusted": torch.ones(5, device="meta")}, "trusted must be on the device of prediction"),
        ((said.long(), label), {}, "prediction must be floating point, got int64"),
    ):
        with pytest.raises(InputError, match=message):
            loss(*args, **named)
