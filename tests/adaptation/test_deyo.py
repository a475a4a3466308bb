import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from toynet import Golden, built, golden_files, seeded_net, stream

from trimtab.adaptation import Tent, unmix
from trimtab.adaptation.base import entropy
from trimtab.adaptation.destroy import occlude, permute_patches, permute_pixels, shuffle_pixels
from trimtab.adaptation.deyo import DeYO
from trimtab.core.checks import InputError
from trimtab.core.modules import norm_parameters

SLUG = "62-deyo"
SGD = partial(torch.optim.SGD, lr=0.05)
OPEN = {"e_margin": 2.0, "plpd_margin": -1.0, "optimizer": SGD}


@pytest.mark.golden
@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("path", golden_files(SLUG, "x", "n_final"))
def test_golden(path, precision):
    golden = Golden(path, precision)
    if not golden.precise:
        pytest.skip(f"{path.name} has no results in {precision}")
    cfg = golden.cfg
    t = 0

    def destroy(images, generator):
        if cfg["aug_type"] == "occ":
            window = (cfg["row_start"], cfg["column_start"], cfg["occlusion_size"])
            return occlude(images, window=tuple(map(int, window)))
        order = golden.tensor(f"perm.{t}")
        return permute_pixels(images, order) if cfg["aug_type"] == "pixel" else permute_patches(images, order)

    deyo = DeYO(
        golden.net(),
        e_margin=cfg["deyo_margin"],
        e_reference=cfg["margin_e0"],
        plpd_margin=cfg["plpd_threshold"],
        weigh_entropy=bool(cfg["reweight_ent"]),
        weigh_plpd=bool(cfg["reweight_plpd"]),
        destroy=destroy,
        optimizer=golden.optimizer(),
    )
    assert list(deyo.moving) == golden.arrays["adapted_names"].tolist()
    deyo.samples += 1  # no trial run of `destroy`: the orders are there for the sure images alone
    steps = {"outputs": [], "bn1_weight_after": [], "n_entropy": [], "n_final": []}
    for t, x in enumerate(golden.tensor("x")):  # noqa: B007
        reliable, selected = deyo.reliable.clone(), deyo.selected.clone()
        steps["outputs"].append(deyo(x))
        steps["bn1_weight_after"].append(deyo.model.bn1.weight.detach().clone())
        steps["n_entropy"].append(deyo.reliable - reliable)
        steps["n_final"].append(deyo.selected - selected)
    for name, values in steps.items():
        golden.check(name, torch.stack(values))
    golden.check_network("final", deyo.model)
    golden.finish()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("weigh_entropy", [True, False])
@pytest.mark.parametrize("weigh_plpd", [True, False])
def test_the_step_is_the_paper_s(norm, weigh_entropy, weigh_plpd):
    net, xs = seeded_net(norm=norm), 3 * stream(batches=6)
    deyo = DeYO(net, weigh_entropy=weigh_entropy, weigh_plpd=weigh_plpd, e_reference=1.0, destroy=occlude, **OPEN)
    with torch.no_grad():
        deyo.e_margin = float(entropy(deyo.model(xs.flatten(0, 1))).quantile(0.8))
    deyo.plpd_margin = 0.01
    reliable = selected = updates = 0
    for x in xs:
        before = {n: p.detach().clone().requires_grad_() for n, p in deyo.moving.items()}

        def network(x, before=before):
            return torch.func.functional_call(deyo.model, before, (x,))

        logits = network(x)
        sure = [i for i in range(len(x)) if entropy(logits)[i] < deyo.e_margin]
        destroyed = network(occlude(x)[sure]).softmax(1) if sure else []
        terms = []
        for i, p in zip(sure, destroyed):
            best = int(logits[i].argmax())
            plpd = float((logits[i].softmax(0)[best] - p[best]).detach())
            if plpd > 0.01:
                h = entropy(logits)[i]
                weight = weigh_entropy * math.exp(1 - float(h.detach())) + weigh_plpd * math.exp(plpd)
                terms.append(h * (weight if weigh_entropy or weigh_plpd else 1))
        reliable, selected, updates = reliable + len(sure), selected + len(terms), updates + bool(terms)
        expected = before
        if terms:
            slope = torch.autograd.grad(sum(terms) / len(terms), list(before.values()))
            expected = {n: p - 0.05 * g for (n, p), g in zip(before.items(), slope)}
        torch.testing.assert_close(deyo(x), logits.detach())
        for name, parameter in deyo.moving.items():
            torch.testing.assert_close(parameter, expected[name])
    assert (int(deyo.reliable), int(deyo.selected), int(deyo.updates)) == (reliable, selected, updates)
    assert 0 < selected < reliable < int(deyo.samples)


def test_only_sure_images_are_destroyed():
    seen = []

    def destroy(images, generator):
        seen.append(images.clone())
        return images

    x = stream()[0]
    deyo = DeYO(seeded_net(), destroy=destroy, optimizer=SGD)
    with torch.no_grad():
        margin = float(entropy(deyo.model(x)).median())
    deyo = DeYO(seeded_net(), e_margin=margin, destroy=destroy, optimizer=SGD)
    deyo(x)
    trial, destroyed = seen
    assert len(trial) == 1
    assert 0 < len(destroyed) == int(deyo.reliable) < len(x)
    assert int(deyo.selected) == 0, "what destroys nothing tells nothing"
    assert (int(deyo.updates), int(deyo.skipped)) == (0, 0)


def test_images_at_the_margin_are_left_out():
    deyo = DeYO(seeded_net(), **{**OPEN, "plpd_margin": 0.0}, destroy=lambda images, generator: images)
    deyo(stream()[0])
    assert (int(deyo.reliable), int(deyo.selected)) == (12, 0)


def test_the_default_reference_is_a_share_of_the_largest_entropy():
    plain, known = DeYO(seeded_net(), **OPEN), DeYO(seeded_net(), e_reference=0.4 * math.log(5), **OPEN)
    for deyo in (plain, known):
        deyo(stream()[0])
    assert all(torch.equal(moved, known.moving[name]) for name, moved in plain.moving.items())
    assert not torch.equal(plain.model.bn1.weight, seeded_net().bn1.weight)


def test_nothing_sure_nothing_destroyed():
    deyo = DeYO(seeded_net(), e_margin=1e-9)
    state = deyo.generator.get_state()
    for x in stream():
        deyo(x)
    assert (int(deyo.reliable), int(deyo.updates)) == (0, 0)
    assert torch.equal(deyo.generator.get_state(), state)


def test_one_sure_image_goes_through_a_head_that_normalises_vectors():
    net = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)))
    x = stream()[0]
    deyo = DeYO(net, **OPEN)
    with torch.no_grad():
        two_smallest = entropy(deyo.model(x)).sort().values[:2]
    deyo.e_margin = float(two_smallest.mean())
    deyo(x)
    assert int(deyo.reliable) == int(deyo.selected) == 1
    assert deyo.model[3].training


def test_one_sure_image_without_statistics_teaches_nothing():
    def make():
        pooled = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)
        return nn.Sequential(*pooled, nn.Flatten(), nn.Linear(4, 5))

    x = stream()[0]
    deyo = DeYO(built(make), **OPEN)
    with torch.no_grad():
        margins = entropy(deyo.model(x)).sort().values
    deyo.e_margin = float(margins[:2].mean())
    deyo(x)
    assert (int(deyo.reliable), int(deyo.selected), int(deyo.updates)) == (1, 0, 0)
    deyo.e_margin = float(margins[1:3].mean())
    deyo(x)
    assert (int(deyo.reliable), int(deyo.selected), int(deyo.updates)) == (3, 2, 1)


def test_layers_that_follow_the_stream_do_not_follow_destroyed_images():
    x = stream()[0]
    deyo, tent = (
        Method(unmix(seeded_net()), parameters_of=norm_parameters) for Method in (partial(DeYO, **OPEN), Tent)
    )
    assert torch.equal(deyo(x), tent(x))
    assert int(deyo.updates) == 1
    for name, value in deyo.model.named_buffers():
        assert torch.equal(value, tent.model.get_buffer(name)), name


def test_images_in_a_mapping_are_destroyed_and_what_comes_with_them_is_not():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = seeded_net()

        def forward(self, pixel_values, shift, scale):
            return self.net(scale * pixel_values) + shift

    x, shift = stream()[0], torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    options = {**OPEN, "e_margin": 1.4, "destroy": occlude}
    wrapped, plain = DeYO(Shifted(), **options), DeYO(seeded_net(), **options)
    call = plain._call

    def shifted(network, shown):
        sure = entropy(call(network, x) + shift) < 1.4
        return call(network, shown) + (shift if len(shown) == 12 else shift[sure])

    plain._call = shifted
    assert torch.equal(wrapped({"pixel_values": x, "shift": shift, "scale": 1.0}), plain(x))
    assert 0 < int(wrapped.selected) == int(plain.selected) <= int(plain.reliable) < 12
    for name, value in plain.moving.items():
        assert torch.equal(wrapped.moving[f"net.{name}"], value)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(0, 4), st.booleans())
def test_saved_in_the_middle_it_goes_on_bit_by_bit(seed, cut, pixels):
    xs = 3 * stream(seed, batches=5)
    build = partial(DeYO, **({"destroy": shuffle_pixels} if pixels else {}), **OPEN)
    straight = build(seeded_net(), generator=torch.Generator().manual_seed(seed))
    other = build(seeded_net())
    for x in xs[:cut]:
        straight(x)
    other(stream(seed + 1)[0])
    other.load_state_dict(load(save(straight.state_dict())))
    for x in xs[cut:]:
        assert torch.equal(straight(x), other(x))
    assert torch.equal(straight.generator.get_state(), other.generator.get_state())
    assert int(straight.selected) == int(other.selected) > 0


@pytest.mark.parametrize(("classes", "widest"), [(10, 3), (1000, 31)])
def test_the_default_margin_is_half_of_the_largest_entropy(classes, widest):
    for even in (widest, widest + 1):
        deyo = DeYO(seeded_net())
        logits = torch.full((1, classes), -1e4)
        logits[0, :even] = 0
        deyo._call = lambda network, x, logits=logits: logits
        deyo._loss(stream()[0][:1], logits)
        assert int(deyo.reliable) == (even == widest)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e_margin": 0.0}, "e_margin must lie in"),
        ({"plpd_margin": 1.1}, "plpd_margin must lie in"),
        ({"plpd_margin": -1.1}, "plpd_margin must lie in"),
        ({"e_reference": math.inf}, "e_reference must lie in"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DeYO(seeded_net(), **options)


@pytest.mark.bad_input
def test_what_cannot_be_destroyed_is_refused_at_the_first_batch():
    with pytest.raises(InputError, match=r"x must be images, .* got torch.float32 \(4, 3\)"):
        DeYO(seeded_net())(torch.zeros(4, 3))
    with pytest.raises(InputError, match=r"images \(n, c, h, w\) under one name, it does under \[\]"):
        DeYO(seeded_net())({"x": torch.zeros(4, 3)})
    with pytest.raises(InputError, match="sides of at least 4 pixels"):
        DeYO(seeded_net(), e_margin=1e-9)(torch.zeros(4, 3, 3, 3))
    with pytest.raises(InputError, match="window must lie inside"):
        DeYO(seeded_net(), e_margin=1e-9, destroy=partial(occlude, window=(4, 4, 8)))(torch.zeros(4, 3, 8, 8))
