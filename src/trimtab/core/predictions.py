"""`Predictions`: the one thing that travels through trimtab, made, split and written in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks, modules, progress, tables
from trimtab.core.checks import InputError

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier said about n samples of c classes, and what was true.

    Args:
        logits: unnormalised scores, or log-probabilities, (n, c), finite.
        labels: true classes, (n,), integers in 0..c-1; None where unknown.
        features: activations that the last layer saw, (n, d).
        views: logits of v augmented copies of every sample, (n, v, c).
        weights: sample weights >= 0, (n,).

    Raises:
        InputError: a shape, type or range is wrong; the message names the argument and the first bad row.

    Example:
        >>> import torch
        >>> predictions = Predictions(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> predictions.n, predictions.c, predictions.accuracy
        (2, 2, 1.0)
    """

    logits: Float[Tensor, "n c"]
    labels: Int[Tensor, " n"] | None = None
    features: Float[Tensor, "n d"] | None = None
    views: Float[Tensor, "n v c"] | None = None
    weights: Float[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", checks.logits(self.logits))
        if self.labels is not None:
            object.__setattr__(self, "labels", checks.labels(self.labels, self.n, self.c))
        if self.features is not None:
            object.__setattr__(self, "features", checks.matrix(self.features, "features"))
            if len(self.features) != self.n:
                raise InputError(f"features must have {self.n} rows, got {len(self.features)}")
        if self.views is not None:
            object.__setattr__(self, "views", checks.views(self.views, self.n, self.c))
        if self.weights is not None:
            object.__setattr__(self, "weights", checks.weights(self.weights, self.n))

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.logits.shape[0]

    @property
    def c(self) -> int:
        """Number of classes."""
        return self.logits.shape[1]

    @property
    def probs(self) -> Float[Tensor, "n c"]:
        """Softmax of the logits."""
        return self.logits.softmax(1)

    @property
    def accuracy(self) -> float:
        """Share of samples whose largest logit is at the label (weighted, if there are weights)."""
        right = (self.logits.argmax(1) == self.needed("labels")).double()
        return float(right.mean() if self.weights is None else (right * self.weights).sum() / self.weights.sum())

    def needed(self, name: str) -> Tensor:
        """The field `name`, or an error that says that it is missing."""
        value = getattr(self, name)
        if value is None:
            raise InputError(f"predictions must hold {name}, found none")
        return value

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Self:
        """The chosen rows of every field."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        kept: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[index] for name, value in kept.items()}
        return type(self)(**chosen)

    def split(self, *fractions: float, seed: int) -> list[Self]:
        """Random disjoint parts, stratified by label, whose sizes follow `fractions`.

        Args:
            *fractions: positive shares that sum to at most one.
            seed: the same seed gives the same parts.

        Example:
            >>> import torch
            >>> both = Predictions(torch.zeros(10, 2), torch.tensor([0, 1] * 5))
            >>> [part.n for part in both.split(0.6, 0.4, seed=0)]
            [6, 4]
        """
        for i, fraction in enumerate(fractions):
            checks.number(fraction, f"fractions[{i}]", low=0, high=1, low_open=True)
        if not fractions or sum(fractions) > 1 + 1e-9:
            raise InputError(f"fractions must be given and sum to at most 1, got {fractions}")
        position = self._stratified_position(seed)
        edges = np.round(np.cumsum((0.0, *fractions)) * self.n).astype(int)
        parts = [position[a:b] for a, b in pairwise(edges)]
        if any(len(part) == 0 for part in parts):
            raise InputError(f"fractions {fractions} leave a part of the {self.n} samples empty")
        return [self[torch.from_numpy(np.sort(part))] for part in parts]

    def folds(self, k: int, seed: int) -> list[tuple[Self, Self]]:
        """k pairs (fit, held out) for cross-validation, stratified by label; every row is held out once."""
        checks.integer(k, "k", low=2, high=self.n)
        fold = np.empty(self.n, dtype=int)
        fold[self._class_by_class(np.random.default_rng(seed))] = np.arange(self.n) % k
        masks = [torch.from_numpy(fold == i) for i in range(k)]
        return [(self[(~mask).nonzero()[:, 0]], self[mask.nonzero()[:, 0]]) for mask in masks]

    def _stratified_position(self, seed: int) -> np.ndarray:
        """An order of the rows in which every stretch holds the classes in their overall shares."""
        random = np.random.default_rng(seed)
        rows = self._class_by_class(random)
        counts = np.bincount(self._strata())
        within = np.concatenate([(np.arange(m) + random.random()) / m for m in counts if m])
        return rows[np.argsort(within, kind="stable")]

    def _class_by_class(self, random: np.random.Generator) -> np.ndarray:
        """The rows of the first class in random order, then those of the second, ..."""
        shuffled = random.permutation(self.n)
        return shuffled[np.argsort(self._strata()[shuffled], kind="stable")]

    def _strata(self) -> np.ndarray:
        return np.zeros(self.n, dtype=int) if self.labels is None else self.labels.cpu().numpy()

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        features: bool | str = False,
        views: int = 0,
        augment: Augmentation | None = None,
        seed: int = 0,
        description: str = "collect",
    ) -> Self:
        """Run `model` once over `loader` and keep what it said, on the CPU.

        Args:
            model: a classifier; called in eval mode and without gradients, its modes are restored afterwards.
            loader: batches as inputs, (inputs, labels), or a mapping with ``labels`` or ``label`` whose other
                entries are the model's keyword arguments; the model may return logits or an object with ``.logits``.
            features: True keeps the input of the last linear layer, a name the input of that module.
            views: how many augmented copies of every batch are passed through the model too.
            augment: ``augment(inputs, generator)``, needed when ``views > 0``.
            seed: seeds the generator that `augment` is given.
            description: the name of the progress bar.

        Raises:
            InputError: the loader is empty, or the model's output is not a finite (n, c) matrix of logits.
        """
        if (views > 0) != (augment is not None):
            raise InputError("augment must be given exactly when views > 0")
        checks.integer(views, "views", low=0)
        device = modules.device_of(model)
        generator = torch.Generator().manual_seed(seed)
        if isinstance(features, str):
            watched = modules.submodule(model, features)
        elif features:
            watched = modules.last_linear(model)
        else:
            watched = nn.Identity()
        rows: dict[str, list[Tensor]] = {"logits": [], "labels": [], "features": [], "views": []}
        with modules.evaluating(model):
            for number, batch in enumerate(progress.track(loader, description)):
                inputs, labels = take_apart(batch, device)
                with modules.watch_input(watched) as seen:
                    logits = logits_of(model, inputs)
                try:
                    checks.logits(logits, "the model's output")
                except InputError as error:
                    raise InputError(f"batch {number}: {error}") from error
                rows["logits"].append(logits.cpu())
                if labels is not None:
                    rows["labels"].append(labels.cpu())
                if features:
                    rows["features"].append(seen[-1].flatten(1).cpu())
                if augment is not None:
                    copies = [logits_of(model, augment(inputs, generator)) for _ in range(views)]
                    rows["views"].append(torch.stack(copies, 1).cpu())
        if not rows["logits"]:
            raise InputError("loader must yield at least one batch, it yielded none")
        if rows["labels"] and len(rows["labels"]) != len(rows["logits"]):
            raise InputError("loader must yield labels with every batch or with none")
        return cls(**{name: torch.cat(parts) for name, parts in rows.items() if parts})

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a table: Parquet, Feather, CSV or NPZ, told apart by the file's ending.

        Columns: ``logit_0 .. logit_{c-1}``, or ``prob_0 .. prob_{c-1}``, or one list column ``logits`` or ``probs``;
        optional ``label``, ``weight``, ``feature_0 ..``, and views as ``view_0_0 .. view_{v-1}_{c-1}``. An NPZ file
        holds the arrays ``logits`` or ``probs``, ``labels``, ``features``, ``views``, ``weights``. Probabilities become
        log-probabilities; a zero becomes the smallest normal float.

        Raises:
            InputError: the file is missing, empty, truncated, or a column is missing or malformed.
        """
        with tables.Table.open(path) as table:
            return cls(**table.read())

    def write(self, path: str | Path) -> None:
        """Write to `path` what `read` reads back exactly: Parquet, Feather, CSV or NPZ by its ending."""
        tables.write(path, {f.name: getattr(self, f.name) for f in fields(self)})


def take_apart(batch: Any, device: torch.device) -> tuple[Any, Tensor | None]:
    """Split a batch of a loader into the model's input and the labels, both on `device`."""
    if isinstance(batch, Mapping):
        tensors = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = tensors.pop("labels", tensors.pop("label", None))
        return tensors, labels
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
        raise InputError("loader must yield inputs, (inputs, labels) or a mapping of tensors")
    return parts[0].to(device), parts[1].to(device) if len(parts) == 2 else None


def logits_of(model: Callable[..., Any], inputs: Any) -> Tensor:
    """What `model` says about one batch; a mapping holds keywords.

    That is its output, or the ``.logits`` of its output (transformers), or the ``["out"]`` (torchvision's segmenters).
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, dict) and "out" in output:
        return output["out"]
    return getattr(output, "logits", output)
