"""OSTTA, slug 35-ostta: parity with the public re-implementation, and what must hold for every input."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toynet import Golden, built, golden_files, seeded_net, stream

from trimtab.adaptation import OSTTA, Tent
from trimtab.adaptation.ostta import confidence_filter
from trimtab.core.checks import InputError

SGD = partial(torch.optim.SGD, lr=0.05)


@pytest.mark.golden
@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("path", golden_files("35-ostta", "selected", setting="lambda_max"))
def test_the_re_implementation_s_numbers(path, precision):
    golden = Golden(path, precision)
    if not golden.precise:
        pytest.skip(f"{path.name} has no results in {precision}")
    ostta = OSTTA(
        golden.net(),
        diversity_weight=golden.cfg["lambda_max"],
        optimizer=golden.optimizer(),
        **golden.adapted(),
    )
    source = OSTTA(golden.net(), **golden.adapted())
    outputs, selected, bn1 = [], [], []
    for x in golden.tensor("x"):
        before = int(ostta.selected)
        outputs.append(ostta(x))
        with source.frozen():
            selected.append(confidence_filter(source(x).softmax(1), outputs[-1].softmax(1)))
        assert int(ostta.selected) - before == int(selected[-1].sum())
        bn1.append(ostta.model.bn1.weight.detach().clone())
    golden.check("outputs", torch.stack(outputs))
    golden.check("selected", torch.stack(selected))
    golden.check("bn1_weight_after", torch.stack(bn1))
    golden.check_network("final", ostta.model)
    golden.finish()


def by_hand(samples, source, weight):
    """The loss of rows of logits, as the paper writes it."""
    p, q = samples.softmax(1), source.softmax(1)
    confidence, chosen = q.max(1)
    passes = p[torch.arange(len(p)), chosen] >= confidence
    mean = p.mean(0)
    first = -(p * p.log()).sum(1)[passes].mean() if passes.any() else 0.0
    return first + weight * (mean * mean.log()).sum(), int(passes.sum())


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_loss_is_the_paper_s(weight):
    ostta = OSTTA(seeded_net(), diversity_weight=weight, optimizer=SGD)
    start, total = {n: p.detach().clone() for n, p in ostta.moving.items()}, 0
    for x in 3 * stream(batches=5):
        before = {n: p.detach().clone().requires_grad_() for n, p in ostta.moving.items()}
        logits = torch.func.functional_call(ostta.model, before, (x,))
        loss, count = by_hand(logits, torch.func.functional_call(ostta.model, start, (x,)).detach(), weight)
        loss.backward()
        torch.testing.assert_close(ostta(x), logits.detach())
        total += count
        for n, p in ostta.moving.items():
            torch.testing.assert_close(p, before[n] - 0.05 * before[n].grad)
    assert int(ostta.selected) == total < 60


def test_the_first_batch_passes_whole_and_is_tent_s():
    x = stream()[0]
    ostta, tent = OSTTA(seeded_net(), diversity_weight=0.0), Tent(seeded_net())
    assert torch.equal(ostta(x), tent(x))
    assert int(ostta.selected) == len(x)
    assert all(torch.allclose(p, tent.moving[n], rtol=0, atol=1e-7) for n, p in ostta.moving.items())


def test_nothing_passes():
    x = stream()[0]
    for weight, updates in ((0.0, 0), (0.25, 1)):
        ostta = OSTTA(seeded_net(), diversity_weight=weight, margin=1.0, optimizer=SGD)
        before = ostta.model.bn1.weight.detach().clone()
        ostta(x)
        assert (int(ostta.selected), int(ostta.updates), int(ostta.skipped)) == (0, updates, 0)
        assert torch.equal(ostta.model.bn1.weight, before) == (updates == 0)


def test_every_pixel_is_a_sample():
    net = built(lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    ostta = OSTTA(net, optimizer=SGD)
    xs = 3 * stream(batches=3, n=2)
    ostta(xs[0])
    for x in xs[1:]:
        before = {n: p.detach().clone().requires_grad_() for n, p in ostta.moving.items()}
        logits = torch.func.functional_call(ostta.model, before, (x,))
        source = torch.func.functional_call(ostta.model, ostta.source.named(), (x,))
        flat = [z.permute(0, 2, 3, 1).reshape(-1, 4) for z in (logits, source.detach())]
        loss, _ = by_hand(*flat, 0.25)
        loss.backward()
        assert ostta(x).shape == (2, 4, 8, 8)
        for n, p in ostta.moving.items():
            torch.testing.assert_close(p, before[n] - 0.05 * before[n].grad)
    assert 128 < int(ostta.selected) < 3 * 128
    ostta(xs[0, :1])


def test_source_statistics():
    net, x = seeded_net(), stream()[0]
    ostta = OSTTA(net, source_statistics=True)
    ostta(x)
    batch = OSTTA(seeded_net())
    with batch.frozen():
        passes = confidence_filter(net(x).softmax(1), batch(x).softmax(1))
    assert int(ostta.selected) == int(passes.sum()) < len(x)


def test_a_class_that_underflows_leaves_the_gradient_finite():
    ostta = OSTTA(built(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))))
    with torch.no_grad():
        ostta.model[1].bias.copy_(torch.tensor([0.0, 0.0, -300.0]))
    ostta(stream(batches=1, shape=(3,))[0])
    assert (int(ostta.updates), int(ostta.skipped)) == (1, 0)


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(2, 5))
def test_the_filter(seed, n, c):
    generator = torch.Generator().manual_seed(seed)
    source, adapted = (torch.randn(n, c, generator=generator).softmax(1) for _ in range(2))
    passes = confidence_filter(source, adapted)
    for row in range(n):
        k = int(source[row].argmax())
        assert bool(passes[row]) == bool(adapted[row, k] >= source[row, k])
    assert confidence_filter(source, source).all()
    assert not confidence_filter(source, source, margin=0.01).any()
    assert not (confidence_filter(source, adapted, margin=0.1) & ~passes).any()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [({"diversity_weight": -0.1}, "diversity_weight must lie in"), ({"margin": -1.1}, "margin must lie in")],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        OSTTA(seeded_net(), **options)


@pytest.mark.bad_input
def test_one_sample_alone_is_refused_unless_nothing_cancels():
    x = stream(n=1)[0]
    with pytest.raises(InputError, match="x must hold more than one sample"):
        OSTTA(seeded_net())(x)
    alone = OSTTA(seeded_net(), diversity_weight=0.0)
    alone(x)
    assert int(alone.updates) == 1


@pytest.mark.bad_input
def test_the_filter_refuses_other_shapes():
    with pytest.raises(InputError, match=r"one shape \(n, c\), got \(2, 3\) and \(3, 3\)"):
        confidence_filter(torch.ones(2, 3), torch.ones(3, 3))
