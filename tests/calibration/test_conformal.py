"""Conformal sets: MAPIE's and crepes' answers, coverage on exchangeable data, and what happens with too few samples."""

import math

import numpy as np
import pytest
import torch
from crepes.base import ConformalClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from scipy.stats import beta, betabinom
from score_sets import HARD, overconfident
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import nn

from trimtab import Predictions
from trimtab.calibration import ConformalSets, TemperatureScaling, conformal, load
from trimtab.core.checks import InputError

quiet = pytest.mark.filterwarnings("ignore:.* are too few for alpha")
SCORES = ("lac", "aps", "raps")
FIXED = {"lac": {}, "aps": {}, "raps": {"penalty": 0.05, "k_reg": 2}}


def fitted(score, alpha, logits, labels, **settings):
    return ConformalSets(score, alpha, **FIXED[score], **settings).fit(logits, labels)


def drawn(n, c, seed):
    """Logits that are too large, and labels drawn from the truth: exchangeable, other than those of `overconfident`."""
    g = torch.Generator().manual_seed(seed)
    truth = 1.5 * torch.randn(n, c, generator=g, dtype=torch.float64)
    return 2 * truth, truth.softmax(1).multinomial(1, generator=g)[:, 0]


def slow_scores(probs, score, u=0.0, penalty=0.05, k_reg=2):
    """The scores as the papers define them, class by class."""
    n, c = probs.shape
    u = np.broadcast_to(u, n)
    out = np.empty((n, c))
    for i in range(n):
        for k in range(c):
            p = probs[i, k]
            before, rank = probs[i][probs[i] > p].sum(), 1 + (probs[i] > p).sum()
            extra = penalty * max(0, rank - k_reg) if score == "raps" else 0
            out[i, k] = 1 - p if score == "lac" else before + (1 - u[i]) * p + extra
    return out


def mapie_sets(logits, labels, test, alpha, score, include_last_label, seed=None):
    """What MAPIE answers, for a model whose features are its logits."""

    class Model(ClassifierMixin, BaseEstimator):
        def fit(self, X, y):
            return self

        def predict_proba(self, X):
            return torch.from_numpy(X).softmax(1).numpy()

        def predict(self, X):
            return X.argmax(1)

        def __sklearn_is_fitted__(self):
            return True

    model = Model()
    model.classes_, model.n_features_in_ = np.arange(logits.shape[1]), logits.shape[1]
    state = np.random.get_state()  # noqa: NPY002
    mapie = SplitConformalClassifier(model, 1 - alpha, conformity_score=score, prefit=True, random_state=seed)
    mapie.conformalize(logits.numpy(), labels.numpy())
    sets = mapie.predict_set(test.numpy(), conformity_score_params={"include_last_label": include_last_label})[1]
    np.random.set_state(state)  # noqa: NPY002
    return mapie._mapie_classifier, sets[:, :, 0]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_lac_is_mapies(alpha, seed):
    logits, labels = overconfident(900, 6, seed)
    _, theirs = mapie_sets(logits[:400], labels[:400], logits[400:], alpha, "lac", True)
    ours = ConformalSets("lac", alpha).fit(logits[:400], labels[:400]).predict_sets(logits[400:].numpy())
    assert (ours == theirs).all()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_randomised_aps_is_mapies(alpha, monkeypatch):
    logits, labels = overconfident(900, 6)
    _, theirs = mapie_sets(logits[:400], labels[:400], logits[400:], alpha, "aps", "randomized", seed=7)

    def theirs_too(self, logits, generator):
        return torch.from_numpy(np.random.RandomState(7).uniform(size=len(logits)))

    monkeypatch.setattr(ConformalSets, "_chance", theirs_too)
    ours = ConformalSets("aps", alpha, randomised=True).fit(logits[:400], labels[:400])
    assert (ours.predict_sets(logits[400:].numpy()) == theirs).all()


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_raps_is_mapies_given_its_choices(alpha):
    """MAPIE's strictest sets (the last label left out, one label at least) are ours at the threshold that it found."""
    logits, labels = overconfident(900, 8)
    mapie, theirs = mapie_sets(logits[:500], labels[:500], logits[500:], alpha, "raps", False, seed=3)
    found = mapie.conformity_score_function_
    kind = ConformalSets("raps", alpha, penalty=float(found.lambda_star), k_reg=int(found.k_star[0]), allow_empty=False)
    kind.fit(logits[:500], labels[:500])
    kind.threshold = torch.full((8,), float(found.quantiles_[0]) - 1)
    assert (kind(logits[500:]).numpy() == theirs).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("by_class", [False, True])
def test_sets_are_those_whose_p_value_in_crepes_exceeds_alpha(score, by_class):
    logits, labels = overconfident(700, 4)
    probs = logits.softmax(1).numpy()
    scores, y = slow_scores(probs, score), labels.numpy()
    own = scores[np.arange(300), y[:300]]
    theirs = ConformalClassifier().fit(own, bins=y[:300] if by_class else None)
    columns = [
        theirs.predict_p(scores[300:, k], bins=np.full(400, k) if by_class else None, smoothing=False) for k in range(4)
    ]
    ours = fitted(score, 0.15, logits[:300], labels[:300], by_class=by_class)
    assert (ours.predict_sets(logits[300:]).numpy() == (np.stack(columns, 1) > 0.15)).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("randomised", [False, True])
def test_scores_are_the_papers(score, randomised):
    if score == "lac" and randomised:
        return
    logits, _ = overconfident(120, 5)
    u = torch.rand(120, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if randomised else None
    ours = ConformalSets(score, randomised=randomised, **FIXED[score])
    penalty = 0.05 * (torch.arange(1, 6) - 2).clamp(min=0) * (score == "raps")
    shift = 0 if score == "lac" else 1
    found = ours._scores(logits, penalty, u).double() + shift
    np.testing.assert_allclose(found, slow_scores(logits.softmax(1).numpy(), score, 0 if u is None else u), atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("n", [19, 100, 555])
def test_coverage_over_many_draws_is_the_beta_binomials(score, n):
    """Exactly: the share of m new labels covered is beta-binomial with k = ceil((n + 1)(1 - alpha)) of n + 1."""
    alpha, m, draws = 0.1, 200, 40
    k = math.ceil((n + 1) * (1 - alpha))
    hits = 0
    for seed in range(draws):
        logits, labels = drawn(n + m, 10, seed=1000 * n + seed)
        sets = fitted(score, alpha, logits[:n], labels[:n])(logits[n:])
        hits += int(sets.gather(1, labels[n:, None]).sum())
    mean, deviation = betabinom.mean(m, k, n + 1 - k), betabinom.std(m, k, n + 1 - k)
    assert abs(hits / draws - mean) < 4 * deviation / math.sqrt(draws)


@pytest.mark.parametrize("randomised", [False, True])
def test_raps_that_chooses_for_itself_covers(randomised):
    logits, labels = overconfident(6000, 20, seed=5)
    g = torch.Generator().manual_seed(0) if randomised else None
    conformal_sets = ConformalSets("raps", 0.1, randomised=randomised).fit(logits[:1000], labels[:1000], generator=g)
    hits = conformal_sets.predict_sets(logits[1000:], generator=g).gather(1, labels[1000:, None]).double().mean()
    low, high = beta.ppf([1e-4, 1 - 1e-4], 721, 80)  # 800 samples are left
    assert low - 0.02 < hits < high + 0.02
    assert float(conformal_sets.counts.sum()) == 800


def test_every_class_is_covered_by_class():
    logits, labels = drawn(9000, 3, seed=2)
    logits -= torch.tensor([2.0, 0.0, 0.0])  # the model underrates class 0
    marginal, mondrian = (
        ConformalSets("lac", 0.1, by_class=by).fit(logits[:3000], labels[:3000]) for by in (False, True)
    )
    share = []
    for kind in (marginal, mondrian):
        hits = kind(logits[3000:]).gather(1, labels[3000:, None])[:, 0].double()
        share.append([float(hits[labels[3000:] == k].mean()) for k in range(3)])
    assert min(share[1]) > 0.88
    assert min(share[0]) < min(share[1])
    assert len(set(marginal.threshold.tolist())) == 1
    assert len(set(mondrian.threshold.tolist())) == 3


@quiet
@settings(max_examples=25)
@given(
    score=st.sampled_from(SCORES),
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    c=st.integers(2, 6),
    alphas=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)),
    by_class=st.booleans(),
)
def test_sets_grow_as_alpha_falls_and_hold_what_they_must(score, seed, n, c, alphas, by_class):
    logits, labels = overconfident(max(n, 2), c, seed)
    narrow, wide = (fitted(score, a, logits, labels, by_class=by_class)(logits) for a in sorted(alphas, reverse=True))
    assert not bool((narrow & ~wide).any())
    covered = wide.gather(1, labels[:, None])[:, 0]
    assert covered.double().mean() >= 1 - min(alphas)  # on its own samples, for every alpha


@quiet
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60))
def test_weights_are_copies(seed, n):
    logits, labels = overconfident(n, 4, seed)
    weights = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed)).double()
    weights[0] += 1
    copies = torch.arange(n).repeat_interleave(weights.long())
    weighted = ConformalSets("aps", 0.2).fit(logits, labels, weights=weights)
    repeated = ConformalSets("aps", 0.2).fit(logits[copies], labels[copies])
    assert torch.equal(weighted.threshold, repeated.threshold)
    assert torch.equal(weighted.counts, repeated.counts)


@quiet
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("case", HARD, ids=[name for name, *_ in HARD])
def test_hard_sets(score, by_class, case):
    _, logits, labels, *weights = case
    weights = weights[0] if weights else None
    kind = ConformalSets(score, 0.2, by_class=by_class).fit(logits, labels, weights=weights)
    sets = kind(logits)
    assert sets.dtype == torch.bool
    assert not kind.threshold.isnan().any()
    if score != "raps" and weights is None:
        assert sets.gather(1, labels[:, None]).double().mean() >= 0.8
    few = kind.threshold.isinf()
    assert torch.equal(few, (kind.counts if by_class else kind.counts.sum().expand_as(few)) < 4)
    for x in (1e4 * logits.sign(), 0 * logits, 100 * logits):
        assert kind(x)[:, few].all()
        assert not kind._scores(x, kind.rank_penalty, None).isnan().any()


def test_nine_samples_are_enough_for_a_tenth_and_eight_are_not():
    logits, labels = overconfident(9, 3)
    assert ConformalSets(alpha=0.1).fit(logits, labels).threshold.isfinite().all()
    with pytest.warns(RuntimeWarning, match=r"8 samples are too few for alpha = 0.1, which takes 9: .* every class"):
        full = ConformalSets(alpha=0.1).fit(logits[:8], labels[:8])
    assert full(logits).all()
    with pytest.warns(RuntimeWarning, match=r"alpha = 9.99989e-321, which takes inf"):
        ConformalSets(alpha=1e-320).fit(logits, labels)
    absent = labels.clamp(max=1)
    with pytest.warns(
        RuntimeWarning, match=r"0 samples of class 2 are too few for alpha = 0.5, .* such classes \(1 in all\)"
    ):
        kind = ConformalSets(alpha=0.5, by_class=True).fit(logits, absent)
    assert kind(logits)[:, 2].all()


def test_empty_sets_are_filled_on_demand():
    logits, labels = 5 * torch.eye(4)[torch.arange(200) % 4], torch.arange(200) % 4
    logits = logits + 0.1 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    honest, filled = (ConformalSets("lac", 0.4, allow_empty=e).fit(logits, labels) for e in (True, False))
    empty = honest(logits).sum(1) == 0
    assert 0 < empty.sum() < 200
    assert (filled(logits).sum(1) == 1).all()
    assert torch.equal(filled(logits)[empty].byte().argmax(1), logits[empty].argmax(1))


def test_saturated_probabilities_still_differ():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 3
    logits = 40 * torch.eye(3, dtype=torch.float64)[labels] + torch.randn(400, 3, generator=g, dtype=torch.float64)
    for score in SCORES:
        sets = fitted(score, 0.1, logits, labels)(logits)
        assert sets.double().sum(1).mean() < 2, score
        assert sets.gather(1, labels[:, None]).double().mean() == pytest.approx(0.9, abs=0.01), score


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_containers_devices_and_disk(score, dtype, tmp_path):
    logits, labels = overconfident(300, 4, dtype=dtype)
    kind = ConformalSets(score, 0.2, allow_empty=False, seed=3).fit_predictions(Predictions(logits, labels))
    sets = kind.predict_sets(logits)
    assert isinstance(kind.predict_sets(logits.numpy()), np.ndarray)
    assert (kind.predict_sets(logits.numpy()) == sets.numpy()).all()
    kind.save(tmp_path / "sets.safetensors")
    again = load(tmp_path / "sets.safetensors")
    assert repr(again) == repr(kind)
    assert torch.equal(again(logits), sets)
    assert torch.equal(again.double()(logits), sets)


def test_randomised_sets_need_a_generator_and_repeat_with_it():
    logits, labels = overconfident(500, 6)

    def seeded():
        return torch.Generator().manual_seed(4)

    kind = ConformalSets("aps", 0.2, randomised=True).fit(logits, labels, generator=seeded())
    sets = kind.predict_sets(logits, generator=seeded())
    assert torch.equal(sets, kind.predict_sets(logits, generator=seeded()))
    plain = ConformalSets("aps", 0.2).fit(logits, labels)
    assert sets.sum() < plain(logits).sum()
    for call in (lambda: kind.fit(logits, labels), lambda: kind.predict_sets(logits)):
        with pytest.raises(InputError, match="generator must be given exactly when randomised, which is True"):
            call()
    with pytest.raises(InputError, match="u must be given exactly when randomised, which is True"):
        kind(logits)
    with pytest.raises(InputError, match="u must be given exactly when randomised, which is False"):
        plain(logits, torch.rand(500, generator=seeded()))


@pytest.mark.parametrize("score", SCORES)
def test_the_chain_exports(score, tmp_path):
    import onnxruntime

    logits, labels = overconfident(300, 5, dtype=torch.float32)
    sets = fitted(score, 0.1, logits, labels, allow_empty=False)
    chain = nn.Sequential(TemperatureScaling().fit(logits, labels), sets).eval()
    rows = ({0: torch.export.Dim("n")},)
    program = torch.export.export(chain, (logits,), dynamic_shapes=rows)
    assert torch.equal(program.module()(logits[:7]), chain(logits[:7]))
    path = tmp_path / "sets.onnx"
    torch.onnx.export(chain, (logits,), path, dynamo=True, input_names=["x"], dynamic_shapes=rows, verbose=False)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": logits[:50].numpy()})
    assert (found == chain(logits[:50]).numpy()).all()


def test_raps_chooses_as_its_authors_do():
    logits, labels = overconfident(1000, 12, seed=8)
    kind = ConformalSets("raps", 0.1, seed=5).fit(logits, labels)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(5))[:200]
    z, y = logits[order], labels[order]
    ranks = 1 + (z > z.gather(1, y[:, None])).sum(1)
    k_reg = int(ranks.sort().values[math.ceil(201 * 0.9) - 1])
    sizes = {}
    for penalty in conformal._PENALTIES:
        same = ConformalSets("raps", 0.1, penalty=penalty, k_reg=k_reg).fit(z, y)
        sizes[penalty] = float(same(z).double().sum(1).mean())
    best = min(sizes, key=sizes.get)
    expected = best * (torch.arange(1, 13) - k_reg).clamp(min=0)
    torch.testing.assert_close(kind.rank_penalty, expected.float())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "top"}, "score must be one of lac, aps, raps, got 'top'"),
        ({"alpha": 0}, r"alpha must lie in \(0, 1\), got 0"),
        ({"alpha": 1.0}, r"alpha must lie in \(0, 1\), got 1"),
        ({"alpha": "0.1"}, "alpha must be a number"),
        ({"penalty": 0.1}, "penalty and k_reg belong to raps, score is lac"),
        ({"score": "aps", "k_reg": 2}, "penalty and k_reg belong to raps, score is aps"),
        ({"score": "raps", "penalty": -1}, r"penalty must lie in \[0, inf\)"),
        ({"score": "raps", "k_reg": 0}, "k_reg must be at least 1"),
        ({"randomised": True}, "randomised must be False for lac"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        ConformalSets(**settings)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    z, y = overconfident(20, 3)
    kind = ConformalSets(alpha=0.2)
    for logits, labels, weights, message in (
        (
            z.masked_fill(torch.arange(3) == 1, torch.nan),
            y,
            None,
            "logits must be finite, found nan at row 0, column 1",
        ),
        (z[:0], y[:0], None, "logits must have at least one row"),
        (z[:, :1], y, None, "logits must have at least 2 columns"),
        (z, y + 1, None, r"labels must lie in 0..2, found 3 at row"),
        (z, y[:3], None, "labels must have 20 entries"),
        (z, y, torch.zeros(20), "weights must not be all zero"),
        (z, y, torch.ones(3), r"weights must have shape \(20,\)"),
    ):
        with pytest.raises(InputError, match=message):
            kind.fit(logits, labels, weights=weights)
    with pytest.raises(InputError, match="ConformalSets is not fitted"):
        kind(z)
    with pytest.raises(InputError, match="predictions must hold labels"):
        kind.fit_predictions(Predictions(z))
    with pytest.raises(InputError, match="logits must have 3 columns as in fit"):
        kind.fit(z, y).predict_sets(torch.zeros(2, 4))
    with pytest.raises(InputError, match="k_reg must be at most 3, the number of classes, got 4"):
        ConformalSets("raps", k_reg=4, penalty=0.1).fit(z, y)
