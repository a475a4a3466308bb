import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.calibration import SDM, SDMLoss, adaptor, load, rescaling, sdm_activation
from trimtab.calibration.empirical import ByClass
from trimtab.core.checks import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "64-sdm"
QUICK = {"alpha": 0.9, "dimension": 8, "rounds": 2, "epochs": 8, "lr": 0.02, "rescaler_epochs": 8, "rescaler_lr": 0.01}


def files(array):
    found = [path for path in sorted(GOLDEN.glob("*.npz")) if array in np.load(path).files]
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def blobs(n=240, c=3, d=5, seed=0, gap=4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % c
    centres = gap * torch.randn(c, d, generator=generator, dtype=dtype)
    return centres[labels] + torch.randn(n, d, generator=generator, dtype=dtype), labels


@pytest.fixture(scope="module")
def fitted():
    features, labels = blobs()
    return SDM(**QUICK).fit(torch.zeros(240, 3), labels, features=features), features, labels


@pytest.mark.golden
@files("logp_base_q")
def test_the_authors_activation(path):
    arrays = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    z, q, d = arrays["z"].requires_grad_(), arrays["q"][:, 0], arrays["d"][:, 0]
    assert bool((arrays["d"] == d[:, None]).all())
    close = {"atol": 1e-4, "rtol": 1e-4} if z.dtype == torch.float32 else {"atol": 1e-9, "rtol": 1e-7}
    log_p = sdm_activation(z, q, d, log=True)
    torch.testing.assert_close(log_p.detach(), arrays["logp_base_q"], **close)
    torch.testing.assert_close(sdm_activation(z.detach(), q, d), arrays["p"], **close)
    torch.testing.assert_close(sdm_activation(z.detach(), q), arrays["p_no_distance"], **close)
    torch.testing.assert_close((2 + q[:, None]) ** log_p.detach(), arrays["p_from_log"], **close)
    loss = SDMLoss()(z, arrays["labels"], q, d)
    torch.testing.assert_close(loss.detach(), arrays["nll"], **close)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], arrays["grad_z"], **close)


def assembled(arrays):
    """The state that follows from the authors' trained weights, and the spread of their made-up three rounds."""
    t = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    c = len(t["w/fc.bias"])
    weights = adaptor.Adaptor(
        t["norm_mean"],
        t["norm_std"],
        *(t[f"w/{name}"].double() for name in ("conv.weight", "conv.bias", "fc.weight", "fc.bias")),
    )
    weights = weights._replace(embedding=weights.embedding[:, 0])
    train, held = t["xtr"].double(), t["xca"].double()
    support = adaptor.Support.of(weights, train, t["ytr"])
    fit = adaptor.against_support(weights, support, held, t["yca"])
    rescaler = t["w/model_rescaler.weight"].double()
    output = rescaling.rescaled(rescaler, fit.quantiles, fit.similarity)
    region = rescaling.region(output, fit.similarity, fit.predicted, t["yca"], float(t["alpha"]))
    rounds = [
        region._replace(similarity=region.similarity + more, magnitudes=region.magnitudes + shift)
        for more, shift in ((0, 0), (0.01, 2e-6), (0.02, -1e-6))
    ]
    sdm = SDM(alpha=float(t["alpha"]))
    sdm._keep(fit, rescaler, rounds, 0)
    sdm._store(train, counts=torch.bincount(t["yca"], minlength=c).double())
    return t, weights, fit, region, rounds, sdm


@pytest.mark.golden
@files("cal_softq")
def test_the_authors_training_statistics(path):
    with np.load(path) as arrays:
        t, weights, fit, region, rounds, sdm = assembled(arrays)
    c = len(t["w/fc.bias"])
    close = {"atol": 1e-4, "rtol": 1e-4, "check_dtype": False}
    train = t["xtr"].double()
    torch.testing.assert_close(train.mean(), t["norm_mean"], **close)
    torch.testing.assert_close(train.std(), t["norm_std"], **close)
    torch.testing.assert_close(weights.exemplars(train), t["exemplars_train"], **close)
    assert torch.equal(weights.scores(train).argmax(1), t["train_pred"])
    assert torch.equal(fit.predicted, t["cal_pred"])
    torch.testing.assert_close(fit.quantiles, t["cal_quantiles"], **close)
    torch.testing.assert_close(fit.similarity[:, None], t["cal_softq"], **close)
    assert torch.equal(region.outside.long(), t["cal_ood"])
    torch.testing.assert_close(region.thresholds, t["thresholds"], **close)
    torch.testing.assert_close(torch.tensor(region.similarity), t["min_valid_qbin"], **close)
    similarity = sdm._sample("similarity")
    for k in range(c):
        torch.testing.assert_close(fit.distances.of_class(k), t[f"dcdf/{k}"], **close)
        torch.testing.assert_close(fit.outputs.of_class(k), t[f"outcdf/{k}"], **close)
        torch.testing.assert_close(similarity.of_class(k), t[f"qcum/{k}"], **close)
        torch.testing.assert_close(region.magnitudes[k], t[f"mag/{k}"], equal_nan=True, **close)
        torch.testing.assert_close(sdm.offsets[k], t[f"offset/{k}"].nan_to_num(0), atol=1e-8, rtol=1e-4)
    start = region.similarity if math.isfinite(region.similarity) else 3.0
    magnitudes = torch.stack([r.magnitudes for r in rounds])
    bounded, _ = rescaling.bounds([start, start + 0.01, start + 0.02], start, magnitudes, sdm.alpha)
    assert bounded == pytest.approx(float(t["min_valid_qbin_bounded"]), abs=1e-4)


@pytest.mark.golden
@files("test/original_q")
def test_the_authors_estimator(path):
    with np.load(path) as arrays:
        t, *_, sdm = assembled(arrays)
    found = sdm.verify(t["xte"].double())
    close = {"atol": 1e-4, "rtol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(found.q, t["test/original_q"], **close)
    torch.testing.assert_close(found.distance, t["test/d0"], **close)
    torch.testing.assert_close(found.scores, t["test/f"], **close)
    assert torch.equal(found.predicted, t["test/prediction"])
    torch.testing.assert_close(found.d[:, None].expand_as(t["test/f"]), t["test/distance_quantiles"], **close)
    # their calibration part's similarity is rounded to single precision, a test point's is not: where both are equal,
    # chance decides which is smaller. With their sizes everything follows.
    sizes = t["test/cumulative_effective_sample_sizes"].long()
    assert int((found.sizes - sizes).abs().max()) <= 1
    agree = (found.sizes == sizes).all(1)
    assert int(agree.sum()) > len(sizes) / 2
    lower, upper = sdm._ends(sdm._evidence(t["xte"].double()), sizes)
    checks = [("centroid", found.centroid, slice(None)), ("lower", lower, slice(None)), ("upper", upper, slice(None))]
    for name, estimate, rows in [*checks, ("lower", found.lower, agree), ("upper", found.upper, agree)]:
        expected = t[f"test/rescaled_prediction_conditional_distribution__{name}"]
        torch.testing.assert_close(estimate.probs[rows], expected[rows], **close)
        torch.testing.assert_close(estimate.similarity[rows, None], t[f"test/soft_qbin__{name}"][rows], **close)
        taken = sdm.offsets[found.predicted, estimate.similarity.long()]
        torch.testing.assert_close(taken[rows], t[f"test/iterated_lower_offset__{name}"][rows], **close)
        assert torch.equal(estimate.admitted[rows], t[f"test/is_valid_index_conditional__{name}"][rows])


def test_state_survives_the_disk_exactly(fitted, tmp_path):
    sdm, features, _ = fitted
    sdm.save(tmp_path / "sdm.safetensors")
    again = load(tmp_path / "sdm.safetensors")
    assert isinstance(again, SDM)
    assert again.extra_repr() == sdm.extra_repr()
    for name, value in sdm.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for mine, theirs in zip(sdm.verify(features), again.verify(features)):
        pairs = zip(mine, theirs) if isinstance(mine, tuple) else [(mine, theirs)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_contract_of_a_calibrator(fitted):
    sdm, features, labels = fitted
    logits = torch.zeros(240, 3)
    log_probs = sdm(logits, features=features)
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(240))
    probs = sdm.predict_proba(logits.numpy(), features=features.numpy())
    assert isinstance(probs, np.ndarray)
    assert float((probs.argmax(1) == labels.numpy()).mean()) > 0.9
    same = SDM(**QUICK).fit(logits, labels, features=features)
    assert all(torch.equal(a, b) for a, b in zip(sdm.state_dict().values(), same.state_dict().values()))
    other = SDM(**QUICK, seed=1).fit(logits, labels, features=features)
    assert not torch.equal(other.head, sdm.head)
    single = SDM(**QUICK).fit(logits, labels, features=features.float())
    assert bool(single.verify(features.float()).lower.probs.isfinite().all())


def test_what_verification_promises(fitted):
    sdm, features, labels = fitted
    seen = sdm.verify(features.numpy())
    admitted = sdm.admit(features)
    assert torch.equal(seen.admitted, admitted)
    assert float(admitted.double().mean()) > 0.2
    assert bool((seen.predicted == labels)[admitted].all())
    assert torch.equal(seen.probability, seen.lower.probs[torch.arange(240), seen.predicted])
    assert bool((seen.lower.similarity <= seen.centroid.similarity).all())
    assert bool((seen.probability[admitted] >= sdm.thresholds[seen.predicted][admitted]).all())
    assert bool((seen.lower.similarity[admitted] >= sdm.bounded_similarity).all())
    assert not bool(sdm.admit(features + 1e300).any())
    far = sdm.verify(features + 1e4)
    assert not bool(far.admitted.any())
    assert bool((far.d == 0).all())
    for estimate in (far.lower, far.centroid, far.upper):
        assert bool(estimate.probs.isfinite().all())
        # equal scores go to the first class: where that is not the predicted one, nothing is similar
        assert bool((estimate.similarity[far.predicted != 0] == 0).all())


def test_exemplars_in_more_dimensions_than_features_keep_their_distances(fitted):
    sdm, features, _ = fitted
    layer = adaptor.Adaptor(*(sdm.get_buffer(name) for name in adaptor.Adaptor._fields))
    assert sdm.embedding.shape == (8, 5)
    assert sdm.places.shape[1] == 5
    whole = torch.pdist(layer.exemplars(features))
    torch.testing.assert_close(torch.pdist(layer.standard(features) @ sdm.factor.mT), whole)


def test_a_calibration_part_of_ones_own(fitted):
    _, features, labels = fitted
    held_out = torch.arange(240) >= 100
    weights = torch.ones(240)
    weights[::10] = 0
    sdm = SDM(**QUICK).fit(torch.zeros(240, 3), labels, features=features, held_out=held_out, weights=weights)
    assert len(sdm.places) == int((~held_out & (weights > 0)).sum())
    assert len(sdm.output_values) == int((held_out & (weights > 0)).sum())
    kept = weights > 0
    same = SDM(**QUICK).fit(
        torch.zeros(int(kept.sum()), 3), labels[kept], features=features[kept], held_out=held_out[kept].numpy()
    )
    assert torch.equal(same.places, sdm.places)


def test_every_class_is_in_both_halves():
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 2, 2, 2])
    for seed in range(5):
        for half in SDM()._halves(labels, torch.Generator().manual_seed(seed)):
            assert labels[half].unique().tolist() == [0, 1, 2]
    first, second = SDM()._halves(labels, torch.Generator().manual_seed(0))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(11))


def test_softmax_is_the_special_case():
    z = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.full((20,), math.e - 2, dtype=torch.float64)
    torch.testing.assert_close(sdm_activation(z, q), z.softmax(1))
    torch.testing.assert_close(
        SDMLoss()(z, torch.arange(20) % 4, q),
        torch.nn.functional.cross_entropy(z, torch.arange(20) % 4),
        atol=1e-6,
        rtol=1e-6,
    )


def test_warm_up_lets_a_slow_start_learn():
    features, labels = blobs(n=200, c=5, gap=3.0)
    right = []
    for warm_up in (1, 60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sdm = SDM(**QUICK | {"lr": 1e-3, "epochs": 60, "rounds": 1}, warm_up=warm_up)
            sdm.fit(torch.zeros(200, 5), labels, features=features)
        right.append(float((sdm.verify(features).predicted == labels).double().mean()))
    assert right[1] > right[0] + 0.3


def test_extreme_scores_stay_finite():
    z = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]])
    q, d = torch.tensor([0.0, 1e6, 5.0]), torch.tensor([1.0, 1.0, 0.0])
    for log in (False, True):
        assert bool(sdm_activation(z, q, d, log=log).isfinite().all())
    assert torch.autograd.gradcheck(
        lambda x: sdm_activation(x, q, d.double(), log=True),
        (torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(),),
    )


def test_the_written_out_rescaler_is_adam_point_by_point():
    generator = np.random.default_rng(0)
    rounds, n, c, epochs = 3, 12, 4, 40
    v = generator.random((rounds, n, c))
    similarity, labels = 3 * generator.random((rounds, n)), generator.integers(0, c, (rounds, n))
    found = rescaling.train_rescalers(v, similarity, labels, epochs=epochs, lr=0.5, random=np.random.default_rng(7))
    random = np.random.default_rng(7)
    starts = random.uniform(-1, 1, (rounds, c, c)) / math.sqrt(c)
    orders = [[random.permutation(n) for _ in range(rounds)] for _ in range(epochs)]
    stopped = 0
    for r in range(rounds):
        w = torch.tensor(starts[r], requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=0.5)
        lowest, best, waited = math.inf, None, 0
        for e in range(epochs):
            losses = []
            for i in orders[e][r]:
                q = torch.tensor([similarity[r, i]])
                loss = SDMLoss()(torch.from_numpy(v[r, i : i + 1]) @ w.mT, torch.tensor([labels[r, i]]), q)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if np.mean(losses) < lowest:
                lowest, best = np.mean(losses), w.detach().clone()
            waited = waited + 1 if np.mean(losses) > lowest else 0
            if waited > 10:
                stopped += 1
                break
        np.testing.assert_allclose(found[r], best.numpy(), atol=1e-8)
    assert stopped


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(5, 60), st.sampled_from([0.6, 0.8, 0.9]))
def test_the_region_is_the_first_that_a_search_finds(seed, c, n, alpha):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, c, (n,), generator=generator)
    similarity = (8 * torch.rand(n, generator=generator, dtype=torch.float64)).round() / 2
    sharp = 2 * similarity[:, None] * torch.nn.functional.one_hot(labels, c)
    log_output = (sharp + torch.randn(n, c, generator=generator, dtype=torch.float64)).log_softmax(1)
    predicted = torch.where(torch.rand(n, generator=generator) < 0.9, log_output.argmax(1), labels)
    found = rescaling.region(log_output, similarity, predicted, labels, alpha)
    inside = (similarity >= 1) & (log_output.argmax(1) == predicted)
    assert torch.equal(found.outside, ~inside)
    least, psi = math.inf, [0.0] * c
    for candidate in sorted(set(similarity[inside].tolist())):
        thresholds = []
        for k in range(c):
            rows = inside & (similarity >= candidate) & (labels == k)
            values = sorted(log_output[rows, k].exp().tolist())
            thresholds.append(values[min(int((1 - alpha) * len(values)), len(values) - 1)] if values else 0.0)
        if min(thresholds) >= alpha:
            least, psi = candidate, thresholds
            break
    assert found.similarity == least
    assert found.thresholds.tolist() == psi


def test_bounds_of_rounds_that_found_nothing():
    magnitudes = torch.full((3, 2, rescaling.BINS), torch.nan)
    magnitudes[:, 0, 1] = torch.tensor([0.5, 0.7, 0.6])
    magnitudes[0, 1, 2] = 0.9
    inf = math.inf
    factor = math.tan(math.pi * 0.4)
    bounded, offsets = rescaling.bounds([1.0, 1.5, inf], 1.0, magnitudes, 0.9)
    assert bounded == pytest.approx(1 + 0.5 * factor)
    assert float(offsets[0, 1]) == pytest.approx(0.1 * factor, rel=1e-5)
    assert int((offsets != 0).sum()) == 1
    assert rescaling.bounds([1.0, inf, inf], 1.0, magnitudes, 0.9)[0] == 1.0
    assert rescaling.bounds([inf, inf, inf], inf, magnitudes, 0.9)[0] == inf


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), max_size=30), st.lists(st.integers(-1, 7), min_size=1))
def test_distribution_functions_by_class(points, queries):
    values = torch.tensor([float(v) for v, _ in points], dtype=torch.float64)
    labels = torch.tensor([k for _, k in points], dtype=torch.long)
    x = torch.tensor(queries, dtype=torch.float64)
    sample = ByClass.of(values, labels, 3)
    not_below, quantile = sample.share_not_below(x), sample.quantile(x[:, None].expand(-1, 3))
    for k in range(3):
        mine = sorted(v for v, label in points if label == k)
        assert sample.of_class(k).tolist() == mine
        for i, query in enumerate(queries):
            share = sum(v < query for v in mine) / len(mine) if mine else 0.0
            assert float(not_below[i, k]) == (1 - share if mine else 0.0)
            assert float(quantile[i, k]) == (1.0 if mine and query >= mine[-1] else share)


def test_too_little_training_admits_nothing_and_says_so():
    features, labels = blobs(n=60, gap=0.3)
    with pytest.warns(UserWarning, match="nothing will be admitted"):
        sdm = SDM(**QUICK | {"lr": 1e-6, "rounds": 1}).fit(torch.zeros(60, 3), labels, features=features)
    assert math.isinf(sdm.least_similarity)
    assert not bool(sdm.admit(features).any())
    assert bool(sdm(torch.zeros(60, 3), features=features).isfinite().all())


def test_a_missing_class_and_copies_are_told():
    features, labels = blobs(n=120)
    with pytest.warns(UserWarning, match="class 3 is missing from a half"):
        sdm = SDM(**QUICK).fit(torch.zeros(120, 5), labels, features=features)
    assert not bool(sdm.admit(features).any())
    assert bool(sdm(torch.zeros(120, 5), features=features).isfinite().all())
    features[7] = features[8]
    with pytest.warns(UserWarning, match="features hold 1 rows that are copies"):
        SDM(**QUICK).fit(torch.zeros(120, 3), labels, features=features)
    with pytest.warns(UserWarning, match="class 2 is missing from a half"):
        SDM(**QUICK).fit(
            torch.zeros(120, 3), labels, features=features, held_out=(labels == 2) | (torch.arange(120) < 60)
        )


def test_fewer_points_than_classes():
    features, labels = blobs(n=4, c=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdm = SDM(**QUICK).fit(torch.zeros(4, 6), labels, features=features)
    probs = sdm.predict_proba(torch.zeros(4, 6), features=features)
    assert bool(probs.isfinite().all())
    assert not bool(sdm.admit(features).any())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(60, 1)}, "logits must have at least 2 columns"),
        ({"labels": torch.zeros(60).long()}, "labels must hold at least two classes"),
        ({"features": torch.full((60, 5), math.nan)}, "features must be finite, found nan at row 0, column 0"),
        ({"features": torch.ones(60, 5)}, "features must vary, by a finite amount, in every training half: .* is 0"),
        ({"features": 1e200 * torch.arange(300).reshape(60, 5).double()}, "features must vary, by a finite amount"),
        ({"features": torch.ones(59, 5)}, "features must have 60 rows, got 59"),
        ({"weights": torch.zeros(60)}, "weights must not be all zero"),
        ({"weights": torch.arange(60).float()}, "weights must be equal where they are not zero"),
        ({"weights": (torch.arange(60) < 3).float()}, "either half must hold at least two points of weight > 0"),
        ({"held_out": torch.ones(60)}, "held_out must be 60 booleans"),
        ({"held_out": torch.ones(60).bool()}, "either half must hold at least two points"),
        ({"held_out": torch.ones(59).bool()}, "held_out must be 60 booleans"),
    ],
)
def test_bad_input_is_refused(change, message):
    features, labels = blobs(n=60)
    given = {"logits": torch.zeros(60, 3), "labels": labels, "features": features} | change
    sdm = SDM(**QUICK)
    with pytest.raises(InputError, match=message):
        sdm.fit(**given)
    assert not sdm.fitted


@pytest.mark.bad_input
def test_a_training_half_that_does_not_vary_and_a_training_that_diverges():
    features, labels = blobs(n=60)
    held_out = torch.arange(60) >= 30
    constant = features.where(held_out[:, None], 1.0)
    sdm = SDM(**QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="in every training half"):
            sdm.fit(torch.zeros(60, 3), labels, features=constant, held_out=held_out)
    with pytest.raises(InputError, match="lr must be smaller"):
        SDM(**QUICK | {"lr": 1e300}).fit(torch.zeros(60, 3), labels, features=features)


@pytest.mark.bad_input
def test_bad_points_are_refused(fitted):
    sdm, features, _ = fitted
    with pytest.raises(InputError, match="SDM is not fitted"):
        SDM().verify(features)
    with pytest.raises(InputError, match="features must have 5 columns, got 4"):
        sdm.verify(features[:, :4])
    with pytest.raises(InputError, match="features must be finite"):
        sdm.admit(features.log())
    with pytest.raises(InputError, match="features must have 2 rows, got 240"):
        sdm(torch.zeros(2, 3), features=features)
    with pytest.raises(InputError, match="SDM works on features; it was given nothing else"):
        sdm.predict_proba(torch.zeros(2, 3))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(3)), r"q must have shape \(2,\), got \(3,\)"),
        ((torch.zeros(2, 3), torch.tensor([0.0, -1.0])), "q must lie in .*, found -1 at row 1"),
        ((torch.zeros(2, 3), torch.zeros(2), torch.tensor([0.0, 1.5])), "d must lie in .*, found 1.5 at row 1"),
        ((torch.zeros(2, 3), torch.tensor([math.inf, 0.0])), "q must be finite"),
        ((torch.zeros(2, 1), torch.zeros(2)), "z must have at least 2 columns"),
    ],
)
def test_bad_arguments_of_the_activation(arguments, message):
    with pytest.raises(InputError, match=message):
        sdm_activation(*arguments)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options",
    [
        *(
            {"alpha": 0.5},
            {"alpha": 1.0},
            {"dimension": 0},
            {"rounds": 0},
            {"epochs": 0},
            {"warm_up": 0},
            {"lr": 0.0},
            {"batch": 0},
        ),
        *({"rescaler_epochs": 0}, {"rescaler_lr": -1.0}, {"seed": -1}),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        SDM(**options)
