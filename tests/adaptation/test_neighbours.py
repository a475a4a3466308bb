import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from toynet import golden_files

from trimtab.adaptation import neighbours
from trimtab.adaptation.neighbours import NonParametricClassifier, NonParametricLoss, vote
from trimtab.core.checks import InputError


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("50-adanpc", "temps"))
def test_the_authors_training(path):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    size, d = arrays["memory0"].shape
    loss = NonParametricLoss(d, int(arrays["num_classes"]), size=size, k=int(arrays["k"])).to(arrays["x"].dtype)
    loss.load_state_dict({**loss.state_dict(), "memory": arrays["memory0"], "labels": arrays["labels0"]})
    for x, y, expected, gradient, temperature in zip(*(arrays[n] for n in ("x", "y", "losses", "grads", "temps"))):
        assert loss.temperature == pytest.approx(float(temperature), abs=1e-12)
        features = x.clone().requires_grad_()
        value = loss(features, y)
        value.backward()
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(features.grad, gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss.memory, arrays["final_memory"], rtol=0, atol=1e-10)
    assert torch.equal(loss.labels, arrays["final_labels"])
    assert int(loss.index) == int(arrays["final_index"])


def drawn(seed, n, m, d, classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features, memory = (torch.randn(size, d, generator=generator, dtype=dtype) for size in (n, m))
    return features, memory, torch.randint(classes, (m,), generator=generator)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 25), st.booleans(), st.integers(0, 10**6))
def test_the_vote_is_that_of_a_loop_whatever_the_blocks(n, m, k, ball, seed):
    features, memory, labels = drawn(seed, n, m, 3, 4)
    memory = torch.nn.functional.normalize(memory, dim=1)
    eps_ball = 0.2 if ball else None
    cosine = torch.cosine_similarity(features[:, None], memory, dim=2)
    open_ball = ball and bool((cosine.amax(1) > 0.2).all())
    expected = torch.zeros(n, 4, dtype=torch.float64)
    for row, similarity in enumerate(cosine):
        order = similarity.argsort(descending=True)
        chosen = order[similarity[order] >= 0.2] if open_ball else order[:k]
        weights = (similarity[chosen] / 0.1).softmax(0)
        for place, weight in zip(chosen, weights):
            expected[row, labels[place]] += weight
    whole = neighbours._BLOCK
    for block in (whole, 1, 3 * n, 7 * n):
        neighbours._BLOCK = block
        try:
            found = vote(features, memory, labels, 4, k=k, temperature=0.1, eps_ball=eps_ball)
        finally:
            neighbours._BLOCK = whole
        torch.testing.assert_close(found, (expected + 1e-5).clamp(max=1))


@pytest.mark.parametrize("eps_ball", [None, 0.1])
def test_gradients_flow_through_the_vote(eps_ball):
    features, memory, labels = drawn(0, 4, 30, 3, 3)

    def voted(x):
        return vote(x, torch.nn.functional.normalize(memory, dim=1), labels, 3, k=5, temperature=0.3, eps_ball=eps_ball)

    assert torch.autograd.gradcheck(voted, features.requires_grad_())


def test_neighbours_are_told_apart_in_mixed_precision_too():
    features, memory, labels = drawn(0, 6, 40, 3, 4, torch.float32)
    expected = vote(features, memory, labels, 4, k=3, temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vote(features, memory, labels, 4, k=3, temperature=0.01), expected)
        trained = NonParametricLoss(3, 4)(features.bfloat16().requires_grad_(), labels[:6])
    assert trained.dtype == torch.float32
    trained.backward()


def test_equal_rows_split_the_vote():
    classifier = NonParametricClassifier(2, k=2).fit(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(classifier.predict_proba(torch.tensor([[0.3, 0.0]])), torch.tensor([[0.5, 0.5]]))
    assert classifier.predict_proba(torch.zeros(1, 2)).isfinite().all()


def fitted(**settings):
    features, _, labels = drawn(1, 12, 12, 3, 3, torch.float32)
    return NonParametricClassifier(3, **{"k": 4, **settings}).fit(features, labels)


def test_a_batch_is_predicted_before_it_joins():
    classifier = fitted()
    x = drawn(2, 5, 1, 3, 3, torch.float32)[0]
    expected = classifier.predict_proba(x)
    assert torch.equal(classifier.adapt(x), expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(5))
    assert torch.equal(classifier.labels[12:], expected.argmax(1))
    torch.testing.assert_close(classifier.memory[12:], torch.nn.functional.normalize(x, dim=1))
    assert len(classifier.reset().labels) == 12


@pytest.mark.parametrize("confidence", ["double_softmax", "prob"])
def test_only_the_sure_join(confidence):
    x = drawn(2, 40, 1, 3, 3, torch.float32)[0]
    votes = fitted()(x)
    sure = votes.softmax(1).amax(1) if confidence == "double_softmax" else votes.amax(1)
    beta = float(sure.median())
    classifier = fitted(beta=beta, confidence=confidence)
    classifier.adapt(x)
    assert len(classifier.labels) - 12 == int((sure >= beta).sum())
    assert 12 < len(classifier.labels) < 52


def test_a_threshold_that_nothing_can_reach_is_told():
    most = math.e / (math.e + 2)
    with pytest.warns(RuntimeWarning, match=r"beta 0\.75 lies above 0\.576, the largest confidence that 3 classes"):
        classifier = fitted(beta=0.75)
    classifier.adapt(100 * classifier.memory)
    assert len(classifier.labels) == 12
    fitted(beta=most - 1e-6).adapt(classifier.memory)
    fitted(beta=1.0, confidence="prob")
    with pytest.warns(RuntimeWarning, match="largest confidence"):
        fitted(beta=1.1, confidence="prob")


def test_the_oldest_of_the_stream_go_first_and_the_source_stays():
    bounded, free = fitted(beta=0.0, max_size=17), fitted(beta=0.0)
    for seed, n in enumerate((3, 4, 1, 9, 2)):
        x = drawn(seed, n, 1, 3, 3, torch.float32)[0]
        free.learn(x, bounded.adapt(x))
        tail = len(bounded.labels) - 12
        assert tail == min(5, len(free.labels) - 12)
        for name in ("memory", "labels"):
            kept, everything = getattr(bounded, name), getattr(free, name)
            assert torch.equal(kept[:12], everything[:12])
            assert torch.equal(kept[12:], everything[len(everything) - tail :])
    assert torch.equal(fitted(beta=0.0, max_size=12).reset().memory, bounded.reset().memory)


def test_a_grown_memory_is_saved_and_restored():
    classifier = fitted()
    x = drawn(2, 5, 1, 3, 3, torch.float32)[0]
    classifier.adapt(x)
    other = NonParametricClassifier(3, k=4)
    other.load_state_dict(load(save(classifier.state_dict())))
    assert torch.equal(other.predict_proba(x), classifier.predict_proba(x))
    assert torch.equal(other.reset().memory, classifier.reset().memory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype):
    features, _, labels = drawn(1, 12, 12, 3, 3, dtype)
    classifier = NonParametricClassifier(3, k=4).fit(features, labels)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert classifier.memory.dtype == classifier.adapt(features).dtype == expected


def test_training_finds_the_directions_that_tell_classes_apart():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    noise = torch.randn(300, 8, generator=generator)
    x = torch.cat((torch.eye(3)[labels] + 0.3 * noise[:, :3], 2 * noise[:, 3:]), 1)
    w = torch.randn(8, 4, generator=generator).requires_grad_()
    loss = NonParametricLoss(4, 3, size=100, k=20, steps=30, temperatures=(1.0, 0.2))
    optimizer = torch.optim.Adam([w], lr=0.05)
    values = []
    for i in range(60):
        rows = torch.arange(i * 30, i * 30 + 30) % 300
        value = loss(x[rows] @ w, labels[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert sum(values[-10:]) < 0.6 * sum(values[5:15])
    assert loss.temperature == pytest.approx(0.2)


def test_the_queue_takes_the_last_of_a_large_batch_and_nothing_in_eval_mode():
    loss = NonParametricLoss(3, 3, size=8, k=2)
    x, _, _ = drawn(0, 21, 1, 3, 3, torch.float32)
    y = torch.arange(21) % 3
    before = loss.memory
    loss.eval()(x, y)
    assert loss.memory is before
    loss.train()(x, y)
    assert int(loss.index) == 21 % 8
    places = torch.arange(13, 21) % 8
    torch.testing.assert_close(loss.memory[places], torch.nn.functional.normalize(x[13:], dim=1))
    assert torch.equal(loss.labels[places], y[13:])
    other = NonParametricLoss(3, 3, size=8, k=2, generator=torch.Generator().manual_seed(5))
    other.load_state_dict(loss.state_dict())
    assert float(other(x, y)) == float(loss(x, y))
    assert other.temperature == loss.temperature < 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NonParametricClassifier(1), "classes must be at least 2"),
        (lambda: fitted(k=0), "k must be at least 1"),
        (lambda: fitted(temperature=0.0), "temperature must lie in"),
        (lambda: fitted(beta=-0.1), "beta must lie in"),
        (lambda: fitted(eps_ball=1.1), "eps_ball must lie in"),
        (lambda: fitted(confidence="entropy"), "confidence must be one of"),
        (lambda: fitted(max_size=11), "max_size must be at least 12, the rows of the source, got 11"),
        (lambda: fitted().fit(torch.zeros(3, 2), torch.tensor([0, 1, 3])), "labels must lie in 0..2, found 3 at row 2"),
        (lambda: fitted().fit(torch.full((1, 2), float("nan")), torch.tensor([0])), "features must be finite"),
        (lambda: fitted().adapt(torch.full((1, 3), float("inf"))), "features must be finite"),
        (lambda: fitted().adapt(torch.zeros(1, 4)), "features must have 3 columns, got 4"),
        (lambda: NonParametricClassifier(3).predict_proba(torch.zeros(1, 4)), "memory is empty"),
        (lambda: NonParametricLoss(3, 3, temperatures=(1.0, 0.0)), r"temperatures\[1\] must lie in"),
        (lambda: NonParametricLoss(3, 3)(torch.zeros(2, 3), torch.tensor([0, 3])), "labels must lie in 0..2"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
