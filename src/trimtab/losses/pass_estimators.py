"""pass@N, the share of problems that at least one of N sampled answers solves: from probabilities, or from samples.

The analytic form is for models whose probability of the right answer can be computed. Where answers can only be
sampled, the unbiased estimate uses all n >= N of them: it is the share of choices of N among the n that hold a right
one.

Chen, Raventós, Cheng, Ganguli, Druckmann (NeurIPS 2025), arXiv 2502.07154; the estimator from samples is that of Chen
et al. (2021), arXiv 2107.03374. Both give one number a problem: report the mean.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.precision import doubled
from trimtab.losses.base import same_device, widened


def pass_at_n(p: Float[Tensor, " k"], samples: int) -> Float[Tensor, " k"]:
    """1 - (1 - p)^N, exact for the smallest p too.

    Args:
        p: (k,), probability of a right answer to each of k problems, in 0..1.
        samples: N >= 1.

    Returns:
        (k,), at least float32, without gradient: to train for it, see `DirectCoverage`.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from trimtab.losses import pass_at_n
        >>> sure, open_minded = torch.tensor([1.0, 0.0]), torch.tensor([0.1, 0.1])
        >>> [round(float(pass_at_n(p, samples).mean()), 3) for p in (sure, open_minded) for samples in (1, 64)]
        [0.5, 0.5, 0.1, 0.999]

    Reference:
        Chen et al., NeurIPS 2025, arXiv 2502.07154.
    """
    if p.ndim != 1 or not p.is_floating_point():
        raise InputError(f"p must be a floating-point vector, got {p.dtype} of shape {tuple(p.shape)}")
    p = checks.within(widened(p.detach()), "p", 0, 1)
    return torch.expm1(checks.integer(samples, "samples", low=1) * torch.log1p(-p)).abs()


def pass_at_n_unbiased(drawn: int | Int[Tensor, " k"], right: Int[Tensor, " k"], samples: int) -> Float[Tensor, " k"]:
    """1 - C(n - c, N) / C(n, N): the chance that N of the n drawn answers hold one of the c right ones.

    Args:
        drawn: n, how many answers were drawn for every problem, or (k,) for each; at least `samples`.
        right: (k,) integers, how many of them were right, in 0..n.
        samples: N >= 1.

    Returns:
        (k,) in float64 (float32 on Apple's GPUs).

    Raises:
        InputError: an argument is out of its range, or has another shape.

    Example:
        >>> import torch
        >>> from trimtab.losses import pass_at_n_unbiased
        >>> pass_at_n_unbiased(10, torch.tensor([0, 1, 5, 10]), 4)
        tensor([0.0000, 0.4000, 0.9762, 1.0000], dtype=torch.float64)

    Reference:
        Chen et al., Evaluating Large Language Models Trained on Code, 2021, arXiv 2107.03374.
    """
    samples = checks.integer(samples, "samples", low=1)
    if right.ndim != 1 or right.is_floating_point() or right.dtype == torch.bool:
        raise InputError(f"right must be a vector of integers, got {right.dtype} of shape {tuple(right.shape)}")
    n = drawn if isinstance(drawn, Tensor) else torch.full_like(right, checks.integer(drawn, "drawn"))
    same_device(right=right, drawn=n)
    if n.shape != right.shape or n.is_floating_point():
        raise InputError(f"drawn must be an integer, or one for each problem, got {n.dtype} of shape {tuple(n.shape)}")
    for bad, words in ((n < samples, f"drawn must be at least {samples}"), (right > n, "right must not exceed drawn")):
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise InputError(f"{words}, found {int(right[row])} of {int(n[row])} at row {row}")
    if bool((right < 0).any()):
        raise InputError(f"right must be >= 0, found {int(right.min())} at {checks.first_bad(right < 0)}")
    n, wrong = doubled(n), doubled(n - right)
    missed = _log_choose(wrong.clamp(min=samples), samples) - _log_choose(n, samples)
    return torch.where(wrong < samples, 1.0, 1 - missed.exp())


def _log_choose(n: Tensor, k: int) -> Tensor:
    """log of n! / (n - k)!, the part of C(n, k) that depends on n."""
    return torch.lgamma(n + 1) - torch.lgamma(n - k + 1)
