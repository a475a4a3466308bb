"""The state of measures of detectors: all boxes of all images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth
from trimtab.metrics.matching import Matches, match_detections

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
_FOUND = ("boxes", "scores", "labels")
_THERE = ("true_boxes", "true_labels", "crowd")


class BoxMetric(Metric):
    """Keeps the boxes of every image, found and true; a measure adds `compute`.

    Args:
        num_classes: labels lie in 0..num_classes-1.
        box_format: ``"xyxy"``, ``"xywh"`` or ``"cxcywh"``.
        tau: least intersection over union of a true positive.
        max_detections: how many detections of an image and class count.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        num_classes: int,
        *,
        box_format: BoxFormat = "xyxy",
        tau: float = 0.0,
        max_detections: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer(num_classes, "num_classes", low=1)
        if box_format not in ("xyxy", "xywh", "cxcywh"):
            raise InputError(f"box_format must be xyxy, xywh or cxcywh, got {box_format!r}")
        self.box_format = box_format
        self.tau = checks.number(tau, "tau", low=0, high=1, high_open=True)
        self.max_detections = checks.integer(max_detections, "max_detections", low=1)
        for name in (*_FOUND, "found", *_THERE, "there"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Tensor]]) -> None:
        """Add a batch of images, as torchmetrics' MeanAveragePrecision takes them.

        Args:
            preds: a dict an image: ``boxes`` (n, 4), ``scores`` (n,), ``labels`` (n,).
            target: a dict an image: ``boxes`` (m, 4), ``labels`` (m,), and ``iscrowd`` (m,) where there are crowds.
        """
        if len(preds) != len(target) or not len(preds):
            raise InputError(
                f"preds and target must have as many images, at least one, got {len(preds)} and {len(target)}"
            )
        state = {
            **dict(zip(_FOUND, self._columns(preds, "preds", _FOUND))),
            **dict(zip(_THERE, self._columns(target, "target", ("boxes", "labels", "iscrowd")))),
        }
        for name, images in (("found", preds), ("there", target)):
            state[name] = torch.tensor([len(image["boxes"]) for image in images], device=state["boxes"].device)
        self._pair(state)
        for name, value in state.items():
            getattr(self, name).append(value)

    def _columns(self, images: Sequence[Mapping[str, Tensor]], name: str, keys: tuple[str, ...]) -> list[Tensor]:
        """The entries of all images one after another."""
        parts: dict[str, list[Tensor]] = {key: [] for key in keys}
        for i, image in enumerate(images):
            for key in keys:
                if key == "iscrowd" and key not in image:
                    value = torch.zeros_like(image["labels"])
                elif key in image:
                    value = checks.tensor(image[key], f"{name}[{i}][{key!r}]")
                else:
                    raise InputError(f"{name}[{i}] must have {key!r}, it has {sorted(image)}")
                if key == "boxes":
                    if value.numel() and (value.ndim != 2 or value.shape[1] != 4):
                        raise InputError(f"{name}[{i}]['boxes'] must have shape (n, 4), got {tuple(value.shape)}")
                    value = self._left_top_width_height(value)
                elif value.shape != (len(image["boxes"]),):
                    boxes, shape = len(image["boxes"]), tuple(value.shape)
                    raise InputError(f"{name}[{i}][{key!r}] must have shape ({boxes},), got {shape}")
                parts[key].append(value.bool() if key == "iscrowd" else value)
        return [torch.cat(parts[key]) for key in keys]

    def _left_top_width_height(self, boxes: Tensor) -> Tensor:
        first, second = boxes.reshape(-1, 4).double().split(2, 1)
        if self.box_format == "xyxy":
            second = second - first
        elif self.box_format == "cxcywh":
            first = first - second / 2
        return torch.cat([first, second], 1)

    def _pair(self, state: Mapping[str, Tensor]) -> tuple[GroundTruth, Detections]:
        """The boxes as they are matched, checked."""
        boxes, scores, labels, found, true_boxes, true_labels, crowd, there = (
            state[name] for name in (*_FOUND, "found", *_THERE, "there")
        )
        images = torch.arange(len(found), device=boxes.device)
        image, true_image = (torch.repeat_interleave(images, n) for n in (found, there))
        truth = GroundTruth(true_image, true_labels, true_boxes, crowd, range(len(images)), range(self.num_classes))
        return truth, Detections(image, labels, boxes, scores, len(images), self.num_classes)

    def _matches(self) -> Matches:
        """All batches together."""
        state = {name: dim_zero_cat(getattr(self, name)) for name in (*_FOUND, "found", *_THERE, "there")}
        truth, detections = self._pair(state)
        return match_detections(truth, detections, tau=self.tau, max_detections=self.max_detections)
