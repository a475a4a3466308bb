"""Selective prediction: the guarantee, counted; its bound; and the plain word where no threshold meets the risk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from score_sets import HARD, overconfident
from torch import nn

from trimtab import Predictions
from trimtab.calibration import SelectivePrediction, TemperatureScaling, load
from trimtab.core.checks import InputError

quiet = pytest.mark.filterwarnings("ignore:no threshold keeps the risk")


def sample(n, seed, c=3, scale=4.0, ties=False):
    """Logits with labels drawn from them, and the chance of each prediction to be wrong."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, c, generator=g, dtype=torch.float64)
    logits = logits.round() if ties else logits
    probs = logits.softmax(1)
    return 2 * logits, probs.multinomial(1, generator=g)[:, 0], 1 - probs.amax(1)


@quiet
@pytest.mark.parametrize("ties", [False, True])
def test_the_risk_is_exceeded_less_often_than_delta(ties):
    new, _, chance = sample(100_000, 10**6, ties=ties)
    failed, accepted, runs = 0, [], 150
    for seed in range(runs):
        logits, labels, _ = sample(600, seed, ties=ties)
        mask = SelectivePrediction(risk=0.1, delta=0.2, steps=5).fit(logits, labels)(new)
        accepted.append(float(mask.double().mean()))
        failed += bool(mask.any()) and float(chance[mask].mean()) > 0.1
    assert failed <= binom.ppf(0.999, runs, 0.2)
    assert np.mean(accepted) > 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_lowest_whose_bound_meets_the_risk(seed):
    logits, labels, _ = sample(500, seed)
    kind = SelectivePrediction(risk=0.1, delta=0.1, steps=10).fit(logits, labels)
    confidence = logits.softmax(1).amax(1)
    order = confidence.argsort(descending=True)
    wrong = (logits.argmax(1) != labels)[order].numpy()

    def certified(kept):
        """Were the risk 0.1, so few errors would have a chance of at most delta / steps."""
        return binom.cdf(wrong[:kept].sum(), kept, 0.1) <= 0.1 / 10

    best = max((kept for kept in range(50, 501, 50) if certified(kept)), default=0)
    assert best > 0
    assert kind(logits).sum() == best
    assert float(kind.coverage) == pytest.approx(best / 500)
    assert kind(logits)[order[:best]].all()
    assert float(kind.bound) <= 0.1
    assert binom.cdf(wrong[:best].sum(), best, float(kind.bound)) == pytest.approx(0.01, abs=1e-4)


@quiet
@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 200),
    risks=st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 0.9)),
    deltas=st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 0.9)),
    ties=st.booleans(),
)
def test_more_risk_or_less_certainty_accept_no_less(seed, n, risks, deltas, ties):
    logits, labels, _ = sample(n, seed, ties=ties)
    strict = SelectivePrediction(min(risks), min(deltas)).fit(logits, labels)
    for loose in (SelectivePrediction(max(risks), min(deltas)), SelectivePrediction(min(risks), max(deltas))):
        assert not bool((strict(logits) & ~loose.fit(logits, labels)(logits)).any())
    if strict(logits).any():
        assert (logits.argmax(1) != labels)[strict(logits)].double().mean() <= min(risks)


def test_everything_is_accepted_where_nothing_is_wrong():
    labels = torch.arange(200) % 4
    kind = SelectivePrediction(0.05, 0.05).fit(2 * torch.eye(4)[labels], labels)
    assert float(kind.threshold) == -torch.inf
    assert float(kind.coverage) == 1
    assert kind(torch.zeros(3, 4)).all()


def test_where_no_threshold_meets_the_risk_it_says_so():
    logits, labels, _ = sample(50, 0)
    message = (
        r"no threshold keeps the risk at 0.05 with probability 0.95 on 50 samples: nothing .* it takes 117 accepted"
    )
    with pytest.warns(RuntimeWarning, match=message):
        kind = SelectivePrediction().fit(logits, labels)
    with pytest.warns(RuntimeWarning, match="it takes inf accepted"):
        SelectivePrediction(1e-320).fit(logits, labels)
    assert not kind(logits).any()
    assert float(kind.coverage) == 0
    assert float(kind.threshold) == torch.inf
    assert kind.bound.isnan()
    labels = torch.arange(117) % 3
    assert SelectivePrediction(steps=20).fit(torch.eye(3)[labels], labels).coverage == 1


@quiet
@pytest.mark.parametrize("case", HARD, ids=[name for name, *_ in HARD])
def test_hard_sets(case):
    _, logits, labels, *_ = case
    kind = SelectivePrediction(0.4, 0.4, steps=2).fit(logits, labels)
    mask = kind(logits)
    assert mask.dtype == torch.bool
    assert float(kind.coverage) == pytest.approx(float(mask.double().mean()))
    assert not kind.threshold.isnan()
    assert kind.bound.isnan() == (kind.coverage == 0)
    everything = kind.threshold == -torch.inf
    for x in (1e4 * logits.sign(), 0 * logits, 100 * logits):
        assert kind(x).all() or not everything


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_containers_export_and_disk(dtype, tmp_path):
    logits, labels, _ = sample(600, 1)
    logits = logits.to(dtype)
    kind = SelectivePrediction(0.1).fit_predictions(Predictions(logits, labels))
    mask = kind(logits)
    assert 0 < mask.sum() < 600
    assert (kind.accepts(logits.numpy()) == mask.numpy()).all()
    assert torch.equal(kind.accepts(logits), mask)
    kind.save(tmp_path / "selective.safetensors")
    again = load(tmp_path / "selective.safetensors")
    assert repr(again) == repr(kind)
    assert torch.equal(again.double()(logits), mask)


def test_the_chain_exports(tmp_path):
    import onnxruntime

    logits, labels, _ = sample(600, 1)
    logits = logits.float()
    temperature = TemperatureScaling().fit(logits, labels)
    with torch.no_grad():
        chain = nn.Sequential(temperature, SelectivePrediction(0.1).fit(temperature(logits), labels)).eval()
    rows = ({0: torch.export.Dim("n")},)
    program = torch.export.export(chain, (logits,), dynamic_shapes=rows)
    assert torch.equal(program.module()(logits[:7]), chain(logits[:7]))
    path = tmp_path / "selective.onnx"
    torch.onnx.export(chain, (logits,), path, dynamo=True, input_names=["x"], dynamic_shapes=rows, verbose=False)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": logits[:50].numpy()})
    assert (found == chain(logits[:50]).numpy()).all()


@pytest.mark.bad_input
def test_bad_input_is_refused():
    z, y = overconfident(20, 3)
    for wrong, message in (
        ({"risk": 0}, r"risk must lie in \(0, 1\), got 0"),
        ({"delta": 1.5}, r"delta must lie in \(0, 1\), got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            SelectivePrediction(**wrong)
    kind = SelectivePrediction(0.5, 0.5)
    for logits, labels, message in (
        (z.masked_fill(torch.arange(3) == 1, torch.inf), y, "logits must be finite, found inf at row 0, column 1"),
        (z[:0], y[:0], "logits must have at least one row"),
        (z, y + 1, r"labels must lie in 0..2, found 3 at row"),
        (z, y[:3], "labels must have 20 entries"),
    ):
        with pytest.raises(InputError, match=message):
            kind.fit(logits, labels)
    with pytest.raises(InputError, match="SelectivePrediction is not fitted"):
        kind(z)
    with pytest.raises(InputError, match="predictions must hold labels"):
        kind.fit_predictions(Predictions(z))
    with pytest.raises(InputError, match="predictions must not be weighted"):
        kind.fit_predictions(Predictions(z, y, weights=torch.ones(20)))
