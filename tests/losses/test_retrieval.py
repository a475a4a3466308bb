"""Scores of a batch of a dual encoder; the losses that take them are of 10-mw-loss."""

import pytest
import torch

from trimtab.core.checks import InputError
from trimtab.losses import dual_encoder_scores


def test_every_query_meets_every_passage():
    queries, passages = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hard = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cosines = dual_encoder_scores(queries, passages, hard)
    products = dual_encoder_scores(queries, passages, hard, normalize=False)
    assert cosines.shape == (3, 9)
    for i in range(3):
        for j in range(9):
            other = passages[j] if j < 3 else hard[(j - 3) // 2, (j - 3) % 2]
            torch.testing.assert_close(products[i, j], queries[i] @ other)
            torch.testing.assert_close(cosines[i, j], torch.cosine_similarity(queries[i], other, 0))
    assert torch.equal(dual_encoder_scores(queries, passages), cosines[:, :3])


def test_autocast_does_not_narrow_the_product():
    queries, passages = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = dual_encoder_scores(queries.bfloat16(), passages.bfloat16())
    assert torch.equal(found, dual_encoder_scores(queries.bfloat16().float(), passages.bfloat16().float()))


@pytest.mark.bad_input
def test_bad_input_is_refused():
    q = torch.ones(2, 3)
    for arguments, message in (
        ((q, q[:1]), "passages must have a row for each of the 2 queries, got 1"),
        ((q, q[:, :2]), "passages must have 3 columns, got 2"),
        ((q, q.to("meta")), "passages must be on the device of queries"),
        ((q, q, q), r"hard must have shape \(2, h, 3\), got \(2, 3\)"),
        ((q, q, torch.ones(2, 1, 3).long()), "hard must be floating point, got int64"),
        ((q, q, torch.full((2, 1, 3), torch.nan)), "hard must be finite, found nan at axis 0 index 0"),
        ((q.long(), q), "queries must be floating point"),
    ):
        with pytest.raises(InputError, match=message):
            dual_encoder_scores(*arguments)
