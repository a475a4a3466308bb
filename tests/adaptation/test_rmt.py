from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from toynet import built, golden_files, seeded_net, stream

from trimtab.adaptation import Tent
from trimtab.adaptation.objectives import symmetric_cross_entropy, view_contrast
from trimtab.adaptation.prepared import Prepared
from trimtab.adaptation.rmt import RMT
from trimtab.core.checks import InputError
from trimtab.core.modules import norm_parameters

SLUG = "42-rmt"


class TinyNet(nn.Module):
    """The network of the golden streams: conv, batch norm, ReLU, mean over the map, linear."""

    def __init__(self, conv, fc):
        super().__init__()
        self.conv = nn.Conv2d(conv[1], conv[0], conv[2:], padding=1)
        self.bn = nn.BatchNorm2d(conv[0])
        self.fc = nn.Linear(fc[1], fc[0])

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def part(arrays, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def close(value, expected, tolerance):
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=tolerance)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files(SLUG, "init.*", "prototypes", "outputs"))
def test_the_authors_streams(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    dtype = arrays["x"].dtype
    tolerance, moved = (1e-10, 1e-7) if dtype == torch.float64 else (1e-5, 1e-5)
    weights = part(arrays, "init.")
    net = built(lambda: TinyNet(weights["conv.weight"].shape, weights["fc.weight"].shape)).to(dtype)
    net.load_state_dict(weights)
    source = list(zip(arrays["src_x"], arrays["src_y"]))
    warmed = any(not torch.equal(value, weights[name]) for name, value in part(arrays, "after_warmup_student.").items())
    prepared = RMT.prepare(net, source, warm_up=5 if warmed else 0)
    prepared = Prepared("RMT", {**prepared, "prototypes": arrays["prototypes"]}, net)
    layers = part(arrays, "projector.")
    (wide, d), (last, _) = layers["0.weight"].shape, layers["2.weight"].shape
    projector = built(lambda: nn.Sequential(nn.Linear(d, wide), nn.ReLU(), nn.Linear(wide, last))).to(dtype)
    projector.load_state_dict(layers)
    rmt = RMT(
        net,
        prepared,
        source=source if warmed else None,
        projector=projector,
        ensemble="sum",
        augment=lambda x, generator: x.flip(-1) * 0.9 + 0.05,
    )
    for kind, network in (("student", rmt.model), ("teacher", rmt.teacher)):
        for name, value in part(arrays, f"after_warmup_{kind}.").items():
            close(network.state_dict()[name], value, moved)
    losses, descend = [], rmt._descend
    rmt._descend = lambda loss: losses.append(loss.detach()) or descend(loss)
    for x, expected in zip(arrays["x"], arrays["outputs"]):
        close(rmt(x), expected, tolerance)
    close(torch.stack(losses), arrays["losses"], tolerance)
    for kind, network in (("student", rmt.model), ("teacher", rmt.teacher), ("projector", rmt.projector)):
        for name, value in part(arrays, f"final_{kind}.").items():
            if dtype == torch.float64 or name != "conv.bias":  # its gradient is rounding alone: batch norm comes next
                close(network.state_dict()[name], value, moved)


SETTINGS = {"augment": lambda x, generator: 0.9 * x + 0.05 * torch.rand(x.shape, generator=generator)}
SGD = partial(torch.optim.SGD, lr=0.05)
CLASSES = 5


def source(batches=3, n=10, seed=7):
    return [(x, (torch.arange(n) + i) % CLASSES) for i, x in enumerate(stream(seed=seed, batches=batches, n=n))]


def build(model=None, replay=True, warm_up=0, **settings):
    model = seeded_net() if model is None else model
    optimizer = {"optimizer": settings["optimizer"]} if "optimizer" in settings else {}
    prepared = RMT.prepare(model, source(), warm_up=warm_up, **optimizer)
    return RMT(model, prepared, source=source() if replay else None, **{**SETTINGS, **settings})


def everything(adapter):
    return {name: value.clone() for name, value in adapter.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("ensemble", ["mean", "sum"])
def test_one_update_by_hand(ensemble):
    weights = {"source_weight": 0.5, "training_weight": 2.0, "contrast_weight": 0.3, "alpha": 0.2, "temperature": 0.5}
    rmt = build(optimizer=SGD, projector=7, teacher_momentum=0.9, ensemble=ensemble, warm_up=2, **weights)
    x = stream(seed=3, n=6)[0]
    student, teacher, projector = (deepcopy(network) for network in (rmt.model, rmt.teacher, rmt.projector))
    assert int(rmt.replay.taken) == 2
    view = SETTINGS["augment"](x, torch.Generator().set_state(rmt.generator.get_state()))

    def said(images):
        features = student.layer4(student.layer1(student.bn1(student.conv1(images)).relu())).mean((2, 3))
        return features, student.fc(features)

    (features, logits), (features_of_view, logits_of_view), target = said(x), said(view), teacher(x).detach()
    nearest = torch.stack([torch.cosine_similarity(rmt.prototypes, f[None]).argmax() for f in features])
    views = torch.stack((rmt.prototypes[nearest], features, features_of_view), 1)
    agreement = [symmetric_cross_entropy(z, target, 0.2).mean() for z in (logits, logits_of_view)]
    images, labels = source()[2]
    loss = 2 * sum(agreement) / 2 + 0.3 * view_contrast(projector(views), 0.5)
    loss = loss + 0.5 * F.cross_entropy(student(images), labels)
    loss.backward()
    outputs = rmt(x)
    torch.testing.assert_close(outputs, (logits + target).detach() / (2 if ensemble == "mean" else 1))
    pairs = [(student, rmt.model), (projector, rmt.projector)]
    for old, new in pairs:
        for before, after in zip(old.parameters(), new.parameters(), strict=True):
            torch.testing.assert_close(after.detach(), before.detach() - 0.05 * before.grad)
    for slow, before, fast in zip(rmt.teacher.parameters(), teacher.parameters(), rmt.model.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.9 * before.detach() + 0.1 * fast.detach())
    assert int(rmt.replay.taken) == 3


def test_prototypes_are_class_means_under_batch_statistics():
    net, batches = seeded_net(), source(n=9)
    student = Tent(net).model
    rows, labels = [], []
    for x, y in batches[:2]:
        with torch.no_grad():
            rows.append(student.layer4(student.layer1(student.bn1(student.conv1(x)).relu())).mean((2, 3)))
        labels.append(y)
    expected = torch.stack([torch.cat(rows)[torch.cat(labels) == k].mean(0) for k in range(CLASSES)])
    before = everything(net)
    torch.testing.assert_close(RMT.prepare(net, batches, n=10)["prototypes"], expected)
    assert same(everything(net), before)
    mapped = [{"x": x, "labels": y} for x, y in batches]
    torch.testing.assert_close(RMT.prepare(net, mapped, n=10)["prototypes"], expected)


def test_the_warm_up_raises_the_learning_rate_and_ignores_labels():
    net = seeded_net()
    rates = []

    class Watched(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    prepared = RMT.prepare(net, source(), warm_up=4, optimizer=partial(Watched, lr=0.2), teacher_momentum=0.5)
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert int(prepared["replayed"]) == 1
    again = RMT.prepare(
        net,
        [(x, y.roll(1)) for x, y in source()],
        warm_up=4,
        optimizer=partial(torch.optim.SGD, lr=0.2),
        teacher_momentum=0.5,
    )
    assert all(torch.equal(again[n], v) for n, v in prepared.items() if n != "prototypes")
    assert not torch.equal(prepared["student.bn1.bias"], prepared["teacher.bn1.bias"])


def test_gradients_that_the_model_brought_along_are_not_learnt_from():
    net, used = seeded_net(), seeded_net()
    used(source()[0][0]).sum().backward()
    prepared = RMT.prepare(net, source(), warm_up=2)
    assert same(dict(RMT.prepare(used, source(), warm_up=2)), dict(prepared))


@pytest.mark.parametrize("warm_up", [0, 4])
def test_reset_returns_to_the_start_of_the_stream(warm_up):
    rmt, xs = build(warm_up=warm_up), stream(batches=5)
    start = everything(rmt)
    first = [rmt(x) for x in xs]
    rmt.reset()
    rmt.generator.set_state(start["generator"])
    after = everything(rmt)
    counters = ("samples", "updates", "resets")
    assert all(torch.equal(after[name], value) for name, value in start.items() if name not in counters)
    assert after.keys() == start.keys()
    assert all(torch.equal(rmt(x), expected) for x, expected in zip(xs, first))
    assert any(name.startswith("optimizer.bn1") for name in start) == (warm_up > 0)


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_saved_in_the_middle_it_goes_on_bit_by_bit_with_its_replay(cut, tmp_path):
    xs, net = stream(batches=7), seeded_net()
    RMT.prepare(net, source(), warm_up=2).save(tmp_path / "rmt.safetensors")
    prepared = Prepared.load(tmp_path / "rmt.safetensors")
    straight = RMT(net, prepared, source=source(), **SETTINGS)
    for x in xs[:cut]:
        straight(x)
    saved = save(straight.state_dict())
    expected = [straight(x) for x in xs[cut:]]
    other = RMT(net, prepared, source=source(), **SETTINGS)
    other(xs[0])
    other.load_state_dict(load(saved))
    assert all(torch.equal(other(x), y) for x, y in zip(xs[cut:], expected))
    assert same(everything(other), everything(straight))


def test_what_moves_is_what_the_optimizer_holds():
    rmt = build()
    held = [id(p) for group in rmt.optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in rmt.moving.values()]
    assert held == [id(p) for p in (*rmt.model.parameters(), *rmt.projector.parameters())]
    before = everything(rmt)
    for x in stream():
        rmt(x)
    after = everything(rmt)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.fc.weight", "teacher.fc.weight", "projector.0.weight"} <= moved
    assert "optimizer.projector/0.weight.exp_avg" in after
    assert not {"prototypes", "start.projector/0/weight", "source.bn1/weight"} & moved


@pytest.mark.parametrize("replay", [False, True])
def test_passes_of_the_model_are_those_that_are_promised(replay):
    rmt = build(replay=replay)
    passes = []
    for network in (rmt.model, rmt.teacher):
        network.register_forward_hook(lambda *_: passes.append("forward"))
    rmt.model.fc.register_full_backward_hook(lambda *_: passes.append("backward"))
    rmt(stream()[0])
    assert passes.count("forward") == RMT.forwards - (not replay)
    assert passes.count("backward") == RMT.backwards - (not replay)


def test_frozen_it_says_the_same_and_leaves_no_trace():
    rmt, xs = build(), stream()
    rmt(xs[0])
    before = everything(rmt)
    with rmt.frozen():
        expected = rmt(xs[1])
    assert same(everything(rmt), before)
    assert torch.equal(rmt(xs[1]), expected)


def test_what_is_not_finite_is_skipped_and_moves_nothing():
    rmt, x = build(augment=lambda x, generator: x), stream()[0]
    rmt(x)
    before = everything(rmt)
    rmt(3e38 * (0.5 + x / 2))
    assert (int(rmt.updates), int(rmt.skipped)) == (1, 1)
    after = everything(rmt)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"samples", "skipped", "replay.taken"}


def test_a_window_serves_inputs_one_by_one():
    rmt = build(window=4, replay=False)
    for x in stream(batches=9, n=1):
        assert rmt(x).shape == (1, CLASSES)
    assert (int(rmt.updates), int(rmt.samples)) == (2, 9)


def test_one_input_is_enough_without_batch_normalisation():
    rmt = build(seeded_net(norm="group"), replay=False)
    assert rmt(stream(n=1)[0]).isfinite().all()
    assert int(rmt.updates) == 1


def test_the_projector_may_be_any_module_and_is_copied():
    given = nn.Identity()
    rmt = build(projector=given)
    assert rmt.projector is not given
    assert list(rmt.moving) == [n for n, _ in rmt.model.named_parameters()]
    rmt(stream()[0])
    assert int(rmt.updates) == 1


def test_frozen_norm_layers_and_inference_mode():
    net = seeded_net()
    net.bn1.requires_grad_(False)
    rmt = build(net, warm_up=1)
    with torch.inference_mode():
        rmt(stream()[0])
    assert not torch.equal(rmt.model.bn1.weight, net.bn1.weight)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.1}, "alpha must lie in"),
        ({"temperature": 0.0}, "temperature must lie in"),
        ({"source_weight": -1.0}, "source_weight must lie in"),
        ({"training_weight": -1.0}, "training_weight must lie in"),
        ({"contrast_weight": float("nan")}, "contrast_weight must lie in"),
        ({"teacher_momentum": 1.5}, "teacher_momentum must lie in"),
        ({"projector": 0}, "projector must be at least 1"),
        ({"ensemble": "product"}, "ensemble must be one of mean, sum"),
        ({"head": "conv1"}, "nn.Linear named 'conv1'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "at least one batch"),
        ([(torch.zeros(6, 3, 8, 8),)], "without labels"),
        ([(torch.zeros(6, 3, 8, 8), torch.arange(6))], "labels must lie in 0..4, found 5 at row 5"),
        ([(torch.zeros(6, 3, 8, 8), torch.arange(6) % 3)], r"shows none of \[3, 4\] in 6 inputs"),
        ([(torch.full((6, 3, 8, 8), float("nan")), torch.arange(6) % 5)], "features must be finite"),
    ],
)
def test_bad_source_data_are_refused(loader, message):
    with pytest.raises(InputError, match=message):
        RMT.prepare(seeded_net(), loader)


@pytest.mark.bad_input
def test_preparations_for_something_else_are_refused():
    net = seeded_net()
    prepared = RMT.prepare(net, source(), warm_up=1)
    with pytest.raises(InputError, match="for another model"):
        RMT(seeded_net(seed=1), prepared)
    with pytest.raises(InputError, match=r"must come from RMT\.prepare, it was made by CAFA"):
        RMT(net, Prepared("CAFA", prepared, net))
    with pytest.raises(InputError, match="prototypes of the 10 features that the head takes, they have 9"):
        RMT(net, Prepared("RMT", {"prototypes": torch.zeros(5, 9)}, net))
    with pytest.raises(InputError, match=r"it moved 'conv1\.weight"):
        RMT(net, prepared, parameters_of=norm_parameters)
    with pytest.raises(InputError, match="loss of the warm-up finite, it is nan at step 2"):
        RMT.prepare(net, source(), warm_up=3, optimizer=partial(torch.optim.SGD, lr=1e38))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter([]), "source must yield batches every time"),
        ([torch.zeros(4, 3, 8, 8)], r"source must yield \(inputs, labels\)"),
        ([(torch.full((4, 3, 8, 8), torch.nan), torch.zeros(4, dtype=torch.int64))], "inputs of source must be finite"),
        ([(torch.zeros(4, 3, 8, 8), torch.full((4,), 9))], "labels of source must lie in 0..4, found 9"),
    ],
)
def test_a_bad_source_to_replay_is_refused(batches, message):
    net = seeded_net()
    rmt = RMT(net, RMT.prepare(net, source()), source=batches, **SETTINGS)
    with pytest.raises(InputError, match=message):
        rmt(stream()[0])


def test_mixed_precision_and_black_and_short_batches():
    rmt = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (stream()[0], torch.zeros(6, 3, 8, 8), stream(n=2)[0]):
            outputs = rmt(x)
            assert outputs.dtype == torch.float32
            assert outputs.isfinite().all()
    assert (int(rmt.updates), int(rmt.skipped)) == (3, 0)
