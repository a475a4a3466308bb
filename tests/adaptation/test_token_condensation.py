"""Slug 61-tca."""

import math

import pytest
import torch
import torch.nn.functional as F
import vision_towers
from safetensors.torch import load, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vision_towers import CLASSES, every_model, images, zero_shot

from trimtab.adaptation import Guard, Source, TokenCondensation
from trimtab.adaptation.base import entropy
from trimtab.adaptation.condensing import condensed
from trimtab.adaptation.reservoir import ReservoirCache
from trimtab.adaptation.vit_blocks import TowerClassifier, take_apart
from trimtab.core.checks import InputError

SLUG = "61-tca"
SETTINGS = {"blocks": (2, 4), "anchors": "available", "lam": 8.0}


def adapter_of(make, **settings):
    return TokenCondensation(zero_shot(make()), **{**SETTINGS, **settings})


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@every_model
def test_with_nothing_condensed_and_no_votes_it_is_the_model(make):
    model, x = zero_shot(make()), images(3)
    torch.testing.assert_close(TokenCondensation(model, blocks=(), lam=0.0)(x), Source(model)(x))
    torch.testing.assert_close(TokenCondensation(model, blocks=(2,), drop_rate=0.0, lam=0.0)(x), Source(model)(x))


def test_a_tower_alone():
    x = images(2)
    model = TowerClassifier(vision_towers.transformers_tower(), vision_towers.class_features())
    torch.testing.assert_close(TokenCondensation(model, blocks=(), lam=0.0)(x), Source(model)(x))
    assert not torch.allclose(TokenCondensation(model, blocks=(2, 4), lam=0.0)(x), Source(model)(x))


@every_model
def test_the_stream_image_by_image(make):
    """Anchors come from earlier images, for a block from the block before it; an image votes for itself."""
    votes = {"size": 2, "lam": 8.0, "beta": 2.0}
    adapter = adapter_of(make, **votes)
    model, generator = zero_shot(make()), torch.Generator().manual_seed(0)
    reservoir = ReservoirCache(*adapter.reservoir.tokens.shape[::2], adapter.reservoir.tokens.shape[3], **votes)
    parts, steered = take_apart(model.face.model), 0
    for image in images(12):
        with torch.no_grad():
            tokens, summaries = parts.embed(image[None]), []
            ready = (reservoir.counts == 2).nonzero()[:, 0]
            for number, block in enumerate(parts.blocks):
                if number in (2, 4):
                    anchors = reservoir.tokens[ready, :, number - 1].mean(1) if len(ready) else None
                    steered += anchors is not None
                    tokens = condensed(parts, block, tokens, 0.1, generator, anchors=anchors)
                else:
                    tokens = block(tokens)
                summaries.append(parts.summary(tokens)[0])
            logits = model.face.logits(F.normalize(parts.finish(tokens), dim=1), model.gallery)
            reservoir.update(int(logits.argmax()), entropy(logits.double())[0], torch.stack(summaries))
            expected = logits + reservoir.logits(torch.stack(summaries))
        torch.testing.assert_close(adapter(image[None]), expected)
    assert steered


@every_model
def test_a_batch_is_its_images_one_by_one(make):
    whole, single = adapter_of(make), adapter_of(make)
    x = images(6)
    assert torch.equal(whole(x), torch.cat([single(image[None]) for image in x]))
    assert same_bits(whole.state_dict(), single.state_dict())


@every_model
def test_saved_in_the_middle_it_goes_on_bit_by_bit(make):
    first, second = adapter_of(make), adapter_of(make)
    first(images(8))
    second.load_state_dict(load(save(first.state_dict())))
    assert torch.equal(first(images(5, seed=1)), second(images(5, seed=1)))
    assert same_bits(first.state_dict(), second.state_dict())


@every_model
def test_frozen_it_says_what_it_would_say_next_and_nothing_changes(make):
    adapter = adapter_of(make)
    adapter(images(7))
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    x = images(1, seed=1)
    with adapter.frozen():
        said = adapter(x)
        assert torch.equal(said, adapter(x))
    assert same_bits(before, adapter.state_dict())
    assert torch.equal(said, adapter(x))
    assert not same_bits(before, adapter.state_dict())


@every_model
def test_reset_returns_to_the_start(make):
    adapter, x = adapter_of(make), images(8)
    first, settled = adapter(x), adapter(x)
    adapter.reset()
    adapter.generator.manual_seed(0)
    assert torch.equal(adapter(x), first)
    assert not torch.equal(settled, first)


@every_model
def test_flops_of_the_model_are_its_own_and_of_the_adapter_fewer(make):
    adapter, model = adapter_of(make), zero_shot(make()).requires_grad_(False)
    image = images(1)[0]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as own:
        model(image[None])
    torch.backends.mha.set_fastpath_enabled(fast)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    counted = adapter.flops(image)
    assert counted.source == own.get_total_flops()
    assert counted.adapted < 0.95 * counted.source
    assert same_bits(before, adapter.state_dict())
    adapter(images(12))
    assert counted.adapted < adapter.flops(image).adapted < 0.95 * counted.source


def test_flops_are_the_products_that_the_shapes_imply():
    adapter = adapter_of(vision_towers.transformers_clip)
    w, hidden, patches = vision_towers.WIDTH, vision_towers.HIDDEN, (vision_towers.SIDE // vision_towers.PATCH) ** 2
    ends = patches * w * 3 * vision_towers.PATCH**2 + w * 12 + 12 * CLASSES

    def block(t, out):
        return 4 * t * w**2 + 2 * t**2 * w + 2 * out * w * hidden

    assert adapter.flops(images(1)[0]).source == 2 * (ends + vision_towers.DEPTH * block(patches + 1, patches + 1))
    t, total = patches + 1, ends + adapter.reservoir.tokens.numel()
    for number in range(vision_towers.DEPTH):
        out = t
        if number in (2, 4):
            m = t - math.ceil(0.9 * (t - 1))
            out = t - m - 2 * m + 5 + 1
            total += t * w + (4 * 2 * m + m - 1) * w  # a row of the map, four means, a sum
        total += block(t, out)
        t = out
    assert adapter.flops(images(1)[0]).adapted == 2 * total


def test_a_long_stream_takes_no_more_memory():
    adapter = adapter_of(vision_towers.transformers_clip)
    shapes = {name: value.shape for name, value in adapter.state_dict().items()}
    adapter(images(40))
    assert {name: value.shape for name, value in adapter.state_dict().items()} == shapes
    assert (adapter.reservoir.counts <= adapter.reservoir.size).all()


def test_images_of_one_colour_and_half_precision():
    black = torch.zeros(3, 3, vision_towers.SIDE, vision_towers.SIDE)
    assert adapter_of(vision_towers.transformers_clip)(black).isfinite().all()
    model = zero_shot(vision_towers.transformers_clip())
    half = TokenCondensation(zero_shot(vision_towers.transformers_clip().bfloat16()), **SETTINGS)
    said = half(images(6).bfloat16())
    assert said.dtype == torch.float32
    assert half.reservoir.tokens.dtype == torch.float32
    torch.testing.assert_close(said, TokenCondensation(model, **SETTINGS)(images(6)), atol=5.0, rtol=0.1)


def test_a_mapping_of_images():
    adapter, x = adapter_of(vision_towers.transformers_clip), images(2)
    with adapter.frozen():
        assert torch.equal(adapter({"pixel_values": x}), adapter(x))


def test_a_guard_watches_it():
    adapter = adapter_of(vision_towers.transformers_clip, guard=Guard(every=1))
    adapter(images(4))
    assert int(adapter.guard.looks) == 1


def test_logits_that_are_not_finite_leave_no_trace():
    adapter = adapter_of(vision_towers.transformers_clip)
    with torch.no_grad():
        adapter.model.gallery[0] = torch.inf
    assert not adapter(images(2)).isfinite().all()
    assert int(adapter.skipped) == 2
    assert not adapter.reservoir.counts.any()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_rate": 1.0}, r"drop_rate must lie in \[0, 1\), got 1"),
        ({"blocks": (0,)}, r"blocks\[0\] must be at least 1, got 0"),
        ({"blocks": (2, 6)}, r"blocks\[1\] must be at most 5, got 6"),
        ({"scale": 0.0}, "scale must lie in"),
        ({"beta": -1.0}, "beta must lie in"),
        ({"lam": -1.0}, "lam must lie in"),
        ({"size": 0}, "size must be at least 1"),
        ({"ranking": "rank"}, "ranking must be one of attention, head_rank"),
        ({"anchors": "some"}, "anchors must be one of all, available, off"),
        ({"steps": 2}, "steps must be 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        adapter_of(vision_towers.transformers_clip, **settings)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"model must be ImageQueries .* or a TowerClassifier, got CLIPVisionModel"):
        TokenCondensation(vision_towers.transformers_tower())
    adapter = adapter_of(vision_towers.transformers_clip, drop_rate=0.5)
    with pytest.raises(InputError, match=r"0\.5 of 36 patches leaves 18, 38 of them doubtful"):
        adapter(images(1))
    with pytest.raises(InputError, match=r"0\.01 of 36 patches leaves 36, 2 of them doubtful"):
        adapter_of(vision_towers.transformers_clip, drop_rate=0.01)(images(1))
    with pytest.raises(InputError, match=r"x must be images \(n, c, h, w\) alone, got \[\(3, 96, 96\)\]"):
        adapter(images(1)[0])
    with pytest.raises(InputError, match="labels must not be given"):
        adapter(images(1), torch.zeros(1))
    with pytest.raises(InputError, match="x must be finite, found nan"):
        adapter(images(1) * torch.nan)
    assert not adapter.reservoir.counts.any()
