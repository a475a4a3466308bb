import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.calibration import SDM, SDMLoss, adaptor, rescaling, sdm_activation

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
    for name, estimate in {"lower": found.lower, "centroid": found.centroid, "upper": found.upper}.items():
        assert torch.equal(estimate.admitted, t[f"test/is_valid_index_conditional__{name}"])
        torch.testing.assert_close(
            estimate.probs, t[f"test/rescaled_prediction_conditional_distribution__{name}"], **close | {"atol": 2e-2}
        )
