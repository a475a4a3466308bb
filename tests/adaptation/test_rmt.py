from functools import partial

import numpy as np
import pytest
import torch
from toynet import built, golden_files
from torch import nn

from trimtab.adaptation.objectives import symmetric_cross_entropy, view_contrast
from trimtab.adaptation.prepared import Prepared
from trimtab.adaptation.rmt import RMT

SLUG = "42-rmt"


class TinyNet(nn.Module):
    """The network of the golden streams: conv, batch norm, ReLU, mean over the map, linear."""

    def __init__(self, conv, fc):
        super().__init__()
        self.conv = nn.Conv2d(conv[1], conv[0], conv[2:], padding=1)
        self.bn = nn.BatchNorm2d(conv[0])
        self.fc = nn.Linear(fc[1], fc[0])

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def part(arrays, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def close(value, expected, tolerance):
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=tolerance)


def losses_of(arrays):
    found = {}
    for name in arrays:
        if name.endswith("_loss"):
            found[name.removesuffix("_loss")] = name
    return found


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files(SLUG, "sce_*_loss", "cont*_loss"))
def test_the_authors_losses(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    tolerance = 1e-10 if arrays["cont_f"].dtype == torch.float64 else 1e-5
    for case in losses_of(arrays):
        if case.startswith("sce_"):
            x, target = (arrays[f"{case}_{name}"].clone().requires_grad_() for name in ("x", "ema"))
            alpha = float(case[5:]) if case.startswith("sce_a") else 0.5
            loss = symmetric_cross_entropy(x, target, alpha)
            close(loss, arrays[f"{case}_loss"], tolerance * max(1.0, float(loss.detach().abs().max())))
            pairs = {"gx": x, "gema": target}
        else:
            base = case.removesuffix("_sup")
            x = arrays[f"{base}_f"].clone().requires_grad_()
            loss = view_contrast(x, 0.1, arrays[f"{base}_labels"] if case.endswith("_sup") else None)
            close(loss, arrays[f"{case}_loss"], tolerance)
            pairs = {"grad": x}
        loss.mean().backward()
        for name, tensor in pairs.items():
            if f"{case}_{name}" in arrays:
                close(tensor.grad, arrays[f"{case}_{name}"], tolerance)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files(SLUG, "init.*", "prototypes", "outputs"))
def test_the_authors_streams(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    dtype = arrays["x"].dtype
    tolerance, moved = (1e-10, 1e-7) if dtype == torch.float64 else (1e-5, 1e-5)
    weights = part(arrays, "init.")
    net = built(lambda: TinyNet(weights["conv.weight"].shape, weights["fc.weight"].shape)).to(dtype)
    net.load_state_dict(weights)
    source = list(zip(arrays["src_x"], arrays["src_y"]))
    warmed = any(not torch.equal(value, weights[name]) for name, value in part(arrays, "after_warmup_student.").items())
    prepared = RMT.prepare(net, source, warm_up=5 if warmed else 0)
    prepared = Prepared("RMT", {**prepared, "prototypes": arrays["prototypes"]}, net)
    layers = part(arrays, "projector.")
    (wide, d), (last, _) = layers["0.weight"].shape, layers["2.weight"].shape
    projector = built(lambda: nn.Sequential(nn.Linear(d, wide), nn.ReLU(), nn.Linear(wide, last))).to(dtype)
    projector.load_state_dict(layers)
    rmt = RMT(
        net,
        prepared,
        source=source if warmed else None,
        projector=projector,
        ensemble="sum",
        augment=lambda x, generator: x.flip(-1) * 0.9 + 0.05,
    )
    for kind, network in (("student", rmt.model), ("teacher", rmt.teacher)):
        for name, value in part(arrays, f"after_warmup_{kind}.").items():
            close(network.state_dict()[name], value, moved)
    losses, descend = [], rmt._descend
    rmt._descend = lambda loss: losses.append(loss.detach()) or descend(loss)
    for x, expected in zip(arrays["x"], arrays["outputs"]):
        close(rmt(x), expected, tolerance)
    close(torch.stack(losses), arrays["losses"], tolerance)
    for kind, network in (("student", rmt.model), ("teacher", rmt.teacher), ("projector", rmt.projector)):
        for name, value in part(arrays, f"final_{kind}.").items():
            if dtype == torch.float64 or name != "conv.bias":  # its gradient is rounding alone: batch norm comes next
                close(network.state_dict()[name], value, moved)
