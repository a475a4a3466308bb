"""Tent and EATA against a hand-written loop: forward, entropy, backward, step, on a ResNet-20 and 200 CIFAR images.

Both run in turns on the same batches, so that a slow minute hits both; the median of the ratios is reported.

    python benchmarks/bench_adaptation.py [--pairs 15] [--batch 200] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from copy import deepcopy

import torch
from torch import Tensor, nn

from trimtab.adaptation import EATA, ETA, Tent, compute_fisher

GOAL = 1.05


class Block(nn.Module):
    """The basic block of a CIFAR ResNet, with a strided, zero-padded shortcut."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return (y + shortcut).relu()


def resnet20() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for stage in (16, 32, 64):
        for block in range(3):
            layers.append(Block(width, stage, 2 if stage > 16 and block == 0 else 1))
            width = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def by_hand(model: nn.Module):
    """Tent as one would write it for this network alone."""
    model = deepcopy(model).requires_grad_(False)
    parameters = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
            module.track_running_stats = False
            module.running_mean = module.running_var = None
            parameters += [module.weight, module.bias]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step(x: Tensor) -> Tensor:
        logits = model(x)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits

    return step


def seconds(step, x: Tensor) -> float:
    start = time.perf_counter()
    step(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, x = resnet20(), torch.rand(options.batch, 3, 32, 32)
    fishers = compute_fisher(model, [x])
    wide = {"e_margin": 10.0, "d_margin": 1.0}  # every sample is selected: the whole batch goes backward, as by hand
    adapters = {
        "Tent": Tent(model),
        "ETA": ETA(model, **wide),
        "EATA": EATA(model, fishers=fishers, **wide),
    }
    hand = by_hand(model)
    for step in (hand, *adapters.values()):
        step(x)
    print(f"{options.batch} x 3 x 32 x 32, {options.threads} thread(s), median of {options.pairs} pairs, goal {GOAL}")
    for name, adapter in adapters.items():
        pairs = []
        for i in range(options.pairs):
            order = (hand, adapter) if i % 2 else (adapter, hand)
            times = {step: seconds(step, x) for step in order}
            pairs.append((times[adapter], times[hand]))
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        ours, theirs = (1e3 * statistics.median(side) for side in zip(*pairs))
        print(f"{name:5s} {ours:8.1f} ms, by hand {theirs:8.1f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
