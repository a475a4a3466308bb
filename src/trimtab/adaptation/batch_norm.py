"""Batch-norm adaptation: normalise by what the stream looks like now, and learn nothing.

Reach for it first: it costs one forward pass, has nothing to tune in its plain form, and under a change of imaging
conditions (noise, contrast, weather) it often wins most of what any adapter wins. The batches must be large and their
classes mixed: a batch that holds one class is normalised until it looks like all of them.

Papers: Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS
2020 (arXiv:2006.16971); Nado et al. 2020 (arXiv:2006.10963). As in the former's code (bethgelab/robustness),
``alpha`` is the weight of the *batch*; the alpha-BN paper (You et al. 2021) gives that letter to the *source*. That
code takes the batch's variance with Bessel's correction and divides by zero where a channel has one value (refused
here in words), and knows BatchNorm2d only. The popular benchmark's plain variant also moves the running statistics,
on which no output depends; here they stay.
"""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor, nn

from trimtab.adaptation.base import Adapter, Inputs, Options
from trimtab.adaptation.batch_stats import mix_statistics, use_batch_statistics
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import BATCH_NORMS


class BatchNormAdapt(Adapter):
    """Normalises by the statistics of the batch, by a mixture with the source's, or by a moving average.

    One forward pass a batch; two for ``"ema"``.

    Args:
        model: a classifier with batch normalisation layers that keep running statistics, logits (n, c).
        variant: ``"batch"``: statistics of the batch alone (Nado et al.), for batches of a hundred and more;
            ``"mixed"``: (1 - alpha) source + alpha batch (Schneider et al.), for small batches, down to a single image;
            ``"ema"``: running statistics are updated by each batch first, with each layer's own momentum (0.1 where it
            was left alone), then used; for a slow drift.
        alpha: weight of the batch in ``"mixed"``, in [0, 1]; 0 is the source model. 0.1 as the benchmarks take it for
            batches of one image; Schneider et al. write n / (n + N) with N = 16 pseudo-samples.
        **options: what every `Adapter` takes.

    Raises:
        InputError: the model has no batch normalisation layer, or one without running statistics where they are
            needed; `alpha` lies outside [0, 1].

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
        >>> x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(BatchNormAdapt(model)(x), BatchNormAdapt(model)(x + 5), atol=1e-5)
        True
        >>> torch.allclose(BatchNormAdapt(model, variant="mixed", alpha=0.0)(x), model(x), atol=1e-6)
        True

    Reference:
        Schneider et al., NeurIPS 2020, https://arxiv.org/abs/2006.16971
    """

    forwards = 2
    dense = True

    def __init__(
        self,
        model: nn.Module,
        *,
        variant: Literal["batch", "mixed", "ema"] = "batch",
        alpha: float = 0.1,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        if variant not in ("batch", "mixed", "ema"):
            raise InputError(f"variant must be 'batch', 'mixed' or 'ema', got {variant!r}")
        checks.number(alpha, "alpha", low=0.0, high=1.0)
        self.layers = [module for module in self.model.modules() if isinstance(module, BATCH_NORMS)]
        if not self.layers:
            raise InputError("model must have a batch normalisation layer, found none")
        if variant == "batch":
            use_batch_statistics(self.model)
        elif variant == "mixed":
            mix_statistics(self.model, alpha, unbiased=True, follow=False)
        elif any(layer.running_mean is None for layer in self.layers):
            raise InputError("model must keep running statistics in its batch normalisation layers for variant 'ema'")
        self.variant = variant
        self._begin()

    def _adapt(self, x: Inputs) -> Tensor:
        if self.variant == "ema":
            self._move_statistics(x)
        return self._predict(x)

    def _move_statistics(self, x: Inputs) -> None:
        """One train-mode pass for its effect on the running statistics; undone where they overflowed."""
        statistics = [statistic for layer in self.layers for statistic in layer.buffers()]
        before = [statistic.clone() for statistic in statistics]
        for layer in self.layers:
            layer.train()
        try:
            self._call(self.model, x)
        finally:
            for layer in self.layers:
                layer.eval()
        if all(bool(statistic.isfinite().all()) for statistic in statistics):
            self.updates += 1
            return
        self.skipped += 1
        for statistic, value in zip(statistics, before):
            statistic.copy_(value)
