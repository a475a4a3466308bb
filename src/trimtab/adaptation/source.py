"""The model as it is: the baseline that every adapter is measured against.

Reach for it to know what a shift costs before anything is done about it, and to run an unadapted model through the
same code as the adapted ones.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from trimtab.adaptation.base import Adapter, Inputs, Options


class Source(Adapter):
    """Predicts in eval mode and never changes.

    One forward pass a batch.

    Args:
        model: a classifier, logits (n, c).
        **options: what every `Adapter` takes.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2).eval()
        >>> x = torch.zeros(4, 3)
        >>> torch.equal(Source(model)(x), model(x))
        True
    """

    dense = True

    def __init__(self, model: nn.Module, **options: Unpack[Options]):
        super().__init__(model, **options)
        self._begin()

    def _adapt(self, x: Inputs) -> Tensor:
        return self._predict(x)
