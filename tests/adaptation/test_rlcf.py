"""48-rlcf: parity with the authors' code, and what holds for every policy and reward."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import small_clip
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toynet import GOLDEN, built, seeded_net
from toynet import stream as toy_stream

from trimtab.adaptation import RLCF
from trimtab.adaptation.batch_stats import MixedBatchNorm
from trimtab.adaptation.rewards import ClipScoreReward, RewardEnsemble, advantages
from trimtab.adaptation.rlcf import (
    ENCODER,
    IMAGE_TO_TEXT,
    PROMPT,
    TEXT_TO_IMAGE,
    adamw,
    distillation_loss,
    policy_gradient_loss,
)
from trimtab.adaptation.views import confident, mean_entropy
from trimtab.adaptation.vision_language import ImageQueries, PromptedClasses, TextQueries, VisionLanguage, embed
from trimtab.core.checks import InputError

CASES = sorted((GOLDEN / "48-rlcf").glob("*.npz"))
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
FAST = partial(torch.optim.SGD, lr=0.5)


class Cosine(nn.Module):
    """The golden policy: tanh of one linear layer, against unit rows."""

    def __init__(self, weight, bias, text, scale):
        super().__init__()
        self.enc = built(lambda: nn.Linear(weight.shape[1], weight.shape[0])).to(weight.dtype)
        self.enc.load_state_dict({"weight": weight, "bias": bias})
        self.register_buffer("text", text)
        self.scale = scale

    def forward(self, x):
        return self.scale * F.normalize(torch.tanh(self.enc(x)), dim=1) @ self.text.T


class Recorder:
    """A reward that keeps what it is asked and answers."""

    def __init__(self, reward):
        self.reward, self.inputs, self.scores = reward, [], []

    def __call__(self, inputs, index):
        return self.bind(inputs)(index)

    def bind(self, inputs):
        self.inputs.append(inputs)
        score = self.reward.bind(inputs)

        def scored(index):
            self.scores.append(score(index))
            return self.scores[-1]

        return scored


@pytest.mark.golden
@pytest.mark.parametrize("path", [p for p in CASES if "clip_scores" in np.load(p).files], ids=lambda p: p.stem)
def test_classification_is_the_authors(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    x, weight = arrays["x"], arrays["policy.enc.weight"]
    close = partial(torch.testing.assert_close, rtol=0, atol=TOLERANCE[str(x.dtype).removeprefix("torch.")])
    policy = Cosine(weight, arrays["policy.enc.bias"], arrays["policy.text"], float(arrays["policy_scale"]))
    w, b = arrays["reward.enc.weight"], arrays["reward.enc.bias"]
    reward = Recorder(ClipScoreReward(lambda x: torch.tanh(x @ w.T + b), arrays["class_features"]))
    settings = {"amplify": bool(arrays["amplify"]), "across_views": bool(arrays["process_batch"])}
    settings["baseline"] = bool(arrays["process"])
    ended = []

    def optimizer(parameters):
        made = torch.optim.AdamW(parameters, lr=float(arrays["lr"]), weight_decay=float(arrays["weight_decay"]))
        made.register_step_post_hook(lambda *_: ended.append(rlcf.model(x).detach()))
        made.register_step_post_hook(lambda *_: ended.append(deepcopy(rlcf.model.enc.state_dict())))
        return made

    rlcf = RLCF(
        policy,
        reward,
        k=int(arrays["sample_k"]),
        steps=int(arrays["steps"]),
        selection=float(arrays["selection_p"]),
        augment=None,
        entropy_weight=0.1 * int(arrays["min_entropy_reg"]),
        optimizer=optimizer,
        **settings,
    )
    close(rlcf.model(x).detach(), arrays["logits_before"])
    assert torch.equal(confident(arrays["logits_before"], float(arrays["selection_p"])), arrays["selected_idx"])
    plain = rlcf(x[None])
    close(reward.inputs[0], x[arrays["selected_idx"]])
    close(torch.stack(reward.scores).flatten(1), arrays["clip_scores"])
    close(torch.stack([advantages(s, **settings) for s in reward.scores]).flatten(1), arrays["rewards"])
    assert len(ended) == 2 * int(arrays["steps"])
    close(ended[-1]["weight"], arrays["final_weight"])
    close(ended[-1]["bias"], arrays["final_bias"])
    close(ended[-2], arrays["logits_after"])
    close(plain, arrays["logits_after"][:1])
    assert torch.equal(rlcf.model.enc.weight, weight)


@pytest.mark.golden
@pytest.mark.parametrize("path", [p for p in CASES if "kd_loss" in np.load(p).files], ids=lambda p: p.stem)
def test_helpers_are_the_authors(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
    chosen = confident(arrays["logits"], float(arrays["top"]))
    assert torch.equal(chosen, arrays["sel_idx"])
    close(arrays["logits"][chosen], arrays["sel_logits"])
    close(mean_entropy(arrays["logits"]), arrays["avg_entropy"])
    student = arrays["kd_student"].requires_grad_()
    loss = distillation_loss(student, arrays["kd_teacher"], float(arrays["kd_T"]))
    loss.backward()
    close(loss.detach(), arrays["kd_loss"])
    close(student.grad, arrays["kd_grad"])


def test_there_are_golden_files():
    assert len(CASES) >= 6


def class_reward(x, index):
    """Rewards class 1, whatever the input."""
    return (index == 1).float()


def small(reward=class_reward, **settings):
    settings = {"k": 5, "views": 4, "selection": 0.5, "optimizer": FAST, **settings}
    return RLCF(seeded_net(norm="group"), reward, **settings)


def test_each_input_is_tuned_alone_and_forgotten():
    x = toy_stream()[0][:4]
    together = small(views=1, selection=1.0)
    outputs = together(x)
    for row, output in zip(x, outputs):
        torch.testing.assert_close(small(views=1, selection=1.0)(row[None])[0], output)
    source = seeded_net(norm="group")
    assert all(torch.equal(p, q) for p, q in zip(together.model.parameters(), source.parameters()))
    assert not together.optimizer.state
    with torch.no_grad():
        assert (outputs.softmax(1)[:, 1] > source(x).softmax(1)[:, 1]).all()
    counters = (int(together.samples), int(together.updates), int(together.skipped), int(together.starts.episodes))
    assert counters == (4, 12, 0, 4)


def test_no_input_inherits_the_optimizer_s_memory():
    x = toy_stream()[0][:1].expand(3, -1, -1, -1)
    outputs = small(views=1, selection=1.0, optimizer=adamw(0.05))(x)
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


def test_the_loss_is_reinforce_over_the_best_guesses():
    x = toy_stream()[0][:1]
    net = seeded_net(norm="group")
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(5, generator=generator)
    rlcf = small(lambda x, index: scores[index], views=1, selection=1.0, k=3, steps=2)
    expected = deepcopy(net)
    optimizer = FAST(expected.parameters())
    for _ in range(2):
        logits = expected(x)[0]
        best = logits.topk(3).indices
        advantage = scores[best] - scores[best].mean()
        loss = (advantage * -logits.log_softmax(0)[best]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(rlcf(x), expected(x).detach())


@given(shift=st.floats(-1, 1), seed=st.integers(0, 100))
def test_a_reward_shifted_for_all_candidates_is_the_same(shift, seed):
    scores = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for settings in ({}, {"amplify": True}, {"across_views": True}):
        torch.testing.assert_close(advantages(scores, **settings), advantages(scores + shift, **settings))
        assert abs(float(advantages(scores, **settings).sum())) < 1e-9


def test_a_constant_reward_teaches_nothing():
    x = toy_stream()[0][:2]
    rlcf = small(lambda x, index: torch.ones_like(index, dtype=torch.float32))
    torch.testing.assert_close(rlcf(x), seeded_net(norm="group")(x).detach())


def test_the_surest_views_are_learnt_from_and_the_plain_one_is_predicted():
    views = toy_stream()[0][:8]
    seen = []

    def reward(x, index):
        seen.append(x)
        return class_reward(x, index)

    rlcf = small(reward, augment=None, selection=0.25, steps=2)
    outputs = rlcf(views[None])
    net = seeded_net(norm="group")
    logits = net(views).detach()
    sure = (-(logits.softmax(1) * logits.log_softmax(1)).sum(1)).argsort()[:2]
    assert len(seen) == 2
    assert torch.equal(seen[0], views[sure])
    assert torch.equal(seen[1], views[sure])
    assert outputs.shape == (1, 5)
    with rlcf.frozen():
        torch.testing.assert_close(rlcf(views[None]), logits[:1])


def test_candidates_may_be_drawn():
    asked = []

    def reward(x, index):
        asked.append(index)
        return class_reward(x, index)

    net = seeded_net(norm="group")
    x = toy_stream()[0][:1]
    rlcf = RLCF(net, reward, k=4000, steps=1, views=1, selection=1.0, draw=True, optimizer=FAST)
    rlcf(x)
    shares = torch.bincount(asked[0][0], minlength=5) / 4000
    torch.testing.assert_close(shares, net(x).softmax(1)[0].detach(), rtol=0, atol=0.04)


def test_distillation_instead_of_the_reward():
    x = toy_stream()[0][:2]
    teacher = seeded_net(seed=5, norm="group")
    settings = {"views": 1, "selection": 1.0, "steps": 20, "optimizer": partial(torch.optim.Adam, lr=1e-2)}
    learnt = small(teacher=teacher, temperature=2.0, **settings)(x)
    with torch.no_grad():
        wanted, before = teacher(x), seeded_net(norm="group")(x)
    assert float(distillation_loss(learnt, wanted)) < 0.5 * float(distillation_loss(before, wanted))


def test_mixed_statistics_while_tuning_only():
    x = toy_stream()[0][:2]
    net = seeded_net()
    source = RLCF(net, class_reward, k=5, views=4, selection=1.0, optimizer=FAST, prior=16.0)
    plain = RLCF(net, class_reward, k=5, views=4, selection=1.0, optimizer=FAST)
    still = RLCF(net, class_reward, k=5, views=4, selection=1.0, optimizer=partial(FAST, lr=0.0), prior=16.0)
    assert not torch.allclose(source(x), plain(x))
    seen = []

    def reward(x, index):
        seen.append({layer.alpha for layer in source.model.modules() if isinstance(layer, MixedBatchNorm)})
        return class_reward(x, index)

    source.reward = reward
    source(x[:1])
    assert seen == [{1 / 17}] * 3
    torch.testing.assert_close(still(x), net(x).detach())


def momentum_settings():
    return {"momentum": 0.5, "update_every": 2, "update_weight": 0.5}


def test_the_start_follows_the_slow_average():
    x = toy_stream()[0][:4]
    rlcf = small(views=1, selection=1.0, **momentum_settings())
    source = {n: p.detach().clone() for n, p in rlcf.moving.items()}
    slow = dict(source)
    start = dict(source)
    for i, row in enumerate(x, 1):
        tuned = small(views=1, selection=1.0, momentum=0.0, update_every=1)
        with torch.no_grad():
            for name, parameter in tuned.moving.items():
                parameter.copy_(start[name])
        tuned(row[None])  # without inertia the start is where the input ended
        ended = {n: p.detach().clone() for n, p in tuned.moving.items()}
        rlcf(row[None])
        slow = {n: 0.5 * slow[n] + 0.5 * ended[n] for n in slow}
        if i % 2 == 0:
            start = {n: 0.5 * source[n] + 0.5 * slow[n] for n in slow}
        for name, parameter in rlcf.moving.items():
            torch.testing.assert_close(parameter, start[name])
    assert any(not torch.equal(start[n], source[n]) for n in source)
    rlcf.reset()
    assert all(torch.equal(p, source[n]) for n, p in rlcf.moving.items())
    assert all(torch.equal(p, source[n]) for n, p in rlcf.starts.slow.named().items())
    assert int(rlcf.starts.episodes) == 0


@pytest.mark.parametrize("settings", [{}, {"draw": True, "k": 4, **momentum_settings()}])
def test_saved_in_mid_stream_it_goes_on_bit_by_bit(settings):
    xs = toy_stream(n=3)
    whole = small(**settings)
    expected = [whole(x) for x in xs]
    first, second = small(**settings), small(**settings)
    for x in xs[:2]:
        first(x)
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    second(xs[3])
    second.load_state_dict(saved)
    assert all(torch.equal(second(x), y) for x, y in zip(xs[2:], expected[2:]))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_frozen_changes_nothing_and_the_model_stays_as_it_was():
    net = seeded_net()
    before = deepcopy(net.state_dict())
    rlcf = RLCF(net, class_reward, views=4, selection=0.5, optimizer=FAST, momentum=0.9)
    rlcf(toy_stream()[0][:2])
    state = deepcopy(rlcf.state_dict())
    with rlcf.frozen():
        rlcf(toy_stream()[1][:2])
    assert all(torch.equal(value, rlcf.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_what_breaks_a_step_leaves_the_start():
    calls = []

    def reward(x, index):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return class_reward(x, index)

    rlcf = small(reward)
    with pytest.raises(KeyboardInterrupt):
        rlcf(toy_stream()[0][:1])
    source = seeded_net(norm="group")
    assert all(torch.equal(p, q) for p, q in zip(rlcf.model.parameters(), source.parameters()))


def test_the_judge_is_no_part_of_the_state():
    judge = seeded_net(seed=3)
    reward = ClipScoreReward(judge, torch.eye(5))
    names = set(small(reward).state_dict())
    assert names == set(small().state_dict())


def test_the_passes_are_those_stated():
    forwards, backwards = [], []
    rlcf = RLCF(seeded_net(norm="group"), class_reward)
    rlcf.model.register_forward_hook(lambda _, args, out: forwards.append(len(args[0])))
    rlcf.model.fc.register_full_backward_hook(lambda *args: backwards.append(len(args[2][0])))
    rlcf(toy_stream()[0][:1])
    assert (sum(forwards), sum(backwards)) == (RLCF.forwards, RLCF.backwards)


MODELS = [
    small_clip.transformers_clip,
    small_clip.transformers_siglip,
    pytest.param(small_clip.open_clip_clip, marks=pytest.mark.vision),
    pytest.param(small_clip.open_clip_siglip, marks=pytest.mark.vision),
]


def lifted(features):
    """Features whose cosines are not negative: an untrained judge may find that nothing fits."""
    return F.pad(features, (0, 1), value=1.0)


def tasks(face, judge):
    """Policies, rewards, the paper's settings and an input of the three tasks."""
    tokens, pictures = small_clip.texts(24), small_clip.images(14, seed=5)
    texts = embed(face, face.encode_text, [tokens])
    said = ClipScoreReward(lambda x: lifted(judge.encode_image(x)), lifted(embed(judge, judge.encode_text, [tokens])))
    shown = ClipScoreReward(
        lambda x: lifted(judge.encode_text(x)), lifted(embed(judge, judge.encode_image, [pictures]))
    )
    both = RewardEnsemble([said, said], [0.3, 0.7])
    image = small_clip.images(1, seed=9)
    return {
        "encoder": (ImageQueries(face, texts), both, ENCODER, image),
        "prompt": (PromptedClasses(face, tokens), said, PROMPT, image),
        "image to text": (ImageQueries(face, texts), said, IMAGE_TO_TEXT, image),
        "text to image": (
            TextQueries(face, embed(face, face.encode_image, [pictures])),
            shown,
            TEXT_TO_IMAGE,
            tokens[:1],
        ),
    }


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("task", ["encoder", "prompt", "image to text", "text to image"])
def test_clip_and_siglip_learn_what_the_judge_prefers(make, task):
    """With the paper's settings but the learning rate, the mean score under the policy rises."""
    face, judge = VisionLanguage(make()), VisionLanguage(small_clip.transformers_siglip())
    policy, reward, settings, x = tasks(face, judge)[task]
    with torch.no_grad():
        before = policy(x)
        scores = reward(x, torch.arange(before.shape[1])[None])
    start = deepcopy(policy.state_dict())
    rlcf = RLCF(policy, reward, **{**settings, "optimizer": adamw(3e-2 if task == "prompt" else 1e-3)})
    after = rlcf(x)
    best = before.topk(settings["k"]).indices

    def expected_score(logits):
        return float((logits.gather(1, best).softmax(1) * scores.gather(1, best)).sum())

    assert expected_score(after) > expected_score(before)
    assert int(rlcf.updates) == settings["steps"]
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in start.items())
    with rlcf.frozen():
        torch.testing.assert_close(rlcf(x), before)


def test_the_paper_s_settings():
    table = {"encoder": ENCODER, "prompt": PROMPT, "i2t": IMAGE_TO_TEXT, "t2i": TEXT_TO_IMAGE}
    assert {name: (s["k"], s["steps"], s["views"], s["selection"]) for name, s in table.items()} == {
        "encoder": (3, 3, 64, 0.1),
        "prompt": (3, 3, 64, 0.1),
        "i2t": (20, 8, 1, 1.0),
        "t2i": (12, 8, 1, 1.0),
    }
    assert [s["optimizer"].keywords["lr"] for s in table.values()] == [1e-5, 7e-3, 1e-6, 1e-6]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"selection": 0.2}, r"selection must leave at least one view, int\(4 x 0.2\) leaves none"),
        ({"selection": 0.0}, "selection must lie in"),
        ({"temperature": 0.0}, "temperature must lie in"),
        ({"momentum": 1.1}, "momentum must lie in"),
        ({"prior": 16.0}, "a batch normalisation layer where prior is given, found none"),
        ({"update_every": 0, "momentum": 0.5}, "update_every must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        small(**settings)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 6}, "k must be at most the number of classes, 5, got 6"),
        ({"reward": lambda x, index: index * float("nan")}, "the reward's scores must be finite, found nan at row 0"),
        ({"reward": lambda x, index: x.flatten(1).sum(1)}, r"reward must return scores \(2, 5\), got \(2,\)"),
        ({"reward": ClipScoreReward(lambda x: x[:, 0, 0, :4], torch.eye(4))}, "policy's 5 classes, it knows 4"),
        ({"augment": None, "selection": 0.3}, r"int\(3 x 0.3\) leaves none"),
        ({"augment": lambda x, g: x[:1]}, r"augment must keep the shape \(3, 3, 8, 8\), it gave \(1, 3, 8, 8\)"),
        ({"teacher": lambda x: torch.ones(2, 4)}, r"teacher must return logits \(2, 5\), got \(2, 4\)"),
        ({"reward": lambda x, index: "good"}, "the reward's scores must be"),
    ],
)
def test_what_does_not_fit_is_refused_at_a_call(settings, message):
    x = toy_stream()[0][:2]
    if settings.get("augment", True) is None:
        x = x[:, None].expand(-1, 3, -1, -1, -1)
    rlcf = small(**settings)
    with pytest.raises(InputError, match=message):
        rlcf(x)
    assert all(torch.equal(p, q) for p, q in zip(rlcf.model.parameters(), seeded_net(norm="group").parameters()))


@pytest.mark.bad_input
def test_other_inputs_than_tensors_of_numbers():
    rlcf, x = small(), toy_stream()[0][:2]
    with pytest.raises(InputError, match="x must be a tensor of inputs, got dict"):
        rlcf({"x": x})
    with pytest.raises(InputError, match="x must be finite"):
        rlcf(x * float("nan"))
    with pytest.raises(InputError, match="labels must not be given"):
        rlcf(x, torch.zeros(2))
    with pytest.raises(InputError, match=r"images must be floating point of shape \(n, c, h, w\)"):
        rlcf(x[0])
    assert small()(torch.zeros(1, 3, 8, 8)).isfinite().all()
    with pytest.raises(InputError, match="parameters_of must choose at least one parameter"):
        small(parameters_of=lambda model: {})


def test_the_loss_by_hand():
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    index, weights = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.5, -0.5], [1.0, 0.0]])
    log_probs = logits.log_softmax(1)
    expected = -(0.5 * log_probs[0, 0] - 0.5 * log_probs[0, 2] + log_probs[1, 1]) / 4
    torch.testing.assert_close(policy_gradient_loss(logits, index, weights), expected)
