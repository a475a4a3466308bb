"""A dataset that tells the number of each sample: what objectives that remember samples ask of the loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

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
