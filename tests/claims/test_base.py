"""Expectations as data, and the verdicts that follow from them."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trimtab.claims.base import Claim, Expectation, worst
from trimtab.core import stats
from trimtab.core.checks import InputError

EFFECTS = st.lists(st.floats(-10, 10), min_size=1, max_size=8)
BOUND = st.none() | st.floats(-10, 10)


@given(EFFECTS, BOUND, BOUND, st.booleans())
def test_the_verdict_follows_from_the_interval(effects, at_least, at_most, every_seed):
    assume(at_least is not None or at_most is not None)
    assume(at_least is None or at_most is None or at_least <= at_most)
    judged = Expectation("x", at_least, at_most, every_seed=every_seed).judge(effects)
    interval = judged.effect
    assert interval == stats.bootstrap_mean(np.array(effects), seed=0)
    low = -math.inf if at_least is None else at_least
    high = math.inf if at_most is None else at_most
    inside = low <= interval.low and interval.high <= high
    outside = interval.high < low or interval.low > high
    if every_seed and any(not low <= effect <= high for effect in effects):
        assert judged.verdict == "fails"
    else:
        assert judged.verdict == ("holds" if inside else "fails" if outside else "undecided")


@pytest.mark.parametrize(
    ("expectation", "words"),
    [
        (Expectation("a", at_least=0.05, minus="b"), "a - b >= 0.05"),
        (Expectation("a", at_most=-1.0), "a <= -1"),
        (Expectation("a", at_least=0, at_most=2.5, every_seed=True), "0 <= a <= 2.5, every seed"),
    ],
)
def test_an_expectation_in_words(expectation, words):
    assert str(expectation) == words


def test_the_effect_is_a_difference():
    values = {"a": 3.0, "b": 1.0, "c": math.nan}
    assert Expectation("a", at_least=0).effect(values) == 3.0
    assert Expectation("a", at_least=0, minus="b").effect(values) == 2.0
    with pytest.raises(InputError, match="run must return a finite 'c', got nan"):
        Expectation("a", at_least=0, minus="c").effect(values)
    with pytest.raises(InputError, match="run must return a finite 'd', got nothing"):
        Expectation("d", at_least=0).effect(values)


BETWEEN = (Expectation("x", at_least=1.0), Expectation("x", at_most=5.0))


def claim(seeds=(100, 101, 102), expectations=BETWEEN):
    return Claim("00-none", "x lies between one and five", lambda seed: {"x": 2.0}, expectations, seeds)


def test_a_claim_judges_every_expectation():
    judged = claim().judge({seed: {"x": x} for seed, x in {100: 2.0, 101: 3.0, 102: 2.5}.items()})
    assert [j.verdict for j in judged] == ["holds", "holds"]
    judged = claim().judge({seed: {"x": 0.5} for seed in (100, 101, 102)})
    assert [j.verdict for j in judged] == ["fails", "holds"]


def test_one_seed_of_several_decides_nothing_but_an_only_seed_does():
    assert [j.verdict for j in claim().judge({100: {"x": 2.0}})] == ["undecided", "undecided"]
    assert [j.verdict for j in claim(seeds=(100,)).judge({100: {"x": 2.0}})] == ["holds", "holds"]


def test_the_weakest_expectation_decides():
    assert worst(["holds", "holds"]) == "holds"
    assert worst(["holds", "fails", "undecided"]) == "fails"


def test_what_makes_no_claim():
    with pytest.raises(InputError, match="must have at_least or at_most, got neither"):
        Expectation("x")
    with pytest.raises(InputError, match="at_least must not exceed at_most"):
        Expectation("x", at_least=2.0, at_most=1.0)
    with pytest.raises(InputError, match="claim 00-none must have at least one expectation"):
        claim(expectations=())
    for seeds in ((), (1, 1)):
        with pytest.raises(InputError, match="claim 00-none must have distinct seeds"):
            claim(seeds=seeds)
