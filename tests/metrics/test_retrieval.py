"""Pooled retrieval AUC against counting; the measure of 10-mw-loss."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.metrics import PooledRetrievalAUC, pooled_retrieval_auc


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(2, 8), st.integers(1, 9) | st.none())
def test_it_is_the_area_of_positives_and_top_negatives(seed, q, d, top_k):
    random = np.random.default_rng(seed)
    scores, relevance = random.permutation(q * d).reshape(q, d) / 7.0, random.random((q, d)) < 0.4
    order = np.argsort(-scores, 1)[:, :top_k]
    negatives = np.concatenate([s[o][~r[o]] for s, r, o in zip(scores, relevance, order)])
    metric = PooledRetrievalAUC(top_k)
    if not relevance.any() or not len(negatives):
        with pytest.raises(InputError, match=r"relevance must leave a (positive|negative) pair to compare"):
            pooled_retrieval_auc(scores, relevance, top_k)
        return
    expected = definitions.auc(scores[relevance], negatives)
    assert pooled_retrieval_auc(scores, relevance, top_k) == pytest.approx(expected, abs=1e-12)
    for row in range(q):
        metric.update(torch.from_numpy(scores[row : row + 1]), torch.from_numpy(relevance[row : row + 1]))
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-12)


def test_ties_count_half():
    assert pooled_retrieval_auc(torch.zeros(2, 3), torch.eye(2, 3).bool()) == 0.5


@pytest.mark.bad_input
def test_bad_input_is_refused():
    scores, relevance = torch.zeros(2, 3), torch.eye(2, 3).bool()
    for arguments, message in (
        ((scores, relevance[:1]), r"relevance must be boolean of shape \(2, 3\), got bool \(1, 3\)"),
        ((scores, relevance.int()), r"relevance must be boolean of shape \(2, 3\), got int32"),
        ((scores * torch.nan, relevance), "scores must be finite"),
        ((scores, relevance, 0), "top_k must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            pooled_retrieval_auc(*arguments)
