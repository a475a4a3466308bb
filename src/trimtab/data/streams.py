"""Streams: the orders in which a deployed model meets its samples.

A stream is an order, nothing more: an index tensor `(n,)`, or, where several domains take part, `(n, 2)` pairs of
domain and index. `batches` turns an order into the loader that `Adapter`s and `Predictions.collect` read; an `(n,)`
order is also a plain sampler, ``DataLoader(dataset, batch_size=200, sampler=order.tolist())``.

Adapters that look good on an `iid` stream may collapse on a correlated one (`sorted_by_label`, `dirichlet`), so try
both. `dirichlet` is the label-correlated protocol of LAME (Boudiaf et al. 2022, arXiv:2201.05718) and RoTTA (Yuan et
al. 2023, arXiv:2303.13899), as implemented in mariodoebler/test-time-adaptation; `continual` and `mixed` are the two
multi-domain protocols of CoTTA (Wang et al. 2022, arXiv:2203.13591) and its successors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from trimtab.core import checks
from trimtab.core.checks import InputError


def iid(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Every sample once, in random order.

    Args:
        n: number of samples, >= 1.
        generator: a CPU generator; the same state gives the same order.

    Example:
        >>> iid(5, torch.Generator().manual_seed(0)).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    return torch.randperm(checks.integer(n, "n", low=1), generator=generator)


def sorted_by_label(labels: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """Class after class in ascending order, each class shuffled: the hardest label-correlated stream.

    Args:
        labels: class indices >= 0, (n,), n >= 1.
        generator: a CPU generator.

    Example:
        >>> labels = torch.tensor([1, 0, 1, 0])
        >>> labels[sorted_by_label(labels, torch.Generator().manual_seed(0))]
        tensor([0, 0, 1, 1])
    """
    labels = _indices(labels)
    order = iid(len(labels), generator)
    return order[labels[order].argsort(stable=True)]


def dirichlet(
    labels: Int[Tensor, " n"], delta: float, generator: torch.Generator, *, smallest: int = 10, draws: int = 1000
) -> Int[Tensor, " n"]:
    """A label-correlated stream: chunks whose class proportions are drawn from a symmetric Dirichlet distribution.

    There are as many chunks as classes. Every class is spread over the chunks in proportions drawn from Dir(delta);
    chunks that already hold their share (n / classes) get nothing more; the drawing is repeated until every chunk
    holds at least `smallest` samples. Chunks follow one another; inside a chunk the classes do, in random order.

    Args:
        labels: class indices >= 0, (n,); at least ``smallest`` samples for each class that occurs, on average.
        delta: concentration, >= 0. Small is strongly correlated, 0 is `sorted_by_label`; CIFAR-10-C runs use 0.1,
            CIFAR-100-C and ImageNet-C runs 0.01.
        generator: a CPU generator.
        smallest: least number of samples in a chunk; 10 as in the authors' code.
        draws: how often to draw before giving up.

    Raises:
        InputError: an argument is out of range, or no draw left every chunk with `smallest` samples.

    Example:
        >>> labels = torch.arange(10).repeat(50)
        >>> order = dirichlet(labels, 0.1, torch.Generator().manual_seed(0))
        >>> bool((order.sort().values == torch.arange(500)).all())
        True
    """
    labels = _indices(labels)
    checks.number(delta, "delta", low=0.0)
    checks.integer(smallest, "smallest", low=0)
    if delta == 0:
        return sorted_by_label(labels, generator)
    counts = np.unique(labels.numpy(), return_counts=True)[1].tolist()
    k = len(counts)
    if smallest * k > len(labels):
        raise InputError(f"labels must hold at least {smallest} samples for each of the {k} classes, got {len(labels)}")
    for _ in range(checks.integer(draws, "draws", low=1)):
        sizes = chunk_sizes(counts, k, delta, generator)
        if int(sizes.sum(0).min()) >= smallest:
            break
    else:
        raise InputError(
            f"delta {delta:g} left a chunk with fewer than {smallest} samples in each of {draws} draws: "
            "raise delta or lower smallest"
        )
    by_class = sorted_by_label(labels, generator).split_with_sizes(counts)
    pieces = [part.split_with_sizes(row.tolist()) for part, row in zip(by_class, sizes)]
    order = [pieces[c][chunk] for chunk in range(k) for c in torch.randperm(k, generator=generator).tolist()]
    return torch.cat(order)


def continual(orders: Sequence[Int[Tensor, " _"]]) -> Int[Tensor, "n 2"]:
    """Domain after domain, each in its own order.

    Args:
        orders: one index order a domain, such as `iid` or `dirichlet` give; lengths may differ.

    Returns:
        (n, 2): the domain and the index inside the domain, sample by sample.

    Example:
        >>> continual([torch.tensor([1, 0]), torch.tensor([0])]).tolist()
        [[0, 1], [0, 0], [1, 0]]
    """
    for i, order in enumerate(orders):
        _indices(order, f"orders[{i}]")
    if not orders:
        raise InputError("orders must hold at least one domain, got none")
    return torch.cat([torch.stack((torch.full_like(order, d), order), 1) for d, order in enumerate(orders)])


def mixed(orders: Sequence[Int[Tensor, " _"]], generator: torch.Generator) -> Int[Tensor, "n 2"]:
    """All domains interleaved at random; inside a domain its own order is kept.

    So the stream mixes domains in every batch, yet labels stay as correlated inside each domain as its order has them.

    Args:
        orders: one index order a domain; lengths may differ.
        generator: a CPU generator.

    Returns:
        (n, 2): the domain and the index inside the domain, sample by sample.

    Example:
        >>> pairs = mixed([torch.tensor([3, 4]), torch.tensor([7, 8])], torch.Generator().manual_seed(0))
        >>> pairs[pairs[:, 0] == 1].tolist()
        [[1, 7], [1, 8]]
    """
    pairs = continual(orders)
    shuffled = pairs[torch.randperm(len(pairs), generator=generator), 0]
    out = torch.empty_like(pairs)
    out[shuffled.argsort(stable=True)] = pairs
    return out


def batches(
    domains: Dataset[tuple[Tensor, ...]] | Sequence[Dataset[tuple[Tensor, ...]]],
    order: Int[Tensor, " n"] | Int[Tensor, "n 2"],
    batch_size: int,
    *,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, ...]]:
    """The loader that yields `domains` in the given order.

    Args:
        domains: one map-style dataset for an (n,) order, for instance ``TensorDataset(images, labels)``; a list of
            them, one a domain, for an (n, 2) order.
        order: what this module's generators return.
        batch_size: samples a batch, >= 1; the last batch may be smaller.
        workers: processes that load in the background.

    Raises:
        InputError: the order's shape does not fit the domains, or it points outside them.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> day, night = TensorDataset(torch.zeros(3, 1)), TensorDataset(torch.ones(2, 1))
        >>> order = continual([torch.arange(3), torch.arange(2)])
        >>> [batch.flatten().tolist() for (batch,) in batches([day, night], order, 3)]
        [[0.0, 0.0, 0.0], [1.0, 1.0]]
    """
    one = isinstance(domains, Dataset)
    parts = [domains] if isinstance(domains, Dataset) else list(domains)
    sizes = torch.tensor([len(part) for part in parts])  # type: ignore[arg-type]
    shape = "(n,) for one dataset" if one else "(n, 2) for a list of datasets"
    if order.ndim != (1 if one else 2) or (not one and order.shape[1] != 2):
        raise InputError(f"order must have shape {shape}, got {tuple(order.shape)}")
    domain, index = (torch.zeros_like(order), order) if one else order.unbind(1)
    bad = (domain < 0) | (domain >= len(parts))
    bad |= (index < 0) | (index >= sizes[domain.where(~bad, 0)])
    if bool(bad.any()):
        row = int(bad.to(torch.uint8).argmax())
        raise InputError(
            f"order must point inside the {len(parts)} dataset(s) of sizes {sizes.tolist()}, "
            f"found {order[row].tolist()} at row {row}"
        )
    first = sizes.cumsum(0) - sizes
    return DataLoader(
        ConcatDataset(parts),
        batch_size=checks.integer(batch_size, "batch_size", low=1),
        sampler=(first[domain] + index).tolist(),
        num_workers=workers,
        generator=torch.Generator(),  # without one, a loader draws from the global random state
    )


def _indices(value: Tensor, name: str = "labels") -> Tensor:
    index = checks.tensor(value, name)
    if index.ndim != 1 or len(index) == 0:
        raise InputError(f"{name} must have shape (n,) with n >= 1, got {tuple(index.shape)}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise InputError(f"{name} must be integers, got {str(index.dtype).removeprefix('torch.')}")
    if bool((index < 0).any()):
        raise InputError(f"{name} must be >= 0, found {int(index[index < 0][0])} at {checks.first_bad(index < 0)}")
    return index.long().cpu()


def chunk_sizes(counts: list[int], chunks: int, delta: float, generator: torch.Generator) -> Int[Tensor, "classes k"]:
    """How many samples of each class go to each of k chunks: one draw of Dir(delta) a class."""
    total = sum(counts)
    held = torch.zeros(chunks, dtype=torch.long)
    sizes = torch.empty(len(counts), chunks, dtype=torch.long)
    for row, count in zip(sizes, counts):
        # Dirichlet proportions are gamma variates over their sum, and Gamma(delta) = Gamma(1 + delta) * U^(1 / delta);
        # in logarithms, because the variates themselves underflow for small delta.
        gamma = torch._standard_gamma(torch.full_like(held, 1 + delta, dtype=torch.float64), generator=generator)
        uniform = torch.rand(chunks, dtype=torch.float64, generator=generator)
        uniform.clamp_(min=torch.finfo(torch.float64).tiny)
        variates = gamma.log() + uniform.log() / delta
        filled = variates.masked_fill(held >= total / chunks, -torch.inf).softmax(0).cumsum(0)
        cuts = (filled[:-1] / filled[-1] * count).long()
        row[:] = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([count]))
        held += row
    return sizes
