"""Slug 61-tca."""

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vision_towers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toynet import golden_files
from vision_towers import CLASSES, every_model, images, zero_shot

from trimtab.adaptation import Guard, Source, TokenCondensation, vit_blocks
from trimtab.adaptation.base import entropy
from trimtab.adaptation.token_condensation import (
    ReservoirCache,
    condense,
    condensed,
    coreset_averaging,
    k_center_greedy,
    partition,
)
from trimtab.adaptation.vit_blocks import TowerClassifier, take_apart
from trimtab.core.checks import InputError

SLUG = "61-tca"
SETTINGS = {"blocks": (2, 4), "anchors": "available", "lam": 8.0}


def adapter_of(make, **settings):
    return TokenCondensation(zero_shot(make()), **{**SETTINGS, **settings})


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def tolerance(values):
    return 1e-5 if values.dtype == np.float32 else 1e-9


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def authors_block(arrays):
    """The block of a golden file, in a tower of which nothing else is used."""
    width, inner = arrays["block.mlp.c_proj.weight"].shape
    with torch.random.fork_rng(devices=[]):
        block = nn.Module()
        block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        block.attn = nn.MultiheadAttention(width, int(arrays["n_head"]))
        layers = [("c_fc", nn.Linear(width, inner)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(inner, width))]
        block.mlp = nn.Sequential(OrderedDict(layers))
        shell = nn.Module()
        shell.class_embedding, shell.ln_post = nn.Parameter(torch.zeros(width)), nn.LayerNorm(width)
        shell.transformer = nn.Module()
        shell.transformer.resblocks = nn.ModuleList([block])
    weights = {n.removeprefix("block."): torch.from_numpy(v) for n, v in arrays.items() if n.startswith("block.")}
    block.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return take_apart(shell)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files(SLUG, "block.*", "kept_idx"))
def test_the_authors_block(path):
    arrays = dict(np.load(path))
    parts = authors_block(arrays)
    anchors = torch.from_numpy(arrays["anchors"]) if "anchors" in arrays else None
    for i, start in enumerate(arrays["k_center_starts"].tolist()):
        tokens = torch.from_numpy(arrays["x"][:, i])[None]
        with torch.no_grad():
            ours = condensed(parts, parts.blocks[0], tokens, float(arrays["drop_rate"]), start, anchors=anchors)
        # float32 within the authors' merging, whatever the precision of the file
        np.testing.assert_allclose(ours[0], arrays["y"][:, i], rtol=0, atol=1e-5)
        if anchors is None:  # an anchor adds a key, and changes the map
            queries, keys, _ = parts.blocks[0].split(parts.blocks[0].ln_1(tokens))
            weights = vit_blocks.attention(queries[:, :, 0], keys)[0, :, 1:]
            np.testing.assert_array_equal(partition(weights, float(arrays["drop_rate"]))[0], arrays["kept_idx"][i])


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files(SLUG, "tokens", "merged"))
def test_the_authors_merging(path):
    arrays = dict(np.load(path))
    for i, start in enumerate(arrays["k_center_starts"].tolist()):
        merged = coreset_averaging(torch.from_numpy(arrays["tokens"][:, i]), int(arrays["num_centers"]), start)
        np.testing.assert_allclose(merged, arrays["merged"][:, i], rtol=0, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files(SLUG, "reservoir_logits", "final_anchor_tokens"))
def test_the_authors_reservoir(path):
    arrays = dict(np.load(path))
    close = {"rtol": 0, "atol": tolerance(arrays["features"])}
    tokens, class_features = torch.from_numpy(arrays["cls_tokens"]), torch.from_numpy(arrays["class_weights"])
    steps, blocks, width = tokens.shape
    classes = class_features.shape[1]
    reservoir = ReservoirCache(
        classes,
        blocks,
        width,
        size=int(arrays["reservoir_size"]),
        lam=float(arrays["lambd"]),
        beta=float(arrays["beta"]),
        scale=float(arrays["scale"]),
        dtype=tokens.dtype,
    )
    assert steps
    for t, features in enumerate(torch.from_numpy(arrays["features"])):
        logits = 100 * F.normalize(features, dim=0) @ class_features
        reservoir.update(int(logits.argmax()), entropy(logits[None])[0], tokens[t])
        votes = reservoir.logits(tokens[t])
        np.testing.assert_allclose(votes, arrays["reservoir_logits"][t], **close)
        np.testing.assert_allclose(logits + votes, arrays["final_logits"][t], **close)
        np.testing.assert_array_equal(reservoir.counts, arrays["sizes"][t])
        anchors = list(reservoir.anchors(range(blocks)))
        assert bool(anchors) == bool(arrays["anchors_set"][t])
    np.testing.assert_allclose(torch.stack(anchors, 1), arrays["final_anchor_tokens"], **close)
    for name, values in arrays.items():
        if place := re.fullmatch(r"res_(\d+)_(\d+)_entropy", name):
            held = reservoir.entropies[int(place[1]), int(place[2])]
            np.testing.assert_allclose(held, float(values[0]), **close)


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


@pytest.mark.parametrize(("drop_rate", "lengths"), [(0.1, [143, 104, 77]), (0.035, [182, 167, 155])])
def test_lengths_of_the_authors_vit_b_16(drop_rate, lengths):
    tokens = torch.randn(197, 4, generator=torch.Generator().manual_seed(0))
    for length in lengths:
        rest = condense(
            tokens[1:], torch.rand(2, len(tokens) - 1, generator=torch.Generator().manual_seed(1)), drop_rate, 0
        )
        tokens = torch.cat([tokens[:1], rest])
        assert len(tokens) == length


@given(st.integers(20, 120), st.floats(0.05, 0.3), st.sampled_from(["attention", "head_rank"]), st.integers(0, 99))
def test_every_patch_is_in_one_part_and_parts_are_in_order(n, drop_rate, ranking, seed):
    attention = torch.rand(3, n, generator=torch.Generator().manual_seed(seed))
    scores = attention.mean(0)
    if ranking == "head_rank":
        scores = (attention[:, None] < attention[:, :, None]).double().sum(2).mean(0)
    kept, doubtful, disregarded = partition(attention, drop_rate, ranking)
    order = torch.cat([kept, doubtful, disregarded])
    assert sorted(order.tolist()) == list(range(n))
    assert (scores[order].diff() <= 0).all()
    assert len(doubtful) == 2 * (n + 1 - len(kept) - len(doubtful)) == 2 * (len(disregarded) + 1)


@given(st.integers(4, 30), st.integers(0, 99))
def test_centres_are_the_farthest_tokens(n, seed):
    tokens = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    centres = k_center_greedy(tokens, 4, seed % n).tolist()
    assert centres[0] == seed % n
    for i in range(1, 4):
        nearest = [min(float((token - tokens[c]).norm()) for c in centres[:i]) for token in tokens]
        assert nearest[centres[i]] == pytest.approx(max(nearest), rel=1e-5)


def test_four_tokens_are_their_own_means_and_twins_leave_zeros():
    tokens = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    merged = coreset_averaging(tokens, 4, 2)
    assert sorted(merged.tolist()) == sorted(tokens.tolist())
    same = coreset_averaging(tokens[:1].expand(9, -1), 4, 5)
    torch.testing.assert_close(same[0], tokens[0])
    assert not same[1:].any()


def test_the_first_centre_comes_from_the_generator():
    tokens = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    starts = {int(k_center_greedy(tokens, 1, torch.Generator().manual_seed(seed))[0]) for seed in range(20)}
    assert len(starts) > 10


def test_anchors_by_policy():
    reservoir = ReservoirCache(2, 1, 2)
    for prediction, value in [(0, 1.0), (0, 3.0), (1, 5.0)]:
        reservoir.update(prediction, torch.tensor(0.1), torch.full((1, 2), value))
    assert list(reservoir.anchors([0], "all")) == list(reservoir.anchors([0], "off")) == []
    assert [a.tolist() for a in reservoir.anchors([0], "available")] == [[[2.0, 2.0]]]
    reservoir.update(1, torch.tensor(0.1), torch.full((1, 2), 7.0))
    assert [a.tolist() for a in reservoir.anchors([0], "all")] == [[[2.0, 2.0], [6.0, 6.0]]]


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
