"""Every adapter on streams that are not as the papers have them."""

import pytest
import torch
from builders import BUILDERS, LEARNERS
from torch import nn
from toynet import seeded_net, stream

from trimtab.core.checks import InputError

every = pytest.mark.parametrize("name", BUILDERS)


def sound(adapter):
    return all(value.isfinite().all() for value in adapter.state_dict().values())


@every
def test_frozen_normalisation_layers_adapt_all_the_same(name):
    net = seeded_net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    adapter, plain = BUILDERS[name](net), BUILDERS[name](seeded_net())
    for x in stream(n=20):
        assert torch.equal(adapter(x), plain(x))
    assert int(adapter.updates) == int(plain.updates) >= (name in LEARNERS)
    assert not any(p.requires_grad for n, p in net.named_parameters() if "bn" in n)


@every
@pytest.mark.parametrize("shade", [0.0, 1.0])
def test_a_batch_of_one_colour_leaves_it_sound(name, shade):
    adapter = BUILDERS[name](seeded_net())
    xs = stream(n=20)
    for x in (xs[0], torch.full_like(xs[0], shade), torch.full_like(xs[0], shade), xs[1]):
        assert adapter(x).isfinite().all()
    assert sound(adapter)


@every
def test_batches_of_changing_size(name):
    adapter = BUILDERS[name](seeded_net())
    xs = stream(batches=1, n=64)[0]
    for x in xs.split([20, 3, 33, 2, 6]):
        outputs = adapter(x)
        assert outputs.shape == (len(x), 5)
        assert outputs.isfinite().all()
    assert int(adapter.samples) == 64
    assert sound(adapter)


@every
def test_a_stream_that_ends_in_one_input(name):
    adapter = BUILDERS[name](seeded_net())
    *xs, last = stream(batches=1, n=25)[0].split(8)
    for x in xs:
        adapter(x)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    if name in ("adanpc_bn", "ostta"):
        with pytest.raises(InputError, match=r"x must hold more than one .*; pass larger batches, "):
            adapter(last)
        assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
    else:
        assert adapter(last).isfinite().all()
        assert int(adapter.samples) == 25


@every
def test_one_by_one_in_a_window_and_batches_between(name):
    adapter = BUILDERS[name](seeded_net(), window=8)
    singles, batches = stream(batches=20, n=1), stream(seed=1, batches=2)
    for x in (*singles[:11], batches[0], *singles[11:], batches[1]):
        outputs = adapter(x)
        assert outputs.shape == (len(x), 5)
        assert outputs.isfinite().all()
    assert int(adapter.samples) == 20 + 24
    assert int(adapter.updates) >= (name in LEARNERS)
    assert sound(adapter)


@pytest.mark.bad_input
@every
def test_what_was_prepared_for_another_model_or_by_another_method_is_refused(name):
    build = BUILDERS[name]
    if build.prepare is None:
        pytest.skip("needs no preparation")
    ours, theirs = build.prepared(seeded_net()), build.prepared(seeded_net(seed=1))
    with pytest.raises(InputError, match=r"prepared was made for another model: '.*' holds other numbers"):
        build.method(seeded_net(), **{**build.settings, "prepared": theirs})
    ours.method = "Other"
    with pytest.raises(InputError, match=rf"prepared must come from {build.method.__name__}\.prepare, .* by Other"):
        build.method(seeded_net(), **{**build.settings, "prepared": ours})
