"""The measurement of the camera's bias (60-tokenhmr): it is nought for the right camera, and least for its place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import camera_bias, perspective


def bodies(seed, n=6, k=8):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, k, 3, generator=generator, dtype=torch.float64) / 2
    camera = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    return points, camera * torch.tensor([0.5, 0.4, 0.4]) + torch.tensor([0.6, -0.2, -0.2])


@given(st.integers(0, 1000), st.floats(300, 6000))
def test_the_right_camera_has_no_bias(seed, focal):
    points, camera = bodies(seed)
    seen = perspective(points, camera, focal=focal)
    assert camera_bias(points, seen, focal=focal).max() < 1e-18


def test_no_other_place_of_the_camera_is_better():
    points, camera = bodies(0)
    seen = perspective(points, camera, focal=400.0)
    least = camera_bias(points, seen).mean()
    assert least > 1e-6
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        other = camera * (1 + 0.05 * torch.randn(camera.shape, generator=generator, dtype=torch.float64))
        assert (perspective(points, other) - seen).square().sum(-1).mean() >= least


def test_the_nearer_the_camera_the_larger_the_bias():
    points, camera = bodies(1)
    found = [camera_bias(points, perspective(points, camera, focal=focal)).mean() for focal in (400.0, 800.0, 1600.0)]
    assert found[0] > 2 * found[1] > 4 * found[2]


def test_keypoints_that_are_not_seen_do_not_count():
    points, camera = bodies(2)
    seen = perspective(points, camera)
    spoilt, confidence = seen.clone(), torch.ones_like(seen[..., 0])
    spoilt[0, 3], confidence[0, 3] = 9.0, 0.0
    assert camera_bias(points, spoilt, confidence=confidence).max() < 1e-18


@pytest.mark.bad_input
def test_what_cannot_be_measured_is_refused():
    points, camera = bodies(0)
    seen = perspective(points, camera)
    for args, named, message in (
        ((points, seen[:, :3]), {}, "keypoints must be as many as points"),
        ((points[..., :2], seen), {}, r"points must be floating point of shape \(n, k, 3\)"),
        (
            (points, seen),
            {"confidence": torch.zeros(6, 8)},
            "for each keypoint in some sample, it is not for keypoint 0",
        ),
        ((points, seen), {"confidence": -torch.ones(6, 8)}, "confidence must be >= 0, found row 0, column 0"),
        ((points, seen), {"confidence": torch.ones(6, 8, device="meta")}, "confidence must be on the device of points"),
        ((points, seen), {"confidence": torch.zeros(6, 7)}, r"confidence must have shape \(6, 8\), got \(6, 7\)"),
        ((points, -seen), {}, "keypoints must show the points from in front of them, row 0"),
        ((points, seen), {"focal": 0.0}, r"focal must lie in \(0, inf\)"),
    ):
        with pytest.raises(InputError, match=message):
            camera_bias(*args, **named)
    with pytest.raises(InputError, match="camera must have 6 rows"):
        perspective(points, camera[:5])
    for scale in (-1, 0):
        camera[2, 0] = scale
        with pytest.raises(InputError, match=f"camera must have a positive scale in column 0, found {scale} at row 2"):
            perspective(points, camera)
    camera[2, 0] = 1e6
    with pytest.raises(InputError, match="camera must be in front of all points, it is not at row 2, column"):
        perspective(points, camera)
