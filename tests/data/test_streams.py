"""Streams: every sample once, the order that the name says, seeded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from trimtab.core.checks import InputError
from trimtab.data import streams


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def purity(labels, order, window=50):
    """Mean share of the commonest class in consecutive windows."""
    parts = labels[order].split(window)
    return sum(float(part.bincount().max()) / len(part) for part in parts) / len(parts)


@given(st.integers(1, 200), st.integers(0, 99))
def test_iid_is_a_seeded_permutation(n, seed):
    order = streams.iid(n, seeded(seed))
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, streams.iid(n, seeded(seed)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 99))
def test_sorted_by_label_is_ascending_and_shuffled_inside(values, seed):
    labels = torch.tensor(values)
    order = streams.sorted_by_label(labels, seeded(seed))
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    assert bool((labels[order].diff() >= 0).all())


def test_sorted_by_label_shuffles_each_class():
    order = streams.sorted_by_label(torch.zeros(100, dtype=torch.long), seeded())
    assert not torch.equal(order, torch.arange(100))


@settings(max_examples=30)
@given(st.sampled_from([0.0, 1e-4, 0.01, 0.1, 1.0, 100.0]), st.integers(0, 99))
def test_dirichlet_is_a_seeded_permutation(delta, seed):
    labels = torch.randint(0, 10, (1500,), generator=seeded(seed)) * 7
    order = streams.dirichlet(labels, delta, seeded(seed))
    assert torch.equal(order.sort().values, torch.arange(1500))
    assert torch.equal(order, streams.dirichlet(labels, delta, seeded(seed)))


def test_dirichlet_grows_more_correlated_as_delta_falls():
    labels = torch.arange(10).repeat(200)
    means = [
        sum(purity(labels, streams.dirichlet(labels, delta, seeded(s))) for s in range(5)) / 5
        for delta in (0.0, 0.01, 0.1, 1.0, 100.0)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] == 1.0
    # classes follow one another inside a chunk of 200, about 20 each: a window of 50 sees two or three of them
    assert means[-1] < 0.55
    assert purity(labels, streams.iid(2000, seeded())) < 0.3


def test_dirichlet_shares_match_the_distribution():
    """Two classes, two chunks: the first class's share of the first chunk is Beta(delta, delta)."""
    delta, draws, count = 0.5, 4000, 10_000
    generator = seeded()
    share = torch.stack([streams.chunk_sizes([count, count], 2, delta, generator)[0, 0] for _ in range(draws)]) / count
    # Beta(1/2, 1/2): mean 1/2, variance 1/8, and a third of its mass below 1/4
    assert abs(float(share.mean()) - 0.5) < 0.03
    assert abs(float(share.var()) - 0.125) < 0.008
    assert abs(float((share < 0.25).double().mean()) - 1 / 3) < 0.03


def test_dirichlet_adds_nothing_to_a_full_chunk():
    for seed in range(20):
        sizes = streams.chunk_sizes([100] * 10, 10, 0.1, seeded(seed))
        closed = sizes.cumsum(0)[:-1] >= 100
        assert int(sizes[1:][closed].sum()) == 0
        assert sizes.sum(1).tolist() == [100] * 10


def test_continual_and_mixed_hold_every_sample_once():
    orders = [streams.iid(n, seeded(n)) for n in (7, 30, 1)]
    one_by_one = streams.continual(orders)
    assert bool((one_by_one[:, 0].diff() >= 0).all())
    woven = streams.mixed(orders, seeded())
    assert not torch.equal(one_by_one, woven)
    for d, order in enumerate(orders):
        assert torch.equal(one_by_one[one_by_one[:, 0] == d, 1], order)
        assert torch.equal(woven[woven[:, 0] == d, 1], order)


def test_mixed_spreads_the_domains_evenly():
    woven = streams.mixed([torch.arange(500)] * 4, seeded())
    for part in woven[:, 0].split(200):
        assert int(part.bincount(minlength=4).min()) > 25


def test_batches_follow_the_order():
    images, labels = torch.arange(12.0).reshape(6, 1, 1, 2), torch.arange(6)
    data = TensorDataset(images, labels)
    order = streams.iid(6, seeded())
    got = list(streams.batches(data, order, 4))
    assert [len(y) for _, y in got] == [4, 2]
    assert torch.equal(torch.cat([y for _, y in got]), order)
    assert torch.equal(torch.cat([x for x, _ in got]), images[order])
    sampled = list(DataLoader(data, batch_size=4, sampler=order.tolist(), generator=torch.Generator()))
    assert all(torch.equal(a, b) for mine, plain in zip(got, sampled) for a, b in zip(mine, plain))


def test_batches_of_several_domains():
    domains = [TensorDataset(torch.full((n, 1), float(d)), torch.arange(n)) for d, n in enumerate((3, 5))]
    pairs = streams.mixed([torch.arange(3), torch.arange(5)], seeded())
    x, y = next(iter(streams.batches(domains, pairs, 8)))
    assert torch.equal(torch.stack((x[:, 0].long(), y), 1), pairs)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streams.iid(0, seeded()), "n must be at least 1, got 0"),
        (lambda: streams.sorted_by_label(torch.zeros(2, 2).long(), seeded()), r"labels must have shape \(n,\)"),
        (lambda: streams.sorted_by_label(torch.zeros(0).long(), seeded()), r"n >= 1, got \(0,\)"),
        (lambda: streams.sorted_by_label(torch.zeros(3), seeded()), "labels must be integers, got float32"),
        (lambda: streams.sorted_by_label(torch.tensor([0, 1, -2]), seeded()), "must be >= 0, found -2 at row 2"),
        (lambda: streams.dirichlet(torch.arange(10).repeat(20), -1, seeded()), "delta must lie in"),
        (lambda: streams.dirichlet(torch.arange(10).repeat(20), float("nan"), seeded()), "delta must lie in"),
        (lambda: streams.dirichlet(torch.arange(10), 1, seeded()), "at least 10 samples for each of the 10 classes"),
        (lambda: streams.dirichlet(torch.arange(10).repeat(10), 0.01, seeded(), draws=2), "raise delta or lower"),
        (lambda: streams.continual([]), "at least one domain"),
        (lambda: streams.mixed([torch.arange(2), torch.zeros(2)], seeded()), r"orders\[1\] must be integers"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("many", "order", "message"),
    [
        (False, torch.tensor([[0, 1]]), r"shape \(n,\) for one dataset"),
        (True, torch.tensor([0, 1]), r"shape \(n, 2\) for a list"),
        (False, torch.tensor([0, 3]), r"sizes \[3\], found 3 at row 1"),
        (True, torch.tensor([[0, 0], [0, -1]]), r"found \[0, -1\] at row 1"),
        (True, torch.tensor([[2, 0]]), r"found \[2, 0\] at row 0"),
    ],
)
def test_batches_refuse_an_order_that_does_not_fit(many, order, message):
    data = TensorDataset(torch.zeros(3, 1))
    with pytest.raises(InputError, match=message):
        streams.batches([data, data] if many else data, order, 2)
