"""Label shift adapter, slug 40-label-shift-adapter: there is no public code, so identities and brute force."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from toynet import built, seeded_net, stream

from trimtab.adaptation import (
    CAFA,
    ETA,
    LAME,
    BatchNormAdapt,
    CoTTA,
    LabelShiftAdapter,
    Prepared,
    PriorShiftCorrection,
    RoTTA,
    Source,
    Tent,
)
from trimtab.adaptation.label_shift_training import imbalance_degree, inverse_mix, logit_adjusted_loss
from trimtab.core.checks import InputError
from trimtab.core.modules import all_parameters

LABELS = torch.tensor([0] * 10 + [1] * 5 + [2] * 3 + [3] * 2 + [4] * 2)
COUNTS = torch.bincount(LABELS)
SGD = partial(torch.optim.SGD, lr=0.05)
HOSTS = {
    "batch": BatchNormAdapt,
    "mixed": partial(BatchNormAdapt, variant="mixed"),
    "source": Source,
    "tent": partial(Tent, optimizer=SGD),
    "tent_everything": partial(Tent, optimizer=SGD, parameters_of=all_parameters),
    "eta": partial(ETA, d_margin=0.9, e_margin=1.5),
    "cotta": partial(CoTTA, augmentations=2),
    "rotta": partial(RoTTA, capacity=16, update_every=10, nu=0.1),
    "lame": LAME,
}
hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(seed, c):
    return draw(seed, c).softmax(0)


def labelled(batches=3):
    return [(x, LABELS) for x in stream(9, batches=batches, n=len(LABELS))]


@pytest.fixture(scope="module")
def prepared():
    return LabelShiftAdapter.prepare(seeded_net(), labelled(), steps=60, hidden=8)


def with_network(seed, net, hidden=7, spread=0.3):
    """A preparation with a random network, so that every part of the change is there."""
    c, d = net.fc.out_features, net.fc.in_features
    m = c * d + c + 2 * d
    shapes = {
        "hidden.weight": (hidden,),
        "hidden.bias": (hidden,),
        "output.weight": (m, hidden),
        "output.bias": (m,),
    }
    tensors = {name: spread * draw(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return Prepared("LabelShiftAdapter", {"prior": COUNTS.double() / COUNTS.sum(), **tensors}, net)


def untrained(net):
    tensors = with_network(0, net, spread=1.0)
    return Prepared(
        "LabelShiftAdapter",
        {name: torch.zeros_like(value) if "output" in name else value for name, value in tensors.items()},
        net,
    )


def by_hand(prepared, features, weight, bias, mix):
    """The card's formulas, one number after the other."""
    prior = prepared["prior"]
    degree = sum(float(a * b) for a, b in zip(mix, prior)) / sum(float(a) ** 2 for a in prior)
    units = [max(0.0, float(w) * degree + float(b)) for w, b in zip(prepared["hidden.weight"], prepared["hidden.bias"])]
    out = prepared["output.weight"] @ torch.tensor(units, dtype=torch.float64) + prepared["output.bias"]
    c, d = weight.shape
    change, shift_bias, gamma, beta = out[: c * d], out[c * d : c * d + c], out[-2 * d : -d], out[-d:]
    h = (1 + gamma) * features + beta
    return h @ (weight + change.reshape(c, d)).T + bias + shift_bias


@hosts
def test_an_untrained_adapter_is_its_host_bit_by_bit(host):
    net = seeded_net()
    adapter, alone = LabelShiftAdapter(net, untrained(net), host=host), host(net)
    for x in stream(n=20):
        expected = alone(x) if alone.outputs == "logits" else alone(x).log()
        assert torch.equal(adapter(x), expected)
    assert int(adapter.updates) == int(alone.updates)
    assert (int(adapter.samples), int(adapter.skipped)) == (80, 0)


def test_by_default_the_host_is_batch_statistics():
    net = seeded_net()
    adapter, alone = LabelShiftAdapter(net, untrained(net)), BatchNormAdapt(net)
    for x in stream():
        assert torch.equal(adapter(x), alone(x))


def test_the_changed_model_is_the_card_s():
    net = seeded_net().double()
    prepared = with_network(3, net)
    adapter = LabelShiftAdapter(net, prepared, host=Source, momentum=0.7)
    head, net.fc = net.fc, nn.Identity()
    mix = torch.full((5,), 0.2, dtype=torch.float64)
    for x in stream().double():
        torch.testing.assert_close(adapter.target, mix)
        with torch.no_grad():
            expected = by_hand(prepared, net(x), head.weight, head.bias, mix)
        torch.testing.assert_close(adapter(x), expected)
        mix = 0.7 * mix + 0.3 * expected.softmax(1).mean(0)
    assert float(adapter.target.sum()) == pytest.approx(1.0)
    assert (adapter.target - 0.2).abs().max() > 0.05


def test_a_host_s_loss_sees_the_changed_logits_and_trains_neither_network_nor_estimate():
    net = seeded_net().double()
    adapter = LabelShiftAdapter(net, with_network(3, net), host=partial(Tent, optimizer=SGD))
    constants = {name: value.clone() for name, value in adapter.network.named().items()}
    for x in stream().double():
        tent = adapter.host
        with adapter.frozen():
            expected = adapter(x)  # leaves the change of the last layer as the next call will find it
        before = {name: p.detach().clone().requires_grad_() for name, p in tent.moving.items()}
        logits = torch.func.functional_call(tent.model, before, (x,))
        torch.testing.assert_close(logits.detach(), expected)
        loss = torch.distributions.Categorical(logits=logits).entropy().mean()
        gradients = torch.autograd.grad(loss, list(before.values()))
        adapter(x)
        for (name, old), gradient in zip(before.items(), gradients):
            torch.testing.assert_close(tent.moving[name].detach(), old.detach() - 0.05 * gradient)
    assert int(adapter.updates) == 4
    assert all(torch.equal(value, constants[name]) for name, value in adapter.network.named().items())
    assert not any(value.requires_grad for value in (adapter.target, *adapter.network.buffers()))


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0.1, 2.0))
def test_the_loss_is_cross_entropy_for_the_prior_and_balanced_softmax_for_the_uniform_mix(seed, c, tau):
    logits, labels, prior = draw(seed, 9, c), torch.arange(9) % c, simplex(seed, c)
    torch.testing.assert_close(logit_adjusted_loss(logits, labels, prior, prior, tau), F.cross_entropy(logits, labels))
    uniform = torch.full_like(prior, 1 / c)
    losses = []
    for row, y in zip(logits.tolist(), labels.tolist()):
        terms = [float(n) ** tau * math.exp(v) for n, v in zip(1000 * prior, row)]
        losses.append(-math.log(terms[y] / sum(terms)))
    expected = torch.tensor(losses, dtype=torch.float64).mean()
    torch.testing.assert_close(logit_adjusted_loss(logits, labels, prior, uniform, tau), expected)


@given(st.integers(0, 10**6), st.floats(0.0, 2.0))
def test_a_mix_that_is_a_power_of_the_prior_adds_a_share_of_the_log_prior(seed, t):
    """Notes on the paper: cross entropy of logits + t log prior, t = 0, 1, 2 for source, uniform and inverse mix."""
    logits, labels, prior = draw(seed, 9, 4), torch.arange(9) % 4, simplex(seed, 4)
    mix = prior ** (1 - t)
    found = logit_adjusted_loss(logits, labels, prior, mix / mix.sum())
    torch.testing.assert_close(found, F.cross_entropy(logits + t * prior.log(), labels))


@given(st.integers(2, 12), st.floats(1.1, 200.0), st.integers(0, 1000))
def test_where_shares_fall_geometrically_the_inverse_mix_is_one_over_the_prior(c, ratio, seed):
    prior = ratio ** -torch.linspace(0, 1, c, dtype=torch.float64)
    prior = (prior / prior.sum())[torch.randperm(c, generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(inverse_mix(prior), (1 / prior) / (1 / prior).sum())


@given(st.integers(0, 10**6), st.integers(2, 9))
def test_the_inverse_mix_exchanges_first_and_last(seed, c):
    prior = simplex(seed, c)
    inverse = inverse_mix(prior)
    ranked = sorted(range(c), key=lambda k: float(prior[k]))
    assert [float(inverse[k]) for k in ranked] == [float(prior[k]) for k in reversed(ranked)]
    assert torch.equal(inverse_mix(inverse), prior)
    assert Counter(inverse.tolist()) == Counter(prior.tolist())


@given(st.integers(0, 10**6), st.integers(2, 9))
def test_the_degree_of_imbalance(seed, c):
    prior = simplex(seed, c)
    squares = sum(float(p) ** 2 for p in prior)
    assert float(imbalance_degree(prior, prior)) == pytest.approx(1)
    assert float(imbalance_degree(torch.full_like(prior, 1 / c), prior)) == pytest.approx(1 / (c * squares))
    assert float(imbalance_degree(inverse_mix(prior), prior)) <= float(imbalance_degree(prior.flip(0), prior)) + 1e-12
    assert float(imbalance_degree(simplex(seed + 1, c), torch.full_like(prior, 1 / c))) == pytest.approx(1)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_the_estimate_of_a_stream_of_one_class_converges_geometrically(momentum):
    sure = built(lambda: nn.Linear(3, 4)).double()
    with torch.no_grad():
        sure.weight.zero_()
        sure.bias.copy_(torch.tensor([-2000.0, 2000.0, -2000.0, -2000.0]))
    adapter = PriorShiftCorrection(sure, torch.ones(4), momentum=momentum, target=torch.tensor([3, 1, 2, 4]))
    goal = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    start = adapter.target - goal
    for t in range(1, 8):
        adapter(torch.zeros(t, 3, dtype=torch.float64))
        torch.testing.assert_close(adapter.target - goal, momentum**t * start, rtol=0, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.2, 2.0))
def test_the_correction_is_bayes_rule(seed, c, tau):
    net = built(lambda: nn.Linear(3, c)).double()
    prior, mix, x = simplex(seed, c), simplex(seed + 1, c), draw(seed, 7, 3)
    known = PriorShiftCorrection(net, 100 * prior, tau=tau, target=5 * mix, momentum=1.0)
    weighted = net(x).detach().softmax(1) * (mix / prior) ** tau
    torch.testing.assert_close(known(x).softmax(1), weighted / weighted.sum(1, keepdim=True), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(known.target, mix)


def test_the_correction_finds_the_mix_of_a_stream_and_gains_by_it():
    """A batch makes a tenth of a step of expectation maximisation: the first fifty are on the way."""
    means = torch.tensor([[-1.2], [1.2]], dtype=torch.float64)
    bayes = built(lambda: nn.Linear(1, 2)).double()
    with torch.no_grad():
        bayes.weight.copy_(means)
        bayes.bias.copy_(-0.5 * means[:, 0] ** 2)
    generator = torch.Generator().manual_seed(3)
    y = (torch.rand(20000, generator=generator) < 0.1).long()
    x = means[y] + torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    adapter, mixes, said = PriorShiftCorrection(bayes, torch.tensor([50, 50])), [], []
    for batch in x.split(200):
        mixes.append(adapter.target)
        said.append(adapter(batch))
        step = bayes(batch).detach().softmax(1) * mixes[-1] / 0.5
        step = (step / step.sum(1, keepdim=True)).mean(0)
        torch.testing.assert_close(adapter.target, 0.9 * mixes[-1] + 0.1 * step)
    said = torch.cat(said)
    assert torch.stack(mixes[50:]).mean(0).tolist() == pytest.approx([0.9, 0.1], abs=0.02)
    late = slice(10000, None)
    accuracy = (said.argmax(1) == y)[late].double().mean()
    assert accuracy > (bayes(x).argmax(1) == y)[late].double().mean() + 0.02


@pytest.mark.parametrize("bias", [True, False])
def test_training_is_the_card_s(bias):
    """A second way to write the training: modules, a loss by hand, and the same draws."""
    net = seeded_net()
    if not bias:
        net.fc.bias = None
    settings = {"hidden": 6, "steps": 25, "batch": 16, "lr": 0.01, "tau": 0.8}
    found = LabelShiftAdapter.prepare(net, labelled(), seed=4, **settings)
    head, net.fc = net.fc, nn.Identity()
    with torch.no_grad():
        features = torch.cat([net(x) for x, _ in labelled()])
    labels = torch.cat([y for _, y in labelled()])
    prior = COUNTS.double() / COUNTS.sum()
    mixes = (prior, torch.full((5,), 0.2).double(), inverse_mix(prior))
    generator = torch.Generator().manual_seed(4)
    g = built(lambda: nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 75)))
    with torch.no_grad():
        g[0].weight.copy_(2 * torch.rand(6, generator=generator)[:, None] - 1)
        g[0].bias.copy_(2 * torch.rand(6, generator=generator) - 1)
        g[2].weight.zero_()
        g[2].bias.zero_()
    adam = torch.optim.Adam(g.parameters(), lr=0.01)
    for _ in range(25):
        rows = torch.randint(66, (16,), generator=generator)
        mix = mixes[int(torch.randint(3, (), generator=generator))]
        out = g((mix @ prior / (prior @ prior)).float()[None])
        h = (1 + out[55:65]) * features[rows] + out[65:]
        logits = h @ (head.weight.detach() + out[:50].view(5, 10)).T + out[50:55]
        logits = logits + head.bias.detach() if bias else logits
        adjusted = logits + 0.8 * (prior.log() - mix.log()).float()
        loss = -adjusted.log_softmax(1)[range(16), labels[rows]].mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(found["prior"], prior)
    for name, tensor in {"hidden.weight": g[0].weight[:, 0], "hidden.bias": g[0].bias}.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-4, atol=1e-5)
    for name, tensor in {"output.weight": g[2].weight, "output.bias": g[2].bias}.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-4, atol=1e-5)
        assert found[name].abs().max() > 0.01


def test_preparation_leaves_the_model_alone_and_depends_on_its_seed():
    net = seeded_net()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        one, same, other = (
            LabelShiftAdapter.prepare(net, labelled(), steps=3, hidden=4, seed=seed) for seed in (0, 0, 1)
        )
    assert net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["output.bias"], other["output.bias"])


def test_it_learns_what_each_mix_asks_for():
    """Two overlapping classes, nine to one: fed a mix, the adapter is as good as the rule that knows it."""
    means = torch.tensor([[-0.7, 0.0], [0.7, 0.0]])
    generator = torch.Generator().manual_seed(0)

    def samples(n, share):
        y = (torch.rand(n, generator=generator) < share).long()
        return means[y] + torch.randn(n, 2, generator=generator), y

    net = built(lambda: nn.Linear(2, 2))
    with torch.no_grad():
        net.weight.copy_(means)
        net.bias.copy_(torch.tensor([0.9, 0.1]).log())
    prepared = LabelShiftAdapter.prepare(net, [samples(3000, 0.1)], steps=400, lr=5e-3, hidden=16)
    for share in (0.1, 0.5, 0.9):
        x, y = samples(4000, share)
        mix = torch.tensor([1 - share, share])
        known = LabelShiftAdapter(net, prepared, target=mix, momentum=1.0)
        correction = PriorShiftCorrection(net, torch.tensor([9, 1]), target=mix, momentum=1.0)
        right = [(adapter(x).argmax(1) == y).float().mean() for adapter in (known, correction, Source(net))]
        assert right[0] > right[1] - 0.015
        assert share == 0.1 or right[0] > right[2] + 0.1


@hosts
def test_saved_in_the_middle_it_goes_on_bit_by_bit(host, prepared):
    xs = stream(batches=6, n=13)
    straight = LabelShiftAdapter(seeded_net(), prepared, host=host)
    for x in xs[:3]:
        straight(x)
    saved = save(straight.state_dict())
    expected = [straight(x) for x in xs[3:]]
    other = LabelShiftAdapter(seeded_net(), prepared, host=host)
    other(stream(seed=5)[0])
    other.load_state_dict(load(saved))
    assert [torch.equal(other(x), y) for x, y in zip(xs[3:], expected)] == [True] * 3
    assert torch.equal(other.target, straight.target)
    assert int(other.updates) == int(straight.updates) == int(other.host.updates)


@hosts
def test_reset_and_frozen(host, prepared):
    if "CoTTA" in str(host) or "RoTTA" in str(host):
        host = partial(host, augment=lambda x, generator: 0.9 * x)
    if "CoTTA" in str(host):
        host = partial(host, restore=0.0)
    adapter = LabelShiftAdapter(seeded_net(), prepared, host=host, target=COUNTS)
    xs = stream(batches=3, n=13)
    start = adapter.target.clone()
    first = [adapter(x) for x in xs]
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    with adapter.frozen():
        again = adapter(xs[0])
        assert torch.equal(adapter(xs[0]), again)
    assert all(torch.equal(value, adapter.state_dict()[name]) for name, value in state.items())
    torch.testing.assert_close(adapter(xs[0]), again)
    adapter.reset()
    assert torch.equal(adapter.target, start)
    assert [torch.equal(adapter(x), y) for x, y in zip(xs, first)] == [True] * 3
    assert (int(adapter.resets), int(adapter.host.resets)) == (1, 1)


def test_every_copy_inside_the_host_follows_the_estimate_and_none_its_resets(prepared):
    x = stream(n=20)[0]
    for host in (partial(CoTTA, augmentations=2), RoTTA, partial(Tent, episodic=True)):
        adapter = LabelShiftAdapter(seeded_net(), prepared, host=host)
        heads = [module for module in adapter.modules() if getattr(module, "change", None) is not None]
        assert heads == []
        adapter(x)
        estimate = adapter.target.clone()
        adapter(x)
        heads = [module for module in adapter.modules() if hasattr(module, "change")]
        assert len(heads) == {"CoTTA": 2, "RoTTA": 2, "Tent": 1}[type(adapter.host).__name__]
        known = LabelShiftAdapter(seeded_net(), prepared, target=estimate, momentum=1.0)
        known(x)
        asked = known.host.model.fc.change
        for head in heads:
            for found, expected in zip(head.change, asked):
                torch.testing.assert_close(found, expected)


def test_a_host_that_looks_at_features_sees_those_of_the_source_model(prepared):
    cafa = CAFA.prepare(seeded_net(), labelled())
    adapter = LabelShiftAdapter(seeded_net(), prepared, host=partial(CAFA, prepared=cafa))
    for x in stream():
        adapter(x)
    assert int(adapter.updates) == 4
    assert adapter.host.model.fc.in_features == 10


def test_options_of_its_own(prepared):
    xs = stream(batches=6)
    episodic = LabelShiftAdapter(seeded_net(), prepared, host=Tent, episodic=True)
    for x in xs:
        fresh = LabelShiftAdapter(seeded_net(), prepared, host=Tent)
        assert torch.equal(episodic(x), fresh(x))
    resetting = LabelShiftAdapter(seeded_net(), prepared, host=Tent, reset_every=3)
    for x in xs:
        resetting(x)
    assert (int(resetting.updates), int(resetting.resets)) == (6, 2)
    net = seeded_net()
    inside = LabelShiftAdapter(net, prepared, host=Tent, inplace=True)
    inside(xs[0])
    assert inside.host.model is net
    assert not torch.equal(net.bn1.weight, seeded_net().bn1.weight)


def test_a_window_serves_inputs_one_by_one(prepared):
    xs = stream(batches=7, n=1)
    adapter = LabelShiftAdapter(seeded_net(), prepared, host=Tent, window=3)
    by_batch = LabelShiftAdapter(seeded_net(), prepared, host=Tent)
    for i, x in enumerate(xs):
        rows = xs[max(0, i - 2) : i + 1, 0]
        if (i + 1) % 3 == 0:
            expected = by_batch(rows)[-1:]
        else:
            with by_batch.frozen():
                expected = by_batch(rows)[-1:]
        torch.testing.assert_close(adapter(x), expected)
    assert (int(adapter.samples), int(adapter.updates)) == (7, 2)


@pytest.mark.parametrize("host", [Source, Tent])
def test_logits_that_are_not_finite_do_not_poison_the_estimate(host, prepared):
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = seeded_net()

        def forward(self, x):
            bad = x[:, 0, 0, 0] > 2
            return self.inner(x) + torch.where(bad, torch.nan, 0.0)[:, None]

    net = Fragile()
    tensors = Prepared("LabelShiftAdapter", dict(prepared), net)
    adapter, clean = (LabelShiftAdapter(net, tensors, host=host) for _ in range(2))
    x = stream(n=20)[0]
    adapter(x)
    clean(x)
    before = adapter.target.clone()
    spoilt = x.clone()
    spoilt[:, 0, 0, 0] = 3.0
    adapter(spoilt)
    assert torch.equal(adapter.target, before)
    assert int(adapter.skipped) == 1
    spoilt[3:, 0, 0, 0] = x[3:, 0, 0, 0]
    said = adapter(spoilt)
    mean = said[3:].softmax(1).mean(0)
    torch.testing.assert_close(adapter.target, 0.9 * before + 0.1 * mean)
    assert int(adapter.skipped) == 2


@given(st.integers(0, 10**6), st.floats(0.0, 0.19), st.integers(1, 6))
def test_the_estimate_stays_a_distribution_above_its_floor(seed, floor, batches):
    net = built(lambda: nn.Linear(3, 5))
    adapter = PriorShiftCorrection(net, torch.arange(1, 6), floor=floor, momentum=0.3)
    for i in range(batches):
        adapter(20 * draw(seed + i, 4, 3).float())
        assert float(adapter.target.sum()) == pytest.approx(1, abs=1e-5)
        assert adapter.target.min() >= floor / (1 + 5 * floor) - 1e-7


def test_what_a_distributed_stream_sums(prepared):
    """Two halves of a batch, summed as two processes do, move the estimate as the whole batch does."""
    net = seeded_net().double()
    x = stream(n=20)[0].double()
    parts = [LabelShiftAdapter(net, with_network(3, net), host=Source) for _ in range(2)]
    whole = LabelShiftAdapter(net, with_network(3, net), host=Source)
    halves, sums = (x[:7], x[7:]), []
    for part in parts:
        part.summed = lambda counts: sums.append(counts) or counts
    for part, half in zip(parts, halves):
        part(half)
    total = sums[0] + sums[1]
    parts[0].reset()
    parts[0].summed = lambda counts: total
    parts[0](halves[0])
    whole(x)
    torch.testing.assert_close(parts[0].target, whole.target)


def test_from_a_file_it_is_the_same(tmp_path, prepared):
    prepared.save(tmp_path / "lsa.safetensors")
    again = Prepared.load(tmp_path / "lsa.safetensors")
    one, other = (LabelShiftAdapter(seeded_net(), p, host=Tent) for p in (prepared, again))
    for x in stream():
        assert torch.equal(one(x), other(x))


def test_short_batches_black_images_and_half_precision(prepared):
    adapter = LabelShiftAdapter(seeded_net(), prepared, host=Tent)
    for x in (stream()[0], stream()[0][:1], torch.zeros(12, 3, 8, 8)):
        assert adapter(x).isfinite().all()
    assert float(adapter.target.sum()) == pytest.approx(1)
    half = seeded_net().bfloat16()
    narrow = LabelShiftAdapter(half, Prepared("LabelShiftAdapter", dict(prepared), half), host=Source)
    wide = LabelShiftAdapter(seeded_net(), prepared, host=Source)
    for x in stream():
        said = narrow(x.bfloat16())
        assert said.dtype == torch.float32
        torch.testing.assert_close(said, wide(x), rtol=0.1, atol=0.3)
    assert narrow.target.dtype == torch.float32


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.1}, r"momentum must lie in \[0, 1\]"),
        ({"floor": 0.2}, r"floor must lie in \[0, 0.2\)"),
        ({"target": torch.ones(4)}, r"target must have shape \(5,\)"),
        ({"target": -torch.ones(5)}, "target must be >= 0"),
        ({"target": torch.zeros(5)}, "target must not be all zero"),
        ({"target": torch.full((5,), float("nan"))}, "target must be finite"),
        ({"host": lambda model, inplace: model}, "host must give an Adapter, it gave ToyNet"),
        ({"head": "conv1"}, r"must have an nn.Linear named 'conv1'"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message, prepared):
    with pytest.raises(InputError, match=message):
        LabelShiftAdapter(seeded_net(), prepared, **settings)


@pytest.mark.bad_input
def test_what_belongs_to_another_model_or_layer_is_refused(prepared):
    with pytest.raises(InputError, match="made for another model"):
        LabelShiftAdapter(seeded_net(1), prepared)
    with pytest.raises(InputError, match=r"must come from LabelShiftAdapter.prepare, it was made by CAFA"):
        LabelShiftAdapter(seeded_net(), CAFA.prepare(seeded_net(), labelled()))
    net = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    x = draw(0, len(LABELS), 3).float()
    inner = LabelShiftAdapter.prepare(net, [(x, LABELS)], head="1", steps=1)
    assert LabelShiftAdapter(net, inner)(x).shape == (22, 5)
    with pytest.raises(InputError, match=r"must fit the head \(4 classes, 3 features\)"):
        LabelShiftAdapter(net, inner, head="0")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("prior", "settings", "message"),
    [
        (torch.ones(4), {}, r"prior must have shape \(5,\)"),
        (torch.tensor([1, 2, 0, 1, 1]), {}, "prior must be > 0 for every class, it is 0 at row 2"),
        (torch.tensor([1.0, -2, 1, 1, 1]), {}, "prior must be >= 0"),
        (torch.ones(5), {"tau": 0.0}, "tau must lie in"),
    ],
)
def test_a_bad_prior_is_refused(prior, settings, message):
    with pytest.raises(InputError, match=message):
        PriorShiftCorrection(seeded_net(), prior, **settings)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loader", "settings", "message"),
    [
        ([], {}, "at least one batch"),
        ([x for x, _ in labelled()], {}, r"must yield \(inputs, labels\), it yields no labels"),
        ([(x, y % 4) for x, y in labelled()], {}, "must hold every class, class 4 has no sample"),
        ([(x[:20], torch.arange(20) % 5) for x, _ in labelled()], {}, "use PriorShiftCorrection"),
        ([(x * float("nan"), y) for x, y in labelled()], {}, "batch 0"),
        (labelled(), {"hidden": 0}, "hidden must be at least 1"),
        (labelled(), {"steps": 0}, "steps must be at least 1"),
        (labelled(), {"batch": 0}, "batch must be at least 1"),
        (labelled(), {"lr": 0.0}, "lr must lie in"),
        (labelled(), {"tau": -1.0}, "tau must lie in"),
    ],
)
def test_bad_source_data_are_refused(loader, settings, message):
    with pytest.raises(InputError, match=message):
        LabelShiftAdapter.prepare(seeded_net(), loader, **settings)


class Cosine(nn.Linear):
    def forward(self, features):
        return 10 * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class Sharpened(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = seeded_net()

    def forward(self, x):
        return 2 * self.net(x)


@pytest.mark.bad_input
def test_a_head_that_is_not_linear_is_refused():
    counts = torch.arange(1, 6)
    for head in (partial(Cosine, 3, 5), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))):
        with pytest.raises(InputError, match=r"must have a plain nn\.Linear as its head"):
            PriorShiftCorrection(built(head), counts)
    batches = [(draw(0, len(LABELS), 3).float(), LABELS)]
    with pytest.raises(InputError, match="must return what its head makes of the features"):
        LabelShiftAdapter.prepare(built(partial(Cosine, 3, 5)), batches, steps=1)
    with pytest.raises(InputError, match="must return what its head makes of the features"):
        LabelShiftAdapter.prepare(built(Sharpened), labelled(), steps=1)


@pytest.mark.bad_input
def test_a_host_that_is_built_already_is_refused(prepared):
    with pytest.raises(InputError, match="host must build an adapter, as the class Tent does; this is built"):
        LabelShiftAdapter(seeded_net(), prepared, host=Tent(seeded_net()))
