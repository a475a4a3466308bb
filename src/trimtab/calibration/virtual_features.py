"""Virtual features: draws from the Gaussians that class statistics describe."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.calibration.class_statistics import ClassStatistics, degrees_of_freedom
from trimtab.core import checks
from trimtab.core.checks import InputError


def sample_virtual_features(
    statistics: ClassStatistics, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"]]:
    """Draw n features of every class from its Gaussian; a covariance may have any rank.

    Negative variances and eigenvalues, from rounding or from noise that clients added, count as zero.

    Args:
        statistics: of all clients together.
        n: for each class, >= 1: equally many, so that the set is balanced however unbalanced the clients are.
        generator: the same state gives the same features.

    Returns:
        Features in float64 on the generator's device and their labels, class after class. A class with fewer than two
        samples (where the covariance is shared: with none) gets no features, and a warning names it.

    Raises:
        InputError: no class can be drawn from: none has two samples.

    Example:
        >>> import torch
        >>> from trimtab.calibration import class_statistics, sample_virtual_features
        >>> line = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])  # rank one
        >>> statistics = class_statistics(line, torch.zeros(3, dtype=torch.long), 1)
        >>> x, y = sample_virtual_features(statistics, 5, torch.Generator().manual_seed(0))
        >>> x.shape, bool(torch.allclose(x[:, 0], x[:, 1]))
        (torch.Size([5, 2]), True)
    """
    checks.integer(n, "n", low=1)
    known = degrees_of_freedom(statistics.counts, statistics.covariance).flatten() > 0
    drawn = ((statistics.counts > 0) & known).nonzero()[:, 0].tolist()
    if not drawn:
        raise InputError("statistics must hold a class with at least 2 samples, found none")
    if missing := sorted(set(range(statistics.c)) - set(drawn)):
        least = 1 if statistics.covariance == "shared" else 2
        few = f"fewer than {least} sample(s) of each"
        warnings.warn(f"no virtual features for classes {missing}: {few}", UserWarning, stacklevel=2)
    means, covariances = statistics.means.to(generator.device), statistics.covariances.to(generator.device)
    root = _root(covariances) if statistics.covariance == "shared" else None
    features = []
    for k in drawn:
        noise = torch.randn(n, statistics.d, dtype=torch.float64, device=generator.device, generator=generator)
        if statistics.covariance == "diagonal":
            features.append(means[k] + noise * covariances[k].clamp(min=0).sqrt())
        else:
            features.append(means[k] + noise @ (_root(covariances[k]) if root is None else root).mT)
    x = torch.cat(features)
    if statistics.tukey != 1:
        x = x.clamp(min=0) ** (1 / statistics.tukey)
    return x, torch.tensor(drawn, device=generator.device).repeat_interleave(n)


def _root(covariance: Tensor) -> Tensor:
    """A matrix R with R R^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()
