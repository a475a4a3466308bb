from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from toynet import built, golden_files, seeded_net, stream

from trimtab.adaptation import AdaNPC
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


def everything(adapter):
    return {name: value.clone() for name, value in adapter.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_vote_of_the_source_s_features():
    net, xs = seeded_net(), stream()
    rows = torch.cat([features_of(net, x) for x, _ in source()])
    labels = torch.cat([y for _, y in source()])
    adapter = build(net, beta=0.0)
    for i, x in enumerate(xs):
        features = features_of(net, x)
        expected = normalised(vote(features, F.normalize(rows, dim=1), labels, CLASSES, k=7, temperature=0.1))
        torch.testing.assert_close(adapter(x), expected)
        assert len(adapter.classifier.memory) == 36 + 12 * (i + 1)
        rows, labels = torch.cat((rows, features)), torch.cat((labels, expected.argmax(1)))
    assert not list(adapter.moving)
    assert all(torch.equal(p, q) for p, q in zip(adapter.model.parameters(), net.parameters()))


@pytest.mark.parametrize("steps", [1, 3])
def test_batch_norm_learns_to_make_the_vote_sure(steps):
    net, x = seeded_net(), 2 * stream(n=8)[0]
    adapter = build(net, batch_norm=True, beta=0.0, steps=steps, optimizer=partial(torch.optim.SGD, lr=0.5))
    features = features_of(net, x)
    memory, labels = adapter.classifier.memory, adapter.classifier.labels
    weight, bias = torch.ones(10, requires_grad=True), torch.zeros(10, requires_grad=True)
    for _ in range(steps):
        u = F.batch_norm(features, None, None, weight, bias, training=True)
        votes = vote(u, memory, labels, CLASSES, k=7, temperature=0.1)
        memory = torch.cat((memory, F.normalize(u.detach(), dim=1)))
        labels = torch.cat((labels, votes.argmax(1)))
        gradients = torch.autograd.grad(entropy(votes).mean(), (weight, bias))
        with torch.no_grad():
            for parameter, gradient in zip((weight, bias), gradients):
                parameter -= 0.5 * gradient
    torch.testing.assert_close(adapter(x), normalised(votes.detach()))
    torch.testing.assert_close(adapter.norm.weight, weight)
    torch.testing.assert_close(adapter.norm.bias, bias)
    torch.testing.assert_close(adapter.classifier.memory, memory)
    assert torch.equal(adapter.classifier.labels, labels)
    assert int(adapter.updates) == steps
    assert not torch.equal(weight, torch.ones(10))


kinds = pytest.mark.parametrize(
    "settings",
    [{}, {"batch_norm": True}, {"eps_ball": 0.5}, {"max_size": 50}, {"confidence": "prob", "beta": 0.3}],
    ids=lambda settings: "-".join(settings) or "plain",
)


@kinds
def test_reset_returns_to_the_source(settings):
    adapter, xs = build(**settings), stream(batches=5)
    start = everything(adapter)
    first = [adapter(x) for x in xs]
    grown = len(adapter.classifier.memory)
    assert grown > 36
    adapter.reset()
    after = everything(adapter)
    assert {n for n, v in start.items() if not torch.equal(after[n], v)} <= {"samples", "updates", "resets"}
    assert all(torch.equal(adapter(x), y) for x, y in zip(xs, first))


@kinds
@pytest.mark.parametrize("cut", [0, 3])
def test_saved_in_the_middle_it_goes_on_bit_by_bit(settings, cut, tmp_path):
    net, xs = seeded_net(), stream(batches=6)
    AdaNPC.prepare(net, source()).save(tmp_path / "adanpc.safetensors")
    prepared = Prepared.load(tmp_path / "adanpc.safetensors")
    straight = AdaNPC(net, prepared, **settings)
    for x in xs[:cut]:
        straight(x)
    saved = save(straight.state_dict())
    expected = [straight(x) for x in xs[cut:]]
    other = AdaNPC(net, prepared, **settings)
    other(xs[0])
    other.load_state_dict(load(saved))
    assert all(torch.equal(other(x), y) for x, y in zip(xs[cut:], expected))
    assert same(everything(other), everything(straight))


@kinds
def test_frozen_it_says_the_same_and_leaves_no_trace(settings):
    adapter, xs = build(**settings), stream()
    adapter(xs[0])
    before = everything(adapter)
    with adapter.frozen():
        expected = adapter(xs[1])
    assert same(everything(adapter), before)
    assert torch.equal(adapter(xs[1]), expected)


@kinds
def test_a_window_serves_inputs_one_by_one(settings):
    adapter = build(window=4, **settings)
    for x in stream(batches=9, n=1):
        outputs = adapter(x)
        assert outputs.shape == (1, CLASSES)
        torch.testing.assert_close(outputs.sum(1), torch.ones(1))
    assert len(adapter.classifier.memory) <= 36 + 8


@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_is_not_finite_never_joins(batch_norm):
    adapter = build(beta=0.0, batch_norm=batch_norm)
    adapter(3e38 * (0.5 + stream()[0] / 2))
    assert int(adapter.skipped) == 1
    adapter(stream()[1])
    assert len(adapter.classifier.memory) == 48
    assert adapter.classifier.memory.isfinite().all()


def test_an_unreachable_threshold_leaves_the_memory_alone():
    with pytest.warns(RuntimeWarning, match="nothing will join"):
        adapter = build(beta=1.1)
    for x in stream():
        adapter(x)
    assert len(adapter.classifier.memory) == 36


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_and_one_head_by_name(dtype):
    net = seeded_net().to(dtype)
    batches = [(x.to(dtype), y) for x, y in source()]
    adapter = AdaNPC(net, AdaNPC.prepare(net, batches, head="fc"), head="fc", batch_norm=True)
    outputs = adapter(stream()[0].to(dtype))
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.sum(1), torch.ones(12))
    assert int(adapter.updates) == 1


@pytest.mark.bad_input
def test_bad_input_is_refused():
    net = seeded_net()
    prepared = AdaNPC.prepare(net, source())
    for loader, message in (
        ([], "at least one batch"),
        ([torch.zeros(4, 3, 8, 8)], "it yields no labels"),
        ([(torch.zeros(4, 3, 8, 8), torch.full((4,), 9))], "labels must lie in 0..4, found 9"),
    ):
        with pytest.raises(InputError, match=message):
            AdaNPC.prepare(net, loader)
    with pytest.raises(InputError, match="for another model"):
        AdaNPC(seeded_net(seed=1), prepared)
    with pytest.raises(InputError, match="must come from AdaNPC"):
        AdaNPC(net, Prepared("RMT", prepared, net))
    with pytest.raises(InputError, match="max_size must be at least 36"):
        AdaNPC(net, prepared, max_size=10)
    with pytest.raises(InputError, match="more than one input for batch statistics"):
        AdaNPC(net, prepared, batch_norm=True)(stream(n=1)[0])
    with pytest.raises(InputError, match="the 10 features that the head takes, it holds 9"):
        AdaNPC(net, Prepared("AdaNPC", {**prepared, "features": torch.ones(36, 9)}, net))
    with pytest.raises(InputError, match="k must be at least 1"):
        AdaNPC(net, prepared, k=0)


@kinds
def test_mixed_precision_and_black_and_short_batches(settings):
    adapter = build(**settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (stream()[0], torch.zeros(6, 3, 8, 8), stream(n=2)[0]):
            outputs = adapter(x)
            assert outputs.dtype == adapter.classifier.memory.dtype == torch.float32
            torch.testing.assert_close(outputs.sum(1), torch.ones(len(x)))
