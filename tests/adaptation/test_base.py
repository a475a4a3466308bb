"""The contract, held against every adapter."""

import io
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from builders import BUILDERS, LEARNERS, source
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from toynet import ToyNet, built, huge, seeded_net, stream

from trimtab.adaptation import (
    ADAPTERS,
    EATA,
    PETAL,
    AlphaBN,
    BatchNormAdapt,
    CoRe,
    CoTTA,
    RoTTA,
    Source,
    Tent,
    UnMixTNS,
)
from trimtab.adaptation.base import Adapter, entropy, follow, rows
from trimtab.core.checks import InputError
from trimtab.core.modules import BATCH_NORMS, all_parameters

every = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
learners = pytest.mark.parametrize("build", [BUILDERS[name] for name in LEARNERS], ids=LEARNERS)


def everything(adapter):
    return {name: value.clone() for name, value in adapter.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every
def test_predicts_and_counts_and_leaves_the_model_alone(build):
    net = seeded_net()
    before, flags = everything(net), [p.requires_grad for p in net.parameters()]
    adapter = build(net)
    for x in stream(batches=3, n=12):
        with torch.no_grad():
            outputs = adapter(x)
        assert outputs.shape == (12, 5)
        assert not outputs.requires_grad
    assert int(adapter.samples) == 36
    assert int(adapter.skipped) == int(adapter.resets) == 0
    assert same(everything(net), before)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert not net.training
    if adapter.outputs == "probabilities":
        torch.testing.assert_close(outputs.sum(1), torch.ones(12))


@learners
def test_adapts_whatever_the_caller_s_gradient_mode(build):
    finals = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        adapter = build(seeded_net())
        with mode():
            for x in stream():
                adapter(x.clone().requires_grad_())
        assert int(adapter.updates) > 0
        finals.append(everything(adapter))
    assert any(not torch.equal(finals[0][f"model.{n}"], v) for n, v in seeded_net().named_parameters())
    assert same(finals[0], finals[1])
    assert same(finals[0], finals[2])


@learners
def test_optimizer_holds_what_moves_and_nothing_else_moves(build):
    adapter = build(seeded_net())
    held = [id(p) for group in adapter.optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in adapter.moving.values()]
    inside = {name for name in adapter.moving if "/" not in name}  # the others belong to parts of the adapter
    assert {n for n, p in adapter.model.named_parameters() if p.requires_grad} == inside
    before = everything(adapter.model)
    for x in stream():
        adapter(x)
    still = [n for n, p in adapter.model.named_parameters() if n not in adapter.moving]
    assert all(torch.equal(before[n], adapter.model.state_dict()[n]) for n in still)
    assert all(p.grad is None for p in adapter.parameters())


@every
def test_reset_returns_to_the_start(build):
    adapter = build(seeded_net())
    xs = stream(batches=5)
    first = [adapter(x) for x in xs]
    adapter.reset()
    assert int(adapter.resets) == 1
    generator = build(seeded_net()).generator
    if generator is not None:
        adapter.generator.set_state(generator.get_state())
    for x, expected in zip(xs, first):
        assert torch.equal(adapter(x), expected)
    assert int(adapter.samples) == 2 * xs.shape[0] * xs.shape[1]


@every
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_saved_in_the_middle_it_goes_on_bit_by_bit(build, cut):
    xs = stream(batches=6, n=13)
    straight = build(seeded_net())
    for x in xs[:cut]:
        straight(x)
    saved = save(straight.state_dict())
    expected = [straight(x) for x in xs[cut:]]
    other = build(seeded_net())
    other(stream(seed=5)[0])
    other.load_state_dict(load(saved))
    assert [torch.equal(other(x), y) for x, y in zip(xs[cut:], expected)] == [True] * len(expected)
    assert same(everything(other), everything(straight))
    other.reset()
    fresh = build(seeded_net())
    if fresh.generator is not None:
        fresh.generator.set_state(other.generator.get_state())
    assert torch.equal(other(xs[0]), fresh(xs[0])), "the restored adapter knows the source to return to"


@every
def test_a_state_that_was_loaded_is_a_copy(build):
    xs = stream()
    adapter, other = build(seeded_net()), build(seeded_net())
    adapter(xs[0])
    other.load_state_dict(adapter.state_dict())
    before = everything(adapter)
    for x in xs[1:]:
        other(x)
    assert same(everything(adapter), before)


@every
def test_state_survives_a_weights_only_file(build):
    adapter = build(seeded_net())
    adapter(stream()[0])
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    file.seek(0)
    other = build(seeded_net())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(everything(other), everything(adapter))


@every
def test_state_of_another_adapter_is_refused(build):
    state = {**build(seeded_net()).state_dict(), "stranger": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="stranger"):
        build(seeded_net()).load_state_dict(state)
    state.pop("stranger")
    state.pop("samples")
    with pytest.raises(RuntimeError, match="samples"):
        build(seeded_net()).load_state_dict(state)


def test_optimizer_state_must_fit():
    tent = Tent(seeded_net())
    tent(stream()[0])
    state = tent.state_dict()
    with pytest.raises(RuntimeError, match="optimizer"):
        Source(seeded_net()).load_state_dict(state)
    state["optimizer.fc.weight.exp_avg"] = torch.zeros(1)
    del state["optimizer.lr"]
    with pytest.raises(RuntimeError, match=r"optimizer\.lr[\s\S]*optimizer\.fc\.weight\.exp_avg"):
        Tent(seeded_net()).load_state_dict(state)


def test_a_changed_learning_rate_is_restored():
    tent = Tent(seeded_net())
    tent.optimizer.param_groups[0]["lr"] = 0.25
    other = Tent(seeded_net())
    other.load_state_dict(tent.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.25


@every
def test_frozen_changes_nothing(build):
    adapter = build(seeded_net())
    xs = stream()
    adapter(xs[0])
    before = everything(adapter)
    with adapter.frozen() as same_adapter:
        assert same_adapter is adapter
        outputs = [adapter(x) for x in xs]
        assert torch.equal(adapter(xs[2]), outputs[2])
    assert same(everything(adapter), before)
    adapter(xs[1])
    assert int(adapter.samples) == 24


@every
def test_frozen_predicts_what_comes_before_the_update(build):
    adapter = build(seeded_net(), **({"confidence": 0.0} if build.method in (CoTTA, PETAL) else {}))
    if build is BUILDERS["ema"]:
        pytest.skip("statistics move before the prediction")
    x = stream()[0]
    with adapter.frozen():
        expected = adapter(x)
    torch.testing.assert_close(adapter(x), expected)


@every
def test_float64_stays_float64(build):
    adapter = build(seeded_net().double())
    for x in stream().double():
        assert adapter(x).dtype == torch.float64


@every
def test_log_probs(build):
    x = stream()[0]
    expected = build(seeded_net())(x)
    log_probs = build(seeded_net()).log_probs(x)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(len(x)))
    gives = build.method.outputs if isinstance(build.method, type) else "logits"
    torch.testing.assert_close(log_probs.exp(), expected if gives == "probabilities" else expected.softmax(1))


def test_log_probs_of_a_zero_probability_are_finite():
    class Sure(Adapter):
        outputs = "probabilities"

        def __init__(self):
            super().__init__(nn.Linear(2, 2, device="meta"))
            self._begin()

        def _adapt(self, x):
            return torch.eye(2)

    assert Sure().log_probs(torch.zeros(2, 2)).isfinite().all()


@every
def test_episodic_forgets_between_batches(build):
    xs = stream()
    adapter = build(seeded_net(), episodic=True)
    outputs = [adapter(x) for x in xs]
    for x, output in zip(xs, outputs):
        fresh = build(seeded_net())
        if fresh.generator is None:
            assert torch.equal(fresh(x), output)
    assert int(adapter.resets) == len(xs)


def test_steps_and_reset_every():
    xs = stream(batches=6)
    tent = Tent(seeded_net(), steps=3, reset_every=6)
    outputs = [tent(x) for x in xs]
    assert int(tent.updates) == 18
    assert int(tent.resets) == 3
    again = Tent(seeded_net(), steps=3)
    assert [torch.equal(again(x), y) for x, y in zip(xs[:4], outputs[:4])] == [True, True, False, False]
    fresh = Tent(seeded_net(), steps=3)
    assert [torch.equal(fresh(x), y) for x, y in zip(xs[2:4], outputs[2:4])] == [True, True]


@every
def test_inplace_adapts_the_model_itself(build):
    net = seeded_net()
    adapter, copied = build(net, inplace=True), build(seeded_net())
    assert any(module is net for module in adapter.modules())
    for x in stream():
        assert torch.equal(adapter(x), copied(x))
    assert same(everything(adapter), everything(copied))


@every
def test_modes_of_the_networks_do_not_follow_the_adapter(build):
    adapter = build(seeded_net())
    modes = [m.training for m in adapter.model.modules()]
    for switch in (adapter.train, adapter.eval):
        assert switch() is adapter
        assert [m.training for m in adapter.model.modules()] == modes
    assert not adapter.training


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_window_serves_inputs_one_by_one(window, norm):
    xs = stream(batches=2 * window + 1, n=1)
    tent = Tent(seeded_net(norm=norm), window=window)
    by_hand = Tent(seeded_net(norm=norm))
    for i, x in enumerate(xs):
        rows = xs[max(0, i + 1 - window) : i + 1, 0]
        renewed = (i + 1) % window == 0
        with torch.no_grad():
            seen = rows if norm == "batch" or renewed else x
            expected = by_hand(seen)[-1:] if renewed else by_hand.model(seen)[-1:]
        torch.testing.assert_close(tent(x), expected)
    assert int(tent.updates) == 2
    assert int(tent.samples) == len(xs)
    assert len(tent.recent) == window


@every
def test_window_is_saved_and_frozen_looks_at_it_without_a_trace(build):
    xs = stream(batches=9, n=1)
    adapter = build(seeded_net(), window=4)
    for x in xs[:6]:
        adapter(x)
    state = everything(adapter)
    with adapter.frozen():
        expected = adapter(xs[6])
    assert same(everything(adapter), state)
    other = build(seeded_net(), window=4)
    other.load_state_dict(load(save(state)))
    if build is not BUILDERS["ema"]:
        assert torch.equal(other(xs[6]), expected)
    other.load_state_dict(load(save(state)))
    assert [torch.equal(other(x), adapter(x)) for x in xs[6:]] == [True] * 3
    adapter.reset()
    assert adapter.recent.numel() == 0


def test_window_of_one_row_uses_the_source_s_statistics_in_batchnorm1d():
    net = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    net[1].running_mean.fill_(0.7)
    x = stream(batches=2, n=1, shape=(3,))
    tent = Tent(net, window=2)
    torch.testing.assert_close(tent(x[0]), net(x[0]).detach())
    assert int(tent.updates) == 0
    tent(x[1])
    assert int(tent.updates) == 1
    torch.testing.assert_close(tent.model[1].running_mean, net[1].running_mean, rtol=0, atol=0)


def test_reset_inside_a_window_keeps_the_inputs():
    tent = Tent(seeded_net(), window=3, reset_every=1)
    for x in stream(batches=3, n=1):
        tent(x)
    assert int(tent.resets) == 1
    assert len(tent.recent) == 3


@pytest.mark.parametrize("build", [BUILDERS[name] for name in LEARNERS if name != "rotta"])
def test_what_is_not_finite_is_skipped_and_counted(build):
    adapter = build(seeded_net(), **({"augment": lambda x, g: 0.9 * x} if build.augment else {}))
    xs = stream(batches=6, n=20)
    adapter(xs[0])
    before = everything(adapter)
    updates = int(adapter.updates)
    adapter(huge(xs[0]))
    assert int(adapter.skipped) >= 1
    assert int(adapter.updates) == updates
    for name, value in everything(adapter).items():
        if name.startswith(("model.", "teacher.", "optimizer.")):
            assert torch.equal(value, before[name]), name
    for x in xs[1:]:
        adapter(x)
    assert int(adapter.updates) > updates
    assert all(v.isfinite().all() for v in adapter.state_dict().values())


def test_statistics_that_overflow_are_taken_back():
    adapter = BatchNormAdapt(seeded_net(), variant="ema")
    x = stream()[0]
    adapter(x)
    before = everything(adapter.model)
    adapter(huge(x))
    assert same(everything(adapter.model), before)
    assert (int(adapter.updates), int(adapter.skipped)) == (1, 1)


NETS = {
    "1d": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (4,)),
    "1d_series": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(36, 3)),
        (2, 8),
    ),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 3)),
        (1, 4, 4, 4),
    ),
    "layer": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)), (4,)),
    "group": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3)),
        (3, 8, 8),
    ),
}


@every
@pytest.mark.parametrize(("net", "shape"), NETS.values(), ids=NETS)
def test_every_kind_of_normalisation(build, net, shape):
    if build.images and len(shape) != 3:
        pytest.skip("takes images alone")
    net = built(net)
    if build.method in (BatchNormAdapt, AlphaBN, CoRe, UnMixTNS) and not any(
        isinstance(m, BATCH_NORMS) for m in net.modules()
    ):
        with pytest.raises(InputError, match="batch normalisation layer"):
            build(net, shape)
        return
    adapter = build(net, shape)
    before = everything(adapter)
    for x in stream(shape=shape, batches=4):
        outputs = adapter(x)
        assert outputs.isfinite().all()
    assert outputs.shape == (12, 3)
    inside = {name: parameter for name, parameter in adapter.moving.items() if "/" not in name}
    if inside and int(adapter.updates):
        assert any(not torch.equal(before[f"model.{name}"], parameter) for name, parameter in inside.items())


class Wrapped(nn.Module):
    """Speaks like a transformers model: keyword arguments in, an object with .logits out."""

    def __init__(self):
        super().__init__()
        self.net = seeded_net()
        self.classifier = self.net.fc

    def forward(self, pixel_values, shift=0.0):
        return SimpleNamespace(logits=self.net(pixel_values + shift))


@every
def test_mappings_and_outputs_with_logits(build):
    if build.method is RoTTA:
        pytest.skip("a memory holds tensors")
    x = stream()[0]
    adapter = build(Wrapped(), **({"augment": lambda x, generator: {**x, "shift": 0.1}} if build.augment else {}))
    with torch.inference_mode():
        outputs = adapter({"pixel_values": x.clone()})
    if not build.augment:
        assert torch.equal(outputs, build(seeded_net())(x))
    assert outputs.shape == (12, 5)


def test_shared_parameters_move_once():
    net = seeded_net()
    net.layer1[1].bias = net.layer1[1].weight
    tent = Tent(net)
    assert len(tent.moving) == 5
    tent(stream()[0])
    tent.reset()
    torch.testing.assert_close(tent.model.layer1[1].bias, net.layer1[1].weight, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_all_adapters_work_without_settings(kind):
    net = seeded_net()
    known = source(net, (3, 8, 8))
    needed = {} if kind.preparation == "none" else {"prepared": kind.prepare(net, known)}
    assert kind(net, **needed)(stream(n=16)[0]).shape == (16, 5)
    if kind.preparation == "none":
        with pytest.raises(InputError, match=f"{kind.__name__} needs no preparation"):
            kind.prepare(net, known)


@every
def test_a_batch_implies_no_more_passes_than_are_declared(build):
    adapter = build(seeded_net())
    passes = {"forward": 0, "backward": 0}

    def count(module, inputs, output):
        passes["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: passes.update(backward=passes["backward"] + len(gradient)))

    for module in adapter.modules():
        if isinstance(module, ToyNet):
            module.layer4.register_forward_hook(count)
    xs = stream(batches=6, n=32)
    for x in xs:
        adapter(x)
    assert 0 < passes["forward"] <= adapter.forwards * xs.shape[0] * xs.shape[1]
    assert passes["backward"] <= adapter.backwards * xs.shape[0] * xs.shape[1]
    assert (passes["backward"] > 0) == (adapter.backwards > 0)


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_entropy_and_mean_teacher(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, classes, generator=generator, dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected)
    teacher, student = (nn.Linear(2, 2, bias=False, device="meta").to_empty(device="cpu") for _ in range(2))
    with torch.no_grad():
        teacher.weight.fill_(1.0)
        student.weight.fill_(3.0)
    follow(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight.detach(), torch.full((2, 2), 1.5))


def test_an_entropy_of_one_hot_logits_is_zero():
    assert float(entropy(torch.tensor([[200.0, -200.0]]))) == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, x: a(x, torch.zeros(12)), "labels must not be given"),
        (lambda a, x: a((x, torch.zeros(12))), "without labels, got tuple"),
        (lambda a, x: a({"pixel_values": x, "labels": torch.zeros(12)}), "must not hold 'labels'"),
        (
            lambda a, x: a(x.index_fill(0, torch.tensor([3]), float("nan"))),
            "x must be finite, found nan at axis 0 index 3",
        ),
        (lambda a, x: a(x.index_fill(0, torch.tensor([3]), float("inf"))), "x must be finite, found inf"),
        (lambda a, x: a(x[:0]), "empty batch"),
        (lambda a, x: a({}), "empty batch"),
        (lambda a, x: a(x.numpy()), "got ndarray"),
    ],
)
@every
def test_bad_batches_are_refused_and_leave_no_trace(build, call, message):
    adapter = build(seeded_net())
    adapter(stream()[0])
    before = everything(adapter)
    with pytest.raises(InputError, match=message):
        call(adapter, stream()[1])
    assert same(everything(adapter), before)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"reset_every": 0}, "reset_every must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 1.5}, "window must be an integer"),
        ({"parameters_of": lambda model: {}}, "must choose at least one parameter"),
        ({"parameters_of": lambda model: {"a": nn.Parameter(torch.zeros(1))}}, "'a' is none"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Tent(seeded_net(), **options)


@pytest.mark.bad_input
@pytest.mark.parametrize("model", [None, lambda x: x])
def test_what_is_not_a_module_is_refused(model):
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
        Source(model)


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [Tent, EATA, RoTTA])
def test_a_model_without_normalisation_is_refused(build):
    with pytest.raises(InputError, match="normalisation layer"):
        build(built(lambda: nn.Sequential(nn.Linear(3, 2))))


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [Tent, EATA, BatchNormAdapt, partial(BatchNormAdapt, variant="ema"), CoTTA])
def test_one_value_a_channel_is_refused_in_words(build):
    adapter = build(built(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))))
    with pytest.raises(InputError, match="more than one value for batch statistics"):
        adapter(torch.zeros(1, 3, 1, 1))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: nn.Linear(3, 1), r"\(4, 1\)"),
        (lambda: nn.Unflatten(1, (3, 1)), r"\(4, 3, 1\)"),
        (lambda: nn.LSTM(3, 2), "tuple"),
    ],
)
def test_models_that_do_not_classify_are_refused(net, shape):
    class OneRow(Source):
        dense = False

    with pytest.raises(InputError, match=f"c >= 2, it returned {shape}"):
        OneRow(built(net))(torch.zeros(4, 3))


def test_dense_predictions():
    segmenter = built(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)))
    tent = Tent(segmenter)
    outputs = tent(stream()[0])
    assert outputs.shape == (12, 4, 6, 6)
    assert int(tent.updates) == 1
    assert rows(outputs).shape == (12 * 36, 4)
    assert torch.equal(rows(outputs)[36 + 7], outputs[1, :, 1, 1])
    torch.testing.assert_close(entropy(outputs).flatten(), entropy(rows(outputs)))


@pytest.mark.bad_input
def test_a_model_that_hides_its_gradients_is_refused():
    class Hidden(ToyNet):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(InputError, match="must let gradients flow"):
        Tent(built(Hidden))(stream()[0])


@pytest.mark.bad_input
def test_a_window_takes_tensors_of_one_shape():
    tent = Tent(seeded_net(), window=2)
    tent(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"\(3, 8, 8\), got \(3, 9, 9\)"):
        tent(torch.zeros(1, 3, 9, 9))
    with pytest.raises(InputError, match="must be a tensor where window > 1"):
        Tent(Wrapped(), window=2)({"pixel_values": torch.zeros(1, 3, 8, 8)})


def test_everything_may_move():
    tent = Tent(seeded_net(), parameters_of=all_parameters)
    tent(stream()[0])
    assert "fc.weight" in tent.moving
