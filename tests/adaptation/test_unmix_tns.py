from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from toynet import Golden, built, golden_files, seeded_net, stream

from trimtab.adaptation import (
    CAFA,
    EATA,
    LAME,
    SAR,
    BatchNormAdapt,
    CoTTA,
    DeYO,
    LabelShiftAdapter,
    RoTTA,
    Source,
    Tent,
    UnMixTNS,
    unmix,
)
from trimtab.adaptation.unmix_tns import UnmixedBatchNorm
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions

SLUG = "30-unmix-tns"
LAYERS = ["bn1", "layer1.1", "layer4.1"]
precisions = pytest.mark.parametrize("precision", ["f64", "f32"])


def read(path, precision):
    golden = Golden(path, precision)
    if not golden.precise:
        pytest.skip(f"{path.name} has no results in {precision}")
    return golden


@pytest.mark.golden
@precisions
@pytest.mark.parametrize("path", golden_files(SLUG, "init_means", "means_after"))
def test_the_authors_layer(path, precision):
    golden = read(path, precision)
    xs = golden.tensor("x")
    bn = nn.BatchNorm2d(xs.shape[2], eps=float(golden.arrays["eps"])).to(golden.dtype)
    bn.load_state_dict({k: golden.tensor(f"bn_{k}") for k in ("running_mean", "running_var", "weight", "bias")}, False)
    # the momentum in the file is that of a batch of this size
    settings = {"momentum": float(golden.arrays["momentum"]), "batch_size_max": xs.shape[1]}
    layer = unmix(bn, components=len(golden.arrays["init_means"]), **settings)
    torch.testing.assert_close(layer.variances, golden.tensor("init_vars"))
    layer.means = golden.tensor("init_means")
    steps = {name: [] for name in ("out", "grad_x", "grad_weight", "grad_bias", "means_after", "vars_after")}
    for x, grad_out in zip(xs, golden.tensor("grad_out")):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        out = layer(x)
        (out * grad_out).sum().backward()
        values = (out.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.means, layer.variances)
        for kept, value in zip(steps.values(), values):
            kept.append(value.clone())
    for name, values in steps.items():
        golden.check(name, torch.stack(values))
    golden.finish()


@pytest.mark.golden
@precisions
@pytest.mark.parametrize("path", golden_files(SLUG, "init.*.means", setting="K"))
def test_the_authors_network_alone_and_below_tent(path, precision):
    golden = read(path, precision)
    cfg = golden.cfg
    adapter = UnMixTNS(golden.net(), components=int(cfg["K"]), batch_size_max=int(cfg["batch_size_max"]))
    for name, layer in adapter.model.named_modules():
        if isinstance(layer, UnmixedBatchNorm):
            layer.means = golden.tensor(f"init.{name}.means")
    if cfg["lr_adam"]:
        adapter = Tent(adapter.model, optimizer=golden.optimizer())
    golden.check("outputs", torch.stack([adapter(x) for x in golden.tensor("x")]))
    golden.check_network("final", adapter.model)
    golden.finish()


def layer_of(c, kind=nn.BatchNorm2d, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    bn = kind(c).double()
    bn.running_mean.normal_(generator=generator)
    bn.running_var.uniform_(0.5, 2, generator=generator)
    with torch.no_grad():
        bn.weight.normal_(generator=generator)
        bn.bias.normal_(generator=generator)
    return unmix(bn, **settings)


def paper(layer, x):
    """The method written out, one tensor (n, k, c) a statistic; gradients flow as they do in the authors' code."""
    over, view = tuple(range(2, x.ndim)), (*x.shape[:2], *[1] * (x.ndim - 2))
    m, v = x.mean(over), x.var(over, correction=0)
    with torch.no_grad():
        p = (F.cosine_similarity(m[:, None], layer.means[None], dim=2) / layer.temperature).softmax(1)[:, :, None]
    mixed_mean = (1 - p) * layer.means + p * m[:, None]
    mixed_var = (1 - p) * layer.variances + p * v[:, None]
    mean = mixed_mean.mean(1)
    var = mixed_var.mean(1) + mixed_mean.square().mean(1) - mean.square()
    y = (x - mean.view(view)) / (var + layer.eps).sqrt().view(view)
    shape = (-1, *view[2:])
    momentum = 1 - (1 - layer.momentum) ** (len(x) / layer.batch_size_max)
    means = layer.means + momentum * (p * (m[:, None] - layer.means)).mean(0)
    variances = layer.variances + momentum * (p * (v[:, None] - layer.variances)).mean(0)
    return layer.weight.view(shape) * y + layer.bias.view(shape), means.detach(), variances.detach()


@given(
    st.sampled_from([1, 2, 5, 16]),
    st.integers(1, 9),
    st.sampled_from([(4, 7), (4, 3, 3), (2, 1, 1), (3, 2, 3, 2)]),
    st.floats(0.02, 1.0),
    st.integers(0, 1000),
)
def test_the_layer_is_the_paper_s(k, n, shape, temperature, seed):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    layer = layer_of(shape[0], kind, seed, components=k, temperature=temperature)
    for x in 3 * stream(seed, batches=3, n=n, shape=shape).double():
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, means, variances = paper(layer, a)
        out = layer(b)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(layer.means, means)
        torch.testing.assert_close(layer.variances, variances)
        weights = torch.arange(x.numel()).view_as(x).sin()
        grads = [torch.autograd.grad((y * weights).sum(), t)[0] for y, t in ((out, b), (expected, a))]
        torch.testing.assert_close(*grads)


def test_one_component_is_instance_normalisation():
    layer = layer_of(3, components=1)
    assert torch.equal(layer.means[0], layer.source_mean)
    assert torch.equal(layer.variances[0], layer.source_var)
    for x in stream().double():
        torch.testing.assert_close(layer(x), F.instance_norm(x, weight=layer.weight, bias=layer.bias))
    assert not torch.equal(layer.means[0], layer.source_mean)


def test_the_first_components_have_the_source_s_mean_and_variance_as_a_mixture():
    bn = nn.BatchNorm2d(5000).double()
    bn.running_mean.fill_(3.0)
    bn.running_var.fill_(4.0)
    for k, spread in ((2, 0.5), (16, 0.5), (16, 0.2)):
        layer = unmix(bn, components=k, spread=spread)
        mixture = layer.variances.mean(0) + layer.means.var(0, correction=0)
        assert float(layer.means.mean()) == pytest.approx(3, abs=0.05)
        assert float(mixture.mean()) == pytest.approx(4, abs=0.1)
        assert float(layer.variances.mean()) == pytest.approx((1 - spread) * 4)


def test_the_first_components_come_from_the_generator():
    def means(seed=None, dtype=torch.float32):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return UnMixTNS(seeded_net().to(dtype), generator=generator).model.bn1.means

    assert torch.equal(means(), means(0))
    assert not torch.equal(means(0), means(1))
    torch.testing.assert_close(means(1, torch.float64), means(1).double(), atol=1e-6, rtol=1e-6)
    net = UnMixTNS(seeded_net()).model
    assert not torch.equal(net.layer1[1].means[:, :6], net.bn1.means)


def test_what_is_said_of_an_input_does_not_depend_on_the_batch():
    adapter = UnMixTNS(seeded_net())
    x = stream(n=6)[0]
    with adapter.frozen():
        together = adapter(x)
        alone = torch.cat([adapter(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not adapter._rows_interact


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_images_move_components_by_as_much_whatever_the_batches(sizes):
    image = stream(n=1, shape=(3, 4, 4))[0].double()
    whole, parts = layer_of(3, components=1), layer_of(3, components=1)
    whole(image.expand(sum(sizes), -1, -1, -1))
    for size in sizes:
        parts(image.expand(size, -1, -1, -1))
    torch.testing.assert_close(whole.means, parts.means)
    torch.testing.assert_close(whole.variances, parts.variances)
    share = (1 - 0.1) ** (sum(sizes) / 64)
    torch.testing.assert_close(whole.means[0], share * whole.source_mean + (1 - share) * image.mean((0, 2, 3)))


def test_momentum_is_each_layer_s_own_unless_given():
    net = seeded_net()
    net.bn1.momentum = 0.3
    assert [UnMixTNS(net).model.get_submodule(name).momentum for name in LAYERS] == [0.3, 0.1, 0.1]
    assert [UnMixTNS(net, momentum=0.2).model.get_submodule(name).momentum for name in LAYERS] == [0.2] * 3


def test_rows_of_features_go_by_the_source_s_statistics():
    net = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    net[1].running_mean.fill_(0.3)
    x = stream(shape=(4,))[0]
    torch.testing.assert_close(UnMixTNS(net)(x), net(x).detach())


def everything(adapter):
    return {name: value.clone() for name, value in adapter.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def on_top(build, **settings):
    return lambda **options: build(unmix(seeded_net(), **settings), **options)


BUILDERS = {
    "alone": lambda **options: UnMixTNS(seeded_net(), **options),
    "source": on_top(Source),
    "tent": on_top(Tent),
    "eata": on_top(partial(EATA, e_margin=1.5, d_margin=0.9)),
    "cotta": on_top(partial(CoTTA, augmentations=2)),
    "rotta": on_top(partial(RoTTA, capacity=8, update_every=10, nu=0.1)),
    "lame": on_top(LAME),
    "sar": on_top(partial(SAR, e_margin=2.0)),
    "deyo": on_top(partial(DeYO, e_margin=2.0, plpd_margin=-1.0)),
}
every = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@every
def test_components_are_saved_restored_reset_and_held(build):
    xs = stream(batches=6, n=7)
    adapter = build()
    first = adapter(xs[0])
    adapter(xs[1][:3])
    moved = adapter.model.bn1.means.clone()
    assert not torch.equal(moved, unmix(seeded_net()).bn1.means)
    before = everything(adapter)
    with adapter.frozen():
        said = adapter(xs[2])
        assert torch.equal(adapter(xs[2]), said)
    assert same(everything(adapter), before)
    saved = save(adapter.state_dict())
    expected = [adapter(x) for x in xs[2:]]
    other = build()
    other(xs[5])
    other.load_state_dict(load(saved))
    assert torch.equal(other.model.bn1.means, moved)
    assert all(torch.equal(other(x), y) for x, y in zip(xs[2:], expected))
    assert same(everything(other), everything(adapter))
    other.reset()
    if other.generator is not None:
        other.generator.set_state(build().generator.get_state())
    assert torch.equal(other(xs[0]), first)


@pytest.mark.parametrize("name", ["tent", "eata", "cotta"])
def test_methods_on_top_let_the_layers_weights_move(name):
    adapter = BUILDERS[name]()
    start = {n: p.detach().clone() for n, p in adapter.moving.items()}
    for x in stream(batches=5):
        adapter(x)
    assert {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")} <= set(start)
    assert int(adapter.updates) > 0
    assert all(not torch.equal(start[f"{layer}.weight"], adapter.moving[f"{layer}.weight"]) for layer in LAYERS)


@pytest.mark.parametrize("name", ["alone", "tent"])
def test_a_window_moves_components_when_it_is_renewed(name):
    adapter = BUILDERS[name](window=3)
    xs = stream(batches=7, n=1)
    by_hand = BUILDERS[name]()
    for i, x in enumerate(xs):
        if (i + 1) % 3:
            with by_hand.frozen():
                expected = by_hand(x)
        else:
            expected = by_hand(xs[i - 2 : i + 1, 0])[-1:]
        torch.testing.assert_close(adapter(x), expected)
    torch.testing.assert_close(adapter.model.bn1.means, by_hand.model.bn1.means)


def test_the_model_stays_unless_told_otherwise():
    net = seeded_net()
    before, layers = everything(net), list(net.modules())
    swapped = unmix(net)
    swapped(stream()[0])
    assert same(everything(net), before)
    assert list(net.modules()) == layers
    assert unmix(net, inplace=True) is net
    assert isinstance(net.bn1, UnmixedBatchNorm)
    assert not net.training


def test_layers_without_affine_parameters_shared_layers_and_single_images():
    def make():
        bn = nn.BatchNorm2d(4, affine=False)
        return nn.Sequential(nn.Conv2d(3, 4, 3), bn, nn.ReLU(), bn, nn.Flatten(), nn.Linear(144, 3))

    adapter = UnMixTNS(built(make))
    assert adapter.model[1] is adapter.model[3]
    for x in stream(n=1):
        assert adapter(x).isfinite().all()
    assert int(adapter.updates) == 4


def test_a_model_that_is_only_looked_at_keeps_its_components():
    net = unmix(seeded_net())
    before = everything(net)
    data = [(x, (torch.arange(12) % 7) % 5) for x in stream()]
    for look in (Predictions.collect, CAFA.prepare, partial(LabelShiftAdapter.prepare, steps=1)):
        look(net, data)
    assert same(everything(net), before)


def test_dense_predictions():
    net = built(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    assert UnMixTNS(net)(stream(n=2)[0]).shape == (2, 4, 6, 6)


def test_constant_images_and_dead_channels_stay_finite():
    layer = layer_of(3)
    layer.source_var.zero_()
    layer.variances = torch.zeros_like(layer.variances)
    layer.means = torch.full_like(layer.means, 1e3)
    layer, x = layer.float(), torch.full((2, 3, 4, 4), 1e3 + 0.1, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer(torch.zeros(2, 3, 4, 4)).isfinite().all()


def test_half_precision_and_autocast_keep_statistics_in_single():
    x = stream()[0]
    expected = UnMixTNS(seeded_net())(x)
    half = UnMixTNS(seeded_net().bfloat16())
    assert half.model.bn1.means.dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()), expected, atol=0.1, rtol=0.05)
    layer = unmix(seeded_net().bn1)
    y = stream(shape=(6, 4, 4))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = deepcopy(layer)(y)
    assert torch.equal(cast, layer(y))


@pytest.mark.parametrize("name", ["alone", "tent"])
def test_a_batch_that_overflows_moves_nothing(name):
    adapter = BUILDERS[name]()
    adapter(stream()[0])
    before = everything(adapter.model)
    adapter(torch.full((4, 3, 8, 8), 3e38))
    assert (int(adapter.updates), int(adapter.skipped)) == (1, 1)
    assert same(everything(adapter.model), before)


def test_values_whose_squares_overflow_move_no_component():
    layer = layer_of(3).float()
    before = layer.means.clone(), layer.variances.clone()
    layer(1e30 * stream()[0])
    assert torch.equal(layer.means, before[0])
    assert torch.equal(layer.variances, before[1])


def test_processes_of_a_distributed_stream_keep_the_mean_of_their_components():
    xs = stream()
    alone = [UnMixTNS(seeded_net()) for _ in range(2)]
    for adapter, x in zip(alone, xs):
        adapter(x)
    theirs = [buffer for name in LAYERS for buffer in _components(alone[1], name)]
    one = UnMixTNS(seeded_net())
    answers = iter([torch.zeros(()), torch.ones(()), *theirs])
    one._group, one.summed = "two processes", lambda value: value + next(answers)
    one(xs[0])
    for name in LAYERS:
        for ours, a, b in zip(*(_components(adapter, name) for adapter in (one, *alone))):
            torch.testing.assert_close(ours, (a + b) / 2)
    before = everything(one.model)
    one.summed = lambda value: value + 1  # the other's predictions are not finite
    one(xs[2])
    assert same(everything(one.model), before)
    assert (int(one.updates), int(one.skipped)) == (1, 1)


def _components(adapter, name):
    layer = adapter.model.get_submodule(name)
    return layer.means, layer.variances


def test_on_a_sorted_stream_it_keeps_what_batch_statistics_lose():
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(4, 3, 1, 1, generator=generator)
    net = built(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)))
    net[0].running_mean.copy_(means.mean(0).flatten())
    net[0].running_var.copy_((means.var(0, correction=0) + 1).flatten())
    with torch.no_grad():
        points = net[:3](means)
        net[3].weight.copy_(points)
        net[3].bias.copy_(-points.square().sum(1) / 2)
    correct = {}
    for build in (UnMixTNS, BatchNormAdapt):
        adapter, right = build(net), []
        for y in range(4):
            x = means[y] + torch.randn(32, 3, 6, 6, generator=generator)
            right.append((adapter(x).argmax(1) == y).double().mean())
        correct[build] = float(torch.stack(right).mean())
    assert correct[UnMixTNS] > 0.95
    assert correct[BatchNormAdapt] < 0.5


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [UnMixTNS, unmix])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components must be at least 1"),
        ({"components": 2.5}, "components must be an integer"),
        ({"temperature": 0.0}, "temperature must lie in"),
        ({"spread": 1.0}, "spread must lie in"),
        ({"spread": -0.1}, "spread must lie in"),
        ({"momentum": 0.0}, "momentum must lie in"),
        ({"momentum": 1.1}, "momentum must lie in"),
        ({"batch_size_max": 0}, "batch_size_max must be at least 1"),
    ],
)
def test_bad_settings_are_refused(build, options, message):
    with pytest.raises(InputError, match=message):
        build(seeded_net(), **options)


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [UnMixTNS, unmix])
def test_bad_models_are_refused(build):
    with pytest.raises(InputError, match="batch normalisation layer, found none"):
        build(seeded_net(norm="group"))
    with pytest.raises(InputError, match="batch normalisation layer, found none"):
        build(unmix(seeded_net()))
    bare = built(lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(InputError, match="running statistics"):
        build(bare)
    cumulative = built(lambda: nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(InputError, match="momentum must be given"):
        build(cumulative)
