"""`GroundTruth` and `Detections`: what is in many images, and what a detector said is there, as flat tensors.

Boxes of all images lie one after another; `image` and `label` say where each belongs. Both are read from the JSON files
of the COCO data set's format, which most detectors can write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core import checks, persist
from trimtab.core.checks import InputError

Id = int | str


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The boxes that are truly there.

    Args:
        image: (n,) which image each box is in, 0..images-1.
        label: (n,) its class, 0..classes-1.
        boxes: (n, 4) left edge, top edge, width, height, in pixels.
        crowd: (n,) boxes that cover a crowd of objects: detections in them count neither for nor against a detector.
        image_ids: the images' names, one each; images without a box count.
        class_ids: the classes' names, one each; classes without a box are legal.
        names: the classes' names in words; by default their ids.

    Raises:
        InputError: a shape, type or range is wrong; the message names the argument and the first bad row.

    Example:
        >>> import torch
        >>> one = torch.tensor([0])
        >>> box = torch.tensor([[5.0, 5.0, 10.0, 20.0]])
        >>> truth = GroundTruth(one, one, box, one.bool(), (7,), (1, 2), ("cat", "dog"))
        >>> truth.images, truth.classes, len(truth)
        (1, 2, 1)
    """

    image: Int[Tensor, " n"]
    label: Int[Tensor, " n"]
    boxes: Float[Tensor, "n 4"]
    crowd: Bool[Tensor, " n"]
    image_ids: Sequence[Id]
    class_ids: Sequence[Id]
    names: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for name in ("image_ids", "class_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            _distinct(getattr(self, name), name)
        object.__setattr__(self, "names", tuple(self.names) or tuple(str(i) for i in self.class_ids))
        if len(self.names) != self.classes:
            raise InputError(f"names must have {self.classes} entries, one for each class, got {len(self.names)}")
        _check_boxes(self)
        crowd = checks.tensor(self.crowd, "crowd")
        if crowd.shape != (len(self),) or crowd.dtype != torch.bool:
            raise InputError(f"crowd must be {len(self)} booleans, got {tuple(crowd.shape)} of {crowd.dtype}")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read an annotation file: ``{"images": [{"id"}], "categories": [{"id", "name"}], "annotations": [...]}``.

        Each annotation holds ``image_id``, ``category_id``, ``bbox`` as [x, y, width, height] and, where it covers a
        crowd, ``iscrowd`` = 1. Images and classes are numbered in the order of their ids.
        """
        data = _read_json(path)
        for key in ("images", "categories", "annotations"):
            if not isinstance(data, dict) or not isinstance(data.get(key), list):
                raise InputError(f"{path}: must be a COCO annotation file with a list {key!r}")
        image_ids = _sorted(_column(data["images"], "id", f"{path}: images"), f"{path}: ids of images")
        found = _column(data["categories"], "id", f"{path}: categories")
        class_ids = _sorted(found, f"{path}: ids of categories")
        names = {k: str(entry.get("name", k)) for k, entry in zip(found, data["categories"])}
        where = f"{path}: annotations"
        entries = data["annotations"]
        return _made(
            path,
            cls,
            image=_numbers(entries, "image_id", image_ids, where),
            label=_numbers(entries, "category_id", class_ids, where),
            boxes=_boxes(entries, where),
            crowd=torch.tensor([entry.get("iscrowd", 0) == 1 for entry in entries], dtype=torch.bool),
            image_ids=image_ids,
            class_ids=class_ids,
            names=[names[k] for k in class_ids],
        )

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_ids)

    def within(self, images: Bool[Tensor, " images"]) -> Self:
        """The boxes of the images that are marked; images keep their numbers."""
        kept = images.to(self.image.device)[self.image]
        return replace(
            self, image=self.image[kept], label=self.label[kept], boxes=self.boxes[kept], crowd=self.crowd[kept]
        )

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes that a detector reports.

    Args:
        image: (n,) which image each box is in, 0..images-1.
        label: (n,) its class, 0..classes-1.
        boxes: (n, 4) left edge, top edge, width, height, in pixels.
        scores: (n,) in 0..1.
        images, classes: how many there are, with and without detections.

    Raises:
        InputError: a shape, type or range is wrong; the message names the argument and the first bad row.

    Example:
        >>> import torch
        >>> boxes = torch.tensor([[5.0, 5.0, 10.0, 20.0], [0.0, 0.0, 3.0, 3.0]])
        >>> found = Detections(torch.tensor([0, 0]), torch.tensor([0, 1]), boxes, torch.tensor([0.9, 0.2]), 1, 2)
        >>> len(found), len(found.above(0.5))
        (2, 1)
    """

    image: Int[Tensor, " n"]
    label: Int[Tensor, " n"]
    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    images: int
    classes: int

    def __post_init__(self) -> None:
        checks.integer(self.images, "images", low=1)
        checks.integer(self.classes, "classes", low=1)
        _check_boxes(self)
        scores = checks.tensor(self.scores, "scores")
        if scores.shape != (len(self),) or not scores.is_floating_point():
            raise InputError(f"scores must be {len(self)} numbers, got {tuple(scores.shape)} of {scores.dtype}")
        checks.finite(scores, "scores")
        bad = (scores < 0) | (scores > 1)
        if bool(bad.any()):
            raise InputError(f"scores must lie in [0, 1], found {scores[bad][0].item():.6g} at {checks.first_bad(bad)}")

    @classmethod
    def read(cls, path: str | Path, truth: GroundTruth) -> Self:
        """Read a results file: a list of ``{"image_id", "category_id", "bbox", "score"}``.

        Args:
            path: the file.
            truth: the ground truth that the ids belong to.
        """
        entries = _read_json(path)
        if not isinstance(entries, list):
            raise InputError(f"{path}: must be a list of detections, found {type(entries).__name__}")
        where = f"{path}: detections"
        scores = _column(entries, "score", where)
        for row, score in enumerate(scores):
            if not _is_number(score):
                raise InputError(f"{where}: entry {row}: score must be a number, found {_short(score)}")
        return _made(
            path,
            cls,
            image=_numbers(entries, "image_id", truth.image_ids, where),
            label=_numbers(entries, "category_id", truth.class_ids, where),
            boxes=_boxes(entries, where),
            scores=torch.tensor(scores, dtype=torch.float64),
            images=truth.images,
            classes=truth.classes,
        )

    def write(self, path: str | Path, truth: GroundTruth) -> None:
        """Write as a results file, whole or not at all, with the ids of `truth`."""
        columns = self.image.tolist(), self.label.tolist(), self.boxes.tolist(), self.scores.tolist()
        rows = (
            {"image_id": truth.image_ids[i], "category_id": truth.class_ids[c], "bbox": box, "score": score}
            for i, c, box, score in zip(*columns)
        )
        persist.write_text(path, "[" + ",\n".join(map(json.dumps, rows)) + "]\n")

    def within(self, images: Bool[Tensor, " images"]) -> Self:
        """The detections in the images that are marked; images keep their numbers."""
        return self.rows(images.to(self.image.device)[self.image])

    def above(self, thresholds: float | Float[Tensor, " classes"]) -> Self:
        """The detections whose score is at least the threshold (of their class); a NaN lets all through."""
        least = thresholds[self.label] if isinstance(thresholds, Tensor) else thresholds
        return self.rows(~(self.scores < least))

    def rows(self, kept: Bool[Tensor, " n"] | Int[Tensor, " m"]) -> Self:
        """Some of the detections."""
        parts = {name: getattr(self, name)[kept] for name in ("image", "label", "boxes", "scores")}
        return replace(self, **parts)

    def __len__(self) -> int:
        return len(self.image)


def _check_boxes(value: GroundTruth | Detections) -> None:
    """The columns that both have."""
    boxes = checks.tensor(value.boxes, "boxes")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise InputError(f"boxes must be floating point of shape (n, 4), got {tuple(boxes.shape)} of {boxes.dtype}")
    checks.finite(boxes, "boxes")
    bad = boxes[:, 2:] < 0
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        side = ("width", "height")[column]
        raise InputError(f"boxes must have {side} >= 0, found {boxes[row, 2 + column]:.6g} at row {row}")
    object.__setattr__(value, "boxes", boxes)
    for name, most in (("image", value.images), ("label", value.classes)):
        object.__setattr__(value, name, checks.labels(getattr(value, name), len(boxes), most, name))


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _column(entries: Sequence[Any], key: str, where: str) -> list[Any]:
    """One field of every entry."""
    try:
        return [entry[key] for entry in entries]
    except (KeyError, TypeError, IndexError):
        bad = next(i for i, entry in enumerate(entries) if not isinstance(entry, Mapping) or key not in entry)
        raise InputError(f"{where}: entry {bad} must have {key!r}, found {_short(entries[bad])}") from None


def _sorted(ids: list[Any], where: str) -> list[Id]:
    """Ids in order, so that the numbers do not depend on the order of the file."""
    if not (all(type(i) is int for i in ids) or all(isinstance(i, str) for i in ids)):
        raise InputError(f"{where} must all be integers or all be strings")
    _distinct(ids, where)
    return sorted(ids)


def _distinct(ids: Sequence[Id], name: str) -> None:
    if not ids:
        raise InputError(f"{name} must hold at least one, found none")
    seen: set[Id] = set()
    for i in ids:
        if i in seen:
            raise InputError(f"{name} must be distinct, found {i!r} twice")
        seen.add(i)


def _numbers(entries: Sequence[Any], key: str, ids: Sequence[Id], where: str) -> Tensor:
    """The place of every entry's id among the known ones."""
    places: dict[Any, int] = {i: place for place, i in enumerate(ids)}
    found = _column(entries, key, where)
    try:
        return torch.tensor([places[i] for i in found], dtype=torch.int64)
    except (KeyError, TypeError):
        row = next(i for i, x in enumerate(found) if not isinstance(x, Hashable) or x not in places)
        thing = {"image_id": "images", "category_id": "categories"}[key]
        raise InputError(f"{where}: entry {row}: {key} {_short(found[row])} is not among the {thing}") from None


def _boxes(entries: Sequence[Any], where: str) -> Tensor:
    boxes = _column(entries, "bbox", where)
    for row, box in enumerate(boxes):
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise InputError(f"{where}: entry {row}: bbox must be [x, y, width, height], found {_short(box)}")
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


def _is_number(x: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold: integers there have no end."""
    return type(x) is float or (type(x) is int and abs(x) <= sys.float_info.max)


def _made(path: str | Path, kind: Any, **columns: Any) -> Any:
    """The checked object; what is wrong with it is told with the file's name."""
    try:
        return kind(**columns)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
