from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from toynet import Golden, built, golden_files, seeded_net, stream

from trimtab.adaptation import AlphaBN, BatchNormAdapt, CoRe, Source, Tent, from_prior
from trimtab.adaptation.alpha_bn import class_correlation
from trimtab.adaptation.batch_stats import MixedBatchNorm, mix_statistics
from trimtab.core.checks import InputError

SLUG = "06-alpha-bn"
LAYERS = ["bn1", "layer1.1", "layer4.1"]


@pytest.mark.golden
@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("path", golden_files(SLUG, "x", "out_*"))
def test_the_code_s_numbers(path, precision):
    golden = Golden(path, precision)
    if not golden.precise:
        pytest.skip(f"{path.name} has no results in {precision}")
    for name in golden.results("out_"):
        if name.startswith("alpha_"):
            adapter = AlphaBN(golden.net(), source_weight=1 - float(name.removeprefix("alpha_")))
        elif name == "source":
            adapter = AlphaBN(golden.net(), source_weight=1.0)
        else:
            adapter = BatchNormAdapt(golden.net(), variant={"bn_test": "batch", "bn_ema": "ema"}[name])
        golden.check(f"out_{name}", torch.stack([adapter(x) for x in golden.tensor("x")]))
    golden.finish()


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([(2, 6), (2, 8), (1, 8)]),
    st.sampled_from([list, tuple, dict]),
)
def test_every_layer_has_its_weight(weights, unbiased, size, container):
    given_ = dict(zip(LAYERS, weights)) if container is dict else container(weights)
    x = stream(n=size[0], shape=(3, size[1], size[1]))[0].double()
    adapter = AlphaBN(seeded_net().double(), source_weight=given_, unbiased=unbiased)

    net = seeded_net().double()

    def mixed(layer, w):
        def forward(x):
            mean = w * layer.running_mean + (1 - w) * x.mean((0, 2, 3))
            var = w * layer.running_var + (1 - w) * x.var((0, 2, 3), correction=int(unbiased))
            y = (x - mean.view(-1, 1, 1)) / (var + layer.eps).sqrt().view(-1, 1, 1)
            return layer.weight.view(-1, 1, 1) * y + layer.bias.view(-1, 1, 1)

        return forward

    for name, w in zip(LAYERS, weights):
        layer = net.get_submodule(name)
        layer.forward = mixed(layer, w)
    torch.testing.assert_close(adapter(x), net(x).detach())
    assert (int(adapter.updates), int(adapter.samples)) == (0, size[0])


def test_nothing_is_carried_over_and_the_mode_is_ignored():
    adapter = AlphaBN(seeded_net(), source_weight=0.5)
    before = {n: v.clone() for n, v in adapter.model.state_dict().items()}
    xs = stream()
    first = adapter(xs[0])
    adapter(xs[1])
    adapter.model.train()
    assert torch.equal(adapter(xs[0]), first)
    assert all(torch.equal(v, before[n]) for n, v in adapter.model.state_dict().items())


def test_the_ends_are_source_and_batch():
    x = stream()[0]
    torch.testing.assert_close(AlphaBN(seeded_net(), source_weight=1.0)(x), Source(seeded_net())(x))
    batch = AlphaBN(seeded_net(), source_weight=0.0, unbiased=False)
    torch.testing.assert_close(batch(x), BatchNormAdapt(seeded_net())(x), atol=1e-5, rtol=1e-5)


def test_from_prior():
    assert from_prior(16, 4) == 0.8
    assert from_prior(0, 4) == 0.0


@pytest.mark.parametrize("build", [AlphaBN, CoRe])
def test_layers_without_affine_parameters_and_single_inputs(build):
    def make():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3)
        )

    for x in stream(n=1):
        assert build(built(make))(x).isfinite().all()


@pytest.mark.parametrize("build", [AlphaBN, CoRe])
def test_dense_predictions(build):
    net = built(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    adapter = build(net)
    assert adapter(stream(n=2)[0]).shape == (2, 4, 6, 6)
    assert int(adapter.updates) == (1 if build is CoRe else 0)


def test_a_model_in_half_precision():
    x = stream()[0]
    half = AlphaBN(seeded_net().bfloat16())(x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, AlphaBN(seeded_net())(x), atol=0.1, rtol=0.05)


logits_ = st.integers(0, 10_000).map(
    lambda seed: 5 * torch.randn(7, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
)


@given(logits_, st.booleans())
def test_class_correlation_is_the_sum_over_pairs(logits, certainty):
    p = logits.softmax(1)
    r = 1 + torch.special.entr(p).sum(1).neg().exp()
    r = r / r.mean() if certainty else torch.ones(7)
    c = sum(r[i] * torch.outer(p[i], p[i]) for i in range(7))
    rows = c / (c.sum(1, keepdim=True) + 1e-8)
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(class_correlation(logits, certainty=certainty), rows[off].sum() / 4)
    plain = class_correlation(logits, normalise=False, certainty=certainty)
    torch.testing.assert_close(plain, c[off].sum() / 7)
    if not certainty:
        torch.testing.assert_close(plain, (1 - p.square().sum(1)).mean())
    assert 0 <= class_correlation(logits, certainty=certainty) <= 1


def test_class_correlation_keeps_its_precision_under_autocast():
    logits = 12 * torch.eye(3).repeat(4, 1)
    expected = class_correlation(logits)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(class_correlation(logits), expected)


@given(logits_)
def test_only_the_normalised_loss_looks_across_the_batch(logits):
    one, two = logits[:3], logits[3:6]
    apart = (class_correlation(one, normalise=False) + class_correlation(two, normalise=False)) / 2
    torch.testing.assert_close(class_correlation(logits[:6], normalise=False), apart)
    assert torch.autograd.gradcheck(class_correlation, (logits.requires_grad_(),))


def test_a_class_without_any_mass_has_a_gradient():
    logits = torch.tensor([[40.0, 0.0, -4000.0], [0.0, 30.0, -4000.0]], requires_grad=True)
    loss = class_correlation(logits)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("detach", [False, True])
def test_a_step_of_core_is_the_gradient_of_its_loss(detach):
    x = stream()[0]
    core = CoRe(seeded_net(), source_weight=0.5, detach=detach, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert sorted(core.moving) == sorted(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
    net = mix_statistics(seeded_net(), 0.5, detach=detach)
    with torch.no_grad():
        torch.testing.assert_close(core(x), net(x))
    class_correlation(net(x)).backward()
    for name, moved in core.moving.items():
        start = net.get_parameter(name)
        assert start.grad.abs().max() > 0
        torch.testing.assert_close(moved, start.detach() - 0.1 * start.grad)
    assert int(core.updates) == 1


def test_detached_statistics_give_another_gradient():
    xs = stream()
    moved = []
    for detach in (False, True):
        core = CoRe(seeded_net(), source_weight=0.2, detach=detach)
        for x in xs:
            core(x)
        moved.append(core.model.bn1.weight.detach().clone())
    assert not torch.allclose(*moved, atol=1e-4)


def test_core_lowers_its_loss():
    core = CoRe(seeded_net(), source_weight=0.5, optimizer=partial(torch.optim.Adam, lr=0.03))
    x = 3 * stream(n=40)[0]
    losses = [float(class_correlation(core(x))) for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]


def test_core_restored_in_the_middle_goes_on_bit_by_bit():
    xs = stream(batches=6)
    settings = {"source_weight": [0.9, 0.5, 0.1], "certainty": True}
    core = CoRe(seeded_net(), **settings)
    start = core(xs[0])
    core(xs[1])
    saved = save(core.state_dict())
    expected = [core(x) for x in xs[2:]]
    other = CoRe(seeded_net(), **settings)
    other.load_state_dict(load(saved))
    assert all(torch.equal(other(x), y) for x, y in zip(xs[2:], expected))
    other.reset()
    assert torch.equal(other(xs[0]), start)


def test_a_batch_that_overflows_is_skipped():
    core = CoRe(seeded_net())
    core(stream()[0])
    before = {n: v.clone() for n, v in core.model.state_dict().items()}
    core(torch.full((4, 3, 8, 8), 3e38))
    assert (int(core.updates), int(core.skipped)) == (1, 1)
    assert all(torch.equal(v, before[n]) for n, v in core.model.state_dict().items())


def test_mixed_layers_serve_below_another_method():
    tent = Tent(mix_statistics(seeded_net(), 0.5))
    assert sorted(tent.moving) == sorted(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
    tent(stream()[0])
    assert sum(isinstance(m, MixedBatchNorm) for m in tent.model.modules()) == 3
    assert int(tent.updates) == 1


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [AlphaBN, CoRe])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (1.5, r"source_weight must lie in \[0, 1\], got 1.5"),
        (float("nan"), "source_weight must lie in"),
        ([0.5, 0.5], r"source_weight must hold one number for each of \['bn1', .*\], it holds 2"),
        ([0.5, 0.5, -1], r"source_weight of 'layer4.1' must lie in"),
        ({"bn1": 0.5}, "source_weight must name every batch normalisation layer"),
        ("abc", "source_weight of 'bn1' must be a number"),
        (None, "source_weight must be a number"),
    ],
)
def test_bad_weights_are_refused(build, weight, message):
    with pytest.raises(InputError, match=message):
        build(seeded_net(), source_weight=weight)


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [AlphaBN, CoRe])
def test_bad_models_and_inputs_are_refused(build):
    with pytest.raises(InputError, match="batch normalisation layer, found none"):
        build(seeded_net(norm="group"))
    bare = built(lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)))
    with pytest.raises(InputError, match="running statistics"):
        build(bare)
    net = built(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(InputError, match="more than one value a channel"):
        build(net)(torch.zeros(1, 3, 1, 1))
    assert build(net, unbiased=False)(torch.zeros(1, 3, 1, 1)).isfinite().all()
    with pytest.raises(InputError, match="x must be finite"):
        build(net)(torch.full((4, 3, 1, 1), float("nan")))


@pytest.mark.bad_input
def test_bad_priors_are_refused():
    with pytest.raises(InputError, match="N must lie in"):
        from_prior(-1, 4)
    with pytest.raises(InputError, match="n must be at least 1"):
        from_prior(16, 0)
