import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from toynet import Golden, built, golden_files, seeded_net, stream

from trimtab.adaptation import CAFA, CoRe, DeYO, Tent, unmix
from trimtab.adaptation.base import entropy
from trimtab.adaptation.lower_norms import lower_norm_parameters
from trimtab.adaptation.sar import SAR
from trimtab.core.checks import InputError
from trimtab.core.modules import norm_parameters

SLUG = "18-sar"
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
OPEN = {"e_margin": 2.0, "optimizer": SGD}


@pytest.mark.golden
@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("path", golden_files(SLUG, "x", "ema_after"))
def test_golden(path, precision):
    golden = Golden(path, precision)
    if not golden.precise:
        pytest.skip(f"{path.name} has no results in {precision}")
    cfg = golden.cfg
    sar = SAR(
        golden.net(),
        e_margin=cfg["margin_e0"],
        rho=cfg["rho"],
        reset_constant=cfg.get("reset_constant", 0.2),
        skip_empty=False,
        legacy_recovery=True,
        optimizer=golden.optimizer(),
    )
    assert list(sar.moving) == golden.arrays["adapted_names"].tolist()
    steps = {"outputs": [], "bn1_weight_after": [], "ema_after": [], "n_reliable": [], "n_resets": []}
    for x in golden.tensor("x"):
        reliable, resets = int(sar.reliable), int(sar.resets)
        steps["outputs"].append(sar(x))
        steps["bn1_weight_after"].append(sar.model.bn1.weight.detach().clone())
        steps["ema_after"].append(sar.mean_loss if sar.mean_loss.numel() else torch.tensor(math.nan).double())
        steps["n_reliable"].append(torch.tensor(int(sar.reliable) - reliable))
        steps["n_resets"].append(torch.tensor(int(sar.resets) - resets))
    for name, values in steps.items():
        golden.check(name, torch.stack(values))
    golden.check_network("final", sar.model)
    golden.finish()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_step_is_the_paper_s(norm):
    net, xs = seeded_net(norm=norm), 3 * stream(batches=6)
    with torch.no_grad():
        margin = float(entropy(SAR(net).model(xs.flatten(0, 1))).quantile(0.8))
    sar = SAR(net, e_margin=margin, rho=0.05, reset_constant=0.0, optimizer=partial(SGD, momentum=0.0))
    learnt = 0
    for x in xs:
        before = {n: p.detach().clone().requires_grad_() for n, p in sar.moving.items()}

        def entropies(parameters, x=x):
            return entropy(torch.func.functional_call(sar.model, parameters, (x,)))

        h = entropies(before)
        sure = h < margin
        expected = before
        if sure.any():
            slope = torch.autograd.grad(h[sure].mean(), list(before.values()))
            length = torch.cat([g.flatten() for g in slope]).norm()
            above = {n: (p.detach() + 0.05 * g / length).requires_grad_() for (n, p), g in zip(before.items(), slope)}
            second = entropies(above)
            still = sure & (second < margin)
            if still.any():
                slope = torch.autograd.grad(second[still].mean(), list(above.values()))
                expected = {n: p - 0.05 * g for (n, p), g in zip(before.items(), slope)}
                learnt += 1
        sar(x)
        for name, parameter in sar.moving.items():
            torch.testing.assert_close(parameter, expected[name])
    assert int(sar.updates) == learnt > 2
    assert 0 < int(sar.reliable) < int(sar.samples)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0, 2))
def test_a_refused_second_step_leaves_the_parameters_exactly_where_they_were(seed, rho):
    sar = SAR(seeded_net(norm="group"), rho=rho, reset_constant=0.0, **OPEN)
    call, calls = sar._call, []

    def second_is_nan(network, x):
        calls.append(None)
        return call(network, x) * (math.nan if len(calls) == 2 else 1)

    sar._call = second_is_nan
    before = {n: p.detach().clone() for n, p in sar.moving.items()}
    sar(stream(seed)[0])
    assert len(calls) == 2
    assert (int(sar.updates), int(sar.skipped)) == (0, 1)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in sar.moving.items())
    assert sar.mean_loss.numel() == 0


def test_a_failing_second_pass_leaves_the_parameters_exactly_where_they_were():
    sar = SAR(seeded_net(), **OPEN)
    before = {n: p.detach().clone() for n, p in sar.moving.items()}
    call, calls = sar._call, []

    def second_fails(network, x):
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError
        return call(network, x)

    sar._call = second_fails
    with pytest.raises(MemoryError):
        sar(stream()[0])
    assert all(torch.equal(p, before[n]) for n, p in sar.moving.items())


def test_without_reliable_samples_nothing_moves_unless_asked():
    xs = stream()
    still, moving = (SAR(seeded_net(norm="group"), skip_empty=skip, **OPEN) for skip in (True, False))
    for sar in (still, moving):
        sar(xs[0])
        sar.e_margin = 1e-9
        before = sar.model.bn1.weight.detach().clone()
        sar(xs[1])
        assert torch.equal(before, sar.model.bn1.weight) == sar.skip_empty
    assert (int(still.updates), int(moving.updates)) == (1, 2)
    assert int(still.skipped) == int(moving.skipped) == 0
    assert torch.equal(still.mean_loss, moving.mean_loss)


def test_processes_share_the_average_and_those_without_samples_do_not_weigh():
    sar = SAR(seeded_net())
    sar.summed = lambda counts: counts + torch.tensor([0.75, 1.0])
    sar._follow(torch.tensor([0.25, 0.25]))
    assert float(sar.mean_loss) == 0.5
    sar._follow(torch.empty(0))
    assert float(sar.mean_loss) == pytest.approx(0.9 * 0.5 + 0.1 * 0.75)


def test_recovery_starts_afresh():
    sar = SAR(seeded_net(norm="group"), reset_constant=10.0, **OPEN)
    xs = stream()
    first = sar(xs[0])
    assert int(sar.resets) == 1
    assert sar.mean_loss.numel() == 0
    assert not sar.optimizer.state
    assert torch.equal(sar(xs[0]), first)


def test_legacy_recovery_keeps_momentum_and_the_low_average():
    sar = SAR(seeded_net(norm="group"), reset_constant=10.0, legacy_recovery=True, **OPEN)
    x = stream()[0]
    first = sar(x)
    assert sar.mean_loss.numel() == 1
    assert sar.optimizer.state
    sar.e_margin = 1e-9
    assert torch.equal(sar(x), first)
    assert int(sar.resets) == 2, "a batch that taught nothing is reset too"


def test_layers_that_follow_the_stream_do_not_follow_the_second_pass():
    x = stream()[0]
    sar, tent = (
        Method(unmix(seeded_net()), parameters_of=norm_parameters)
        for Method in (partial(SAR, reset_constant=0.0, **OPEN), Tent)
    )
    assert torch.equal(sar(x), tent(x))
    assert int(sar.updates) == 1
    for name, value in sar.model.named_buffers():
        assert torch.equal(value, tent.model.get_buffer(name)), name


def test_zero_never_recovers_and_the_window_outlives_a_recovery():
    sar = SAR(seeded_net(), reset_constant=0.0, **OPEN)
    for x in stream():
        sar(x)
    assert int(sar.resets) == 0
    sar = SAR(seeded_net(), reset_constant=10.0, window=3, **OPEN)
    for x in stream()[0].split(1):
        sar(x)
    assert int(sar.resets) == 4
    assert len(sar.recent) == 3


@pytest.mark.parametrize(("classes", "limit"), [(1000, 0.2), (100, 0.4 / 3), (10, 0.2 / 3)])
def test_the_default_constant_is_the_authors_at_a_thousand_classes(classes, limit):
    sar = SAR(seeded_net())
    for loss, resets in ((limit + 1e-9, 0), (limit - 1e-9, 1)):
        sar.mean_loss = torch.tensor(loss, dtype=torch.float64)
        sar._recover(classes)
        assert int(sar.resets) == resets


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(0, 4), st.sampled_from([0.0, 0.6, 0.9]), st.booleans())
def test_saved_in_the_middle_it_goes_on_bit_by_bit(seed, cut, constant, legacy):
    xs = 3 * stream(seed, batches=5)
    build = partial(SAR, e_margin=1.3, reset_constant=constant, legacy_recovery=legacy, optimizer=SGD)
    straight, other = build(seeded_net()), build(seeded_net())
    for x in xs[:cut]:
        straight(x)
    other(stream(seed + 1)[0])
    other.load_state_dict(load(save(straight.state_dict())))
    for x in xs[cut:]:
        assert torch.equal(straight(x), other(x))
        assert torch.equal(straight.mean_loss, other.mean_loss)
        assert int(straight.resets) == int(other.resets)


def test_names_that_count_as_the_top_block():
    layers = ["bn1", "layer3.0.bn", "layer4.0.bn", "blocks.1.norm1", "blocks.9.norm1", "blocks.10.norm2"]
    layers += ["blocks.11.norm1", "norm", "fc_norm", "norm.inner", "stem.norm"]
    root = nn.Module()
    for layer in layers:
        *parents, last = layer.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        if last not in module._modules:
            module.add_module(last, nn.LayerNorm(2))
    chosen = {name.rpartition(".")[0] for name in lower_norm_parameters(root)}
    assert chosen == {"bn1", "layer3.0.bn", "blocks.1.norm1", "fc_norm", "stem.norm"}
    assert lower_norm_parameters(root).keys() < norm_parameters(root).keys()


@pytest.mark.bad_input
def test_nothing_left_below_the_top_block_is_refused_in_words():
    layers = {"layer4": partial(nn.BatchNorm1d, 3), "norm": partial(nn.LayerNorm, 3), "head": partial(nn.Linear, 3, 2)}
    net = built(lambda: nn.Sequential(OrderedDict((name, make()) for name, make in layers.items())))
    with pytest.raises(InputError, match=r"it has only layer4, norm; pass parameters_of=norm_parameters"):
        SAR(net)
    with pytest.raises(InputError, match="must have a normalisation layer with affine parameters"):
        SAR(built(lambda: nn.Linear(3, 2)))
    assert next(iter(SAR(net, parameters_of=norm_parameters).moving)) == "layer4.weight"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e_margin": 0.0}, "e_margin must lie in"),
        ({"rho": -0.1}, "rho must lie in"),
        ({"rho": math.nan}, "rho must lie in"),
        ({"reset_constant": -1.0}, "reset_constant must lie in"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SAR(seeded_net(), **options)


@pytest.mark.parametrize("train", [False, True])
def test_dropout_sleeps_unless_asked_for(train):
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))

    known = [(x, torch.arange(12) % 3) for x in stream()]
    net = built(make)
    cafa = partial(CAFA, prepared=CAFA.prepare(net, known))
    for method in (SAR, DeYO, CoRe, cafa):
        adapter = method(net, train_mode=train)
        assert adapter.model[2].training == train
        assert not adapter.train().model[0].training or train
