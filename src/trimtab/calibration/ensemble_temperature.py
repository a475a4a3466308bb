"""Ensemble temperature scaling: a mixture of the tempered model, the model as it is, and the uniform distribution.

As safe as temperature scaling, since no part of the mixture changes the order of the classes, and more expressive: it
can be sharp and still leave some probability to every class. For networks that are confidently wrong now and then.
(Where the uniform part takes all the weight, the logits being worth nothing, every class ties.)

Zhang, Kailkhura, Han (2020), arXiv 2003.07329. As in the paper, the temperature is fitted first and the weights then.
The authors' code fits both by squared error with SLSQP unless asked for cross-entropy; here both minimise the log
loss, the weights by Newton's method on the simplex.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.calibration.base import Calibrator, logsumexp
from trimtab.calibration.solve import newton
from trimtab.core.temperature import fit_temperature


class EnsembleTemperatureScaling(Calibrator):
    """w1 softmax(logits / T) + w2 softmax(logits) + w3 / c, with weights >= 0 that sum to one.

    Attributes:
        temperature: T, a scalar.
        mixture: (3,), the weights w.

    Example:
        >>> import torch
        >>> from trimtab.calibration import EnsembleTemperatureScaling
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = 3 * torch.randn(4000, 3, generator=generator)
        >>> labels = (0.8 * truth.softmax(1) + 0.2 / 3).multinomial(1, generator=generator)[:, 0]
        >>> calibrator = EnsembleTemperatureScaling().fit(truth, labels)  # a fifth of the labels is noise
        >>> calibrator.mixture[2] > 0.1
        tensor(True)

    Reference:
        Zhang, Kailkhura and Han, Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration in Deep
        Learning, ICML 2020.
    """

    temperature: Tensor
    mixture: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._declare("temperature", "mixture")

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        temperature = logits.new_tensor(fit_temperature(logits, labels, weights))
        parts = [part.gather(1, labels[:, None])[:, 0] for part in _parts(logits, temperature)]
        at_label = torch.stack(parts, 1).double().exp()
        shares = torch.ones_like(at_label[:, 0]) if weights is None else weights.double()
        shares = shares / shares.sum()

        def objective(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Mean log loss plus the sum of the weights: its minimum over w >= 0 has weights that sum to one."""
            w = batch[0]
            mixed = at_label @ w
            ratio = at_label / mixed[:, None]
            loss = w.sum() - mixed.log() @ shares
            gradient = 1 - shares @ ratio
            hessian = ratio.mT @ (ratio * shares[:, None])
            return loss[None], gradient[None], hessian[None]

        start = torch.full((1, 3), 1 / 3, dtype=torch.float64, device=logits.device)
        found = newton(objective, start, lower=torch.zeros(3))[0]
        self._store(logits, temperature=temperature, mixture=found / found.sum())

    def _log_probs(self, logits: Tensor) -> Tensor:
        parts = torch.stack(_parts(logits, self.temperature.to(logits.dtype)))
        return logsumexp(parts + self.mixture.to(logits.dtype).log()[:, None, None], 0)[0]


def _parts(logits: Tensor, temperature: Tensor) -> list[Tensor]:
    """Log-probabilities of the three parts."""
    uniform = torch.zeros_like(logits).log_softmax(-1)
    return [(logits / temperature).log_softmax(-1), logits.log_softmax(-1), uniform]
