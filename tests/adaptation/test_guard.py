import warnings

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from toynet import built

from trimtab.adaptation import Adapter, Guard, Source, Tent
from trimtab.core.checks import InputError


def net():
    """A network that uses all its five classes."""
    plain = built(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)))
    with torch.no_grad():
        for place, parameter in enumerate(plain.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)))
        plain[2].bias.zero_()
    return plain


class Steered(Adapter):
    """Says what its one parameter makes it say: class 0 alone, as soon as the parameter is large."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self._begin(lambda m: {"2.bias": m[2].bias}, lambda p: torch.optim.SGD(p, lr=0.0))

    def _adapt(self, x):
        logits = self._call(self.model, x)
        self._descend(logits.mean())
        return logits

    def push(self, amount):
        with torch.no_grad():
            self.model[2].bias[0] += amount


def varied(batches=12, n=20):
    return torch.randn(batches, n, 4, generator=torch.Generator().manual_seed(1))


def steered(action, **settings):
    return Steered(net(), guard=Guard(action, every=1, memory=20, **settings))


def test_a_healthy_stream_raises_no_alarm():
    adapter = steered("reset")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in varied():
            adapter(x)
    assert int(adapter.guard.looks) == 12
    assert int(adapter.guard.collapses) == int(adapter.resets) == 0
    assert adapter.guard.entropy_ratio() == adapter.guard.agreement() == 1.0


def test_kappa_and_marginal_entropy_are_those_of_the_last_predictions():
    guard = Guard(every=1, memory=10**9)
    adapter = Steered(net(), guard=guard)
    adapter.push(0.3)
    xs = varied()
    ours = torch.cat([adapter(x).argmax(1) for x in xs])
    theirs = torch.cat([net()(x).argmax(1) for x in xs])
    observed = (ours == theirs).double().mean()
    p, q = (torch.bincount(v, minlength=5).double() / len(v) for v in (ours, theirs))
    chance = (p * q).sum()
    assert guard.agreement() == pytest.approx(float((observed - chance) / (1 - chance)), rel=1e-4)
    spread = [-(v[v > 0] * v[v > 0].log()).sum() for v in (p, q)]
    assert guard.entropy_ratio() == pytest.approx(float(spread[0] / spread[1]), rel=1e-4)


def test_a_collapse_resets():
    adapter = steered("reset")
    xs = varied()
    adapter.push(100.0)
    with pytest.warns(RuntimeWarning, match="Steered has collapsed after 20 inputs .* reset to the source model"):
        adapter(xs[0])
    assert int(adapter.resets) == int(adapter.guard.collapses) == 1
    assert torch.equal(adapter.model[2].bias, net()[2].bias)


def test_a_collapse_rolls_back_to_a_state_from_before_it():
    adapter = steered("roll back")
    xs = varied(batches=16)

    def run(batches):
        for x in batches:
            adapter(x)

    biases = []
    for x in xs[:6]:
        adapter.push(0.01)
        adapter(x)
        biases.append(adapter.model[2].bias[0].item())
    adapter.push(100.0)
    with pytest.warns(RuntimeWarning, match="rolled back"):
        run(xs[6:10])
    assert int(adapter.resets) == 0
    assert int(adapter.guard.rollbacks) == 1
    assert adapter.model[2].bias[0].item() in biases
    assert int(adapter.samples) == 200, "counters are not rolled back"
    adapter.push(100.0)
    with pytest.warns(RuntimeWarning, match="reset to the source"):
        run(xs[10:])
    assert int(adapter.resets) == 1


def test_a_warning_changes_nothing():
    adapter = steered("warn")
    adapter.push(100.0)
    with pytest.warns(RuntimeWarning, match="it goes on"):
        adapter(varied()[0])
    assert int(adapter.resets) == int(adapter.guard.rollbacks) == 0
    assert adapter.model[2].bias[0] > 50


def test_a_stream_of_one_class_is_no_collapse():
    one = net()
    with torch.no_grad():
        one[2].bias[3] = 100.0
    adapter = Source(one, guard=Guard(every=1, memory=40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in varied():
            adapter(x)
    assert adapter.guard.entropy_ratio() == adapter.guard.agreement() == 1.0


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_saved_in_the_middle_it_goes_on_bit_by_bit(cut):
    def build():
        optimizer = torch.optim.Adam
        return Tent(net(), optimizer=lambda p: optimizer(p, lr=0.5), guard=Guard("roll back", every=1, memory=40))

    xs = varied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        straight = build()
        for x in xs[:cut]:
            straight(x)
        saved = save(straight.state_dict())
        expected = [straight(x) for x in xs[cut:]]
        other = build()
        other.load_state_dict(load(saved))
        assert all(torch.equal(other(x), y) for x, y in zip(xs[cut:], expected))
    assert int(straight.guard.collapses) > 0
    a, b = straight.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "panic"}, "action must be one of reset, roll back, warn"),
        ({"every": 0}, "every must be at least 1"),
        ({"memory": 1}, "memory must be at least 2"),
        ({"min_entropy": 1.5}, "min_entropy must lie in"),
        ({"min_agreement": -2}, "min_agreement must lie in"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Guard(**settings)


def test_a_guard_watches_one_adapter():
    guard = Guard()
    Tent(net(), guard=guard)
    with pytest.raises(InputError, match="watches another adapter already"):
        Tent(net(), guard=guard)
