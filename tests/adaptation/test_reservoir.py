"""Slug 61-tca: what past images leave."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from toynet import golden_files

from trimtab.adaptation.base import entropy
from trimtab.adaptation.reservoir import ReservoirCache

SLUG = "61-tca"


def tolerance(values):
    return 1e-5 if values.dtype == np.float32 else 1e-9


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
        anchors = [reservoir.anchors(block) for block in range(blocks)]
        assert [a is not None for a in anchors] == [bool(arrays["anchors_set"][t])] * blocks
    np.testing.assert_allclose(torch.stack(anchors, 1), arrays["final_anchor_tokens"], **close)
    for name, values in arrays.items():
        if place := re.fullmatch(r"res_(\d+)_(\d+)_entropy", name):
            held = reservoir.entropies[int(place[1]), int(place[2])]
            np.testing.assert_allclose(held, float(values[0]), **close)


@given(seed=st.integers(0, 1000), size=st.integers(1, 4))
def test_the_most_uncertain_and_most_alike_leaves(seed, size):
    generator = torch.Generator().manual_seed(seed)
    reservoir, held = ReservoirCache(1, 2, 3, size=size, dtype=torch.float64), []
    for _ in range(12):
        tokens = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        held.append((torch.rand((), generator=generator, dtype=torch.float64), tokens))
        reservoir.update(0, *held[-1])
        if len(held) > size:
            means = [tokens.mean(0) for _, tokens in held]
            alike = [
                sum(float(torch.cosine_similarity(mine, other, 0)) for j, other in enumerate(means) if j != i) / size
                for i, mine in enumerate(means)
            ]
            scores = [float(h) + likeness for (h, _), likeness in zip(held, alike)]
            held.pop(scores.index(max(scores)))
        held.sort(key=lambda item: float(item[0]))
        torch.testing.assert_close(reservoir.tokens[0, : len(held)], torch.stack([tokens for _, tokens in held]))


def test_anchors_by_policy():
    reservoir = ReservoirCache(2, 1, 2)
    for prediction, value in [(0, 1.0), (0, 3.0), (1, 5.0)]:
        reservoir.update(prediction, torch.tensor(0.1), torch.full((1, 2), value))
    assert reservoir.anchors(0, "all") is None
    assert reservoir.anchors(0, "available").tolist() == [[2.0, 2.0]]
    reservoir.update(1, torch.tensor(0.1), torch.full((1, 2), 7.0))
    assert reservoir.anchors(0, "all").tolist() == [[2.0, 2.0], [6.0, 6.0]]
    assert reservoir.anchors(0, "off") is None
