"""Method 51-pareto-self-supervision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.calibration import (
    ParetoLoss,
    ParetoSelfSupervision,
    error_calibration,
    load,
    reweight_sources,
    risk_score,
)
from trimtab.core.checks import InputError

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "51-pareto-self-supervision").glob("*.npz"))
SCALARIZERS = ("linear", "square", "2-norm", "max")
golden = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
every = pytest.mark.parametrize("scalarizer", SCALARIZERS)
NEAR = {"atol": 1e-5, "rtol": 1e-5}


def votes(seed=0, n=200, m=3, c=3, coverage=0.7):
    """Features, and the answers of sources that are right three times in four."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, c, (n,), generator=generator)
    X = torch.eye(c)[truth] + 0.3 * torch.randn(n, c, generator=generator)
    wrong = torch.rand(n, m, generator=generator) < 0.25
    labels = torch.where(wrong, (truth[:, None] + 1) % c, truth[:, None])
    return X, labels.masked_fill(torch.rand(n, m, generator=generator) > coverage, -1), truth


def test_there_are_golden_files():
    assert GOLDEN


@pytest.mark.golden
@golden
def test_the_authors_losses_and_gradients(path):
    with np.load(path) as arrays:
        found = [key.removeprefix("loss/") for key in arrays if key.startswith("loss/")]
        assert found
        for scalarizer in found:
            outputs = torch.from_numpy(arrays["outputs"]).requires_grad_()
            loss = ParetoLoss(scalarizer)(outputs, torch.from_numpy(arrays["weak_labels"]))
            loss.backward()
            np.testing.assert_allclose(loss.item(), arrays[f"loss/{scalarizer}"], **NEAR)
            np.testing.assert_allclose(outputs.grad.numpy(), arrays[f"grad/{scalarizer}"], **NEAR)


@pytest.mark.golden
@golden
def test_the_authors_analysis(path):
    with np.load(path) as arrays:
        probs, labels = arrays["probas"], arrays["weak_labels"]
        if probs.ndim == 1:
            probs = np.stack([1 - probs, probs], 1)
        np.testing.assert_array_equal(probs.argmax(1), arrays["pred"])
        for rule in ("maxeig", "minvar"):
            np.testing.assert_allclose(reweight_sources(probs, labels, rule), arrays[f"w_{rule}"], **NEAR)
        risk = risk_score(probs, labels[:, -1])
        truth = error_calibration(risk, labels[:, -1] != arrays["gold"])
        np.testing.assert_allclose(risk[truth.order], arrays["polar_last"], **NEAR)
        assert set(truth.order) == set(arrays["polar_last_idx"])
        np.testing.assert_allclose(truth.ece, arrays["ece"], **NEAR)
        np.testing.assert_allclose(truth.bin_error, arrays["bar_mean_error"], **NEAR)
        np.testing.assert_allclose(truth.bin_sd, arrays["bar_std_error"], **NEAR)
        np.testing.assert_allclose(truth.block_error, arrays["scatter_error"], **NEAR)
        np.testing.assert_allclose(truth.block_risk, arrays["scatter_doubt"], **NEAR)


@pytest.mark.golden
@golden
def test_the_authors_training(path):
    with np.load(path) as arrays:
        # in double precision: in single, the order of the samples alone moves a weight by 1e-5
        X, labels, gold = arrays["X"].astype(np.float64), arrays["weak_labels"], arrays["gold"]
        runs = sorted({tuple(key.split("/")[1:3]) for key in arrays if key.startswith("train/")})
        assert runs
        for base, scalarizer in runs:
            key = f"train/{base}/{scalarizer}"
            names = ("linear",) if base == "LR" else ("mlp.0", "mlp.2")
            linears = []
            for name in names:
                weight, bias = (torch.from_numpy(arrays[f"{key}/init/{name}.{x}"]) for x in ("weight", "bias"))
                linears.append(nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0]))
                linears[-1].load_state_dict({"weight": weight, "bias": bias})
            network = (linears[0] if base == "LR" else nn.Sequential(linears[0], nn.ReLU(), linears[1])).double()
            model = ParetoSelfSupervision(
                int(arrays["n_class"]), lambda n=network: n, scalarizer, 1e-2, epochs=3, batch_size=len(X)
            ).fit(X, labels, X, gold)
            for name, linear in zip(names, linears):
                for x in ("weight", "bias"):
                    expected = arrays[f"{key}/after3/{name}.{x}"]
                    np.testing.assert_allclose(getattr(linear, x).detach().numpy(), expected, **NEAR)
            np.testing.assert_allclose(model.validation_loss.item(), arrays[f"{key}/val_loss"], **NEAR)


@every
@given(seed=st.integers(0, 10**6), m=st.integers(2, 4), c=st.integers(2, 4))
def test_the_loss_is_the_sum_over_samples_written_out(scalarizer, seed, m, c):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, c, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, c, (7, m), generator=generator)
    weights = torch.rand(m, generator=generator, dtype=torch.float64)
    total, voted = 0.0, 0
    for z, row in zip(logits, labels):
        each = [w * nn.functional.cross_entropy(z, y) for w, y in zip(weights, row) if y >= 0]
        if each:
            voted += 1
            each = torch.stack(each)
            total += {"linear": each.sum(), "square": each.sum() ** 2, "2-norm": each.norm(), "max": each.max()}[
                scalarizer
            ]
    expected = total / max(voted, 1)
    assert float(ParetoLoss(scalarizer, weights)(logits, labels)) == pytest.approx(float(expected))


@every
@pytest.mark.parametrize("columns", [1, 3])
def test_gradients(scalarizer, columns):
    logits = torch.randn(6, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(-1, max(columns, 2), (6, 3), generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda z: ParetoLoss(scalarizer)(z, labels), (logits.requires_grad_(),))


@every
def test_losses_of_zero_and_no_votes_have_finite_gradients(scalarizer):
    logits = torch.tensor([[1e4, 0.0], [0.0, 1.0]], requires_grad=True)
    for labels in ([[0, 0], [-1, -1]], [[-1, -1], [-1, -1]]):
        loss = ParetoLoss(scalarizer)(logits, torch.tensor(labels))
        loss.backward()
        assert loss == 0
    assert (logits.grad == 0).all()


@every
def test_one_logit_is_two_classes(scalarizer):
    z = torch.randn(9, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(-1, 2, (9, 3), generator=torch.Generator().manual_seed(1))
    two = torch.cat([torch.zeros_like(z), z], 1)
    torch.testing.assert_close(ParetoLoss(scalarizer)(z, labels), ParetoLoss(scalarizer)(two, labels))


@every
def test_a_single_source_is_summed(scalarizer):
    logits, labels = torch.zeros(4, 2), torch.tensor([[0], [1], [-1], [1]])
    assert float(ParetoLoss(scalarizer)(logits, labels)) == pytest.approx(3 * np.log(2), rel=1e-6)


@pytest.mark.parametrize("base", ["lr", "mlp"])
@pytest.mark.parametrize("c", [2, 3])
def test_it_learns_the_truth_behind_the_sources_and_finds_their_mistakes(base, c, tmp_path):
    X, labels, truth = votes(n=600, c=c)
    model = ParetoSelfSupervision(c, base, lr=0.02, epochs=15).fit(X, labels)
    probs = model.predict_proba(X)
    assert (probs.argmax(1) == truth).float().mean() > 0.9
    torch.testing.assert_close(probs, model(X).exp())
    torch.testing.assert_close(probs.sum(1), torch.ones(600))
    answered = labels[:, 2] >= 0
    wrong = (labels[:, 2] != truth) & answered
    risk = model.risk(X, labels[:, 2])
    assert risk[wrong].mean() > risk[answered & ~wrong].mean() + 0.3
    assert (risk[~answered] == 0).all()
    assert isinstance(model.risk(X.numpy(), labels[:, 2].numpy()), np.ndarray)
    assert model.reweight(X, labels).sum() == pytest.approx(1)

    model.save(tmp_path / "harmonizer.safetensors")
    again = load(tmp_path / "harmonizer.safetensors")
    assert torch.equal(again.predict_proba(X), probs)
    assert repr(again) == repr(model)


def test_the_same_seed_gives_the_same_numbers():
    X, labels, _ = votes()
    first, same, other = (
        ParetoSelfSupervision(3, "mlp", lr=1e-2, epochs=2, seed=seed).fit(X, labels).predict_proba(X)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_module_of_one_s_own_may_have_dropout_and_two_logits():
    X, labels, truth = votes(n=400, c=2)

    def base():
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    first, same = (ParetoSelfSupervision(2, base, lr=0.02, epochs=10).fit(X, labels) for _ in range(2))
    assert torch.equal(first.predict_proba(X), same.predict_proba(X))
    assert (first.predict_proba(X).argmax(1) == truth).float().mean() > 0.9
    assert isinstance(first.network, nn.Module)


def test_the_validation_set_stops_and_chooses():
    X, labels, truth = votes(n=400)
    tried = {lr: float(fit(X, labels, truth, lr).validation_loss) for lr in (1e-5, 3e-2)}
    chosen = fit(X, labels, truth, list(tried))
    assert chosen.chosen.tolist() == [0, 0, 1]
    assert float(chosen.validation_loss) == min(tried.values())
    # with labels turned round no epoch is better than the first: one, and five more in vain
    epochs = []

    class Counting(nn.Linear):
        def train(self, mode=True):
            epochs.extend([1] * mode)
            return super().train(mode)

    ParetoSelfSupervision(3, lambda: Counting(3, 3), lr=0.01).fit(X, labels, X, (truth + 2) % 3)
    assert len(epochs) <= 8


def fit(X, labels, truth, lr):
    return ParetoSelfSupervision(3, lr=lr, epochs=4).fit(X, labels, X, truth)


def test_weights_decide_whom_to_believe():
    X, _, truth = votes(n=300, c=2)
    labels = torch.stack([truth, 1 - truth], 1)
    for weights, expected in (([0.9, 0.1], truth), ([0.1, 0.9], 1 - truth)):
        model = ParetoSelfSupervision(2, lr=0.05, epochs=5).fit(X, labels, weights=weights)
        assert (model.predict_proba(X).argmax(1) == expected).float().mean() > 0.9


@given(seed=st.integers(0, 10**6), m=st.integers(2, 5), rule=st.sampled_from(["maxeig", "minvar"]))
def test_source_weights_are_weights(seed, m, rule):
    _, labels, truth = votes(seed, m=m)
    w = reweight_sources(0.8 * torch.eye(3)[truth] + 0.2 / 3, labels, rule)
    assert w.sum() == pytest.approx(1)
    assert (w >= 0.5 / m - 1e-12).all()
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    again = reweight_sources(0.8 * torch.eye(3)[truth] + 0.2 / 3, labels[:, order], rule)
    np.testing.assert_allclose(again, w[order], atol=1e-9)


def test_a_source_of_noise_weighs_less_and_copies_share():
    _, labels, _ = votes(n=2000, m=4, coverage=1.0)
    labels[:, 0] = torch.randint(0, 3, (2000,), generator=torch.Generator().manual_seed(9))
    probs = torch.full((2000, 3), 1 / 3)
    assert reweight_sources(probs, labels, "maxeig").argmin() == 0
    copied = torch.cat([labels, labels[:, 3:]], 1)
    alone, shared = reweight_sources(probs, labels, "minvar"), reweight_sources(probs, copied, "minvar")
    assert shared[3] == pytest.approx(shared[4])
    assert shared[3] < alone[3]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"base": "bert"}, "base must be 'lr', 'mlp' or a function"),
        ({"scalarizer": "cubic"}, "scalarizer must be one of linear, square, 2-norm, max, got 'cubic'"),
        ({"lr": 0.0}, "lr must lie in"),
        ({"lr": []}, "one is empty"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ParetoSelfSupervision(**{"num_classes": 3, **options})


@pytest.mark.bad_input
def test_bad_data_are_refused():
    X, labels, truth = votes()
    model = ParetoSelfSupervision(3, epochs=1)
    for bad, message in [
        (labels + 3, r"weak_labels must lie in 0..2, or be -1, found"),
        (labels.masked_fill(labels == 0, -2), r"found -2 at row \d+, column \d"),
        (labels * 0 - 1, "every source abstains everywhere"),
        (labels[:5], r"weak_labels must have 200 rows and a column for every source, got \(5, 3\)"),
        (labels[:, :0], r"a column for every source, got \(200, 0\)"),
        (labels.float(), "weak_labels must be integer class indices, got float32"),
    ]:
        with pytest.raises(InputError, match=message):
            model.fit(X, bad)
    for weights, message in [([1.0], r"weights must have shape \(3,\)"), ([1.0, -1.0, 1.0], "weights must be >= 0")]:
        with pytest.raises(InputError, match=message):
            model.fit(X, labels, weights=weights)
    with pytest.raises(InputError, match="X must be finite"):
        model.fit(X / 0, labels)
    with pytest.raises(InputError, match="both or neither"):
        model.fit(X, labels, X)
    with pytest.raises(InputError, match="to choose among several settings"):
        ParetoSelfSupervision(3, ["lr", "mlp"]).fit(X, labels)
    with pytest.raises(InputError, match="X_val must have 3 columns"):
        model.fit(X, labels, X[:, :2], truth)
    with pytest.raises(InputError, match=r"y_val must lie in 0..2"):
        model.fit(X, labels, X, truth + 1)
    with pytest.raises(InputError, match="not fitted"):
        model.predict_proba(X)
    with pytest.raises(InputError, match="X must have 3 columns as in fit, got 2"):
        model.fit(X, labels).predict_proba(X[:, :2])
    with pytest.raises(InputError, match="diverged"):
        ParetoSelfSupervision(3, lr=1e37, epochs=3).fit(X, labels)
    with pytest.raises(InputError, match="the same probabilities"):
        ParetoSelfSupervision(3, lr=[1e-3, 1e-4], epochs=1).fit(X * 0, labels, X * 0, truth)


@pytest.mark.bad_input
def test_bad_modules_are_refused():
    X, labels, _ = votes()
    with pytest.raises(InputError, match="a module with parameters to train, got Identity"):
        ParetoSelfSupervision(3, nn.Identity).fit(X, labels)
    with pytest.raises(InputError, match=r"base must give logits of shape \(n, 3\), got \(1, 1\) for one sample"):
        ParetoSelfSupervision(3, lambda: nn.Linear(3, 1)).fit(X, labels)
    with pytest.raises(InputError, match=r"network\.state_dict"):
        ParetoSelfSupervision(3, lambda: nn.Linear(3, 3), epochs=1).fit(X, labels).save("never.safetensors")


@pytest.mark.bad_input
def test_bad_scores_and_sources_are_refused():
    _, labels, truth = votes()
    probs = torch.eye(3)[truth]
    with pytest.raises(InputError, match=r"answers must lie in 0..2, or be -1, found 3 at row 0"):
        risk_score(probs, truth + 3 - truth[0])
    with pytest.raises(InputError, match="probs must sum to one"):
        risk_score(probs / 2, truth)
    labels[:, 1] = -1
    with pytest.raises(InputError, match="source 1 never votes"):
        reweight_sources(probs, labels)
    with pytest.raises(InputError, match="rule must be one of maxeig, minvar, got 'mean'"):
        reweight_sources(probs, labels, "mean")
    with pytest.raises(InputError, match="weak_labels must have 2 columns as weights, got 3"):
        ParetoLoss("max", [1.0, 1.0])(probs, labels)
