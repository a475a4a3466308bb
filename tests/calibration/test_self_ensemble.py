"""Method 20-icl-self-ensembling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.calibration import SelfEnsemble, batch_calibration, self_ensemble
from trimtab.core.checks import InputError

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "20-icl-self-ensembling").glob("*.npz"))
STRATEGIES = {"mean_prob": "mean", "max_prob": "max", "majority_vote": "majority", "majority_vote_count": "count"}
every = pytest.mark.parametrize("strategy", STRATEGIES.values())


def voters(seed, v=4, n=6, c=3, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(v, n, c, generator=generator, dtype=torch.float64)).softmax(-1)


@pytest.mark.golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    checked = 0
    with np.load(path) as arrays:
        for name, strategy in STRATEGIES.items():
            probs, predicted = self_ensemble(arrays["probs"], strategy)
            if f"{name}/pred" in arrays:
                np.testing.assert_array_equal(predicted, arrays[f"{name}/pred"])
                checked += 1
            if f"{name}/probs" in arrays:
                np.testing.assert_allclose(probs, arrays[f"{name}/probs"], atol=1e-12, rtol=0)
                checked += 1
        if "bn_in" in arrays:
            np.testing.assert_allclose(batch_calibration(arrays["bn_in"]), arrays["bn_out"], atol=1e-6, rtol=0)
            checked += 1
    assert checked


def as_the_authors(probs, strategy):
    """Their `Voters`, sample by sample, on class indices."""
    merged, predicted = [], []
    for p in probs.transpose(1, 0, 2):
        choice, kept = p.argmax(1), np.arange(len(p))
        if strategy == "mean":
            best = np.mean(p, axis=0).argmax()
        else:
            agreement = np.where(choice[:, None] == choice, p.max(1), 0.0).sum(-1)
            kept = (agreement == agreement.max()).nonzero()[0]
            best = choice[kept[0]]
        merged.append(np.mean(p[kept], axis=0))
        predicted.append(best)
    return np.array(merged), np.array(predicted)


@pytest.mark.parametrize("strategy", ["mean", "majority"])
@pytest.mark.parametrize("v", [3, 6, 8, 12, 20])
def test_ties_of_decimals_are_the_authors_to_the_last_bit(strategy, v):
    random = np.random.default_rng(v)
    probs = np.stack([random.multinomial(10, random.dirichlet(np.ones(5)), 2000) for _ in range(v)]) / 10
    merged, predicted = self_ensemble(probs, strategy)
    expected, classes = as_the_authors(probs, strategy)
    np.testing.assert_array_equal(predicted, classes)
    np.testing.assert_allclose(merged, expected, atol=1e-12, rtol=0)


def test_there_are_golden_files():
    assert GOLDEN


@every
@given(seed=st.integers(0, 10**6), v=st.integers(1, 6), c=st.integers(2, 5))
def test_what_comes_out_is_a_distribution_and_between_the_voters(strategy, seed, v, c):
    probs = voters(seed, v, c=c)
    merged, predicted = self_ensemble(probs, strategy)
    torch.testing.assert_close(merged.sum(1), torch.ones(6, dtype=torch.float64))
    assert torch.equal(predicted, merged.argmax(1))
    assert (merged <= probs.amax(0) + 1e-12).all()
    if strategy != "max":
        assert (merged >= probs.amin(0) - 1e-12).all()


@every
@given(seed=st.integers(0, 10**6))
def test_order_of_voters_and_of_classes_does_not_matter(strategy, seed):
    probs = voters(seed, v=5)
    shuffle = torch.Generator().manual_seed(seed)
    by_voter, by_class = torch.randperm(5, generator=shuffle), torch.randperm(3, generator=shuffle)
    merged, predicted = self_ensemble(probs, strategy)
    again, same = self_ensemble(probs[by_voter][:, :, by_class], strategy)
    if strategy != "count":  # counts tie, and then the order decides
        torch.testing.assert_close(again, merged[:, by_class])
        assert torch.equal(by_class[same], predicted)


@every
@given(seed=st.integers(0, 10**6))
def test_identical_voters_change_nothing(strategy, seed):
    one = voters(seed, v=1)
    merged, predicted = self_ensemble(one.expand(7, -1, -1), strategy)
    torch.testing.assert_close(merged, one[0])
    assert torch.equal(predicted, one[0].argmax(1))


@every
@given(seed=st.integers(0, 10**6))
def test_a_weight_counts_as_so_many_copies(strategy, seed):
    probs = voters(seed)
    weights = torch.tensor([2.0, 0.0, 1.0, 3.0])
    weighted = self_ensemble(probs, strategy, weights=weights)
    copied = self_ensemble(probs.repeat_interleave(weights.long(), 0), strategy)
    torch.testing.assert_close(weighted[0], copied[0])
    assert torch.equal(weighted[1], copied[1])


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_container_and_precision_stay(strategy, dtype):
    probs = voters(0).to(dtype)
    merged, predicted = self_ensemble(probs, strategy)
    assert (merged.dtype, predicted.dtype) == (dtype, torch.int64)
    array, classes = self_ensemble(probs.numpy(), strategy)
    np.testing.assert_array_equal(array, merged.numpy())
    np.testing.assert_array_equal(classes, predicted.numpy())


@every
def test_an_underflowed_class_stays(strategy):
    probs = torch.tensor([[[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]])
    merged, predicted = self_ensemble(probs, strategy)
    assert merged.tolist() == [[1.0, 0.0, 0.0]]
    assert predicted.tolist() == [0]


def test_ties_are_decided_as_the_authors_do():
    split = torch.tensor([[[0.3, 0.7]], [[0.7, 0.3]]], dtype=torch.float64)
    for strategy in ("mean", "max"):
        assert self_ensemble(split, strategy)[1].tolist() == [0]  # the first class
    merged, predicted = self_ensemble(split, "majority")
    assert predicted.tolist() == [1]  # the first voter's
    torch.testing.assert_close(merged, torch.full((1, 2), 0.5, dtype=torch.float64))
    merged, predicted = self_ensemble(split, "count")
    assert predicted.tolist() == [1]
    torch.testing.assert_close(merged, split[0])


def test_confidence_can_outvote_numbers():
    probs = torch.tensor([[[0.99, 0.01, 0.0]], [[0.3, 0.36, 0.34]], [[0.3, 0.36, 0.34]]])
    assert self_ensemble(probs, "majority")[1].tolist() == [0]
    assert self_ensemble(probs, "count")[1].tolist() == [1]


@every
@pytest.mark.parametrize("as_numpy", [False, True])
def test_the_wrapper_asks_once_a_variation_and_merges_alike(strategy, as_numpy):
    probs = voters(3, v=5)
    asked = []

    def classifier(inputs, variation):
        asked.append(variation)
        return probs[variation, inputs].numpy() if as_numpy else probs[variation, inputs]

    merged, predicted = SelfEnsemble(classifier, range(5), strategy, weights=[1, 2, 1, 0, 1])(torch.tensor([4, 2]))
    expected = self_ensemble(probs[:, [4, 2]], strategy, weights=[1, 2, 1, 0, 1])
    assert asked == [0, 1, 2, 3, 4]
    assert isinstance(merged, np.ndarray) == as_numpy
    np.testing.assert_allclose(np.asarray(merged), expected[0].numpy(), atol=1e-12)
    np.testing.assert_array_equal(np.asarray(predicted), expected[1].numpy())


@pytest.mark.parametrize(("strategy", "most"), [("mean", 2), ("max", 2), ("majority", 30)])
def test_mean_and_max_do_not_hold_all_voters(strategy, most):
    import weakref

    alive, peak = weakref.WeakSet(), 0

    def classifier(inputs, variation):
        nonlocal peak
        answer = voters(variation, v=1)[0]
        alive.add(answer)
        peak = max(peak, len(alive))
        return answer

    SelfEnsemble(classifier, range(30), strategy)(None)
    assert peak <= most + 2


def test_batch_calibration_forgets_the_preference_for_a_word():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = logits * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.tensor([5.0, 0.0, -5.0, 0.0])
    torch.testing.assert_close(batch_calibration(shifted), batch_calibration(logits))
    torch.testing.assert_close(
        batch_calibration(logits + 3.0 * torch.arange(4), demean_only=True), (logits - logits.mean(0)).softmax(1)
    )


def test_batch_calibration_of_a_constant_class():
    out = batch_calibration(torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]).softmax(1))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.zeros(0, 3, 2), r"v >= 1 voters, got \(0, 3, 2\)"),
        (torch.zeros(3, 2), r"shape \(v, n, c\)"),
        (torch.full((2, 3, 2), float("nan")), r"probs\[0\] must be finite"),
        (torch.tensor([[[0.5, 0.5]], [[1.5, -0.5]]]), r"probs\[1\] must lie in \[0, 1\], found"),
        (torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]), r"probs\[0\] must sum to one .*, row 1 sums to 0"),
        (torch.ones(2, 3, 1), "at least 2 columns"),
    ],
)
def test_bad_probabilities_are_refused(probs, message):
    with pytest.raises(InputError, match=message):
        self_ensemble(probs)


@pytest.mark.bad_input
def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="strategy must be one of mean, max, majority, count, got 'median'"):
        self_ensemble(voters(0), "median")
    with pytest.raises(InputError, match=r"weights must have shape \(4,\)"):
        self_ensemble(voters(0), weights=[1.0])
    with pytest.raises(InputError, match="weights must not be all zero"):
        self_ensemble(voters(0), weights=[0.0] * 4)
    with pytest.raises(InputError, match="at least one variation"):
        SelfEnsemble(lambda inputs, variation: inputs, [])
    with pytest.raises(InputError, match=r"probs\[1\] must have shape \(6, 2\) like probs\[0\], got \(6, 3\)"):
        SelfEnsemble(lambda inputs, c: voters(0, c=c)[0], [2, 3])(None)
    with pytest.raises(InputError, match="at least two rows"):
        batch_calibration(torch.zeros(1, 2))
