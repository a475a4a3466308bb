import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from toynet import GOLDEN, ToyNet, built, golden_files, seeded_net, stream
from torch import nn

from trimtab.adaptation import AdaNPC, Tent
from trimtab.adaptation.base import entropy
from trimtab.adaptation.neighbours import normalised, vote
from trimtab.adaptation.prepared import Prepared
from trimtab.core.checks import InputError

SLUG = "50-adanpc"
CLASSES = 5


def source(batches=3, n=12):
    return [(x, torch.arange(n) % CLASSES) for x in stream(seed=7, batches=batches, n=n)]


def build(model=None, **settings):
    model = seeded_net() if model is None else model
    return AdaNPC(model, AdaNPC.prepare(model, source()), k=7, **settings)


def features_of(net, x):
    with torch.no_grad():
        return net.layer4(net.layer1(net.bn1(net.conv1(x)).relu())).mean((2, 3))


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files(SLUG, "memory_raw"))
def test_the_authors_streams(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[arrays["x"].dtype]
    classes, d, t = int(arrays["num_classes"]), arrays["x"].shape[-1], arrays["x"].shape[0]
    model = built(lambda: nn.Sequential(nn.Identity(), nn.Linear(d, classes))).to(arrays["x"].dtype)
    given = {"features": arrays["memory_raw"], "labels": arrays["memory_labels"], "classes": arrays["num_classes"]}
    eps_ball = float(arrays["eps_ball"])
    adapter = AdaNPC(
        model,
        Prepared("AdaNPC", given, model),
        k=int(arrays["k"]),
        temperature=float(arrays["temperature"]),
        beta=float(arrays["beta"]),
        eps_ball=eps_ball if eps_ball <= 1 else None,
    )
    head = adapter.classifier
    head.memory = torch.cat((arrays["dummy"], head.memory))
    head.labels = torch.cat((arrays["dummy_label"], head.labels))
    for i in range(t):
        torch.testing.assert_close(head(arrays["x"][i]), arrays["probs"][i], rtol=0, atol=tolerance)
        outputs = adapter(arrays["x"][i])
        torch.testing.assert_close(outputs, normalised(arrays["probs"][i]), rtol=0, atol=tolerance)
        assert len(head.memory) == int(arrays["memory_sizes"][i])
    torch.testing.assert_close(head.memory, arrays["final_memory"], rtol=0, atol=tolerance)
    assert torch.equal(head.labels, arrays["final_labels"])
