"""Statistics of the clients of card 47-ccvr: merged they are those of the pooled samples, in any grouping."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import generator
from torch import nn

from trimtab.calibration import (
    ClassStatistics,
    class_statistics,
    collect_class_statistics,
    merge_class_statistics,
    sample_virtual_features,
)
from trimtab.core.checks import InputError

KINDS = ("full", "diagonal", "shared")
kinds = pytest.mark.parametrize("kind", KINDS)
GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "47-ccvr").glob("*.npz"))


def federation(seed, clients, c, d, n=40, spread=1.0, mean=0.0):
    """Features, labels and the client of each sample; clients and classes may be empty."""
    random = generator(seed)
    x = mean + spread * torch.randn(n, d, generator=random, dtype=torch.float64)
    return (
        x,
        torch.randint(c, (n,), generator=random),
        torch.randint(clients, (n,), generator=random),
    )


def of_clients(x, y, client, c, **options):
    return [class_statistics(x[client == k], y[client == k], c, **options) for k in client.unique()]


def same(a, b, atol=1e-10):
    return (
        torch.equal(a.counts, b.counts)
        and torch.allclose(a.means, b.means, rtol=0, atol=atol)
        and torch.allclose(a.covariances, b.covariances, rtol=0, atol=atol)
    )


@pytest.mark.golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_parity(path):
    with np.load(path) as arrays:
        g = dict(arrays)
    clients, c = g["counts"].shape
    held = [k for k in range(clients) if g["counts"][k].any()]
    found = [class_statistics(g["features"][g["client"] == k], g["labels"][g["client"] == k], c) for k in held]
    for k, statistics in zip(held, found):
        np.testing.assert_array_equal(statistics.counts, g["counts"][k])
        matches(statistics, g["client_means"][k], g["client_covs"][k])
    arrays = zip(*(torch.from_numpy(g[name]) for name in ("counts", "client_means", "client_covs")))
    brought = [ClassStatistics(*parts) for parts in arrays]
    for merged in (merge_class_statistics(found), merge_class_statistics(brought)):
        matches(merged, g["global_mean"], g["global_cov"])


def matches(statistics, means, covariances):
    """Equal where they are defined, and zero elsewhere."""
    seen, spread = statistics.counts.numpy()[:, None] > 0, statistics.counts.numpy()[:, None, None] > 1
    np.testing.assert_allclose(statistics.means, np.where(seen, means, 0), atol=1e-10)
    np.testing.assert_allclose(statistics.covariances, np.where(spread, covariances, 0), atol=1e-10)


def test_golden_files_are_there():
    assert GOLDEN


@kinds
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
def test_merged_is_pooled_however_grouped(kind, seed, clients, c, d, n):
    x, y, client = federation(seed, clients, c, d, n)
    parts = of_clients(x, y, client, c, covariance=kind)
    pooled = class_statistics(x, y, c, covariance=kind)
    assert same(merge_class_statistics(parts), pooled)
    cut = seed % len(parts)
    left, right = parts[:cut], parts[cut:]
    nested = [merge_class_statistics(group) for group in (right, left) if group]
    assert same(merge_class_statistics(nested), pooled)


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 4))
def test_each_kind_is_numpys(seed, c, d):
    x, y, _ = federation(seed, 1, c, d)
    full, diagonal, shared = (class_statistics(x, y, c, covariance=kind) for kind in KINDS)
    within, dof = np.zeros((d, d)), 0
    for k in range(c):
        rows = x[y == k].numpy()
        if len(rows) > 1:
            expected = np.atleast_2d(np.cov(rows.T))
            np.testing.assert_allclose(full.covariances[k], expected, atol=1e-12)
            np.testing.assert_allclose(diagonal.covariances[k], np.diag(expected), atol=1e-12)
            within, dof = within + (len(rows) - 1) * expected, dof + len(rows) - 1
    np.testing.assert_allclose(shared.covariances, within / dof, atol=1e-12)


def test_a_mean_far_beyond_the_spread_costs_no_digits():
    x, y, client = federation(0, 5, 2, 3, n=400, spread=1e-3, mean=1e4)
    merged = merge_class_statistics(of_clients(x, y, client, 2))
    expected = torch.from_numpy(np.cov((x[y == 0] - 1e4).numpy().T))
    np.testing.assert_allclose(merged.covariances[0], expected, rtol=1e-5, atol=1e-12)
    # the formula as the paper writes it, for comparison
    parts = of_clients(x, y, client, 2)
    n, mu = merged.counts[0], merged.means[0]
    paper = sum((p.counts[0] - 1) / (n - 1) * p.covariances[0] for p in parts)
    paper += sum(p.counts[0] / (n - 1) * p.means[0].outer(p.means[0]) for p in parts) - n / (n - 1) * mu.outer(mu)
    assert (paper - expected).abs().max() > 100 * (merged.covariances[0] - expected).abs().max()


@kinds
def test_a_loader_gives_what_the_whole_gives(kind):
    x, y, _ = federation(0, 1, 3, 4, n=50)
    model = nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.utils.skip_init(nn.Linear, 4, 3)).double()
    batches = [*zip(x.split(7), y.split(7))]
    model.train()
    found = collect_class_statistics(model, batches, covariance=kind, tukey=0.5)
    assert all(module.training for module in model)
    assert same(found, class_statistics(x.relu(), y, 3, covariance=kind, tukey=0.5))


def filled(model):
    """The same weight everywhere, where skip_init leaves whatever was in the memory."""
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    return model


def test_a_chosen_layer():
    linear = [nn.utils.skip_init(nn.Linear, 2, 3), nn.utils.skip_init(nn.Linear, 3, 2)]
    model = filled(nn.Sequential(*linear))
    batches = [(torch.eye(2), torch.tensor([0, 2]))]
    assert torch.equal(collect_class_statistics(model, batches, layer="0").means[[0, 2]], torch.eye(2).double())
    with pytest.raises(InputError, match=r"layer must name an nn.Linear"):
        collect_class_statistics(nn.Sequential(nn.ReLU(), *linear), batches, layer="0")
    with pytest.raises(InputError, match=r"batch 0: labels must lie in 0..1, found 2 at row 1"):
        collect_class_statistics(model, batches)


@pytest.mark.bad_input
def test_loaders_that_say_nothing():
    model, bad = filled(nn.utils.skip_init(nn.Linear, 2, 2)), torch.tensor([[0.0, 0.0], [torch.nan, 0.0]])
    with pytest.raises(InputError, match="at least one batch"):
        collect_class_statistics(model, [])
    with pytest.raises(InputError, match="batch 0: loader must yield labels"):
        collect_class_statistics(model, [torch.zeros(2, 2)])
    with pytest.raises(InputError, match=r"batch 1: the classifier's input must be finite, found nan at row 1"):
        collect_class_statistics(model, [(torch.zeros(1, 2), torch.tensor([1])), (bad, torch.tensor([0, 1]))])
    with pytest.raises(InputError, match=r"the classifier's input must have shape \(n, c\)"):
        collect_class_statistics(model, [(torch.zeros(2, 3, 2), torch.tensor([0, 1]))])


@kinds
def test_files_bring_back_every_bit(kind, tmp_path):
    x, y, _ = federation(0, 1, 3, 2, n=6)
    statistics = class_statistics(x.abs(), y, 3, covariance=kind, tukey=0.5)
    statistics.write(tmp_path / "client.safetensors")
    back = ClassStatistics.read(tmp_path / "client.safetensors")
    assert same(statistics, back, atol=0)
    assert (back.covariance, back.tukey) == (kind, 0.5)
    (tmp_path / "client.json").write_text('{"covariance": "round"}')
    with pytest.raises(InputError, match="not class statistics"):
        ClassStatistics.read(tmp_path / "client.safetensors")


@kinds
def test_virtual_features_follow_the_statistics(kind):
    x, y, _ = federation(0, 1, 3, 3, n=60)
    x = x @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 2.0, 0.3]], dtype=torch.float64)
    statistics = class_statistics(x, y, 3, covariance=kind)
    virtual, labels = sample_virtual_features(statistics, 20_000, generator(1))
    again = class_statistics(virtual, labels, 3, covariance=kind)
    assert again.counts.tolist() == [20_000] * 3
    assert same(ClassStatistics(statistics.counts, again.means, again.covariances, kind), statistics, atol=0.3)
    assert torch.equal(virtual, sample_virtual_features(statistics, 20_000, generator(1))[0])


def test_a_power_is_undone_in_the_features():
    x = torch.rand(500, 2, generator=generator(0), dtype=torch.float64) ** 4
    statistics = class_statistics(x, torch.zeros(500, dtype=torch.long), 1, tukey=0.5)
    virtual, _ = sample_virtual_features(statistics, 5000, generator(1))
    assert virtual.min() >= 0
    assert torch.allclose(virtual.mean(0), x.mean(0), rtol=0.15)


def test_classes_without_enough_samples_are_named():
    counts, means = torch.tensor([2, 1, 0, 5]), torch.ones(4, 2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"no virtual features for classes \[1, 2\]: fewer than 2"):
        _, y = sample_virtual_features(ClassStatistics(counts, means, eye.expand(4, 2, 2)), 3, generator(0))
    assert y.tolist() == [0, 0, 0, 3, 3, 3]
    with pytest.warns(UserWarning, match=r"classes \[2\]: fewer than 1"):
        _, y = sample_virtual_features(ClassStatistics(counts, means, eye, "shared"), 1, generator(0))
    assert y.tolist() == [0, 1, 3]
    for kind, covariances in (("full", eye.expand(4, 2, 2)), ("shared", eye)):  # one sample of each: no spread
        few = ClassStatistics(counts.clamp(max=1), means, covariances, kind)
        with pytest.raises(InputError, match="a class with at least 2 samples"):
            sample_virtual_features(few, 3, generator(0))


def test_a_client_with_one_sample():
    one = class_statistics(torch.tensor([[3.0, 4.0]]), torch.tensor([1]), 3)
    assert one.counts.tolist() == [0, 1, 0]
    assert one.means[1].tolist() == [3.0, 4.0]
    assert not one.covariances.any()


def test_a_covariance_of_any_rank_or_sign_is_drawn_from():
    indefinite = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)  # eigenvalues 3 and -1
    statistics = ClassStatistics(torch.tensor([9]), torch.zeros(1, 2, dtype=torch.float64), indefinite)
    x, _ = sample_virtual_features(statistics, 100, generator(0))
    torch.testing.assert_close(x[:, 0], x[:, 1])
    constant = class_statistics(torch.ones(4, 2), torch.zeros(4, dtype=torch.long), 1)
    assert bool((sample_virtual_features(constant, 5, generator(0))[0] == 1).all())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, -1], np.ones((2, 2)), np.ones((2, 2, 2))), "counts must be >= 0, found -1 at row 1"),
        (([1.0, 1.0], np.ones((2, 2)), np.ones((2, 2, 2))), "counts must be integers"),
        (([1, 1], np.ones((3, 2)), np.ones((2, 2, 2))), r"means must have shape \(2, d\)"),
        (([2, 2], np.ones((2, 2)), np.ones((2, 2))), r"full covariances must have shape \(2, 2, 2\)"),
        (([2, 2], np.full((2, 2), np.nan), np.ones((2, 2, 2))), "means must be finite, found nan at row 0"),
        (
            ([1, 2], np.ones((2, 2)), np.full((2, 2, 2), np.inf)),
            "covariances must be finite, found inf at axis 0 index 1",
        ),
        (([2, 2], np.ones((2, 2)), np.arange(8.0).reshape(2, 2, 2)), "covariances must be symmetric"),
        (([2, 2], np.ones((2, 2)), np.ones((2, 2)), "round"), "covariance must be one of full, diagonal, shared"),
        (([2, 2], np.ones((2, 2)), np.ones((2, 2)), "diagonal", 0.0), r"tukey must lie in \(0, 1\]"),
    ],
)
def test_statistics_that_cannot_be(arguments, message):
    counts, *rest = arguments
    with pytest.raises(InputError, match=message):
        ClassStatistics(np.array(counts), *rest)


@pytest.mark.bad_input
def test_bad_features_and_labels():
    x, y = torch.ones(2, 2), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"features must be finite, found nan at row 1, column 0"):
        class_statistics(torch.tensor([[0.0], [torch.nan]]), y, 2)
    with pytest.raises(InputError, match=r"labels must lie in 0..0, found 1 at row 1"):
        class_statistics(x, y, 1)
    with pytest.raises(InputError, match="num_classes must be at least 1"):
        class_statistics(x, y, 0)
    with pytest.raises(InputError, match=r"features must be >= 0 for a Tukey power, found -1 at row 0, column 0"):
        class_statistics(-x, y, 2, tukey=0.5)
    with pytest.raises(InputError, match="n must be at least 1"):
        sample_virtual_features(class_statistics(x, y, 2), 0, generator(0))


@pytest.mark.bad_input
def test_statistics_that_do_not_fit_together():
    x, y = torch.ones(2, 2), torch.tensor([0, 1])
    first = class_statistics(x, y, 2)
    with pytest.raises(InputError, match="at least one client's"):
        merge_class_statistics([])
    with pytest.raises(InputError, match=r"statistics must be a sequence of ClassStatistics, one a client, got one"):
        merge_class_statistics(first)
    with pytest.raises(InputError, match=r"agree in d: 2 in the first, 1 in number 1"):
        merge_class_statistics([first, class_statistics(x[:, :1], y, 2)])
    with pytest.raises(InputError, match="agree in c"):
        merge_class_statistics([first, class_statistics(x, y, 3)])
    with pytest.raises(InputError, match="agree in covariance: 'full' in the first, 'shared' in number 1"):
        merge_class_statistics([first, class_statistics(x, y, 2, covariance="shared")])
    with pytest.raises(InputError, match="agree in tukey"):
        merge_class_statistics([first, class_statistics(x, y, 2, tukey=0.5)])
    with pytest.raises(InputError, match=r"statistics\[1\] must be ClassStatistics, got dict"):
        merge_class_statistics([first, {}])
