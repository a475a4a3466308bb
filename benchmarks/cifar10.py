"""CIFAR-10 and its trained ResNet-20 as a setup to audit: ``trimtab audit benchmarks/cifar10.py:setup -o out/cifar10``.

Needs a folder, named by the environment variable ``TRIMTAB_DATA``, with ``cifar10/`` (Parquet in the Hugging Face
layout) and ``resnet-cifar10/resnet20.safetensors`` (akamaster/pytorch_resnet_cifar10).
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad, relu
from torch.utils.data import DataLoader, TensorDataset

from trimtab.audit import Setup
from trimtab.core.checks import InputError
from trimtab.data import corrupt, parquet_images

SHIFTS = {"gaussian_noise": 3, "contrast": 5, "jpeg_compression": 5}
CALIBRATION, TEST, BATCH = 2000, 2000, 200


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return relu(y + shortcut)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016) with 6 n + 2 layers, on images in 0..1."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for i in (1, 2, 3):
            first = Block(widths[i - 1], widths[i], 1 if i == 1 else 2)
            rest = [Block(widths[i], widths[i], 1) for _ in range(n - 1)]
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def data_folder() -> Path:
    """Where the real data lies."""
    if "TRIMTAB_DATA" not in os.environ:
        raise InputError(
            "the environment variable TRIMTAB_DATA must name the folder that holds cifar10/, it is not set"
        )
    return Path(os.environ["TRIMTAB_DATA"])


def resnet(layers: int = 20) -> nn.Module:
    """The trained network with so many layers (20, 32 or 56)."""
    model = ResNet((layers - 2) // 6)
    model.load_state_dict(load_file(data_folder() / "resnet-cifar10" / f"resnet{layers}.safetensors"))
    return model.eval()


def setup() -> Setup:
    """ResNet-20, 2 000 test images to calibrate on and 2 000 to measure on, as they are and under three shifts."""
    source = parquet_images(data_folder() / "cifar10", "test")
    order = torch.randperm(len(source.labels), generator=torch.Generator().manual_seed(0))
    images, labels = source.tensor()[order], source.labels[order]
    fit, test = slice(0, CALIBRATION), slice(CALIBRATION, CALIBRATION + TEST)
    batches = lambda x, y: DataLoader(TensorDataset(x, y), batch_size=BATCH)  # noqa: E731
    shifts = {
        f"{name} {severity}": batches(
            corrupt(images[test], name, severity, torch.Generator().manual_seed(severity)), labels[test]
        )
        for name, severity in SHIFTS.items()
    }
    return Setup(
        resnet(),
        calibration=batches(images[fit], labels[fit]),
        test=batches(images[test], labels[test]),
        shifts=shifts,
        classes=source.classes,
        title="ResNet-20 on CIFAR-10",
    )
