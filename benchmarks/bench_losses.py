"""The training objectives beside their peers: forward and backward, the same numbers first.

Peers are pytorch-msssim and torchmetrics; "naive" is the authors' table of all pairs, "direct" the formula in a few
lines, without a look at its input. All run in turns on the same data; times are the process's own (so that other work
on the machine counts less), medians over turns. The ratio is to the fastest peer with the same value and gradients; one
that has others is said to differ, and by how much of the largest. Memory is what torch allocates at most in a step.

    python -m benchmarks.bench_losses [--turns 9] [--threads 1] [--only images rankings formulas]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trimtab import losses as ours

Loss = Callable[..., Tensor]
SAME = 1e-4  # of the largest number: rounding of single precision, a hundred times over
QUICK = 5e-3  # seconds that a turn takes at least


def step(loss: Loss, data: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients in the data; those in the loss's own weights are taken too."""
    leaves = [x for x in data if x.requires_grad]
    own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    value = loss(*data)
    return [value.detach(), *torch.autograd.grad(value, leaves + own)[: len(leaves)]]


def medians(steps: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Seconds of each, by the process's clock, in turns."""
    repeats = {}
    for name, run in steps.items():
        run()
        start = time.process_time()
        run()
        repeats[name] = max(1, math.ceil(QUICK / max(time.process_time() - start, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, run in steps.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                run()
            taken[name].append((time.process_time() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in taken.items()}


def peak(run: Callable[[], object]) -> int:
    """Bytes that torch holds at most on the CPU at once, beyond what it held before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def compare(
    what: str, goal: float, mine: Loss, peers: dict[str, Loss], data: list[Tensor], turns: int, memory: bool = False
) -> None:
    """One line a contestant."""
    contestants = {"trimtab": mine, **peers}
    steps = {name: lambda loss=loss: step(loss, data) for name, loss in contestants.items()}
    expected, gaps = steps["trimtab"](), {}
    for name, run in steps.items():
        pairs = list(zip(expected, run()))
        gaps[name] = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs)
        assert gaps[name] < SAME or not name.startswith(("naive", "direct")), (what, name, gaps[name])
    times = medians(steps, turns)
    rivals = [times[name] for name in peers if gaps[name] < SAME] or [times[name] for name in peers]
    for name in contestants:
        line = f"{what if name == 'trimtab' else '':34s} {name:26s} {1e3 * times[name]:10.3f} ms"
        if memory:
            line += f" {peak(steps[name]) / 2**20:9.2f} MiB"
        if name == "trimtab":
            ratio = times[name] / min(rivals)
            line += f"   {ratio:6.3f} of the fastest peer{'' if ratio <= goal else f', above the goal {goal:.3g}'}"
        else:
            line += f"   {'same' if gaps[name] < SAME else 'differs'}, by {gaps[name]:.0e}"
        print(line, flush=True)


def classified(n: int, c: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + c)
    logits = 2 * torch.randn(n, c, generator=generator)
    return [logits.requires_grad_(), torch.randint(c, (n,), generator=generator)]


def peer_ms_ssim(x: Tensor, y: Tensor, exponents: Tensor) -> Tensor:
    """pytorch-msssim's `ms_ssim` without its bound on sizes, that of five scales however many it takes."""
    from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim

    window = _fspecial_gauss_1d(11, 1.5).repeat(x.shape[1], 1, 1, 1)
    values = []
    for _ in exponents:
        similar, contrast = _ssim(x, y, data_range=1.0, win=window, size_average=False)
        values.append(contrast.relu())
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return (torch.stack([*values[:-1], similar.relu()]) ** exponents[:, None, None]).prod(0).mean()


def images(turns: int) -> None:
    """MS-SSIM."""
    for shape, scales in (((8, 3, 256, 256), 5), ((32, 1, 64, 64), 3)):
        generator = torch.Generator().manual_seed(0)
        y = F.avg_pool2d(torch.rand(*shape, generator=generator), 3, 1, 1)
        x = (y + 0.1 * torch.rand(*shape, generator=generator)).clamp(0, 1).requires_grad_()
        mine = ours.MSSSIM(data_range=1.0, scales=scales)
        exponents = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
        exponents = exponents / (1.0 if scales == 5 else exponents.sum())
        peers: dict[str, Loss] = {}
        if find_spec("pytorch_msssim"):
            peers["pytorch-msssim"] = lambda x, y, e=exponents: 1 - peer_ms_ssim(x, y, e)
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

        peers["torchmetrics"] = lambda x, y, e=exponents: (
            1 - measure(x, y, data_range=1.0, betas=tuple(e.tolist()), normalize=None)
        )
        compare(f"MSSSIM {'x'.join(map(str, shape))}", 1 / 1.5, mine, peers, [x, y], turns)


def rankings(turns: int) -> None:
    """RankMixup and MNDCG, which have mixtures beside the batch; the naive form of the former is the authors' table."""

    def rank_mixup(z: Tensor, y: Tensor, mixed: Tensor, targets: Tensor) -> Tensor:
        hinges = (mixed.max(1, keepdim=True).values - z.max(1, keepdim=True).values + 2).relu()
        table = (targets.max(1).values != 1).float() * hinges
        return F.cross_entropy(z, y) + 0.1 * table.mean()

    def mndcg(z: Tensor, y: Tensor, mixed: Tensor, targets: Tensor) -> Tensor:
        relevance, order = targets.view(-1, *z.shape).max(2).values.sort(dim=0, descending=True, stable=True)
        discounts = torch.arange(2, len(order) + 3).float().log2()[:, None]
        sure = mixed.softmax(1).max(1).values.view(-1, len(z)).gather(0, order)
        gain = (torch.cat([z.softmax(1).max(1).values[None], sure]) / discounts).sum(0)
        ideal = (torch.cat([torch.ones(1, len(z)), relevance]) / discounts).sum(0)
        return F.cross_entropy(z, y) + 0.1 * (1 - torch.minimum(gain / ideal, ideal / gain)).mean()

    for n, c in ((128, 10), (128, 1000), (4096, 10)):
        logits, labels = classified(n, c)
        for sets, mine, peer in ((1, ours.RankMixup(), rank_mixup), (3, ours.MNDCG(), mndcg)):
            generator = torch.Generator().manual_seed(1)
            mixed = (2 * torch.randn(sets * n, c, generator=generator)).requires_grad_()
            targets = ours.make_mixtures(logits.detach(), labels, classes=c, sets=sets, generator=generator).targets
            peers = {"naive" if sets == 1 else "direct": peer}
            data = [logits, labels, mixed, targets]
            compare(f"{type(mine).__name__} {n} x {c}", 1.05, mine, peers, data, turns, memory=True)


def formulas(turns: int) -> None:
    """What is written down in a few lines."""

    def z_loss(z: Tensor, y: Tensor) -> Tensor:
        target = z.gather(1, y[:, None])[:, 0]
        return F.softplus((z.mean(1) - target) / (z.std(1, correction=0) + 1e-12)).mean()

    def z_loss_by_moments(z: Tensor, y: Tensor) -> Tensor:
        mean = z.mean(1)
        target, sd = z.gather(1, y[:, None])[:, 0], (z - mean[:, None]).square().mean(1).sqrt()
        return F.softplus((mean - target) / (sd + 1e-12)).mean()

    def squared_error(z: Tensor, y: Tensor) -> Tensor:
        return (z - F.one_hot(y, z.shape[1])).square().sum(1).mean()

    def taylor(z: Tensor, y: Tensor) -> Tensor:
        exponential = 1 + z + z.square() / 2
        return (exponential.sum(1).log() - exponential.gather(1, y[:, None])[:, 0].log()).mean()

    def spherical(z: Tensor, y: Tensor) -> Tensor:
        squares = z.square() + 1e-6
        return (squares.sum(1).log() - squares.gather(1, y[:, None])[:, 0].log()).mean()

    def coverage(z: Tensor, y: Tensor) -> Tensor:
        nll = F.cross_entropy(z, y, reduction="none")
        p = (-nll.detach()).double().exp()
        missed = (1 - p) ** 15
        return (16 * p * missed / (1 - missed * (1 - p)) * nll).mean().float()

    def dca(z: Tensor, y: Tensor) -> Tensor:
        p, predicted = z.softmax(1).max(1)
        return (p.mean() - (predicted == y).float().mean()).abs()

    def mdca(z: Tensor, y: Tensor) -> Tensor:
        return (z.softmax(1).mean(0) - F.one_hot(y, z.shape[1]).float().mean(0)).abs().mean()

    forms: dict[str, tuple[Loss, dict[str, Loss]]] = {
        "ZLoss": (ours.ZLoss(), {"direct, std": z_loss, "direct, moments": z_loss_by_moments}),
        "SquaredErrorLoss": (ours.SquaredErrorLoss(), {"direct": squared_error}),
        "TaylorSoftmaxLoss": (ours.TaylorSoftmaxLoss(), {"direct": taylor}),
        "SphericalSoftmaxLoss": (ours.SphericalSoftmaxLoss(), {"direct": spherical}),
        "DirectCoverage": (ours.DirectCoverage(samples=16), {"direct": coverage}),
        "DCA": (ours.DCA(), {"direct": dca}),
        "MDCA": (ours.MDCA(), {"direct": mdca}),
    }
    for n, c in ((128, 10), (128, 1000), (4096, 1000)):
        for name, (mine, peers) in forms.items():
            compare(f"{name} {n} x {c}", 1.05, mine, peers, classified(n, c), turns)

    def f1(scores: Tensor, y: Tensor) -> Tensor:
        h = (73 * (scores.sigmoid() - 0.5)).sigmoid()
        return 1 - 2 * (h * y).sum() / (h.sum() + y.sum())

    def random_loss(scores: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        margins = scores * (2 * y - 1)
        slopes = -noise.exp().clamp(max=1).sort(descending=True).values
        slopes = slopes[margins.argsort().argsort()] / margins.detach().clamp(min=1) - 1e-6
        return (slopes * margins).mean()

    for n in (128, 10_000):
        generator = torch.Generator().manual_seed(0)
        scores, labels = torch.randn(n, generator=generator).requires_grad_(), torch.arange(n) % 2
        noise = torch.randn(n, generator=generator)
        compare(f"AnyLoss {n}", 1.05, ours.AnyLoss(from_logits=True), {"direct": f1}, [scores, labels], turns)
        compare(f"EnsLoss {n}", 1.05, ours.EnsLoss(), {"direct": random_loss}, [scores, labels, noise], turns)


def run(description: str | None, groups: tuple[Callable[[int], None], ...]) -> None:
    """What `main` of a benchmark does: all groups, or those that are asked for."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    named = {group.__name__: group for group in groups}
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=named, default=list(named))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        named[name](options.turns)


def main() -> None:
    run(__doc__, (images, rankings, formulas))


if __name__ == "__main__":
    main()
