from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.adaptation.destroy import occlude, permute_patches, permute_pixels, shuffle_patches, shuffle_pixels
from trimtab.core.checks import InputError


def images(seed, n=3, h=12, w=12):
    return torch.rand(n, 2, h, w, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.integers(2, 4), st.integers(1, 3), st.integers(1, 3))
def test_patches_go_where_the_order_says(seed, side, rows, columns):
    x = images(seed, 2, side * rows, side * columns)
    order = torch.stack([torch.randperm(side**2, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)])

    def patch(x, place):
        top, left = place // side * rows, place % side * columns
        return x[:, top : top + rows, left : left + columns]

    moved = permute_patches(x, order)
    for i in (0, 1):
        for place, origin in enumerate(order[i].tolist()):
            assert torch.equal(patch(moved[i], place), patch(x[i], origin))
    assert torch.equal(permute_patches(moved, order.argsort(1)), x)


@pytest.mark.parametrize("shuffle", [shuffle_patches, shuffle_pixels])
def test_shuffling_keeps_the_pixels_and_follows_the_generator(shuffle):
    x = images(0)
    first, again, other = (shuffle(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.flatten(2).sort(2).values, x.flatten(2).sort(2).values)


def test_every_image_has_a_patch_order_of_its_own_and_all_share_one_of_pixels():
    x = images(0, 1).expand(5, -1, -1, -1)
    assert len(shuffle_patches(x, torch.Generator().manual_seed(0)).unique(dim=0)) == 5
    assert len(shuffle_pixels(x, torch.Generator().manual_seed(0)).unique(dim=0)) == 1


@given(st.integers(2, 5), st.integers(5, 17), st.integers(5, 17))
def test_any_shape_is_kept_and_so_is_a_plain_colour(side, h, w):
    plain = torch.full((2, 3, h, w), 0.25)
    torch.testing.assert_close(shuffle_patches(plain, torch.Generator().manual_seed(0), per_side=side), plain)
    torch.testing.assert_close(occlude(plain), plain)
    assert torch.equal(shuffle_pixels(plain, torch.Generator().manual_seed(0)), plain)


def test_one_order_of_pixels():
    order = torch.arange(144).flip(0)
    x = images(0)
    assert torch.equal(permute_pixels(x, order), x.flip(2, 3))


def test_the_window_holds_the_mean_and_the_rest_is_untouched():
    x = images(0)
    hidden = occlude(x, window=(2, 3, 5))
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[2:7, 3:8] = True
    assert torch.equal(hidden[:, :, ~inside], x[:, :, ~inside])
    torch.testing.assert_close(hidden[:, :, inside], x.mean((2, 3))[:, :, None].expand(-1, -1, 25))
    assert torch.equal(occlude(x), occlude(x, window=(3, 3, 6)))


def test_precision_is_kept():
    for dtype in (torch.float16, torch.float64):
        x = images(0).to(dtype)
        for destroy in (shuffle_patches, shuffle_pixels, occlude):
            assert destroy(x, torch.Generator().manual_seed(0)).dtype == dtype


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("destroy", "x", "message"),
    [
        (shuffle_patches, torch.zeros(2, 3, 4), r"shape \(n, c, h, w\), got torch.float32 \(2, 3, 4\)"),
        (shuffle_pixels, torch.zeros(2, 3), r"shape \(n, c, h, w\), got torch.float32 \(2, 3\)"),
        (occlude, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "floating point of shape"),
        (shuffle_patches, torch.zeros(2, 3, 8, 3), "sides of at least 4 pixels, one a patch, got 8 x 3"),
        (partial(shuffle_patches, per_side=1), torch.zeros(2, 3, 8, 8), "per_side must be at least 2, got 1"),
        (partial(occlude, window=(4, 4, 5)), torch.zeros(2, 3, 8, 8), "window must lie inside the images of 8 x 8"),
        (partial(occlude, window=(-1, 0, 4)), torch.zeros(2, 3, 8, 8), "window must lie inside the images of 8 x 8"),
        (partial(occlude, window=(0, 0, 0)), torch.zeros(2, 3, 8, 8), "window must lie inside the images of 8 x 8"),
    ],
)
def test_bad_images_are_refused(destroy, x, message):
    with pytest.raises(InputError, match=message):
        destroy(x, torch.Generator().manual_seed(0))
