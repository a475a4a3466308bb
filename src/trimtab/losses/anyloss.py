"""AnyLoss: any metric made of a binary confusion matrix, as the loss itself.

Where classes are unbalanced and the metric that counts is F-beta, the geometric mean or balanced accuracy, a model
trained by cross-entropy needs class weights or a tuned threshold. Here every probability counts as almost 0 or almost
1, by a steep sigmoid around 1/2, the confusion matrix is the sum of those, and one minus the metric is minimised; the
threshold stays 1/2. Probabilities trained so are not calibrated: calibrate them afterwards where they are read.

Han, Moniz, Chawla (KDD 2024), arXiv 2405.14745; the authors' notebooks (doheonhan/anyloss) are followed where they
agree with it. They do not in three places: the networks' losses divide by the number of all training rows in place of
the batch's, which changes what is minimised for the geometric mean and balanced accuracy; the geometric mean's
gradient of the single-layer model is four times the true one (a learning rate four times as large reproduces it); and
in the table of networks, one network is trained by one loss after the other without being reset, so that later losses
start from earlier ones' weights.

What we found: the mean of a batch's metrics is not the metric of all rows, so that batches must hold some rows of both
classes, and accumulated gradients are not those of a large batch. In the claim's linear models, one class in fourteen,
F1 on new data is 0.33 by cross-entropy, 0.48 by cross-entropy with a threshold tuned on the training data, and 0.51 by
this loss; balanced accuracy 0.61, 0.77 and 0.79. Most of the gain is the threshold's: tune that first where you can.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses import confusion
from trimtab.losses.base import same_device, widened

Missing = Literal["raise", "skip"]


class AnyLoss(nn.Module):
    """One minus a metric of the batch's soft confusion matrix.

    Args:
        metric: ``"accuracy"``, ``"f1"``, ``"fbeta"``, ``"balanced_accuracy"``, ``"gmean"`` (the root of sensitivity
            times specificity; without gradient where their product is below 1e-12), ``"precision"`` or ``"recall"``; or
            a function of four scalar tensors (tp, fp, fn, tn) that returns a scalar, larger for better.
        beta: weight of recall against precision in ``"fbeta"``, > 0; the authors also use 0.5 and 2.
        amplification: L of the sigmoid(L (p - 1/2)) that a probability p counts as, > 0; 73 as the authors. Smaller
            values give gradients further from 1/2, larger ones a confusion matrix nearer to the counts.
        from_logits: the scores are logits. False: probabilities of class 1.
        on_missing_class: what to do with a batch without positives (in F-beta, precision and recall), or without one of
            the classes (in the geometric mean, balanced accuracy and functions): ``"raise"``, or ``"skip"``, where the
            loss is 1 and its gradient 0. A graph of `torch.compile` cannot look and always skips.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from trimtab.losses import AnyLoss
        >>> probs, labels = torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([1, 1, 0, 0])
        >>> AnyLoss(metric="f1")(probs, labels)  # two hits and one false alarm
        tensor(0.2000)
        >>> AnyLoss(metric=lambda tp, fp, fn, tn: tp / (tp + fp + fn))(probs, labels)  # the Jaccard index
        tensor(0.3333)

    Reference:
        Han et al., AnyLoss: Transforming Classification Metrics into Loss Functions, KDD 2024, arXiv 2405.14745.
    """

    def __init__(
        self,
        *,
        metric: confusion.Metric = "f1",
        beta: float = 1.0,
        amplification: float = confusion.AMPLIFICATION,
        from_logits: bool = False,
        on_missing_class: Missing = "raise",
    ) -> None:
        super().__init__()
        self.metric = metric if callable(metric) else checks.one_of(metric, "metric", confusion.Name)
        self.beta = checks.number(beta, "beta", low=0, low_open=True)
        self.amplification = checks.number(amplification, "amplification", low=0, low_open=True)
        self.from_logits = from_logits
        self.on_missing_class = checks.one_of(on_missing_class, "on_missing_class", Missing)

    def forward(self, scores: Float[Tensor, " n"] | Float[Tensor, "n 2"], labels: Int[Tensor, " n"]) -> Tensor:
        """The loss of a batch.

        Args:
            scores: (n,), probabilities of class 1; with `from_logits` logits of class 1, or (n, 2), of both classes.
            labels: (n,), integers, 0 or 1.

        Returns:
            A scalar in 0..1, for the metrics named above; at least float32.

        Raises:
            InputError: a shape, a type, a device or a value is wrong, a class is missing in the batch, or a metric of
                your own gives no finite scalar.
        """
        p = self._probabilities(scores)
        same_device(scores=scores, labels=labels)
        y = checks.labels(labels, len(p), 2).to(p.dtype)
        positives = y.sum()
        present = confusion.present(self.metric, positives, len(y))
        counted = confusion.soft_confusion(p, y, positives, self.amplification)
        if self.on_missing_class == "raise" and not checks.unread(y):
            if not bool(present):
                raise InputError(
                    f"labels must hold the classes that the metric needs, found {int(positives)} positives in {len(y)} "
                    'rows; on_missing_class="skip" leaves such batches out'
                )
            return 1 - confusion.score(counted, self.metric, self.beta)
        # what is skipped is shown as a matrix of ones, as it would divide by nothing
        counted = confusion.Confusion(*(torch.where(present, count, 1.0) for count in counted))
        return torch.where(present, 1 - confusion.score(counted, self.metric, self.beta), 1.0)

    def _probabilities(self, scores: Tensor) -> Tensor:
        if not checks.tensor(scores, "scores").is_floating_point():
            raise InputError(f"scores must be floating point, got {str(scores.dtype).removeprefix('torch.')}")
        pairs = self.from_logits and scores.ndim == 2 and scores.shape[1] == 2
        if scores.shape[:1] == (0,) or not (scores.ndim == 1 or pairs):
            shapes = "(n,) or (n, 2)" if self.from_logits else "(n,)"
            raise InputError(f"scores must have shape {shapes} with n >= 1, got {tuple(scores.shape)}")
        if not self.from_logits:
            return widened(checks.within(scores, "scores", 0, 1))
        logits = widened(checks.finite(scores, "scores"))
        return torch.sigmoid(logits[:, 1] - logits[:, 0] if pairs else logits)
