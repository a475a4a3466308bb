from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toynet import seeded_net, stream

from trimtab.adaptation import LAME, Source
from trimtab.adaptation.lame import affinity, smooth
from trimtab.core.checks import InputError


@given(st.integers(1, 12), st.integers(2, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_probabilities_of_any_batch(n, classes, knn, seed):
    generator = torch.Generator().manual_seed(seed)
    features, logits = torch.randn(n, 3, generator=generator), 5 * torch.randn(n, classes, generator=generator)
    for kernel in ("rbf", "knn", "linear"):
        weights = affinity(features, kernel, knn)
        assert weights.isfinite().all()
        if kernel == "knn":
            assert weights.sum(1).tolist() == [min(knn, n - 1)] * n
            assert weights.diagonal().abs().sum() == 0
        if kernel == "rbf":
            torch.testing.assert_close(weights.diagonal(), torch.ones(n))
            assert ((weights >= 0) & (weights <= 1)).all()
        torch.testing.assert_close(smooth(logits, weights).sum(1), torch.ones(n))


def test_equal_inputs_pull_together():
    weights = affinity(torch.ones(4, 3), "rbf", 5)
    assert torch.equal(weights, torch.ones(4, 4))


def test_neighbours_settle_a_doubtful_point():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.05], [1.0, -0.05], [0.0, 1.0], [0.05, 1.0]])
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [-0.1, 0.1], [0.0, 3.0], [0.0, 3.0]])
    probs = smooth(logits, affinity(features, "knn", 2))
    assert probs.argmax(1).tolist() == [0, 0, 0, 1, 1]


def test_without_neighbours_it_is_the_source():
    x = stream()[0]
    torch.testing.assert_close(
        LAME(seeded_net(), strength=0.0)(x), Source(seeded_net())(x).softmax(1), atol=1e-6, rtol=0
    )


def test_energy_never_rises_with_a_positive_semidefinite_kernel():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    weights = affinity(torch.randn(20, 3, generator=generator, dtype=torch.float64), "linear", 5)
    unary = -(logits.softmax(1) + 1e-10).log()

    def energy(probs):
        return float((probs * (unary - weights @ probs / 2 + probs.log())).sum())

    energies = [energy(smooth(logits, weights, iterations=i)) for i in range(1, 30)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(energies))


def test_features_by_name_and_parameters_untouched():
    x = stream()[0]
    net = seeded_net()
    assert torch.equal(LAME(net, features="fc")(x), LAME(net)(x))
    assert not torch.equal(LAME(net, features="layer4")(x), LAME(net)(x))
    assert LAME(net).moving == {}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knn": 0}, "knn must be at least 1"),
        ({"kernel": "cosine"}, "kernel must be"),
        ({"strength": -1.0}, "strength must lie in"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"features": "head"}, "no module named 'head'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LAME(seeded_net(), **options)


@pytest.mark.bad_input
def test_models_without_features_are_refused():
    with pytest.raises(InputError, match=r"nn\.Linear"):
        LAME(torch.nn.Flatten())
    net = seeded_net()
    net.unused = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(InputError, match="sees every input once"):
        LAME(net)(stream()[0])
