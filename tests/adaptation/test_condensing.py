"""Slug 61-tca: what is kept, merged and summed."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toynet import golden_files

from trimtab.adaptation import vit_blocks
from trimtab.adaptation.condensing import condense, condensed, coreset_averaging, k_center_greedy, partition
from trimtab.adaptation.vit_blocks import take_apart

SLUG = "61-tca"


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
