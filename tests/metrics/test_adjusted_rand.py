"""The adjusted Rand index against scikit-learn, its own laws and, for the slug 21-slot-tta, the authors' code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from trimtab.core.checks import InputError
from trimtab.metrics import AdjustedRandIndex, adjusted_rand_index

FILES = [p for p in sorted((Path(__file__).parents[1] / "golden/21-slot-tta").glob("*.npz")) if "ari" in np.load(p)]


def segments(seed, n=4, shape=(5, 4), count=4, low=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, count, (2, n, *shape), generator=generator)


def ids(masks):
    """Segments of one-hot masks (n, places, segments); -1 where there is none."""
    masks = torch.from_numpy(masks)
    return masks.argmax(2).masked_fill((masks == 0).all(2), -1)


@pytest.mark.golden
def test_the_authors_numbers():
    checked = 0
    for path in FILES:
        arrays = np.load(path)
        pred = torch.from_numpy(arrays["pred"]).argmax(2)
        for name, predicted, truth, background in (
            ("ari", pred, "true", None),
            ("fg_ari", pred, "true", 0),
            ("ari_zero", pred, "true_zero", None),
            ("perfect", ids(arrays["true"]), "true", None),
            ("single", torch.from_numpy(arrays["single_pred"]).argmax(2), "single_true", None),
        ):
            found = adjusted_rand_index(predicted, ids(arrays[truth]), background=background)
            np.testing.assert_allclose(found, arrays[name], rtol=0, atol=1e-5, err_msg=name)
            checked += 1
    assert checked


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_it_is_scikit_learn_s(seed, count, width):
    predicted, truth = segments(seed, shape=(width,), count=count)
    expected = [adjusted_rand_score(t.numpy(), p.numpy()) for p, t in zip(predicted, truth)]
    np.testing.assert_allclose(adjusted_rand_index(predicted, truth), expected, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_names_do_not_matter_and_neither_do_pixels_left_out(seed, count):
    predicted, truth = segments(seed, count=count)
    index = adjusted_rand_index(predicted, truth)
    torch.testing.assert_close(adjusted_rand_index(1000 - 7 * predicted, 3 * truth), index, equal_nan=True)
    torch.testing.assert_close(adjusted_rand_index(truth, predicted), index, equal_nan=True)
    torch.testing.assert_close(adjusted_rand_index(truth, truth), torch.ones(4, dtype=torch.float64))
    foreground = adjusted_rand_index(predicted, truth, background=0)
    for i in range(4):
        kept = truth[i] != 0
        shown = adjusted_rand_index(predicted[i][kept][None], truth[i][kept][None]) if kept.any() else None
        if shown is None:
            assert foreground[i].isnan()
        else:
            torch.testing.assert_close(foreground[i], shown[0], equal_nan=True)
    torch.testing.assert_close(
        adjusted_rand_index(predicted, truth.masked_fill(truth == 0, -1)), foreground, equal_nan=True
    )


def test_batches_add_up_and_images_without_truth_are_left_out():
    predicted, truth = segments(0, low=-1)
    truth[1] = -1
    index = adjusted_rand_index(predicted, truth)
    assert index.isnan().tolist() == [False, True, False, False]
    first, second = AdjustedRandIndex(), AdjustedRandIndex()
    first.update(predicted[:2], truth[:2])
    second.update(predicted[2:].numpy(), truth[2:].numpy())
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), index.nanmean())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.int64),
            "predicted must be integers, one a pixel, got float32",
        ),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), "truth must have the shape of"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), r"shape \(n, ...\)"),
        (torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64), "n >= 1"),
    ],
)
def test_bad_segments_are_refused(predicted, truth, message):
    with pytest.raises(InputError, match=message):
        adjusted_rand_index(predicted, truth)
