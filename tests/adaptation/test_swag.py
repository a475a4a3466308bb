from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import SWALR, update_bn
from torch.utils.data import DataLoader, TensorDataset
from toynet import built, seeded_net, stream

from trimtab.adaptation import PETAL, SwagDiagonal
from trimtab.core import progress
from trimtab.core.checks import InputError


def labelled(batches=3, n=12, seed=0):
    return [(x, torch.arange(n) % 5) for x in stream(seed, batches=batches, n=n)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@given(st.integers(0, 1000), st.integers(1, 6), st.floats(0, 1e6))
def test_mean_and_variance_of_the_snapshots(seed, n, offset):
    generator = torch.Generator().manual_seed(seed)
    values = offset + torch.randn(n, 2, 3, generator=generator, dtype=torch.float64)
    model = built(lambda: nn.Linear(3, 2, bias=False)).double()
    swag = SwagDiagonal(model)
    for value in values:
        with torch.no_grad():
            model.weight.copy_(value)
        swag.update(model)
    mean, variance = swag.finalize()
    torch.testing.assert_close(mean["weight"], values.mean(0))
    torch.testing.assert_close(variance["weight"], values.var(0, unbiased=False), rtol=1e-6, atol=1e-9)
    assert (variance["weight"] >= 0).all()


def authors(net, batches, epochs=5, lr=8e-4, swa_lr=0.01):
    """The authors' script, in torch's own parts; their cosine, which takes 2e-8 off the rate once, is left out."""
    net = deepcopy(net).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = SWALR(optimizer, anneal_strategy="linear", anneal_epochs=3, swa_lr=swa_lr)
    snapshots = []
    for epoch in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        if epoch > 0:
            snapshots.append({n: p.detach().clone() for n, p in net.named_parameters()})
            scheduler.step()
    mean = {n: torch.stack([s[n] for s in snapshots]).mean(0) for n in snapshots[0]}
    variance = {n: torch.stack([s[n] for s in snapshots]).var(0, unbiased=False) for n in mean}
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(mean[n])
    update_bn(batches, net)
    return mean, variance, dict(net.named_buffers())


@pytest.mark.parametrize("epochs", [3, 5, 7])
def test_the_fine_tuning_is_the_authors(epochs):
    net, batches = seeded_net().double(), [(x.double(), y) for x, y in labelled()]
    before = {n: v.clone() for n, v in net.state_dict().items()}
    prepared = PETAL.prepare(net, batches, epochs=epochs)
    mean, variance, buffers = authors(net, batches, epochs)
    for part, expected in (("mean", mean), ("variance", variance), ("buffer", buffers)):
        for name, value in expected.items():
            torch.testing.assert_close(prepared[f"{part}.{name}"], value, rtol=1e-6, atol=1e-10)
    assert same(net.state_dict(), before)
    assert not net.training
    assert all(p.grad is None for p in net.parameters())


class Interrupted:
    """A loader during whose third pass the power fails."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        yield self.batches[0]
        if self.passes == 3:
            raise progress.OutOfTime("the time limit was reached")
        yield from self.batches[1:]


def test_a_run_that_was_stopped_goes_on_bit_by_bit(tmp_path):
    net, batches, file = seeded_net(), labelled(), tmp_path / "run.safetensors"
    straight = PETAL.prepare(net, batches)
    with pytest.raises(progress.OutOfTime):
        PETAL.prepare(net, Interrupted(batches), checkpoint=file)
    rest = Interrupted(batches)
    rest.passes = 10
    assert same(PETAL.prepare(net, rest, checkpoint=file), straight)
    assert rest.passes == 14, "two epochs were done before, three and the batch statistics were left"
    assert same(PETAL.prepare(net, batches, checkpoint=file), straight)
    with pytest.raises(InputError, match="checkpoint must come from a run with the same settings"):
        PETAL.prepare(net, batches, lr=0.01, checkpoint=file)
    with pytest.raises(InputError, match="made for another model"):
        PETAL.prepare(seeded_net(1), batches, checkpoint=file)


def test_shuffling_draws_from_the_seed_and_dropout_not_at_all():
    net = built(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 5)))
    x, y = torch.cat(tuple(stream(shape=(3,)))), torch.arange(48) % 5
    runs = []
    for seed, batch in ((0, 8), (0, 8), (1, 8), (0, 48), (1, 48)):
        loader = DataLoader(TensorDataset(x.double(), y), batch, shuffle=True)
        runs.append(PETAL.prepare(net.double(), loader, seed=seed))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    for name, value in runs[3].items():
        torch.testing.assert_close(value, runs[4][name])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 2}, "epochs must be at least 3"),
        ({"lr": 0.0}, "lr must lie in"),
        ({"swa_lr": -1.0}, "swa_lr must lie in"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"weight_decay": -1.0}, "weight_decay must lie in"),
        ({"lr": 1e30}, "lr must be smaller: the loss of batch"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        PETAL.prepare(seeded_net(), labelled(), **settings)


@pytest.mark.bad_input
def test_bad_loaders_are_refused():
    net = seeded_net()
    for loader, message in (
        ([], "at least one batch"),
        (iter(labelled()), "in every epoch anew"),
        ([x for x, _ in labelled()], "must yield labels"),
        ([(x, y + 1) for x, y in labelled()], r"labels must lie in 0..4, found 5 at row 4"),
    ):
        with pytest.raises(InputError, match=message):
            PETAL.prepare(net, loader)
    with pytest.raises(InputError, match="must hold its weights in float32"):
        PETAL.prepare(seeded_net().bfloat16(), labelled())


@pytest.mark.bad_input
def test_the_estimator_refuses_what_does_not_fit():
    swag = SwagDiagonal(seeded_net())
    with pytest.raises(InputError, match="at least one snapshot"):
        swag.finalize()
    with pytest.raises(InputError, match="model must have the parameters"):
        swag.update(seeded_net(channels=(3, 4, 5, 6)))
