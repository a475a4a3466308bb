"""Tables of scores on disk: column conventions, whole reads, and reads in pieces for tables larger than memory.

Conventions (`Predictions.read` documents them for users): class scores in ``logit_0 .. logit_{c-1}``,
``prob_0 .. prob_{c-1}``, or one list column ``logits`` or ``probs``; then ``label``, ``weight``, ``feature_j``,
``view_v_c``.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import torch
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.persist import atomic

ENDINGS = (".parquet", ".feather", ".csv", ".npz")
_NPZ_NAMES = ("logits", "probs", "labels", "features", "views", "weights")


class Table:
    """A table of scores, open for reading; a context manager.

    Attributes:
        path: where it lies.
        n: number of rows.
        c: number of classes.
        kind: ``"logit"`` or ``"prob"``, what the score columns hold.
        labelled: whether there is a ``label`` column.
    """

    def __init__(self, path: Path, source: pq.ParquetFile | pa.Table) -> None:
        self.path = path
        self._source = source
        schema = source.schema_arrow if isinstance(source, pq.ParquetFile) else source.schema
        self._names: list[str] = list(schema.names)
        self.n: int = source.metadata.num_rows if isinstance(source, pq.ParquetFile) else source.num_rows
        if self.n == 0:
            raise InputError(f"{path}: the table must have at least one row, found none")
        self.kind, self._score_columns = self._find_scores()
        self.labelled = "label" in self._names
        self._listed = len(self._score_columns) == 1 and self._score_columns[0] in ("logits", "probs")
        self.c = self._list_width() if self._listed else len(self._score_columns)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a Parquet, Feather, CSV or NPZ file, told apart by its ending."""
        path = Path(path)
        if path.suffix not in ENDINGS:
            raise InputError(f"{path}: the ending must be one of {', '.join(ENDINGS)}")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        try:
            if path.suffix == ".parquet":
                # through a small buffer: mapped pages and whole row groups would count as memory held
                return cls(path, pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20))
            if path.suffix == ".feather":
                return cls(path, pyarrow.feather.read_table(path, memory_map=True))
            if path.suffix == ".csv":
                return cls(path, pyarrow.csv.read_csv(path))
            return cls(path, _arrow(_read_npz(path)))
        except (pa.ArrowException, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._source, pq.ParquetFile):
            self._source.close()

    def read(self) -> dict[str, Tensor]:
        """The whole table as the fields of `Predictions`, probabilities turned into log-probabilities."""
        fields: dict[str, Tensor] = {"logits": self.scores()}
        if self.labelled:
            fields["labels"] = self.labels()
        if "weight" in self._names:
            fields["weights"] = self._matrix(["weight"])[:, 0]
        features = self._numbered("feature")
        if features:
            fields["features"] = self._matrix(features)
        views = [name for name in self._names if re.fullmatch(r"view_\d+_\d+", name)]
        if views:
            count = 1 + max(int(name.split("_")[1]) for name in views)
            names = [f"view_{v}_{k}" for v in range(count) for k in range(self.c)]
            fields["views"] = self._matrix(names).reshape(self.n, count, self.c)
        return fields

    def labels(self) -> Tensor:
        """The ``label`` column, checked against the number of classes: (n,) int64."""
        if not self.labelled:
            raise InputError(f"{self.path}: column 'label' is missing; found {self._names[:8]}")
        values = np.concatenate([self._numpy(batch.column(0), start) for start, batch in self._batches(["label"])])
        return checks.labels(values, self.n, self.c, f"{self.path}: column 'label'")

    def scores(self) -> Tensor:
        """All class scores as logits or log-probabilities: (n, c)."""
        out: Tensor | None = None
        for start, block in self.blocks():
            if out is None:
                out = torch.empty(self.n, self.c, dtype=block.dtype)
            out[start : start + len(block)] = block
        assert out is not None
        return out

    def blocks(self, rows: int = 1 << 17) -> Iterator[tuple[int, Tensor]]:
        """Consecutive (first row, logits) blocks of at most `rows` rows, each checked as it is read."""
        for start, batch in self._batches(self._score_columns, rows):
            if self._listed:
                block = torch.from_numpy(self._lists(batch.column(0), start))
            else:
                block = torch.from_numpy(np.stack([self._numpy(column, start) for column in batch.columns], axis=1))
            if not block.is_floating_point():
                block = block.double()
            where = f"{self.path}, rows from {start}: {self.kind} columns"
            if self.kind == "prob":
                checks.probabilities(block, where)
                block = block.clamp_(min=torch.finfo(block.dtype).tiny).log_()
            else:
                checks.logits(block, where)
            yield start, block

    def column(self, k: int) -> Tensor:
        """The stored scores of class k (logits or probabilities as they lie in the file): (n,)."""
        if self._listed:
            raise InputError(
                f"{self.path}: single classes can be read only from columns {self.kind}_0, {self.kind}_1, ..."
            )
        return self._matrix([self._score_columns[k]])[:, 0]

    @property
    def columnar(self) -> bool:
        """Whether single classes can be read without the others."""
        return not self._listed

    def _find_scores(self) -> tuple[str, list[str]]:
        for kind in ("logit", "prob"):
            columns = self._numbered(kind)
            if columns:
                return kind, columns
            if f"{kind}s" in self._names:
                return kind, [f"{kind}s"]
        raise InputError(
            f"{self.path}: columns logit_0, logit_1, ... or prob_0, prob_1, ... or a list column logits or probs "
            f"must be there, found {self._names[:8]}"
        )

    def _numbered(self, stem: str) -> list[str]:
        """The columns stem_0, stem_1, ... in order, without a gap."""
        numbers = sorted(int(name[len(stem) + 1 :]) for name in self._names if re.fullmatch(rf"{stem}_\d+", name))
        for expected, found in enumerate(numbers):
            if expected != found:
                raise InputError(f"{self.path}: column '{stem}_{expected}' is missing")
        return [f"{stem}_{i}" for i in numbers]

    def _list_width(self) -> int:
        first = next(self._batches(self._score_columns, 1))[1].column(0)
        if not (
            pa.types.is_list(first.type)
            or pa.types.is_fixed_size_list(first.type)
            or pa.types.is_large_list(first.type)
        ):
            raise InputError(f"{self.path}: column {self._score_columns[0]!r} must hold lists, holds {first.type}")
        width = len(first.flatten())
        if width == 0:
            raise InputError(f"{self.path}: column {self._score_columns[0]!r} must hold lists, row 0 holds none")
        return width

    def _batches(self, columns: list[str], rows: int = 1 << 17) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The columns in batches of at most `rows` rows, each with the number of its first row."""
        missing = [name for name in columns if name not in self._names]
        if missing:
            raise InputError(f"{self.path}: column {missing[0]!r} is missing")
        try:
            if isinstance(self._source, pq.ParquetFile):
                batches = self._source.iter_batches(batch_size=rows, columns=columns)
            else:
                batches = self._source.select(columns).to_batches(max_chunksize=rows)
            start = 0
            for batch in batches:
                yield start, batch
                start += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: cannot be read: {error}") from error

    def _matrix(self, columns: list[str]) -> Tensor:
        parts = [
            np.stack([self._numpy(column, start) for column in batch.columns], axis=1)
            for start, batch in self._batches(columns)
        ]
        matrix = torch.from_numpy(np.concatenate(parts))
        return matrix if matrix.is_floating_point() else matrix.double()

    def _lists(self, column: pa.Array, start: int) -> np.ndarray:
        """A list column as (rows, c), every list checked to hold c numbers."""
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        if (lengths != self.c).any():
            row = int(np.argmax(lengths != self.c))
            raise InputError(
                f"{self.path}: column {self._score_columns[0]!r} must hold {self.c} numbers a row, "
                f"row {start + row} holds {lengths[row]}"
            )
        values = column.flatten()
        if values.null_count:
            row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // self.c
            raise InputError(f"{self.path}: values must not be missing, found a null at row {start + row}")
        return self._numpy(values, start).reshape(-1, self.c).copy()

    def _numpy(self, column: pa.Array, start: int) -> np.ndarray:
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise InputError(f"{self.path}: values must not be missing, found a null at row {start + row}")
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise InputError(f"{self.path}: columns must be numeric, found one of type {column.type}")
        return column.to_numpy(zero_copy_only=False)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _NPZ_NAMES if name in archive.files}
            found = archive.files
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as npz: {error}") from error
    scores = [name for name in ("logits", "probs") if name in arrays]
    if not scores:
        raise InputError(f"{path}: an array 'logits' or 'probs' must be there, found {found[:8]}")
    n = len(arrays[scores[0]]) if arrays[scores[0]].ndim else 0
    for name, array in arrays.items():
        if name in ("labels", "weights"):
            if array.shape != (n,):
                raise InputError(f"{path}: array {name!r} must have shape ({n},), got {array.shape}")
        elif array.ndim != (3 if name == "views" else 2) or len(array) != n:
            raise InputError(f"{path}: array {name!r} must have {n} rows and the right axes, got {array.shape}")
    return arrays


def _arrow(arrays: Mapping[str, np.ndarray]) -> pa.Table:
    """Arrays named as the fields of `Predictions` as a table with the documented columns."""
    columns: dict[str, np.ndarray] = {}
    for stem, name in (("logit", "logits"), ("prob", "probs"), ("feature", "features")):
        for j in range(arrays[name].shape[1] if name in arrays else 0):
            columns[f"{stem}_{j}"] = arrays[name][:, j]
    for column, name in (("label", "labels"), ("weight", "weights")):
        if name in arrays:
            columns[column] = arrays[name]
    if "views" in arrays:
        for v in range(arrays["views"].shape[1]):
            for k in range(arrays["views"].shape[2]):
                columns[f"view_{v}_{k}"] = arrays["views"][:, v, k]
    return pa.table({name: np.ascontiguousarray(column) for name, column in columns.items()})


def write(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Write the fields of `Predictions` that are not None, whole or not at all, in the format of the ending."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InputError(f"{path}: the ending must be one of {', '.join(ENDINGS)}")
    arrays = {name: value.detach().cpu().numpy() for name, value in fields.items() if value is not None}
    with atomic(path) as draft:
        if path.suffix == ".npz":
            np.savez(draft, **arrays)
        elif path.suffix == ".parquet":
            pq.write_table(_arrow(arrays), draft)
        elif path.suffix == ".feather":
            pyarrow.feather.write_feather(_arrow(arrays), draft)
        else:
            pyarrow.csv.write_csv(_arrow(arrays), draft)
