"""PETAL, slug 36-petal: parity with the authors' code, and what must hold for every input."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toynet import GOLDEN, built, seeded_net, stream

from trimtab.adaptation import PETAL, CoTTA, Prepared
from trimtab.adaptation.petal import quantile
from trimtab.adaptation.teacher import self_training_loss
from trimtab.core.checks import InputError
from trimtab.core.modules import all_parameters

SGD = partial(torch.optim.SGD, lr=0.05)
FILES = sorted((GOLDEN / "36-petal").glob("*.npz"))
HOLDING = {path: set(np.load(path).files) for path in FILES}
ATOL = {np.dtype("float64"): 1e-10, np.dtype("float32"): 2e-5}


class TinyNet(nn.Module):
    """The network of the golden vectors."""

    def __init__(self, inputs, width, classes):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class Flips:
    """The augmentation of the golden vectors: the i-th call mirrors, and scales by 0.9 + 0.2 i / 31, i modulo 32."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, generator):
        factor = 0.9 + 0.2 * (self.calls % 32) / 31
        self.calls += 1
        return x.flip(-1) * factor


def settings_of(path):
    """What the files do not hold as arrays stands on the card, by their names."""
    symmetric, noavg = "symmetric" in path.stem, "noavg" in path.stem
    return {
        "variant": "sres" if "sres" in path.stem else "fim",
        "restore": 0.05 if "sres" in path.stem else 0.2 if noavg else 0.1 if symmetric else 0.03,
        "prior_weight": 1e-3,
        "confidence": 0.0 if noavg else 0.1 if symmetric else 0.92,
        "symmetric": symmetric,
        "optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
        if symmetric
        else partial(torch.optim.Adam, lr=1e-3),
    }


@pytest.mark.golden
@pytest.mark.parametrize("path", [path for path in FILES if "outputs" in HOLDING[path]], ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    arrays = {name: torch.from_numpy(value) for name, value in np.load(path).items()}

    def part(prefix):
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    init, batch = part("init."), 0
    classes, width = init["fc.weight"].shape
    net = built(lambda: TinyNet(init["conv.weight"].shape[1], width, classes)).to(arrays["x"].dtype)
    net.load_state_dict(init)
    posterior = {f"mean.{n}": v for n, v in part("mean.").items()} | {
        f"variance.{n}": v for n, v in part("var.").items()
    }
    options = settings_of(path)
    if options["variant"] == "sres":
        sizes = [parameter.numel() for parameter in net.parameters()]
        names = [name for name, _ in net.named_parameters()]

        def restore_mask(name, parameter, generator):
            masks = arrays["restore_masks"][batch].split(sizes)
            return masks[names.index(name)].view_as(parameter)

        options["restore_mask"] = restore_mask
    petal = PETAL(net, Prepared("PETAL", posterior, net), from_mean=False, augment=Flips(), **options)
    atol = ATOL[np.dtype(str(arrays["x"].dtype).removeprefix("torch."))]
    for batch, (x, expected) in enumerate(zip(arrays["x"], arrays["outputs"], strict=True)):  # noqa: B007
        torch.testing.assert_close(petal(x), expected, rtol=0, atol=atol)
    for prefix, network in (("final_student.", petal.model), ("final_teacher.", petal.teacher)):
        expected, live = part(prefix), dict(network.named_parameters())
        assert expected.keys() == live.keys()
        for name, value in expected.items():
            torch.testing.assert_close(live[name].detach(), value, rtol=0, atol=atol)


@pytest.mark.golden
@pytest.mark.parametrize("path", [path for path in FILES if "q_arr" in HOLDING[path]], ids=lambda path: path.stem)
def test_the_authors_helpers(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    numbers = [name.removeprefix("q_perc_") for name in arrays if name.startswith("q_perc_")]
    assert numbers
    for i in numbers:
        found = quantile(arrays["q_arr"], float(arrays[f"q_perc_{i}"]))
        torch.testing.assert_close(found, arrays[f"q_val_{i}"], rtol=0, atol=1e-12)
    for kind in ("ce", "sce"):
        logits = arrays["ce_x"].clone().requires_grad_()
        loss = self_training_loss(logits, arrays["ce_xema"], symmetric=kind == "sce")
        loss.backward()
        torch.testing.assert_close(loss.detach(), arrays[f"{kind}_loss"].mean(), rtol=0, atol=1e-12)
        torch.testing.assert_close(logits.grad, arrays[f"{kind}_grad_of_mean"], rtol=0, atol=1e-12)


def posterior(net, seed=0, variance=1e-3):
    """A mean near the weights of `net`, and a variance, as tensors by the names that PETAL knows."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(p.shape, generator=generator) for name, p in net.named_parameters()}
    mean = {f"mean.{name}": p.detach() + 0.02 * noise[name] for name, p in net.named_parameters()}
    return {**mean, **{f"variance.{name}": variance * noise[name].square() for name in noise}}


def petal_of(net, **options):
    return PETAL(net, Prepared("PETAL", posterior(net), net), **options)


@settings(max_examples=15)
@given(st.integers(0, 100), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.02, 1.0]), st.booleans())
def test_without_a_prior_and_at_random_it_is_cotta(seed, confidence, restore, symmetric):
    net = seeded_net(seed)
    prepared = Prepared("PETAL", posterior(net, seed), net)
    at_mean = seeded_net(seed)
    at_mean.load_state_dict({n.removeprefix("mean."): v for n, v in prepared.items()}, strict=False)
    shared = {"confidence": confidence, "restore": restore, "symmetric": symmetric, "augmentations": 2}
    cotta = CoTTA(at_mean, generator=torch.Generator().manual_seed(seed), **shared)
    petal = PETAL(
        net, prepared, variant="sres", prior_weight=0.0, generator=torch.Generator().manual_seed(seed), **shared
    )
    for x in stream(seed, batches=3):
        assert torch.equal(petal(x), cotta(x))
    ours, theirs = petal.state_dict(), cotta.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_step_is_the_paper_s():
    petal = petal_of(seeded_net(), prior_weight=0.3, restore=0.25, teacher_momentum=0.9, optimizer=SGD, confidence=0.0)
    mean, source = petal.mean.named(), petal.source.named()
    for x in stream():
        before = {n: p.detach().clone().requires_grad_() for n, p in petal.moving.items()}
        slow = {n: p.clone() for n, p in petal.teacher.named_parameters()}
        target = petal.teacher(x)
        logits = torch.func.functional_call(petal.model, before, (x,))
        variance = {n: 1 / c - 1e-6 for n, c in petal.certainty.named().items()}
        prior = sum(((before[n] - mean[n]) ** 2 / (variance[n] + 1e-6)).sum() for n in before)
        loss = F.cross_entropy(logits, target.softmax(1)) + 0.3 / 2 * prior
        loss.backward()
        torch.testing.assert_close(petal(x), target)
        fisher = torch.cat([p.grad.square().flatten() for p in before.values()])
        threshold = torch.quantile(fisher, 0.25)
        for n, p in petal.moving.items():
            stepped = before[n].detach() - 0.05 * before[n].grad
            back = before[n].grad.square() < threshold
            torch.testing.assert_close(p.detach(), torch.where(back, source[n], stepped), rtol=1e-4, atol=1e-6)
            teacher = dict(petal.teacher.named_parameters())[n]
            torch.testing.assert_close(teacher, 0.9 * slow[n] + 0.1 * stepped, rtol=1e-4, atol=1e-6)
    assert int(petal.updates) == 4


def test_a_strong_prior_holds_the_mean():
    moved = []
    for weight in (0.0, 1e-3):
        petal = petal_of(seeded_net(), prior_weight=weight, restore=0.0, confidence=0.0)
        for x in stream(batches=20):
            petal(x)
        mean = petal.mean.named()
        moved.append(sum(float((p.detach() - mean[n]).square().sum()) for n, p in petal.moving.items()))
    assert moved[1] < moved[0] / 5


def test_where_it_starts():
    net = seeded_net()
    prepared = Prepared("PETAL", {**posterior(net), "buffer.bn1.running_mean": torch.full((6,), 7.0)}, net)
    for from_mean in (True, False):
        petal = PETAL(net, prepared, from_mean=from_mean)
        for name, parameter in petal.model.named_parameters():
            assert torch.equal(parameter, prepared[f"mean.{name}"]) == from_mean
            assert torch.equal(petal.mean.named()[name], prepared[f"mean.{name}"])
    assert all(torch.equal(v, seeded_net().state_dict()[n]) for n, v in net.state_dict().items())


class WithToken(nn.Module):
    """A class token, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(3))
        self.unused = nn.Linear(3, 3)
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        return self.fc(x * self.token)


def test_tokens_stay_and_unused_layers_do_no_harm():
    net = built(WithToken)
    x = stream(batches=1, shape=(3,))[0]
    plain = {"confidence": 0.0, "restore": 0.0, "augment": lambda x, generator: x}
    petal = petal_of(net, **plain)
    petal(x)
    assert int(petal.updates) == 1
    assert "token" not in petal.moving
    everything = petal_of(net, **plain, parameters_of=all_parameters)
    everything(x)
    assert not torch.equal(everything.moving["token"], everything.mean.named()["token"])


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.floats(0, 0.999))
def test_quantile(values, share):
    values = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(quantile(values, share), torch.quantile(values, share), rtol=0, atol=1e-12)


def labelled(batches=3, n=12):
    return [(x, torch.arange(n) % 5) for x in stream(batches=batches, n=n)]


def test_prepared_once_it_serves_after_a_file(tmp_path):
    net = seeded_net()
    prepared = PETAL.prepare(net, labelled())
    prepared.save(tmp_path / "petal.safetensors")
    again = Prepared.load(tmp_path / "petal.safetensors")
    first, second = PETAL(net, prepared, confidence=0.0), PETAL(net, again, confidence=0.0)
    for x in stream(seed=1):
        assert torch.equal(first(x), second(x))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fisher"}, "variant must be one of fim, sres"),
        ({"restore": 1.0}, r"restore must lie in \[0, 1\)"),
        ({"restore": 1.1, "variant": "sres"}, r"restore must lie in \[0, 1\]"),
        ({"restore_mask": lambda n, p, g: p > 0}, "restore_mask must be left out"),
        ({"prior_weight": -1.0}, "prior_weight must lie in"),
        ({"damping": 0.0}, "damping must lie in"),
        ({"confidence": 1.1}, "confidence must lie in"),
        ({"augmentations": 0}, "augmentations must be at least 1"),
        ({"teacher_momentum": -0.1}, "teacher_momentum must lie in"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        petal_of(seeded_net(), **options)


@pytest.mark.bad_input
def test_a_posterior_that_does_not_fit_is_refused():
    net = seeded_net()
    fits = posterior(net)

    def refused(tensors, message):
        with pytest.raises(InputError, match=message):
            PETAL(net, Prepared("PETAL", tensors, net))

    refused({n: v for n, v in fits.items() if n != "mean.fc.bias"}, r"they differ in \['mean.fc.bias'\]")
    refused({**fits, "mean.stranger": torch.zeros(1)}, r"they differ in \['mean.stranger'\]")
    refused({**fits, "mean.fc.bias": torch.zeros(2)}, r"prepared\['mean.fc.bias'\] must have shape \(5,\), got \(2,\)")
    bad = torch.tensor([0.0, 0.1, -0.1, 0.0, 0.0])
    refused({**fits, "variance.fc.bias": bad}, r"prepared\['variance.fc.bias'\] must be >= 0, found -0.1 at row 2")
    with pytest.raises(InputError, match="was made for another model"):
        PETAL(seeded_net(1), Prepared("PETAL", fits, net))
    with pytest.raises(InputError, match="it was made by EATA"):
        PETAL(net, Prepared("EATA", fits, net))


def test_rounding_below_zero_is_no_variance():
    net = seeded_net()
    fits = posterior(net)
    fits["variance.fc.bias"] = -1e-7 * fits["mean.fc.bias"].square()
    assert float(PETAL(net, Prepared("PETAL", fits, net)).certainty.named()["fc.bias"].max()) == pytest.approx(1e6)


@pytest.mark.bad_input
def test_models_without_weights_and_bad_images_are_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(2))

    with pytest.raises(InputError, match="called weight or bias"):
        petal_of(Bare())
    with pytest.raises(InputError, match="normalise inside the model"):
        petal_of(seeded_net(), confidence=0.0)(5 * stream()[0])
