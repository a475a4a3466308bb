"""What a federation knows of its features: count, mean and covariance of every class, without a single sample.

Clients compute `ClassStatistics` of the features that their model's last layer sees, `merge_class_statistics` puts them
together exactly, and `sample_virtual_features` draws features from a Gaussian for each class. `CCVR` recalibrates a
classifier with them.

The statistics of all clients together are those of their pooled samples (unbiased, divisor N - 1), to rounding. Luo et
al. (2021), arXiv 2106.05001, write the merged covariance as a difference of second moments, which loses digits where
the mean is large beside the spread; here the clients' means enter as deviations from the merged mean, which is equal in
algebra and better in floating point.

Means and covariances are no samples, but they tell something of them: of a class with one sample the mean *is* the
sample. Who needs a guarantee adds noise to them before sending; sampling copes with a covariance that noise has made
indefinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from trimtab.core import checks, modules, persist, progress
from trimtab.core.checks import InputError
from trimtab.core.predictions import logits_of, take_apart

Covariance = Literal["full", "diagonal", "shared"]
_AXES: dict[str, str] = {"full": "cdd", "diagonal": "cd", "shared": "dd"}


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Count, mean and covariance of the features of each class, in float64 on the CPU.

    Args:
        counts: (c,) how many samples, integers >= 0.
        means: (c, d).
        covariances: unbiased: (c, d, d) where `covariance` is ``"full"``, the variances (c, d) where it is
            ``"diagonal"``, and where it is ``"shared"`` the one (d, d) within classes, whose divisor is the number of
            samples less the number of classes that have any. What too few samples leave undefined (the mean of
            none, the covariance of one) may hold anything, NaN included, and is kept as zero.
        covariance: which of the three.
        tukey: the power, in (0, 1], to which the features were raised before.

    Raises:
        InputError: shapes do not fit, a count is negative, a value not finite, a covariance not symmetric.

    Example:
        >>> import torch
        >>> statistics = ClassStatistics(torch.tensor([2, 0]), torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3))
        >>> statistics.n, statistics.c, statistics.d, statistics.covariances[1].count_nonzero().item()
        (2, 2, 3, 0)
    """

    counts: Int[Tensor, " c"]
    means: Float[Tensor, "c d"]
    covariances: Float[Tensor, "..."]
    covariance: Covariance = "full"
    tukey: float = 1.0

    def __post_init__(self) -> None:
        checked_options(self.covariance, self.tukey)
        fields = ("counts", "means", "covariances")
        counts, means, covariances = (checks.tensor(getattr(self, name), name).cpu() for name in fields)
        if counts.ndim != 1 or counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise InputError(f"counts must be integers of shape (c,), got {counts.dtype} {tuple(counts.shape)}")
        if bool((bad := counts < 0).any()):
            raise InputError(f"counts must be >= 0, found {int(counts[bad][0])} at {checks.first_bad(bad)}")
        c = len(counts)
        if means.ndim != 2 or len(means) != c or 0 in means.shape:
            raise InputError(f"means must have shape ({c}, d), one row for each count, got {tuple(means.shape)}")
        d = means.shape[1]
        shape = tuple({"c": c, "d": d}[axis] for axis in _AXES[self.covariance])
        if tuple(covariances.shape) != shape:
            raise InputError(f"{self.covariance} covariances must have shape {shape}, got {tuple(covariances.shape)}")
        means, covariances = means.double(), covariances.double()
        means = checks.finite(means.where(counts[:, None] > 0, torch.zeros_like(means)), "means")
        dof = degrees_of_freedom(counts, self.covariance)
        covariances = checks.finite(covariances.where(dof > 0, torch.zeros_like(covariances)), "covariances")
        if self.covariance != "diagonal":
            scale = float(covariances.abs().max())
            if not torch.allclose(covariances, covariances.mT, rtol=0, atol=1e-6 * scale):
                raise InputError("covariances must be symmetric")
        for name, value in zip(fields, (counts.long(), means, covariances)):
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    @property
    def c(self) -> int:
        """Number of classes."""
        return self.means.shape[0]

    @property
    def d(self) -> int:
        """Number of features."""
        return self.means.shape[1]

    def write(self, path: str | Path) -> None:
        """Write to `path` (safetensors), with a description beside it (``.json``), what `read` reads back exactly."""
        tensors = {"counts": self.counts, "means": self.means, "covariances": self.covariances}
        meta = {"covariance": self.covariance, "tukey": self.tukey, "trimtab": version("trimtab")}
        persist.save(path, tensors, meta)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what a client wrote; nothing in the files is executed.

        Raises:
            InputError: a file is missing, truncated, or does not describe class statistics.
        """
        tensors, meta = persist.load(path)
        try:
            return cls(**tensors, covariance=meta["covariance"], tukey=meta["tukey"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not class statistics: {error}") from error


def class_statistics(
    features: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    labels: Int[Tensor, " n"] | Integer[np.ndarray, " n"],
    num_classes: int,
    *,
    covariance: Covariance = "full",
    tukey: float = 1.0,
) -> ClassStatistics:
    """Statistics of one client's features.

    Args:
        features: what the last linear layer sees, (n, d): the `features` of `Predictions`, say.
        labels: (n,), in 0..num_classes-1; classes may be absent.
        num_classes: c, the same for all clients.
        covariance: ``"full"`` takes c d^2 numbers (1.3 GB for 100 classes of 1280 features), ``"diagonal"`` c d,
            ``"shared"`` d^2 for all classes together: the last two for many classes, or few samples of each.
        tukey: raise the features, which must be >= 0, to this power in (0, 1] first. 0.5 makes the skewed features
            behind a ReLU more Gaussian; 1, the default, leaves them. Virtual features come back in the original scale.

    Raises:
        InputError: an argument is out of range or of the wrong shape, or a feature is not finite.

    Example:
        >>> import torch
        >>> statistics = class_statistics(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 2]), 3)
        >>> statistics.counts.tolist(), statistics.means[:, 0].tolist(), statistics.covariances[:, 0, 0].tolist()
        ([2, 0, 1], [1.0, 0.0, 5.0], [2.0, 0.0, 0.0])
    """
    x = checks.matrix(features, "features")
    sums = _Sums(
        checks.integer(num_classes, "num_classes", low=1), x.shape[1], *checked_options(covariance, tukey), x.device
    )
    sums.add(x, checks.labels(labels, len(x), num_classes))
    return sums.statistics()


def collect_class_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layer: str | None = None,
    covariance: Covariance = "full",
    tukey: float = 1.0,
) -> ClassStatistics:
    """One pass of `model` over a client's data, batch by batch: no more than a batch of features is held.

    Args:
        model: called in eval mode and without gradients; its modes are restored afterwards.
        loader: batches as (inputs, labels), or as a mapping with ``labels``, as for `Predictions.collect`.
        layer: name of the linear layer that classifies; by default the model's last one.
        covariance: see `class_statistics`.
        tukey: see `class_statistics`.

    Raises:
        InputError: the loader is empty or yields no labels, or the layer does not see (n, d) finite features.

    Example:
        >>> import torch
        >>> from trimtab.calibration import collect_class_statistics
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(1, 2))
        >>> x, y = torch.tensor([[-1.0], [3.0], [1.0]]), torch.tensor([0, 1, 1])
        >>> batches = [(x[:2], y[:2]), (x[2:], y[2:])]
        >>> collect_class_statistics(model, batches).means
        tensor([[0.],
                [2.]], dtype=torch.float64)
    """
    head, device = classifier(model, layer), modules.device_of(model)
    sums = _Sums(head.out_features, head.in_features, *checked_options(covariance, tukey), device)
    with modules.evaluating(model):
        for number, batch in enumerate(progress.track(loader, "class statistics")):
            inputs, labels = take_apart(batch, device)
            with modules.watch_input(head) as seen:
                logits_of(model, inputs)
            if labels is None or not seen:
                what = "loader must yield labels" if labels is None else "the layer must be called in a forward pass"
                raise InputError(f"batch {number}: {what}")
            try:
                x = checks.matrix(seen[-1], "the classifier's input", columns=head.in_features)
                sums.add(x, checks.labels(labels, len(x), head.out_features))
            except InputError as error:
                raise InputError(f"batch {number}: {error}") from error
    if not int(sums.counts.sum()):
        raise InputError("loader must yield at least one batch, it yielded none")
    return sums.statistics()


def merge_class_statistics(statistics: Sequence[ClassStatistics]) -> ClassStatistics:
    """The statistics of all samples behind `statistics` together; groups may be merged in any order.

    Args:
        statistics: at least one, all of the same classes, features, kind of covariance and power.

    Raises:
        InputError: there is none, or they do not fit together; the message names the first that does not.

    Example:
        >>> import torch
        >>> ones = [class_statistics(torch.tensor([[x]]), torch.tensor([0]), 1) for x in (0.0, 2.0)]
        >>> merge_class_statistics(ones).covariances
        tensor([[[2.]]], dtype=torch.float64)
    """
    if isinstance(statistics, ClassStatistics):
        raise InputError("statistics must be a sequence of ClassStatistics, one a client, got one alone")
    parts = list(statistics)
    if not parts:
        raise InputError("statistics must hold at least one client's, got none")
    first = parts[0]
    for i, part in enumerate(parts):
        if not isinstance(part, ClassStatistics):
            raise InputError(f"statistics[{i}] must be ClassStatistics, got {type(part).__name__}")
        for name in ("c", "d", "covariance", "tukey"):
            if getattr(part, name) != getattr(first, name):
                raise InputError(
                    f"statistics must agree in {name}: {getattr(first, name)!r} in the first, "
                    f"{getattr(part, name)!r} in number {i}"
                )
    sums = _Sums(first.c, first.d, first.covariance, first.tukey, first.means.device)
    for part in parts:
        sums.counts += part.counts
        sums.means += part.counts[:, None] * part.means
    sums.means /= sums.counts.clamp(min=1)[:, None]
    for part in parts:
        sums.scatter += degrees_of_freedom(part.counts, part.covariance) * part.covariances
        deviations = part.counts.double().sqrt()[:, None] * (part.means - sums.means)
        for k in part.counts.nonzero()[:, 0].tolist():
            sums.spread(k, deviations[k, None])
    return sums.statistics()


def classifier(model: nn.Module, layer: str | None) -> nn.Linear:
    """The linear layer called `layer`, by default the model's last."""
    if layer is None:
        return modules.last_linear(model)
    head = modules.submodule(model, layer)
    if not isinstance(head, nn.Linear):
        raise InputError(f"layer must name an nn.Linear, {layer!r} is a {type(head).__name__}")
    return head


def checked_options(covariance: Covariance, tukey: float) -> tuple[Covariance, float]:
    """The arguments that decide what statistics hold, if they are in range."""
    return checks.one_of(covariance, "covariance", Covariance), checks.number(
        tukey, "tukey", low=0, high=1, low_open=True
    )


class _Sums:
    """Counts, means and sums of squared deviations that grow batch by batch (Chan, Golub, LeVeque 1983)."""

    def __init__(self, c: int, d: int, covariance: Covariance, tukey: float, device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.covariance, self.tukey = covariance, tukey
        self.counts = torch.zeros(c, dtype=torch.long, device=device)
        self.means = torch.zeros(c, d, dtype=torch.float64, device=device)
        shape = [{"c": c, "d": d}[axis] for axis in _AXES[covariance]]
        self.scatter = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, features: Tensor, labels: Tensor) -> None:
        x, y = features.detach().to(self.means.device).double(), labels.to(self.means.device)
        if self.tukey != 1:
            if bool((bad := x < 0).any()):
                where = checks.first_bad(bad)
                raise InputError(f"features must be >= 0 for a Tukey power, found {x[bad][0]:g} at {where}")
            x = x**self.tukey
        for k in y.unique().tolist():
            rows = x[y == k]
            mean = rows.mean(0)
            before, after = int(self.counts[k]), int(self.counts[k]) + len(rows)
            step = mean - self.means[k]
            between = step * (before * len(rows) / after) ** 0.5
            self.spread(k, torch.cat([rows - mean, between[None]]))
            self.means[k] += step * (len(rows) / after)
            self.counts[k] = after

    def spread(self, k: int, deviations: Tensor) -> None:
        """Add the squares of deviations (m, d) of class k."""
        if self.covariance == "diagonal":
            self.scatter[k] += deviations.square().sum(0)
        else:
            (self.scatter if self.covariance == "shared" else self.scatter[k]).addmm_(deviations.mT, deviations)

    def statistics(self) -> ClassStatistics:
        dof = degrees_of_freedom(self.counts, self.covariance)
        return ClassStatistics(self.counts, self.means, self.scatter / dof.clamp(min=1), self.covariance, self.tukey)


def degrees_of_freedom(counts: Tensor, covariance: Covariance) -> Tensor:
    """The divisors of the covariances, in a shape that broadcasts with them."""
    each = (counts - 1).clamp(min=0)
    return each.sum() if covariance == "shared" else each.reshape(-1, *[1] * (len(_AXES[covariance]) - 1))
