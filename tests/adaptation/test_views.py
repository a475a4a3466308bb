import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.adaptation.views import confident, mean_entropy, resized_crops
from trimtab.core.checks import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(n, h=16, w=16):
    """Images whose value is linear in the place: a crop's values tell where it was."""
    rows = torch.linspace(-1, 1, h)[:, None].expand(h, w)
    columns = torch.linspace(-1, 1, w).expand(h, w)
    return torch.stack((rows, columns, torch.ones(h, w))).expand(n, -1, -1, -1)


def test_crops_lie_in_the_image_and_cover_what_they_should():
    crops = resized_crops(ramp(400), seeded())
    assert crops.shape == (400, 3, 16, 16)
    torch.testing.assert_close(crops[:, 2], torch.ones(400, 16, 16))
    down = (crops[:, 0, -1, 0] - crops[:, 0, 0, 0]) / 2
    across = (crops[:, 1, 0, -1] - crops[:, 1, 0, 0]) / 2
    assert (down > 0).all()
    assert 0.4 < float((across < 0).float().mean()) < 0.6  # mirrored
    area = down * across.abs()
    assert 0.07 < float(area.min()) < 0.2
    assert 0.8 < float(area.max()) <= 1.0
    ratio = across.abs() / down
    assert float(ratio.min()) > 0.7
    assert float(ratio.max()) < 1.45
    assert float(crops[:, :2].mean((0, 2, 3)).abs().max()) < 0.1


def test_whole_images_are_themselves_and_a_seed_gives_the_same_views():
    images = torch.rand(3, 3, 9, 12, generator=seeded())
    same = resized_crops(images, seeded(), area=(1e9, 1e9), flip=False)
    torch.testing.assert_close(same, images, atol=1e-4, rtol=0)
    assert torch.equal(resized_crops(images, seeded(1)), resized_crops(images, seeded(1)))
    assert not torch.equal(resized_crops(images, seeded(1)), resized_crops(images, seeded(2)))


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 1.0), v=st.integers(1, 30))
def test_the_surest_views_are_chosen(seed, share, v):
    logits = 3 * torch.randn(v, 4, generator=seeded(seed), dtype=torch.float64)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    chosen = confident(logits, share)
    assert len(chosen) == int(v * share)
    assert (entropies[chosen].diff() >= -1e-12).all()
    rest = torch.ones(v, dtype=torch.bool)
    rest[chosen] = False
    if len(chosen) and rest.any():
        assert entropies[chosen].max() <= entropies[rest].min() + 1e-12


def test_entropy_of_the_mean():
    logits = torch.randn(5, 4, generator=seeded(), dtype=torch.float64)
    mean = logits.softmax(1).mean(0)
    torch.testing.assert_close(mean_entropy(logits), -(mean * mean.log()).sum())
    sure = torch.tensor([[1e4, 0.0], [1e4, -1e4]])
    assert float(mean_entropy(sure)) == 0


@pytest.mark.bad_input
@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_other_things_than_images_are_refused(images):
    with pytest.raises(InputError, match="images must be floating point of shape"):
        resized_crops(images, seeded())
