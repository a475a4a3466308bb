import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from toynet import golden_files

from trimtab.adaptation import neighbours
from trimtab.adaptation.neighbours import NonParametricClassifier, NonParametricLoss, vote
from trimtab.core.checks import InputError


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("50-adanpc", "temps"))
def test_the_authors_training(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    size, d = arrays["memory0"].shape
    loss = NonParametricLoss(d, int(arrays["num_classes"]), size=size, k=int(arrays["k"])).to(arrays["x"].dtype)
    loss.load_state_dict({**loss.state_dict(), "memory": arrays["memory0"], "labels": arrays["labels0"]})
    for x, y, expected, gradient, temperature in zip(*(arrays[n] for n in ("x", "y", "losses", "grads", "temps"))):
        assert loss.temperature == pytest.approx(float(temperature), abs=1e-12)
        features = x.clone().requires_grad_()
        value = loss(features, y)
        value.backward()
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(features.grad, gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss.memory, arrays["final_memory"], rtol=0, atol=1e-10)
    assert torch.equal(loss.labels, arrays["final_labels"])
    assert int(loss.index) == int(arrays["final_index"])
