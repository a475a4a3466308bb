"""The toy network of all test-time-adaptation cards, and the reading of their golden vectors."""

import fnmatch
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"f64": 1e-9, "f32": 2e-5}
DTYPE = {"f64": torch.float64, "f32": torch.float32}


class ToyNet(nn.Module):
    """conv, norm, relu, three times; mean over the map; linear."""

    def __init__(self, channels=(3, 6, 8, 10), classes=5, norm="batch", groups=2, eps=1e-5):
        super().__init__()
        a, b, c, d = channels

        def normalise(width):
            return nn.BatchNorm2d(width, eps=eps) if norm == "batch" else nn.GroupNorm(groups, width, eps=eps)

        self.conv1 = nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.bn1 = normalise(b)
        self.layer1 = nn.Sequential(nn.Conv2d(b, c, 3, stride=2, padding=1, bias=False), normalise(c), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(c, d, 3, padding=1, bias=False), normalise(d), nn.ReLU())
        self.fc = nn.Linear(d, classes)

    def forward(self, x):
        x = self.layer1(self.bn1(self.conv1(x)).relu())
        return self.fc(self.layer4(x).mean((2, 3)))


def built(make):
    """The network that `make` gives, in eval mode, without a trace in the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def seeded_net(seed=0, **settings):
    """A ToyNet whose weights and running statistics come from a seed, without the global random state."""
    net = built(lambda: ToyNet(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.is_floating_point():
                tensor.copy_(0.3 * noise + (tensor == 1))
    return net.eval()


def huge(x):
    """Finite, and so large that the first convolution overflows."""
    return 3e38 * (0.5 + x / 2)


def stream(seed=0, batches=4, n=12, shape=(3, 8, 8), low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    return low + (high - low) * torch.rand(batches, n, *shape, generator=generator)


def golden_files(slug, *needed, setting=None):
    """The files of a slug that hold all arrays `needed` (``*`` stands for anything) and the setting of that name."""
    files = []
    for path in sorted((GOLDEN / slug).glob("*.npz")):
        arrays = np.load(path)
        names = [re.sub(r"^f(32|64)\.", "", name) for name in arrays.files]
        settings = arrays["cfg_names"].tolist() if "cfg_names" in names else []
        if all(fnmatch.filter(names, want) for want in needed) and (setting is None or setting in settings):
            files.append(pytest.param(path, id=path.stem))
    assert files, f"no golden file of {slug} holds {needed}"
    return files


class Golden:
    """One file of golden vectors in one precision."""

    def __init__(self, path, precision):
        self.arrays = dict(np.load(path))
        self.precision = precision
        self.dtype = DTYPE[precision]
        self.checked = 0

    @property
    def precise(self):
        """Whether the file holds results in this precision."""
        return bool(self.results())

    def tensor(self, name):
        value = torch.from_numpy(np.asarray(self.arrays[name]))
        return value.to(self.dtype) if value.is_floating_point() else value

    @property
    def cfg(self):
        """Settings by name, strings included."""
        numbers = dict(zip(self.arrays["cfg_names"].tolist(), self.arrays["cfg"].tolist()))
        strings = {k: str(v) for k, v in self.arrays.items() if v.dtype.kind == "U" and v.ndim == 0}
        return {**numbers, **strings}

    def net(self):
        weights = {n[2:]: self.tensor(n) for n in self.arrays if n.startswith("w.")}
        channels = (
            weights["conv1.weight"].shape[1],
            *(weights[f"{layer}.weight"].shape[0] for layer in ("conv1", "layer1.0", "layer4.0")),
        )
        settings = self.cfg if "cfg" in self.arrays else {}
        net = built(
            lambda: ToyNet(
                channels,
                weights["fc.weight"].shape[0],
                norm="batch" if "bn1.running_mean" in weights else "group",
                groups=int(settings.get("groups", 2)),
                eps=float(self.arrays.get("bn_eps", 1e-5)),
            )
        ).to(self.dtype)
        net.load_state_dict(weights)
        return net.eval()

    def augment(self):
        """The stand-in for random augmentation, read from its description: ``a*x+b``."""
        factor, offset = map(float, re.search(r"([\d.]+)\s*\*\s*x\s*\+\s*([\d.]+)", self.cfg["transform"]).groups())
        return lambda x, generator: factor * x + offset

    def optimizer(self):
        cfg = self.cfg
        lr = cfg.get("lr", cfg.get("lr_adam"))
        momentum = cfg.get("momentum", cfg.get("beta1_or_momentum", 0.9))
        name = cfg.get("optim", "Adam" if "lr_adam" in cfg else "SGD")
        if name.startswith("Adam"):
            return partial(torch.optim.Adam, lr=lr, betas=(momentum, 0.999))
        return partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov="nesterov" in name)

    def adapted(self):
        """Chooses the parameters that the file says move; all normalisation parameters where it does not say."""
        if "adapted_names" not in self.arrays:
            return {}
        names = self.arrays["adapted_names"].tolist()
        return {"parameters_of": lambda model: {n: p for n, p in model.named_parameters() if n in names}}

    def results(self, prefix=""):
        start = f"{self.precision}.{prefix}"
        return [name[len(start) :] for name in self.arrays if name.startswith(start)]

    def check(self, name, value):
        """Hold a value against the result of that name, if the file has one."""
        key = f"{self.precision}.{name}"
        if key not in self.arrays:
            return
        expected = self.arrays[key]
        value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        assert value.shape == expected.shape, name
        if expected.dtype.kind in "iub":
            np.testing.assert_array_equal(value, expected, err_msg=name)
        else:
            np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE[self.precision], err_msg=name)
        self.checked += 1

    def check_network(self, prefix, network):
        """Hold parameters and buffers of a network against the results ``prefix.<name>``."""
        live = network.state_dict()
        for name in self.results(f"{prefix}."):
            self.check(f"{prefix}.{name}", live[name])

    def finish(self, *also_known):
        """Every result of the file has been checked."""
        assert self.checked == len([n for n in self.results() if n not in also_known])
        assert self.checked
