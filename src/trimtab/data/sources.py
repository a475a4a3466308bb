"""Sources: labelled images from where they lie, as one kind of thing.

`digits` needs nothing, `fashion_mnist` a Debian package or four files, `parquet_images` reads what Hugging Face's
``datasets`` writes, `image_folder` one sub-folder a class. All give `Images`, which holds bytes, for a quarter of the
memory of floats; `Images.tensor` and `Images.dataset` are what models eat.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from trimtab.core import checks, progress
from trimtab.core.checks import InputError


@dataclass(frozen=True, eq=False)
class Images:
    """n labelled images of one size.

    Args:
        images: (n, c, h, w) bytes, n >= 1.
        labels: (n,) class indices.
        classes: the classes' names, in the order of the indices.

    Raises:
        InputError: a shape, type or range is wrong.

    Example:
        >>> images = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("cat", "dog"))
        >>> len(images), images.tensor().dtype
        (2, torch.float32)
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or self.images.numel() == 0:
            raise InputError(
                f"images must be bytes of shape (n, c, h, w), none of them 0, "
                f"got {str(self.images.dtype).removeprefix('torch.')} {tuple(self.images.shape)}"
            )
        object.__setattr__(self, "labels", checks.labels(self.labels, len(self.images), len(self.classes)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Self:
        """The chosen images."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return type(self)(self.images[index], self.labels[index], self.classes)

    def tensor(self) -> Float[Tensor, "n c h w"]:
        """The images as floats in 0..1."""
        return self.images.float() / 255

    def dataset(self) -> TensorDataset:
        """(image in 0..1, label) pairs, for a `DataLoader` or `streams.batches`."""
        return TensorDataset(self.tensor(), self.labels)


def digits() -> Images:
    """1797 handwritten digits of 8 x 8 pixels in one channel, as scikit-learn bundles them; 0..16 stretched to 0..255.

    Example:
        >>> digits().images.shape
        torch.Size([1797, 1, 8, 8])
    """
    bundle = load_digits()
    pixels = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(bundle.target).long()
    return Images(torch.from_numpy(pixels)[:, None], labels, tuple("0123456789"))


_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def fashion_mnist(split: Literal["train", "test"]) -> Images:
    """Fashion-MNIST: 60 000 training or 10 000 test images of clothing, 28 x 28 pixels in one channel.

    The four IDX files, gzipped, are sought where Debian's package ``dataset-fashion-mnist`` puts them, then in
    ``trimtab/fashion-mnist`` in the user's cache (``$XDG_CACHE_HOME``, by default ``~/.cache``).

    Raises:
        InputError: the split's name is wrong, the files are nowhere (the message says how to get them), or damaged.
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test', got {split!r}")
    stem = "t10k" if split == "test" else "train"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "fashion-mnist"
    for folder in (_FASHION_FOLDER, cache):
        files = [folder / f"{stem}-images-idx3-ubyte.gz", folder / f"{stem}-labels-idx1-ubyte.gz"]
        if all(file.is_file() for file in files):
            images, labels = (_idx(file) for file in files)
            return Images(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), _FASHION)
    raise InputError(
        f"Fashion-MNIST is neither in {_FASHION_FOLDER} nor in {cache}: install Debian's package "
        "dataset-fashion-mnist, or put the four .gz files of https://github.com/zalandoresearch/fashion-mnist there"
    )


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type (8), the number of dimensions, the dimensions, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be unpacked: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise InputError(f"{path}: not an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    values = np.frombuffer(content[start:], np.uint8)
    if len(values) != shape.prod():
        raise InputError(f"{path}: must hold {shape.prod()} values, found {len(values)}")
    return values.reshape(shape).copy()


def parquet_images(
    path: str | Path,
    split: str | None = None,
    *,
    label: str = "label",
    size: int | tuple[int, int] | None = None,
    workers: int = 0,
) -> Images:
    """Images from Parquet files in the layout that Hugging Face's ``datasets`` writes.

    Args:
        path: a Parquet file; or a folder with ``{split}-*.parquet``, ``{split}.parquet``, ``data/{split}-*.parquet`` or
            ``{split}/*.parquet``.
        split: which files of a folder; None for a single file.
        label: the column of class indices (CIFAR-100 has ``fine_label`` and ``coarse_label``). Encoded images are in
            the column ``img`` or ``image``, as ``struct(bytes, path)``.
        size: resize and crop the middle to this height and width; needed where the images' sizes differ.
        workers: threads that decode; 0 decodes in this one.

    Returns:
        Images of one channel if all are grey, otherwise of three; classes are named as in the file's description, or by
        their numbers.

    Raises:
        InputError: no such file, a column missing, a damaged file or image (named with its row), sizes that differ.
    """
    files = _parquet_files(Path(path), split)
    names: tuple[str, ...] | None = None
    labels: list[np.ndarray] = []
    decoder = _Decoder(size)
    with _mapper(workers) as map_:
        for file in files:
            with _readable(file), pq.ParquetFile(file) as table:
                column = next((name for name in ("img", "image") if name in table.schema_arrow.names), None)
                if column is None or label not in table.schema_arrow.names:
                    raise InputError(
                        f"{file}: must have the columns img or image, and {label}; found {table.schema_arrow.names}"
                    )
                names = names or _class_names(table.schema_arrow, label)
                row = 0
                batches = table.iter_batches(1024, columns=[column, label])
                for batch in progress.track(batches, f"decode {file.name}", -(-table.metadata.num_rows // 1024)):
                    encoded = batch.column(0)
                    if not pa.types.is_struct(encoded.type) or encoded.type.get_field_index("bytes") < 0:
                        raise InputError(f"{file}: column {column} must be struct(bytes, path), found {encoded.type}")
                    content = encoded.field("bytes").to_pylist()
                    decoder.add(map_, content, [f"{file}, row {row + i}" for i in range(len(content))])
                    labels.append(batch.column(1).to_numpy(zero_copy_only=False))
                    row += len(content)
    images = decoder.images(f"{path}: no images")
    classes = checks.labels(np.concatenate(labels), len(images), 1 << 31, f"{path}, column {label}")
    return Images(images, classes, names or tuple(str(k) for k in range(int(classes.max()) + 1)))


def image_folder(path: str | Path, *, size: int | tuple[int, int] | None = None, workers: int = 0) -> Images:
    """PNG and JPEG images, one sub-folder a class; classes are in the order of the sub-folders' names.

    Args:
        path: the folder that holds the sub-folders.
        size: resize and crop the middle to this height and width; needed where the images' sizes differ.
        workers: threads that decode; 0 decodes in this one.

    Raises:
        InputError: no such folder, no sub-folders, one without images, a damaged image, sizes that differ.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise InputError(f"{root}: must hold one sub-folder a class, found none")
    decoder, labels = _Decoder(size), []
    with _mapper(workers) as map_:
        for k, folder in enumerate(progress.track(folders, "decode")):
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
            if not files:
                raise InputError(f"{folder}: must hold PNG or JPEG images, found none")
            decoder.add(map_, files, [str(file) for file in files])
            labels += [k] * len(files)
    images = decoder.images(f"{root}: no images")
    return Images(images, torch.tensor(labels), tuple(folder.name for folder in folders))


def _parquet_files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        if split is not None:
            raise InputError(f"split must be left out for a single file, got {split!r}")
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if split is None:
        raise InputError(f"split must be given for a folder, such as 'train' or 'test'; {path} is one")
    patterns = (f"{split}-*.parquet", f"{split}.parquet", f"data/{split}-*.parquet", f"{split}/*.parquet")
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if found:
            return found
    raise InputError(f"{path}: holds none of {', '.join(patterns)}")


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The names that ``datasets`` keeps in the schema's metadata, if it wrote the file."""
    description = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = description.get("info", {}).get("features", {}).get(label, {}).get("names")
    return tuple(names) if names else None


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {error}") from error


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    if checks.integer(workers, "workers", low=0) == 0:
        yield map
    else:
        with ThreadPoolExecutor(workers) as pool:
            yield pool.map


class _Decoder:
    """Collects decoded images and insists that they have one size."""

    def __init__(self, size: int | tuple[int, int] | None) -> None:
        self.size = (size, size) if isinstance(size, int) else size
        for side in self.size or ():
            checks.integer(side, "size", low=1)
        self.arrays: list[np.ndarray] = []
        self.first = ""

    def add(self, map_: Callable[..., Iterable[Any]], encoded: Sequence[bytes | Path], names: Sequence[str]) -> None:
        for name, array in zip(names, map_(self.decode, encoded, names)):
            self.first = self.first or name
            if self.arrays and array.shape[:2] != self.arrays[0].shape[:2]:
                raise InputError(
                    f"{name}: the image is {_by(array)}, but {self.first} is {_by(self.arrays[0])}; "
                    "give a size to resize all"
                )
            self.arrays.append(array)

    def decode(self, encoded: bytes | Path | None, name: str) -> np.ndarray:
        if encoded is None:
            raise InputError(f"{name}: the image has no bytes")
        try:
            with Image.open(BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
                plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{name}: the image cannot be decoded: {error}") from error
        if self.size is not None and plain.size != self.size[::-1]:
            plain = ImageOps.fit(plain, self.size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(plain)

    def images(self, empty: str) -> UInt8[Tensor, "n c h w"]:
        if not self.arrays:
            raise InputError(empty)
        if all(array.ndim == 2 for array in self.arrays):
            return torch.from_numpy(np.stack(self.arrays)[:, None])
        colour = (a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in self.arrays)
        out = np.empty((len(self.arrays), 3, *self.arrays[0].shape[:2]), np.uint8)
        for place, array in zip(out, colour):
            place[:] = array.transpose(2, 0, 1)
        return torch.from_numpy(out)


def _by(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
