import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from toynet import seeded_net, stream

from trimtab.adaptation import EATA, ETA, Prepared, Tent
from trimtab.adaptation.base import entropy
from trimtab.core.checks import InputError
from trimtab.core.modules import all_parameters

SGD = partial(torch.optim.SGD, lr=0.05)


def test_the_loss_is_the_paper_s():
    xs = 3 * stream(batches=6) * stream(seed=1, batches=6, shape=(3, 1, 1))
    net = seeded_net()
    fishers = EATA.prepare(net, list(xs))
    settings = {"e_margin": 1.5, "d_margin": 0.9}
    eata = EATA(net, prepared=fishers, fisher_weight=1e4, optimizer=SGD, **settings)
    start = {n: p.detach().clone() for n, p in eata.moving.items()}
    mean, reliable, selected = None, 0, 0
    for x in xs:
        before = {n: p.detach().clone().requires_grad_() for n, p in eata.moving.items()}
        logits = torch.func.functional_call(eata.model, before, (x,))
        h, p = entropy(logits), logits.detach().softmax(1)
        sure = h < settings["e_margin"]
        keep = sure if mean is None else sure & (F.cosine_similarity(mean[None], p).abs() < settings["d_margin"])
        reliable, selected = reliable + int(sure.sum()), selected + int(keep.sum())
        pull = sum((fishers[n] * (q - start[n]) ** 2).sum() for n, q in before.items())
        outputs = eata(x)
        torch.testing.assert_close(outputs, logits.detach())
        if keep.any():
            loss = (h[keep] * (settings["e_margin"] - h[keep].detach()).exp()).mean() + 1e4 * pull
            loss.backward()
            mean = p[keep].mean(0) if mean is None else 0.9 * mean + 0.1 * p[keep].mean(0)
            torch.testing.assert_close(eata.mean_probs, mean)
        for n, q in eata.moving.items():
            step = 0.05 * before[n].grad if keep.any() else 0
            torch.testing.assert_close(q, before[n] - step)
        assert (int(eata.reliable), int(eata.selected)) == (reliable, selected)
    assert 0 < selected < reliable < int(eata.samples)
    assert 2 < int(eata.updates) < len(xs)


def test_nothing_selected_nothing_learnt():
    eata = EATA(seeded_net(), e_margin=1e-6)
    for x in stream():
        eata(x)
    assert (int(eata.updates), int(eata.selected), int(eata.skipped)) == (0, 0, 0)
    assert eata.mean_probs.numel() == 0


def test_eta_with_open_margins_and_equal_weights_is_close_to_tent():
    x = stream()[0]
    assert torch.equal(ETA(seeded_net())(x), Tent(seeded_net())(x))
    assert isinstance(ETA(seeded_net()), EATA)
    assert ETA(seeded_net()).fishers.named() == {}


def test_a_heavy_fisher_term_holds_the_source():
    net = seeded_net()
    xs = stream(batches=20)
    fishers = Prepared("EATA", {n: torch.ones_like(v) for n, v in EATA.prepare(net, list(xs)).items()}, net)
    moved = []
    for weight in (0.0, 1e4):
        eata = EATA(net, prepared=fishers, fisher_weight=weight, e_margin=2.0, d_margin=1.0)
        for x in xs:
            eata(x)
        source = eata.source.named()
        moved.append(sum(float((p.detach() - source[n]).square().sum()) for n, p in eata.moving.items()))
    assert moved[1] < moved[0] / 5


@pytest.mark.parametrize(("classes", "margin"), [(2, 0.9), (10, 0.4), (100, 0.1), (1000, 0.05), (5000, 0.05)])
def test_default_margins(classes, margin):
    e_margin, d_margin = EATA(seeded_net())._margins(classes)
    assert e_margin == pytest.approx(0.4 * math.log(classes))
    assert d_margin == pytest.approx(margin)


def test_a_long_run_without_a_selection_warns_once():
    eata = EATA(seeded_net(), d_margin=1e-6, e_margin=1.6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in stream(batches=80, n=60):
            eata(x)
    assert ["d_margin 1e-06 is too small" in str(warning.message) for warning in caught] == [True]


def test_fisher_values():
    net, xs = seeded_net(norm="group"), stream(batches=3, n=10)
    expected = {}
    for x in (xs[0], xs[1][:5]):
        net.zero_grad()
        logits = net(x)
        F.cross_entropy(logits, logits.argmax(1)).backward()
        for name, parameter in net.named_parameters():
            if "bn1" in name or name.endswith("1.weight") or name.endswith("1.bias"):
                expected[name] = expected.get(name, 0) + parameter.grad.square() / 2
    fishers = EATA.prepare(net, [(x, torch.zeros(10)) for x in xs], n=15)
    for name, value in fishers.items():
        torch.testing.assert_close(value, expected[name])
    assert load(save(dict(fishers))).keys() == fishers.keys()
    mapping = EATA.prepare(net, [{"x": x, "label": torch.zeros(10)} for x in xs], n=15)
    assert all(torch.equal(mapping[n], v) for n, v in fishers.items())


def test_fisher_values_leave_the_model_alone():
    net = seeded_net()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    with torch.no_grad():
        EATA.prepare(net, list(stream()))
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e_margin": 0.0}, "e_margin must lie in"),
        ({"d_margin": 0.0}, "d_margin must lie in"),
        ({"d_margin": 1.01}, "d_margin must lie in"),
        ({"fisher_weight": -1.0}, "fisher_weight must lie in"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EATA(seeded_net(), **options)


@pytest.mark.bad_input
def test_fishers_of_another_shape_or_not_finite_are_refused():
    net = seeded_net()
    fishers = EATA.prepare(net, list(stream()))
    with pytest.raises(InputError, match=r"prepared was made for another model: .* holds other numbers"):
        EATA(seeded_net(1), prepared=fishers)
    with pytest.raises(InputError, match="they differ in"):
        EATA(net, prepared=fishers, parameters_of=all_parameters)
    with pytest.raises(InputError, match=r"bn1.weight must be finite"):
        Prepared("EATA", {"bn1.weight": torch.full((6,), float("nan"))}, net)


@pytest.mark.bad_input
def test_bad_source_data_are_refused():
    with pytest.raises(InputError, match="at least one batch"):
        EATA.prepare(seeded_net(), [])
    with pytest.raises(InputError, match="x must be finite"):
        EATA.prepare(seeded_net(), [torch.full((4, 3, 8, 8), float("nan"))])
    with pytest.raises(InputError, match="n must be at least 1"):
        EATA.prepare(seeded_net(), list(stream()), 0)
