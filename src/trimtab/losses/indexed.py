"""A dataset that tells the number of each sample: what objectives that remember samples ask of the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trimtab.core.checks import InputError


class Indexed(Dataset[Any]):
    """`dataset` with the number of the sample behind each item, for the ``index`` that `SAF` asks for.

    Items ``(x, y)`` become ``(x, y, index)``; dictionaries get the key ``index``; anything else becomes a pair.

    Args:
        dataset: any dataset with a length.

    Raises:
        InputError: the dataset has no length.

    Example:
        >>> Indexed([("a", 0), ("b", 1)])[1]
        ('b', 1, 1)
        >>> Indexed([{"x": "a"}])[0]
        {'x': 'a', 'index': 0}
    """

    def __init__(self, dataset: Any):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise InputError(f"dataset must have a length and numbered items, got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The item, and its number counted from the front."""
        index = range(len(self))[index]
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return {**item, "index": index}
        return (*item, index) if isinstance(item, (tuple, list)) else (item, index)


def numbered(loader: Iterable[Any]) -> Iterable[Any]:
    """`loader` with the samples' numbers behind each batch, as `Indexed` gives them, and else the same.

    What cannot number its samples stays as it is: what is no DataLoader, an iterable dataset, a dataset of batches.
    Batches that tell numbers keep their own.

    Example:
        >>> loader = DataLoader([(0.5, 0), (1.5, 1), (2.5, 0)], batch_size=2)
        >>> [numbers.tolist() for _, _, numbers in numbered(loader)]
        [[0, 1], [2]]
    """
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return loader
    twin = copy(loader)
    vars(twin).update(dataset=_Pairs(loader.dataset), collate_fn=_Collate(loader.collate_fn), _iterator=None)
    return twin


@dataclass(frozen=True)
class _Pairs(Dataset[Any]):
    """Numbers and items, so that the loader's own collation sees the items that it knows."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


@dataclass(frozen=True)
class _Collate:
    collate: Callable[[list[Any]], Any]

    def __call__(self, pairs: Sequence[tuple[int, Any]]) -> Any:
        numbers, items = zip(*pairs)
        batch = self.collate(list(items))
        if isinstance(batch, Mapping):
            return {"index": torch.tensor(numbers), **batch}
        plain = isinstance(batch, (tuple, list)) and len(batch) == 2
        return (*batch, torch.tensor(numbers)) if plain else batch
