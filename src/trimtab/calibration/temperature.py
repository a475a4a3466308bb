"""Temperature scaling: divide the logits by one number.

The first thing to try: it never changes which class is predicted, has one parameter, and repairs the overconfidence of
most networks trained to a small loss. It cannot repair miscalibration that differs between classes or that bends with
the score.

Guo, Pleiss, Sun, Weinberger (2017), arXiv 1706.04599. Their code runs L-BFGS at a learning rate of 0.01 for 50
iterations and may stop short of the optimum; here the optimum is found.

Codes that follow them stop shorter still: that of Chidambaram and Ge (arXiv 2306.00740) leaves the iterations at
PyTorch's 20, and returns T = 1.096 on logits whose best T is 3.22. ``legacy=True`` gives its numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab.calibration.base import Calibrator
from trimtab.core.checks import InputError
from trimtab.core.temperature import fit_temperature


class TemperatureScaling(Calibrator):
    """softmax(logits / T) with the T that minimises the log loss.

    T lies in 0.01..100; a warning says when the optimum lies outside (every label is the top logit, or the logits tell
    nothing about the labels).

    Args:
        legacy: stop where one call of L-BFGS at a rate of 0.01, 20 iterations from T = 1, happens to be, without
            bounds or weights: only to reproduce numbers that were published with it.

    Attributes:
        temperature: T, a scalar tensor; above one where the model is overconfident.

    Example:
        >>> import torch
        >>> from trimtab.calibration import TemperatureScaling
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = 2 * torch.randn(4000, 3, generator=generator)
        >>> labels = truth.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> calibrator = TemperatureScaling().fit(3 * truth, labels)  # three times too confident
        >>> round(float(calibrator.temperature), 1)
        3.0

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """

    temperature: Tensor

    def __init__(self, legacy: bool = False) -> None:
        super().__init__()
        self.legacy = legacy
        self._declare("temperature")

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        if self.legacy and weights is not None:
            raise InputError("weights must be None with legacy=True")
        found = _unconverged(logits, labels) if self.legacy else fit_temperature(logits, labels, weights)
        self._store(logits, temperature=logits.new_tensor(found))

    def _log_probs(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature.to(logits.dtype)).log_softmax(-1)


@torch.enable_grad()
def _unconverged(logits: Tensor, labels: Tensor) -> float:
    temperature = torch.ones((), dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(temperature.detach())
