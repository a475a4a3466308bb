import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toynet import Golden, built, golden_files, seeded_net

from trimtab.adaptation import ITTA, ITTATrainer, Prepared
from trimtab.adaptation.guard import Guard
from trimtab.adaptation.itta_training import Elementwise, gradient_alignment_penalty
from trimtab.adaptation.mixstyle import Style
from trimtab.core.checks import InputError

SLUG = "13-itta"
BLOCKS = ("layer1", "layer4")
precisions = pytest.mark.parametrize("precision", ["f64", "f32"])
TOLERANCE = {"f64": 1e-8, "f32": 2e-5}


class Blocks(nn.Module):
    """The network of this slug's vectors: convolution and ReLU, block by block; mean over the map; linear."""

    def __init__(self, weights):
        super().__init__()
        self.names = sorted({name.split(".")[1] for name in weights if name.startswith("featurizer.")})
        self.featurizer = nn.ModuleDict()
        for i, name in enumerate(self.names):
            out, into = weights[f"featurizer.{name}.0.weight"].shape[:2]
            conv = nn.Conv2d(into, out, 3, stride=2 if i == 1 else 1, padding=1)
            self.featurizer[name] = nn.Sequential(conv, nn.ReLU())
        self.classifier = nn.Linear(*weights["classifier.weight"].shape[::-1])

    def forward(self, x):
        for block in self.featurizer.values():
            x = block(x)
        return self.classifier(x.mean((2, 3)))


def replay(coins, shares, orders, every=1):
    """The recorded styles, one a call; `every` second draw was the authors' unused one."""
    recorded = iter(range(0, len(coins), every))

    def draw(n, generator):
        i = next(recorded)
        assert n == len(orders[i])
        return Style(0 if coins[i] > 0.5 else 1, shares[i], orders[i])

    return draw


@pytest.mark.golden
@precisions
@pytest.mark.parametrize("path", golden_files(SLUG, "x_train", "coins"))
def test_the_authors_training_and_stream(path, precision):
    golden = Golden(path, precision)
    cfg = golden.cfg
    weights = {name[2:]: golden.tensor(name) for name in golden.arrays if name.startswith("w.")}
    net = built(lambda: Blocks(weights)).to(golden.dtype)
    net.load_state_dict(weights)
    xs, ys, coins = golden.tensor("x_train"), golden.tensor("y_train"), golden.arrays["coins"]
    trained = 2 * len(xs)
    blocks = tuple(f"featurizer.{name}" for name in net.names)
    trainer = ITTATrainer(
        net,
        blocks,
        depth=int(cfg["adaparams_depth"]),
        lr=cfg["lr"],
        weight_decay=cfg["weight_decay"],
        draw=replay(coins[:trained], golden.tensor("lmda_train"), golden.tensor("perm_train")),
    )
    half = xs.shape[1] // 2
    losses = [trainer.update([(x[:half], y[:half]), (x[half:], y[half:])]) for x, y in zip(xs, ys)]
    checked = 0

    def check(name, value, atol=TOLERANCE[precision], rtol=0.0):
        nonlocal checked
        expected = golden.arrays[f"{precision}.{name}"]
        value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol, err_msg=name)
        checked += 1

    # the shares were recorded in single precision: rounding them once more moves these numbers as far
    relative, learnt = {"f64": (1e-7, 3e-6), "f32": (1e-4, 2e-5)}[precision]
    check("loss_cla", [loss.classification for loss in losses], atol=0, rtol=relative)
    check("loss_reg", [loss.consistency for loss in losses], atol=0, rtol=relative)

    prepared = trainer.prepared()
    itta = ITTA(
        net,
        prepared,
        depth=int(cfg["mapping_depth"]),
        loss_weight=cfg["ada_lr"],
        optimizer=partial(torch.optim.Adam, lr=0.1 * cfg["lr"]),
        draw=replay(coins[trained:], golden.tensor("lmda_test"), golden.tensor("perm_test"), every=2),
    )
    outputs, last = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for x in golden.tensor("x_test"):
            outputs.append(itta(x))
            last.append(itta.model.maps[-1].weight[0].detach().clone())
    check("test_outputs", torch.stack(outputs), atol=learnt)
    check("map_weight4_0_after", torch.stack(last), atol=learnt)
    kept = itta.model.network.state_dict()
    for name in golden.results("trained."):
        part, _, rest = name.partition(".")
        if part == "adaparams":
            kind, _, place = rest.partition(".")
            check(f"trained.{name}", getattr(itta.consistency, kind)[int(place)])
        else:
            check(f"trained.{name}", kept[name])
    for name in golden.results("map."):
        place, _, depth = name.partition(".")
        value = getattr(itta.model.maps[int(place[-1]) - 1], place[:-1])[int(depth)].detach()
        expected = golden.arrays[f"{precision}.map.{name}"]
        # where a gradient is rounding alone, Adam makes steps of it
        near = np.isclose(value, expected, rtol=0, atol=learnt)
        assert near.mean() >= 0.97, name
        checked += 1
    assert checked == len(golden.results())


class Small(nn.Module):
    """Two blocks that end in a ReLU, batch normalisation in one, and a linear head."""

    def __init__(self, end=nn.ReLU):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), end())
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).mean((2, 3)))


def domains(seed=0, count=3, n=8, size=8):
    """Domains that differ in gain and offset; the class is the brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        x = torch.randn(n, 3, size, size, generator=generator)
        y = torch.randint(3, (n,), generator=generator)
        x[torch.arange(n), y] += 1
        made.append([((1 + 0.5 * i) * x + 0.3 * i, y)])
    return made


TRAINING = {"blocks": ("first", "second"), "lr": 1e-2}
FAST = {"loss_weight": 0.1, "optimizer": partial(torch.optim.Adam, lr=1e-2)}


def made(net=None, steps=3, training=TRAINING, **settings):
    net = built(Small) if net is None else net
    return ITTA(net, ITTA.prepare(net, domains(), steps=steps, **training), **{**FAST, **settings})


def images(n=6, seed=5, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) + 1


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_a_fresh_chain_cuts_off_what_is_negative_and_nothing_else(depth, seed):
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed))
    for shape in ((3, 2), (3, 1)):
        torch.testing.assert_close(Elementwise(shape, depth)(x), x if depth == 1 else x.relu(), rtol=0, atol=0)


@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-3, 3))
def test_the_penalty_is_twice_one_minus_the_correlation(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    w = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    penalty = gradient_alignment_penalty(w @ (scale * a + shift), w @ b, [w])
    correlation = torch.corrcoef(torch.stack((a, b)))[0, 1]
    torch.testing.assert_close(penalty.detach(), 2 * (1 - correlation) * 29 / 30)


def test_the_consistency_loss_learns_to_pull_where_classification_pulls():
    trainer = ITTATrainer(built(Small), **TRAINING, consistency_lr=1e-3)
    before = [p.detach().clone() for p in trainer.consistency.parameters()]
    batches = [domain[0] for domain in domains()]
    losses = [trainer.update(batches) for _ in range(30)]
    assert losses[-1].classification < losses[0].classification
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.consistency.parameters()))
    assert trainer.skipped == 0


def test_a_consistency_loss_without_gradient_is_left_as_it_is():
    trainer = ITTATrainer(built(Small), **TRAINING)
    with torch.no_grad():
        trainer.consistency.bias.fill_(-100.0)
    before = {name: value.clone() for name, value in trainer.consistency.state_dict().items()}
    losses = trainer.update([domain[0] for domain in domains()])
    assert np.isnan(losses.penalty)
    assert trainer.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.consistency.state_dict().items())
    assert all(p.isfinite().all() for p in trainer.network.parameters())


def test_frozen_parameters_stay_and_the_given_model_too():
    net = built(Small)
    net.first[1].requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    itta = made(net)
    itta(images())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    trained = itta.model.network.state_dict()
    changed = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in net.named_parameters() if not name.startswith("first.1.")}


def test_only_the_maps_move_and_a_reset_takes_them_back():
    itta = made()
    x = images()
    with itta.frozen():
        source = itta(x)
    torch.testing.assert_close(source, itta.model.network(x).detach())
    before = {name: value.clone() for name, value in itta.model.state_dict().items()}
    for _ in range(3):
        outputs = itta(x)
    moved = {name for name, value in itta.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("maps.") for name in moved)
    assert not torch.equal(outputs, source)
    itta.reset()
    with itta.frozen():
        assert torch.equal(itta(x), source)


def test_each_step_brings_the_loss_down_and_the_prediction_is_the_moved_network_s():
    style = Style(0, torch.tensor([0.1, 0.9, 0.2, 0.3, 0.5, 0.0]), torch.tensor([1, 2, 3, 4, 5, 0]))
    itta = made(draw=lambda n, generator: style, optimizer=partial(torch.optim.SGD, lr=1e-2), loss_weight=1.0)
    x = images()
    losses = []
    for _ in range(8):
        losses.append(float(itta._inconsistency(x, style).detach()))
        outputs = itta(x)
        with itta.frozen():
            assert torch.equal(itta(x), outputs)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_one_image_teaches_nothing_and_a_window_of_them_does():
    itta = made()
    before = [p.detach().clone() for p in itta.model.maps.parameters()]
    with pytest.warns(RuntimeWarning, match="two inputs or more"):
        outputs = itta(images(1))
    assert outputs.shape == (1, 3)
    assert int(itta.updates) == int(itta.skipped) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, itta.model.maps.parameters()))
    window = made(window=4)
    for x in images(8):
        window(x[None])
    assert int(window.updates) == 2


def test_saved_mid_stream_it_goes_on_bit_by_bit():
    itta, again = made(), made()
    itta(images())
    again.load_state_dict({name: value.clone() for name, value in itta.state_dict().items()})
    for seed in range(3):
        assert torch.equal(itta(images(seed=seed)), again(images(seed=seed)))


def test_maps_a_channel_take_images_of_any_size():
    itta = made(per_channel=True)
    assert [tuple(m.weight.shape) for m in itta.model.maps] == [(5, 4, 1, 1), (5, 6, 1, 1)]
    assert itta(images(size=12)).shape == (6, 3)
    assert int(itta.updates) == 1


def test_a_preparation_survives_its_file_and_serves_no_other_model(tmp_path):
    net = built(Small)
    prepared = ITTA.prepare(net, domains(), steps=2, **TRAINING)
    prepared.save(tmp_path / "itta.safetensors")
    loaded = ITTA(net, Prepared.load(tmp_path / "itta.safetensors"), **FAST)
    assert torch.equal(loaded(images()), ITTA(net, prepared, **FAST)(images()))
    with pytest.raises(InputError, match="made for another model"):
        ITTA(seeded_net(), prepared)


def test_a_guard_compares_with_the_trained_network():
    itta = made(guard=Guard(every=1, memory=4))
    assert torch.equal(itta.guard.source.fc.weight, itta.model.network.fc.weight)


def test_a_batch_that_overflows_is_skipped():
    itta = made()
    before = [p.detach().clone() for p in itta.model.maps.parameters()]
    itta(torch.full((4, 3, 8, 8), 1e38) * torch.rand(4, 1, 1, 1, generator=torch.Generator().manual_seed(0)))
    assert int(itta.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, itta.model.maps.parameters()))


def test_a_black_batch_is_predicted():
    assert made()(torch.zeros(4, 3, 8, 8)).isfinite().all()


def test_a_network_in_half_precision_keeps_its_maps_in_single():
    net = built(Small)
    prepared = ITTA.prepare(net, domains(), steps=2, **TRAINING)
    itta = ITTA(net.to(torch.bfloat16), prepared, **FAST)
    assert itta(images().to(torch.bfloat16)).dtype == torch.float32
    assert int(itta.updates) == 1
    assert {p.dtype for p in itta.model.maps.parameters()} == {torch.float32}


def test_loaders_of_different_lengths_begin_anew():
    first, second, _ = domains()
    prepared = ITTA.prepare(built(Small), [first * 2, second], steps=3, **TRAINING)
    assert prepared["blocks.0.first"].tolist() == [4, 8, 8]
    same = ITTA.prepare(built(Small), iter([first, second]), steps=3, **TRAINING)
    assert all(torch.equal(prepared[name], same[name]) for name in prepared)


def test_a_single_loader_is_one_domain():
    first, second, _ = domains()
    alone, listed = (
        ITTA.prepare(built(Small), given, steps=3, **TRAINING) for given in (first + second, [first + second])
    )
    assert all(torch.equal(alone[name], listed[name]) for name in listed)


def test_what_a_batch_costs():
    itta, passes, gradients = made(), [], []
    itta.model.network.fc.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    itta.model.network.second.register_full_backward_hook(lambda module, into, out: gradients.append(len(out[0])))
    itta(images(6))
    assert sum(passes) / 6 == ITTA.forwards
    assert sum(gradients) / 6 == ITTA.backwards


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": ("first",)}, "blocks must name at least two submodules"),
        ({"blocks": "first"}, "blocks must name at least two submodules"),
        ({"blocks": ("first", "first")}, "each once"),
        ({"blocks": ("second", "first")}, r"in the order in which they run, \['first', 'second'\]"),
        ({"blocks": ("first", "third")}, "no module named 'third'"),
        ({"blocks": ("first", "fc")}, "block 'fc' must return feature maps"),
        ({"blocks": ("first", "second"), "head": "first"}, "as its head"),
        ({"blocks": ("first", "second"), "lr": 0}, "lr must lie in"),
        ({"blocks": ("first", "second"), "depth": 0}, "depth must be at least 1"),
        ({"blocks": ("first", "second"), "steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ITTA.prepare(built(Small), domains(), **{"steps": 1, **settings})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "must hold one loader a domain"),
        ([[]], r"loader\[0\] must yield something"),
        ([[torch.zeros(2, 3, 8, 8)]], r"minibatches\[0\] must be \(inputs, labels\)"),
        ([torch.zeros(2, 3, 8, 8)], r"minibatches\[0\] must be \(inputs, labels\)"),
        ([[(torch.zeros(2, 3, 8, 8), torch.tensor([0, 3]))]], "must lie in 0..2, found 3 at row 1"),
        ([[(torch.full((2, 3, 8, 8), torch.nan), torch.tensor([0, 1]))]], r"minibatches\[0\] must be finite"),
    ],
)
def test_bad_batches_are_refused_in_training(loader, message):
    with pytest.raises(InputError, match=message):
        ITTA.prepare(built(Small), loader, steps=1, **TRAINING)


def test_blocks_that_return_negative_values_are_warned_of():
    with pytest.warns(RuntimeWarning, match="'second' returns negative values"):
        ITTA.prepare(built(lambda: Small(end=nn.Tanh)), domains(), steps=1, **TRAINING)


@pytest.mark.bad_input
def test_other_sizes_and_other_methods_are_refused():
    itta = made()
    with pytest.raises(InputError, match=r"shape \(4, 8, 8\) as in training, it gave \(4, 12, 12"):
        itta(images(size=12))
    with pytest.raises(InputError, match=r"must come from ITTA\.prepare"):
        ITTA(built(Small), Prepared("CAFA", {}, built(Small)))
    with pytest.raises(InputError, match="must follow at least one update"):
        ITTATrainer(built(Small), **TRAINING).prepared()
