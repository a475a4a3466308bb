"""Method 20-icl-self-ensembling: which examples a prompt shows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.calibration import DemonstrationSampler
from trimtab.core.checks import InputError

POOL = [f"text {i}" for i in range(12)]
LABELS = np.array([0, 1, 2] * 4)
EMBEDDINGS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 11), strategy=st.sampled_from(["random", "balanced", "nearest"]))
def test_what_holds_for_every_draw(seed, n, strategy):
    nearest = strategy == "nearest"
    n = min(n, 9)  # balanced: three are left of the query's class
    sampler = DemonstrationSampler(POOL, LABELS, n, strategy, seed=seed, embeddings=EMBEDDINGS if nearest else None)
    given_embeddings = {"embeddings": EMBEDDINGS} if nearest else {}
    drawn = sampler(POOL, **given_embeddings)
    assert drawn == sampler(POOL, **given_embeddings)
    for query, examples in zip(POOL, drawn):
        texts = [text for text, _ in examples]
        assert query not in texts
        assert len(set(texts)) == n
        assert all(LABELS[POOL.index(text)] == label for text, label in examples)
        if strategy == "balanced":
            counts = np.bincount([label for _, label in examples], minlength=3)
            assert counts.max() - counts.min() <= 1


def test_a_draw_depends_on_the_query_s_place_and_the_seed_alone():
    sampler = DemonstrationSampler(POOL, LABELS, 4, seed=1)
    together = sampler(["a", "b", "c"])
    assert together == sampler(["a"]) + sampler(["b", "c"], start=1)
    assert together == sampler(["d", "e", "f"])
    assert together[0] != together[1]
    assert together != DemonstrationSampler(POOL, LABELS, 4, seed=2)(["a", "b", "c"])


def test_every_example_is_drawn_equally_often():
    drawn = DemonstrationSampler(POOL, LABELS, 3)(["query"] * 4000)
    counts = np.bincount([POOL.index(text) for examples in drawn for text, _ in examples])
    assert np.abs(counts / 1000 - 1).max() < 0.15


def test_the_most_similar_stands_last():
    sampler = DemonstrationSampler(POOL, LABELS, 3, "nearest", embeddings=EMBEDDINGS)
    shown = sampler(["new"], embeddings=2 * EMBEDDINGS[7:8] + 0.01)[0]
    assert shown[-1] == ("text 7", 1)
    similarity = torch.nn.functional.cosine_similarity(EMBEDDINGS, EMBEDDINGS[7:8])
    order = [POOL.index(text) for text, _ in shown]
    assert similarity[order].tolist() == sorted(similarity.tolist())[-3:]
    assert sampler(["text 7"], embeddings=EMBEDDINGS[7:8])[0][-1] == shown[-2]  # itself is not shown


def test_copies_of_the_query_are_not_shown_either():
    sampler = DemonstrationSampler(["a", "a", "b"], [0, 0, 1], 1)
    assert {examples[0] for examples in sampler(["a"] * 20)} == {("b", 1)}


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(InputError, match="n must not exceed the pool, got 13 demonstrations of 12 texts"):
        DemonstrationSampler(POOL, LABELS, 13)
    with pytest.raises(InputError, match="n must be at least 1"):
        DemonstrationSampler(POOL, LABELS, 0)
    with pytest.raises(InputError, match="labels must have 12 entries"):
        DemonstrationSampler(POOL, LABELS[:3], 2)
    with pytest.raises(InputError, match="found -1 at row 1"):
        DemonstrationSampler(["a", "b"], [0, -1], 1)
    with pytest.raises(InputError, match="strategy must be one of random, balanced, nearest, got 'bm25'"):
        DemonstrationSampler(POOL, LABELS, 2, "bm25")
    with pytest.raises(InputError, match="embeddings must be given for strategy 'nearest'"):
        DemonstrationSampler(POOL, LABELS, 2, "nearest")
    with pytest.raises(InputError, match="texts must be a list of strings"):
        DemonstrationSampler("text", LABELS, 2)
    with pytest.raises(InputError, match="texts must be a list of strings"):
        DemonstrationSampler(None, LABELS, 2)
    with pytest.raises(InputError, match="texts must be a list of strings"):
        DemonstrationSampler(POOL, LABELS, 2)("query")
    with pytest.raises(InputError, match="start must be at least 0, got -1"):
        DemonstrationSampler(POOL, LABELS, 2)(["query"], start=-1)
    with pytest.raises(InputError, match="embeddings must have 12 rows, got 3"):
        DemonstrationSampler(POOL, LABELS, 2, "nearest", embeddings=EMBEDDINGS[:3])
    nearest = DemonstrationSampler(POOL, LABELS, 2, "nearest", embeddings=EMBEDDINGS)
    with pytest.raises(InputError, match="embeddings of the queries must be given"):
        nearest(["a"])
    with pytest.raises(InputError, match="embeddings must have 5 columns, got 4"):
        nearest(["a"], embeddings=torch.zeros(1, 4))
    with pytest.raises(InputError, match="the pool holds 11 examples besides query 0, n is 12"):
        DemonstrationSampler(POOL, LABELS, 12)(["text 3"])
    with pytest.raises(InputError, match="the pool holds 0 examples of class 1 besides the query, not 1"):
        DemonstrationSampler(["a", "b", "c"], [0, 1, 0], 2, "balanced")(["b"])
