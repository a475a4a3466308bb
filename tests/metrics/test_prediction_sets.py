"""Coverage and size of sets: MAPIE's numbers, mergeable states, and how the parts make the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import metrics
from trimtab.core.checks import InputError


def some_sets(n, c, seed):
    g = torch.Generator().manual_seed(seed)
    sets = torch.rand(n, c, generator=g) < torch.rand(n, 1, generator=g)
    return sets, torch.randint(0, c, (n,), generator=g)


@pytest.mark.parametrize("seed", range(3))
def test_they_are_mapies(seed):
    from mapie.metrics.classification import (
        classification_coverage_score,
        classification_mean_width_score,
        classification_ssc,
    )

    sets, labels = some_sets(400, 6, seed)
    strata = metrics.size_stratified_coverage(sets, labels)
    arrays = sets.numpy()[:, :, None]
    assert metrics.coverage(sets, labels) == pytest.approx(classification_coverage_score(labels.numpy(), arrays)[0])
    assert metrics.set_size(sets) == pytest.approx(classification_mean_width_score(arrays)[0])
    theirs = classification_ssc(labels.numpy(), arrays)[0]
    assert strata.coverage.numpy() == pytest.approx(theirs)


@given(n=st.integers(1, 50), c=st.integers(1, 6), seed=st.integers(0, 1000), parts=st.integers(1, 4))
def test_parts_make_the_whole(n, c, seed, parts):
    sets, labels = some_sets(n, c, seed)
    strata = metrics.size_stratified_coverage(sets, labels)
    assert int(strata.sets.sum()) == n
    assert float(strata.sets.double() @ strata.coverage) / n == pytest.approx(metrics.coverage(sets, labels))
    assert float(strata.sets.double() @ strata.size.double()) / n == pytest.approx(metrics.set_size(sets))
    whole = [metrics.Coverage(), metrics.SetSize(), metrics.SizeStratifiedCoverage(c)]
    for i in range(parts):
        if len(labels[i::parts]):
            for kind, each in zip(whole, ((sets, labels), (sets,), (sets, labels))):
                one = type(kind)(c) if isinstance(kind, metrics.SizeStratifiedCoverage) else type(kind)()
                one.update(*(x[i::parts] for x in each))
                kind.merge_state(one)
    assert float(whole[0].compute()) == pytest.approx(metrics.coverage(sets.numpy(), labels.numpy()))
    assert float(whole[1].compute()) == pytest.approx(metrics.set_size(sets.numpy()))
    for ours, theirs in zip(whole[2].compute(), strata):
        assert torch.equal(ours.reshape(-1), theirs)  # torchmetrics makes a scalar of a single number


@pytest.mark.bad_input
def test_bad_input_is_refused():
    sets, labels = some_sets(4, 3, 0)
    for s, y, message in (
        (sets.float(), labels, r"sets must be booleans of shape \(n, c\), n and c >= 1, got torch.float32"),
        (sets[0], labels, "sets must be booleans"),
        (sets[:0], labels[:0], "sets must be booleans"),
        (sets, labels[:2], "labels must have 4 entries"),
        (sets, labels + 3, "labels must lie in 0..2"),
    ):
        for function in (metrics.coverage, metrics.size_stratified_coverage):
            with pytest.raises(InputError, match=message):
                function(s, y)
    with pytest.raises(InputError, match="sets must be booleans"):
        metrics.set_size(sets.int())
    with pytest.raises(InputError, match="sets must have 5 columns, got 3"):
        metrics.SizeStratifiedCoverage(5).update(sets, labels)
