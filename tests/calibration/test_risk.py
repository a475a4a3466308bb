"""Method 51-pareto-self-supervision: what surrounds the risk score (its golden numbers are in test_pareto.py)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.calibration import apply_sources, choose_examples, error_calibration, reask
from trimtab.core.checks import InputError


def test_sources_are_plain_functions():
    def by_length(text):
        return np.int64(1) if len(text) > 3 else None

    labels = apply_sources([by_length, lambda text: 0 if "a" in text else -1], iter(["a", "long", "brim"]))
    assert labels.tolist() == [[-1, 0], [1, -1], [1, -1]]
    assert labels.dtype == np.int64


@given(seed=st.integers(0, 10**6), n=st.integers(1, 300))
def test_what_holds_for_every_score(seed, n):
    random = np.random.default_rng(seed)
    risk, wrong = random.random(n) + 1e-7, random.random(n) < 0.3
    risk = np.minimum(risk, 1)
    truth = error_calibration(risk, wrong)
    assert 0 <= truth.ece <= 1
    assert np.isnan(truth.r2) or 0 <= truth.r2 <= 1 + 1e-12
    assert truth.bin_counts.sum() == n
    assert truth.bin_error @ truth.bin_counts == pytest.approx(wrong.sum())
    assert (np.diff(risk[truth.order]) <= 0).all()
    tensors = error_calibration(torch.from_numpy(risk), torch.from_numpy(wrong))
    assert tensors.ece == truth.ece
    same = error_calibration(risk, wrong.astype(np.int64))
    np.testing.assert_array_equal(same.bin_error, truth.bin_error)


def test_true_risks_are_found_true_and_false_ones_false():
    random = np.random.default_rng(0)
    risk = random.random(50_000)
    wrong = random.random(50_000) < risk
    assert error_calibration(risk, wrong).ece < 0.01
    assert error_calibration(risk, wrong).r2 > 0.98
    assert error_calibration(risk, random.random(50_000) < 0.5).ece > 0.2
    assert error_calibration(risk, random.random(50_000) < 0.5).r2 < 0.1


def test_answers_without_risk_are_left_out():
    truth = error_calibration(np.array([0.0, 0.8, 0.0, 0.6]), np.array([1, 1, 1, 0]))
    assert truth.order.tolist() == [1, 3]
    assert truth.bin_counts.sum() == 2


def test_examples_are_hard_and_confirmed_of_every_class():
    risk = np.linspace(0.01, 0.99, 99)
    predicted = np.arange(99) % 3
    examples = choose_examples(predicted, risk, 4)
    for c in range(3):
        for chosen in (examples.hard[c], examples.confirmed[c]):
            assert len(set(chosen)) == 4
            assert (predicted[chosen] == c).all()
        assert risk[examples.hard[c]].min() > 0.75
        assert risk[examples.confirmed[c]].max() < 0.25
    assert [c.tolist() for c in choose_examples(predicted, risk, 4).hard] == [c.tolist() for c in examples.hard]
    assert [len(c) for c in choose_examples(predicted, risk, 50).hard] == [33, 33, 33]


def test_examples_are_drawn_in_proportion():
    risk, counts = np.array([0.2, 0.3, 0.4]), np.zeros(3)
    for seed in range(3000):
        counts[choose_examples(np.zeros(3, np.int64), risk, 1, temperature=0.1, seed=seed).hard[0]] += 1
    expected = np.exp(risk / 0.1)
    np.testing.assert_allclose(counts / 3000, expected / expected.sum(), atol=0.03)


def test_only_what_is_risky_is_asked_again_riskiest_first():
    questions = []

    def ask(question):
        questions.append(question)
        return 2

    answers, risk = np.array([0, 1, -1, 1]), np.array([0.6, 0.5, 0.0, 0.9])
    labels = np.array([[0, -1], [1, 1], [1, 1], [-1, 0]])
    new = reask("abcd", answers, risk, ask, weak_labels=labels, names=["rule", "model"])
    assert new.answers.tolist() == [2, 1, -1, 2]
    assert new.asked.tolist() == [3, 0]
    assert [(q.index, q.input, q.answer, q.risk, q.votes) for q in questions] == [
        (3, "d", 1, 0.9, {"model": 0}),
        (0, "a", 0, 0.6, {"rule": 0}),
    ]
    assert answers.tolist() == [0, 1, -1, 1]
    assert reask("abcd", torch.tensor(answers), torch.tensor(risk), ask, threshold=0.95).asked.size == 0
    assert questions[-1].votes == {"rule": 0}
    assert reask("abcd", answers, risk, lambda q: q.votes["1"], weak_labels=labels, threshold=0.8).answers[3] == 0


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(InputError, match="the answer of source 1 to input 0 must be an integer, got str"):
        apply_sources([lambda x: 0, lambda x: "spam"], ["a"])
    with pytest.raises(InputError, match="the answer of source 0 to input 0 must be at least -1"):
        apply_sources([lambda x: -2], ["a"])
    for sources, inputs in (([], ["a"]), ([len], [])):
        with pytest.raises(InputError, match="at least one each"):
            apply_sources(sources, inputs)
    risk = np.array([0.1, 0.2])
    with pytest.raises(InputError, match=r"risk must lie in \[0, 1\], found nan at row 1"):
        error_calibration(np.array([0.1, np.nan]), np.array([0, 1]))
    with pytest.raises(InputError, match="risk must be n >= 1 floating-point numbers"):
        error_calibration(np.array([0, 1]), np.array([0, 1]))
    with pytest.raises(InputError, match="wrong must have 2 entries"):
        error_calibration(risk, np.array([0]))
    with pytest.raises(InputError, match=r"wrong must lie in 0..1"):
        error_calibration(risk, np.array([0, 2]))
    with pytest.raises(InputError, match="zero for every answer"):
        error_calibration(risk * 0, np.array([0, 1]))
    with pytest.raises(InputError, match="k must be at least 1"):
        choose_examples(np.array([0, 1]), risk, 0)
    with pytest.raises(InputError, match="temperature must lie in"):
        choose_examples(np.array([0, 1]), risk, 1, temperature=0.0)
    answers = np.array([0, 1])
    with pytest.raises(InputError, match="inputs must have 2 entries as risk, got 1"):
        reask(["a"], answers, risk, lambda q: 0)
    with pytest.raises(InputError, match="answers must be integer classes or -1"):
        reask(["a", "b"], np.array([0, -2]), risk, lambda q: 0)
    with pytest.raises(InputError, match="names must have 3 entries, one a source, got 1"):
        reask(["a", "b"], answers, risk, lambda q: 0, weak_labels=np.zeros((2, 3), np.int64), names=["rule"])
    with pytest.raises(InputError, match="the new answer to input 1 must be an integer, got str"):
        reask(["a", "b"], answers, risk, lambda q: "spam", threshold=0.15)
