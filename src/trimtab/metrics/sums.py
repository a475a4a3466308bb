"""The states of measures that add up over samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SumMetric(Metric):
    """Keeps sums in float64; a measure names them and their shapes with `_sum`, and adds `update` and `compute`."""

    is_differentiable = False
    full_state_update = False

    def _sum(self, **shapes: int | tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")


class MeanMetric(Metric):
    """The mean of what `update`, which a measure adds, hands to `_add`."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "samples"):
            self.add_state(name, torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        self.total += values.sum(dtype=torch.float64)
        self.samples += values.numel()

    def compute(self) -> Tensor:
        """The mean over all batches together."""
        return (self.total / self.samples)[0]
