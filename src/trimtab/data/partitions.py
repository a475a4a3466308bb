"""Partitions: one data set divided among the clients of a federation."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.data.streams import chunk_sizes, sorted_by_label


def dirichlet_partition(
    labels: Int[Tensor, " n"],
    clients: int,
    beta: float,
    generator: torch.Generator,
    *,
    smallest: int = 10,
    draws: int = 1000,
) -> list[Int[Tensor, " _"]]:
    """Clients whose classes differ: every class is spread over them in proportions drawn from Dir(beta).

    Clients that already hold their share (n / clients) get nothing more of the classes that follow; the drawing is
    repeated until each has `smallest` samples. Both are customary since Yurochkin et al. (2019), arXiv 1905.12022.

    Args:
        labels: class indices >= 0, (n,).
        clients: how many, >= 1.
        beta: concentration, > 0. Small is heterogeneous (0.05: mostly one or two classes a client), large approaches
            equal clients; papers use 0.05 to 0.5.
        generator: a CPU generator; the same state gives the same partition.
        smallest: least number of samples of a client; 10 as is customary.
        draws: how often to draw before giving up.

    Returns:
        The indices of each client's samples, ascending; every sample is one client's.

    Raises:
        InputError: an argument is out of range, or no draw left every client with `smallest` samples.

    Example:
        >>> labels = torch.arange(3).repeat(100)
        >>> parts = dirichlet_partition(labels, 3, 0.1, torch.Generator().manual_seed(0))
        >>> [labels[part].bincount(minlength=3).tolist() for part in parts]
        [[99, 0, 0], [0, 99, 3], [1, 1, 97]]
    """
    order = sorted_by_label(labels, generator)
    checks.integer(clients, "clients", low=1)
    checks.number(beta, "beta", low=0, low_open=True)
    checks.integer(smallest, "smallest", low=0)
    if smallest * clients > len(order):
        raise InputError(f"labels must hold {smallest} samples for each of {clients} clients, got {len(order)}")
    counts = np.unique(checks.tensor(labels, "labels").cpu().numpy(), return_counts=True)[1].tolist()
    for _ in range(checks.integer(draws, "draws", low=1)):
        sizes = chunk_sizes(counts, clients, beta, generator)
        if int(sizes.sum(0).min()) >= smallest:
            break
    else:
        raise InputError(
            f"beta {beta:g} left a client with fewer than {smallest} samples in each of {draws} draws: "
            "raise beta or lower smallest"
        )
    pieces = [part.split_with_sizes(row.tolist()) for part, row in zip(order.split_with_sizes(counts), sizes)]
    return [torch.cat(parts).sort().values for parts in zip(*pieces)]
