"""The model as it is: what every calibrator has to beat."""

from __future__ import annotations

from torch import Tensor

from trimtab.calibration.base import Calibrator


class Uncalibrated(Calibrator):
    """softmax(logits), unchanged. Nothing is fitted; it stands among the candidates of a ranking.

    Example:
        >>> import torch
        >>> from trimtab.calibration import Uncalibrated
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> calibrator = Uncalibrated().fit(logits, torch.tensor([0, 1]))
        >>> torch.equal(calibrator(logits), logits.log_softmax(1))
        True
    """

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        pass

    def _log_probs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)
