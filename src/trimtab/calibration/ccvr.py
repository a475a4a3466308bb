"""CCVR: a federated model's classifier, retrained on virtual features that no client ever had.

After federated training on clients whose classes differ, the last linear layer is the most biased part of the model.
Each client sends the count, mean and covariance of every class's features once, after the last round; the server
samples balanced virtual features from one Gaussian a class and retrains that layer alone. Reach for it when clients are
heterogeneous: the more they are, the more it helps, and with equal clients there is little to gain.

Luo, Chen, Hu, Zhang, Liang, Feng (2021), NeurIPS, arXiv 2106.05001; the authors published no code. Public
re-implementations differ from the paper and are not followed: one (smduan/Fed-CCVR) does not reset its feature list
between classes, divides by N where the formula wants N - 1, and adds a scalar to the covariance in place of an outer
product; another (FL-bench) makes one pass over the virtual set at the federation's own learning rate.

Tukey's power, which later work applies to the features, is undone after sampling here, so that the model needs no extra
layer; the paper does without, as do our defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.calibration.class_statistics import ClassStatistics, classifier, merge_class_statistics
from trimtab.calibration.virtual_features import sample_virtual_features
from trimtab.core import checks, progress
from trimtab.core.checks import InputError

M = TypeVar("M", bound=nn.Module)


class CCVR:
    """Classifier calibration with virtual representations.

    Args:
        samples: virtual features of each class, >= 1. The paper studies 100 to 2000; 200 is what the re-implementation
            FL-bench uses, and enough on the small sets that we measured.
        lr: learning rate, > 0. This and the next four are the settings of the paper's experiments as commonly
            reproduced.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD, >= 0.
        epochs: passes over the virtual features, >= 1.
        batch_size: >= 1.
        seed: of the features and of their order; the same seed gives the same classifier.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> import torch
        >>> from trimtab.calibration import CCVR, collect_class_statistics
        >>> generator = torch.Generator().manual_seed(0)
        >>> y = torch.arange(3).repeat(100)
        >>> x = torch.eye(3)[y] + 0.3 * torch.randn(300, 3, generator=generator)
        >>> clients = [[(x[y != k], y[y != k])] for k in range(3)]  # each has one class less
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 3))
        >>> _ = torch.nn.init.zeros_(model[1].weight)  # a classifier that knows nothing
        >>> calibrated = CCVR(lr=0.1)(model, [collect_class_statistics(model, client) for client in clients])
        >>> bool((calibrated(x).argmax(1) == y).double().mean() > 0.9), model[1].weight.count_nonzero().item()
        (True, 0)

    Reference:
        Luo et al., No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data,
        NeurIPS 2021.
    """

    def __init__(
        self,
        samples: int = 200,
        *,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        epochs: int = 10,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.samples = checks.integer(samples, "samples", low=1)
        self.lr = checks.number(lr, "lr", low=0, low_open=True)
        self.momentum = checks.number(momentum, "momentum", low=0, high=1, high_open=True)
        self.weight_decay = checks.number(weight_decay, "weight_decay", low=0)
        self.epochs = checks.integer(epochs, "epochs", low=1)
        self.batch_size = checks.integer(batch_size, "batch_size", low=1)
        self.seed = checks.integer(seed, "seed")

    def __call__(self, model: M, statistics: Sequence[ClassStatistics], *, layer: str | None = None) -> M:
        """A copy of `model` whose last linear layer is recalibrated; everything else is as it was.

        Args:
            model: the federation's, or its linear layer alone.
            statistics: one a client (or merged ones), of the features that this model gives its classifier.
            layer: name of the linear layer that classifies; by default the model's last one.

        Raises:
            InputError: the statistics do not fit each other or the layer, or fewer than two classes have samples.
        """
        calibrated = copy.deepcopy(model)
        old = classifier(calibrated, layer)
        new = self._calibrated(old, merge_class_statistics(statistics), torch.Generator().manual_seed(self.seed))
        if old is calibrated:
            return new  # type: ignore[return-value]
        # the layer is swapped, not written to: its weight may be tied to another layer's
        for parent in calibrated.modules():
            for name, child in parent._modules.items():
                if child is old:
                    setattr(parent, name, new)
        return calibrated

    def _calibrated(self, linear: nn.Linear, statistics: ClassStatistics, generator: torch.Generator) -> nn.Linear:
        """A copy of `linear`, retrained on virtual features."""
        if (statistics.c, statistics.d) != (linear.out_features, linear.in_features):
            raise InputError(
                f"statistics of {statistics.c} classes and {statistics.d} features do not fit a classifier of "
                f"{linear.out_features} classes and {linear.in_features} features"
            )
        x, y = sample_virtual_features(statistics, self.samples, generator)
        if not bool((y != y[0]).any()):
            raise InputError(f"at least two classes must have virtual features, only class {int(y[0])} has")
        new = copy.deepcopy(linear)
        self._retrain(new.to(torch.promote_types(linear.weight.dtype, torch.float32)), x, y, generator)
        if not all(bool(parameter.isfinite().all()) for parameter in new.parameters()):
            raise InputError(f"lr must be smaller than {self.lr:g}: the classifier diverged")
        return new.to(linear.weight.dtype)

    def _retrain(
        self,
        linear: nn.Linear,
        features: Float[Tensor, "m d"],
        labels: Int[Tensor, " m"],
        generator: torch.Generator,
    ) -> None:
        """SGD on the cross-entropy, in place; what was frozen before is frozen afterwards."""
        x, y = features.to(linear.weight), labels.to(linear.weight.device)
        learns = {parameter: parameter.requires_grad for parameter in linear.parameters()}
        optimizer = torch.optim.SGD(
            linear.requires_grad_().parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
        )
        with torch.enable_grad():
            for _ in progress.track(range(self.epochs), "CCVR"):
                order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
                for rows in order.split(self.batch_size):
                    optimizer.zero_grad()
                    torch.autograd.backward(F.cross_entropy(linear(x[rows]), y[rows]))
                    optimizer.step()
        optimizer.zero_grad()
        for parameter, flag in learns.items():
            parameter.requires_grad_(flag)


def calibrate_classifier(
    linear: nn.Linear,
    statistics: ClassStatistics,
    *,
    samples: int = 200,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-5,
    epochs: int = 10,
    batch_size: int = 64,
    generator: torch.Generator,
) -> nn.Linear:
    """A copy of `linear`, retrained on virtual features drawn from `statistics`.

    Args:
        linear: the classifier, (c, d), with a bias or without.
        statistics: of all clients together, c classes of d features; see `CCVR` for the other arguments.
        generator: draws the features and their order; its device is where features are drawn.

    Raises:
        InputError: `statistics` do not fit `linear`, or fewer than two classes have samples.
        UserWarning: (as a warning) a class without enough samples gets no features: the retrained layer will
            hardly ever predict it.

    Example:
        >>> import torch
        >>> from trimtab.calibration import calibrate_classifier, class_statistics
        >>> features, labels = torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1])
        >>> linear = torch.nn.Linear(1, 2)
        >>> new = calibrate_classifier(
        ...     linear, class_statistics(features, labels, 2), lr=0.3, generator=torch.Generator().manual_seed(0)
        ... )
        >>> new(features).argmax(1)
        tensor([0, 0, 1, 1])
    """
    if not isinstance(linear, nn.Linear):
        raise InputError(f"linear must be an nn.Linear, got {type(linear).__name__}")
    settings = CCVR(samples, lr=lr, momentum=momentum, weight_decay=weight_decay, epochs=epochs, batch_size=batch_size)
    return settings._calibrated(linear, statistics, generator)
