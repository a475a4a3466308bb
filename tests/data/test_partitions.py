"""Partitions: every sample is one client's, and a small beta makes the clients differ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.data import dirichlet_partition


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 8), st.sampled_from([0.01, 0.1, 1.0, 100.0]), st.integers(0, 99))
def test_every_sample_is_one_clients(clients, beta, seed):
    labels = torch.randint(0, 5, (300,), generator=seeded(seed)) * 7
    parts = dirichlet_partition(labels, clients, beta, seeded(seed), smallest=2)
    assert len(parts) == clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    assert min(map(len, parts)) >= 2
    assert all(bool((part.diff() > 0).all()) for part in parts)
    again = dirichlet_partition(labels, clients, beta, seeded(seed), smallest=2)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


def test_clients_differ_more_as_beta_falls():
    labels = torch.arange(10).repeat(100)
    purity = []
    for beta in (0.05, 0.5, 100.0):
        parts = [part for s in range(5) for part in dirichlet_partition(labels, 10, beta, seeded(s))]
        purity.append(sum(float(labels[part].bincount().max()) / len(part) for part in parts) / len(parts))
    assert purity == sorted(purity, reverse=True)
    assert purity[0] > 0.6
    assert purity[2] < 0.2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(0, dtype=torch.long), 2, 0.1), r"labels must have shape \(n,\) with n >= 1"),
        ((torch.arange(9), 0, 0.1), "clients must be at least 1"),
        ((torch.arange(90), 2, 0.0), r"beta must lie in \(0, inf\)"),
        ((torch.arange(9), 2, 0.1), "labels must hold 10 samples for each of 2 clients, got 9"),
        ((torch.zeros(40, dtype=torch.long), 2, 1e-4), "beta 0.0001 left a client with fewer than 10 samples"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        dirichlet_partition(*arguments, seeded(), draws=3)
