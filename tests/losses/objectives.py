"""Every training objective, as the tests of the contract call it on a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.losses import (
    DCA,
    ICNN,
    MDCA,
    MESA,
    MMCE,
    MNDCG,
    MSSSIM,
    SAF,
    UNPG,
    AnyLoss,
    ArcFace,
    AugCal,
    CertifiedIBP,
    CosFace,
    DirectCoverage,
    DMixup,
    EnsLoss,
    ExpectedLossVAE,
    InfoNCE,
    MagFace,
    MannWhitney,
    ProtoTriplet,
    RankMixup,
    SphericalSoftmaxLoss,
    SquaredErrorLoss,
    TaylorSoftmaxLoss,
    ThresholdAdaptiveScaling,
    ZLoss,
    make_mixtures,
)
from trimtab.losses.base import pair


@dataclass(frozen=True)
class Builder:
    """Builds a loss, and calls it on scores that it is asked about.

    Args:
        make: a function that returns the loss; called anew for every test.
        batch: ``batch(n, generator)`` returns ``(scores, rest)``: a tensor of n rows that gradients are taken for, in
            float64, and what else a call takes; two classes in n >= 2 rows.
        call: ``call(loss, scores, *rest)`` returns the scalar; by default ``loss(scores, *rest)``.
        smallest: the smallest batch that it takes; below it, an InputError.
        compiled: whether ``torch.compile(fullgraph=True)`` captures it.
        differentiable: whether the value's gradient is what backward returns (False where a surrogate is used, whose
            docstring says so).
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, tuple[Tensor, ...]]]
    call: Callable[..., Tensor] = lambda loss, scores, *rest: loss(scores, *rest)
    smallest: int = 1
    compiled: bool = True
    differentiable: bool = True


def classified(n: int, generator: torch.Generator, classes: int = 5) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits of some classes, and labels."""
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, (torch.arange(n) % classes,)


def binary(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scores (n,) and labels 0 or 1."""
    return 2 * torch.randn(n, generator=generator, dtype=torch.float64), (torch.arange(n) % 2,)


def mixed(sets: int) -> Callable[[int, torch.Generator], tuple[Tensor, tuple[Tensor, ...]]]:
    """Logits and labels, and the logits and soft labels of some mixtures of each sample."""

    def batch(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, (labels,) = classified(n, generator)
        x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        targets = make_mixtures(x, labels, classes=5, sets=sets, generator=generator).targets
        return logits, (labels, 2 * torch.randn(sets * n, 5, generator=generator, dtype=torch.float64), targets)

    return batch


def noisy(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scores (n,), labels 0 or 1, and normal numbers."""
    scores, rest = binary(n, generator)
    return scores, (*rest, torch.randn(n, generator=generator, dtype=torch.float64))


def answers(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits (n, 4, 5) and labels of tokens after a prompt of one."""
    labels = torch.randint(5, (n, 4), generator=generator)
    labels[:, 0] = -100
    return torch.randn(n, 4, 5, generator=generator, dtype=torch.float64), (labels,)


def blended(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits and labels, and the mixtures that the logits are of."""
    logits, (labels,) = classified(n, generator)
    return logits, (labels, DMixup(generator=generator).mix(logits))


def adapted(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Source inputs, which are their own logits, labels, and target inputs."""
    logits, rest = classified(n, generator)
    return logits, (*rest, torch.randn(3, 5, generator=generator, dtype=torch.float64))


def augcal() -> AugCal:
    """AugCal with the smallest of parts."""
    return AugCal(
        adaptation=lambda model, source, target: model(target).square().mean() - source.mean(),
        augment=lambda x: 0.9 * x,
        calibration=DCA(),
    )


class CrossEntropy(nn.Module):
    """What every classification objective stands beside, at the same door."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(*pair(logits, labels))


def episode(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A support set of two classes, and as many queries."""
    support, queries = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % 2
    return support, (labels, queries, labels)


def remembered(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, labels and numbers of samples, of an epoch in which SAF's memory counts."""
    logits, (labels,) = classified(n, generator)
    return logits, (labels, torch.arange(n), 2)


def saf() -> SAF:
    """A SAF that remembers outputs of epoch 1."""
    loss = SAF(samples=9, classes=5, start=1, lookback=1)
    logits, (labels,) = classified(9, torch.Generator().manual_seed(1))
    loss(logits, labels, torch.arange(9), epoch=1)
    return loss


def averaged(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, labels and inputs, of an epoch in which MESA's average counts."""
    logits, rest = classified(n, generator)
    return logits, (*rest, 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64), 1)


def keypoints(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Keypoints and their labels."""
    said, labels = torch.randn(2, n, 3, 2, generator=generator, dtype=torch.float64)
    return said, (labels,)


def embedded(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Embeddings of some classes, and labels."""
    return 5 * torch.randn(n, 8, generator=generator, dtype=torch.float64), (torch.arange(n) % 3,)


def pictures(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Small images, and images that resemble them."""
    images, other = torch.rand(2, n, 1, 9, 8, generator=generator, dtype=torch.float64)
    return images, (0.7 * images + 0.3 * other,)


def encoded(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Small images, what they shall be, and the means and logarithmic variances of their codes."""
    images, rest = pictures(n, generator)
    return images, (*rest, *torch.randn(2, n, 3, generator=generator, dtype=torch.float64))


def certified() -> CertifiedIBP:
    """A small network to certify, with inputs of any size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    return CertifiedIBP(model, eps=0.1, pixels=None)


BUILDERS: dict[str, Builder] = {
    "cross_entropy": Builder(CrossEntropy, classified),
    "AnyLoss": Builder(partial(AnyLoss, from_logits=True), binary, smallest=2),
    "AnyLoss, gmean": Builder(
        partial(AnyLoss, metric="gmean", amplification=10, from_logits=True), partial(classified, classes=2), smallest=2
    ),
    "AugCal": Builder(augcal, adapted, lambda loss, x, *rest: loss(nn.Identity(), x, *rest)),
    "CertifiedIBP": Builder(certified, embedded, smallest=2),
    "CertifiedIBP, warm-up": Builder(certified, embedded, lambda loss, x, y: loss(x, y, 0.03), smallest=2),
    "DCA": Builder(DCA, classified),
    "DCA, ignoring": Builder(partial(DCA, ignore_index=1), classified),
    "DMixup": Builder(DMixup, blended),
    "DirectCoverage": Builder(partial(DirectCoverage, samples=4), answers, differentiable=False),
    "DirectCoverage, classes": Builder(partial(DirectCoverage, samples=16), classified, differentiable=False),
    "ExpectedLossVAE": Builder(lambda: ExpectedLossVAE(MSSSIM(data_range=1, scales=2, win_size=3), weight=2), encoded),
    "EnsLoss": Builder(EnsLoss, binary, compiled=False, differentiable=False),
    "EnsLoss, noise": Builder(partial(EnsLoss, tail=False), noisy),
    "ArcFace": Builder(partial(ArcFace, 8, 3), embedded),
    "CosFace": Builder(partial(CosFace, 8, 3), embedded),
    "MagFace": Builder(partial(MagFace, 8, 3), embedded),
    "UNPG": Builder(lambda: UNPG(ArcFace(8, 3, scale=16)), embedded, smallest=2),
    "InfoNCE": Builder(partial(InfoNCE, temperature=1), classified),
    "MannWhitney": Builder(partial(MannWhitney, temperature=1), classified),
    "MannWhitney, paper": Builder(partial(MannWhitney, reduction="paper"), classified),
    "MDCA": Builder(MDCA, classified),
    "MESA": Builder(partial(MESA, nn.Identity(), start=0), averaged),
    "MMCE": Builder(MMCE, classified),
    "MMCE, weighted": Builder(partial(MMCE, weighted=True), classified),
    "MNDCG": Builder(MNDCG, mixed(3)),
    "MSSSIM": Builder(partial(MSSSIM, data_range=1, scales=2, win_size=3), pictures),
    "RankMixup": Builder(RankMixup, mixed(1)),
    "RankMixup, probs": Builder(partial(RankMixup, on="probs", margin=0.2, masking="elementwise"), mixed(1)),
    "ICNN": Builder(partial(ICNN, k=2), partial(classified, classes=2), smallest=3),
    "ICNN, whole episode": Builder(partial(ICNN, ipc=4), partial(classified, classes=2), smallest=5),
    "ProtoTriplet": Builder(ProtoTriplet, episode, smallest=2, compiled=False),
    "SAF": Builder(saf, remembered),
    "SphericalSoftmaxLoss": Builder(SphericalSoftmaxLoss, classified),
    "SquaredErrorLoss": Builder(SquaredErrorLoss, classified),
    "TaylorSoftmaxLoss": Builder(TaylorSoftmaxLoss, classified),
    "ThresholdAdaptiveScaling": Builder(partial(ThresholdAdaptiveScaling, 1.0), keypoints),
    "ZLoss": Builder(ZLoss, classified),
}
