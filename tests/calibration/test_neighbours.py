import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.calibration import neighbours


def one_by_one(points, kinds, support, support_kinds, itself):
    """Every neighbour sorted, ties by row: what the definition says."""
    lengths, distances = [], []
    for i, (point, kind) in enumerate(zip(points, kinds)):
        d = (support - point).square().sum(1)
        order = [int(j) for j in d.argsort(stable=True) if not (itself and int(j) == i)]
        run = 0
        while run < len(order) and support_kinds[order[run]] == kind:
            run += 1
        lengths.append(run)
        distances.append(float(d[order[0]]))
    return lengths, distances


@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_runs_are_those_of_sorted_neighbours_ties_included(seed, n, d, c, itself, dtype):
    generator = torch.Generator().manual_seed(seed)
    # a small grid, so that many distances are equal
    support = torch.randint(0, 4, (n, d), generator=generator).to(dtype)
    kinds = torch.randint(-1, c, (n,), generator=generator)
    points, wanted = support, kinds.clamp(min=0)
    if not itself:
        points = torch.randint(0, 4, (25, d), generator=generator).to(dtype)
        wanted = torch.randint(0, c, (25,), generator=generator)
    lengths, distances = neighbours.runs(points, wanted, support, kinds, itself=itself)
    expected = one_by_one(points, wanted, support, kinds, itself)
    assert (lengths.tolist(), distances.tolist()) == expected


@pytest.mark.parametrize("itself", [False, True])
def test_tiles_do_not_show(monkeypatch, itself):
    generator = torch.Generator().manual_seed(3)
    support = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    kinds = (support[:, 0] > 0).long() + (support[:, 1] > 1).long()
    points = support if itself else torch.randn(70, 6, generator=generator, dtype=torch.float64)
    wanted = kinds[: len(points)]
    whole = neighbours.runs(points, wanted, support, kinds, itself=itself)
    monkeypatch.setattr(neighbours, "_ROWS", 7)
    monkeypatch.setattr(neighbours, "_COLUMNS", 11)
    tiled = neighbours.runs(points, wanted, support, kinds, itself=itself)
    assert torch.equal(whole[0], tiled[0])
    assert torch.equal(whole[1], tiled[1])
    assert int(whole[0].max()) > 11
    assert whole[0].tolist() == one_by_one(points, wanted, support, kinds, itself)[0]


def test_a_far_offset_costs_no_accuracy():
    generator = torch.Generator().manual_seed(4)
    support = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    kinds = torch.randint(0, 2, (200,), generator=generator)
    here = neighbours.runs(support, kinds, support, kinds, itself=True)
    there = neighbours.runs(support + 1e6, kinds, support + 1e6, kinds, itself=True)
    assert torch.equal(here[0], there[0])
    torch.testing.assert_close(here[1], there[1], rtol=1e-6, atol=1e-6)


def test_without_another_kind_all_are_alike():
    support = torch.eye(5)
    lengths, distances = neighbours.runs(support, torch.zeros(5).long(), support, torch.zeros(5).long(), itself=True)
    assert lengths.tolist() == [4] * 5
    assert distances.tolist() == [2.0] * 5
    lengths, _ = neighbours.runs(support, torch.ones(5).long(), support, torch.zeros(5).long())
    assert lengths.tolist() == [0] * 5
