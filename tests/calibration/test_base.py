"""The contract, kept by every calibrator."""

import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import LACKS, REFUSES, WARNS, OfLogits, every, fit, fitted, having, make, needed
from score_sets import HARD, generator, log_loss, overconfident
from torch import nn

from trimtab import Predictions
from trimtab.calibration import (
    CALIBRATORS,
    BetaCalibration,
    Calibrator,
    CorrectnessAware,
    EnsembleTemperatureScaling,
    HCalibration,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    PlattScaling,
    TemperatureScaling,
    Uncalibrated,
    VectorScaling,
    load,
)
from trimtab.core.checks import InputError


class Weighted(Calibrator):
    """A calibrator that also needs features: what later rooms look like."""

    needs = frozenset({"features"})

    def __init__(self, power=1.0):
        super().__init__()
        self.power = power
        self._declare("factor")

    def _fit(self, logits, labels, weights, features):
        self._store(logits, factor=features.abs().mean())

    def _log_probs(self, logits, features):
        return (logits * self.factor * features.abs().mean(1, keepdim=True) ** self.power).log_softmax(1)


@every
@pytest.mark.parametrize("c", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_container_and_precision_stay(kind, c, dtype):
    logits, labels = overconfident(200, c, dtype=dtype)
    calibrator = fitted(kind, logits, labels)
    probs = calibrator.predict_proba(logits)
    assert isinstance(probs, torch.Tensor)
    assert probs.dtype == calibrator(logits).dtype == dtype
    assert torch.allclose(probs.sum(1), torch.ones(200, dtype=dtype))
    array = fitted(kind, logits.numpy(), labels.numpy()).predict_proba(logits.numpy())
    assert isinstance(array, np.ndarray)
    assert array.dtype == probs.numpy().dtype
    np.testing.assert_array_equal(array, probs.numpy())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_answers_come_in_the_precision_of_the_question(kind, dtype):
    logits, labels = overconfident(300, 3)
    answer = fitted(kind, logits, labels)(logits.to(dtype))
    assert answer.dtype == dtype
    assert torch.isfinite(answer).all()


@having("another precision")
def test_the_map_takes_another_precision_than_it_was_fitted_in(kind):
    logits, labels = overconfident(300, 3)
    calibrator = fitted(kind, logits, labels)
    assert torch.allclose(calibrator(logits.float()), calibrator(logits).float(), atol=1e-4)


@every
def test_log_probabilities_are_those_that_predict_proba_gives(kind):
    logits, labels = overconfident(200, 4)
    calibrator = fitted(kind, logits, labels)
    assert torch.allclose(calibrator(logits).exp(), calibrator.predict_proba(logits), atol=1e-12)


@having("gradient")
@pytest.mark.parametrize("c", [2, 4])
def test_gradients(kind, c):
    logits, labels = overconfident(100, c)
    calibrator = fitted(kind, logits, labels)
    x = overconfident(6, c, seed=1)[0].requires_grad_()
    assert torch.autograd.gradcheck(calibrator, (x,))
    calibrator(x).sum().backward()
    assert not any(state.requires_grad for state in calibrator.state_dict().values())


@having("order of rows")
@pytest.mark.parametrize("c", [2, 4])
def test_order_of_the_rows_does_not_matter(kind, c):
    logits, labels = overconfident(300, c)
    order = torch.randperm(300, generator=generator(1))
    there = fitted(kind, logits, labels)(logits)
    back = fitted(kind, logits[order], labels[order])(logits)
    assert torch.allclose(there, back, atol=1e-6)


@having("order of classes")
@pytest.mark.parametrize("c", [2, 4])
def test_order_of_the_classes_does_not_matter(kind, c):
    logits, labels = overconfident(300, c)
    order = torch.randperm(c, generator=generator(1)) if c > 2 else torch.tensor([1, 0])
    there = fitted(kind, logits, labels)(logits)
    back = fitted(kind, logits[:, order], order.argsort()[labels])(logits[:, order])
    assert torch.allclose(there[:, order], back, atol=1e-6)


@having("weights")
@pytest.mark.parametrize("c", [2, 4])
def test_a_weight_counts_as_so_many_copies(kind, c):
    logits, labels = overconfident(200, c)
    weights = torch.randint(0, 4, (200,), generator=generator(1)).double()
    weighted = fitted(kind, logits, labels, weights)
    copied = fitted(kind, logits.repeat_interleave(weights.long(), 0), labels.repeat_interleave(weights.long()))
    assert torch.allclose(weighted(logits), copied(logits), atol=1e-6)
    assert torch.equal(weighted.calibrator.counts, copied.calibrator.counts)


@every
def test_a_weight_of_zero_leaves_the_row_out(kind):
    logits, labels = overconfident(200, 3)
    weights = (torch.arange(200) % 3 > 0).double()
    zero, without = fitted(kind, logits, labels, weights), fitted(kind, logits[weights > 0], labels[weights > 0])
    assert torch.allclose(zero(logits), without(logits), atol=1e-6)


@pytest.mark.parametrize(("kind", "promise"), [(kind, promise) for kind in LACKS for promise in LACKS[kind]])
def test_what_is_not_promised_is_not_kept(kind, promise):
    """Or the list of what a calibrator lacks would outlive its reasons."""
    logits, labels = overconfident(100, 3)
    calibrator = fitted(kind, logits, labels)
    answer = calibrator(logits)
    if promise == "gradient":
        assert not calibrator(logits.clone().requires_grad_()).requires_grad
    elif promise == "weights":
        with pytest.raises(InputError, match="weights must be equal"):
            fit(kind, logits, labels, torch.linspace(1, 2, 100))
    elif promise == "tracing":
        with pytest.raises(Exception, match="data-dependent"):
            torch.export.export(calibrator, (logits[:5],))
    elif promise == "another precision":
        assert not torch.allclose(calibrator(logits.float()), answer.float(), atol=1e-4)
    elif promise == "order of rows":
        assert not torch.allclose(fitted(kind, logits.flip(0), labels.flip(0))(logits), answer)
    else:
        assert promise == "order of classes"
        assert not torch.allclose(fitted(kind, logits.flip(1), 2 - labels)(logits.flip(1)).flip(1), answer)


@every
def test_a_second_fit_forgets_the_first(kind):
    logits, labels = overconfident(200, 3)
    other = overconfident(150, 3, seed=5)
    twice = fit(kind, *other).fit(logits, labels, **needed(kind, logits))
    assert torch.equal(OfLogits(twice)(logits), fitted(kind, logits, labels)(logits))


@every
def test_inputs_are_left_alone(kind):
    logits, labels = overconfident(200, 3)
    weights = torch.ones(200)
    extra = needed(kind, logits)
    inputs = (logits, labels, weights, *extra.values())
    before = [x.clone() for x in inputs]
    make(kind).fit(logits, labels, weights=weights, **extra).predict_proba(logits, **extra)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    logits.requires_grad_()
    assert not fitted(kind, logits, labels).predict_proba(logits).requires_grad


@every
@pytest.mark.parametrize("case", HARD, ids=lambda case: case[0])
def test_hard_calibration_sets(kind, case):
    _, logits, labels, *weights = case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the best temperature lies outside")
        if kind in WARNS:
            warnings.filterwarnings("ignore", WARNS[kind])
        try:
            calibrator = fitted(kind, logits, labels, *weights)
        except InputError as error:
            refused = str(error)
            calibrator = None
    if calibrator is None:
        assert re.match(REFUSES.get(kind, "nothing"), refused)
        return
    unseen = 100 * torch.randn(40, logits.shape[1], generator=generator(3))
    for x in (logits, unseen):
        assert torch.isfinite(calibrator(x)).all()
        probs = calibrator.predict_proba(x)
        assert torch.allclose(probs.sum(1), torch.ones(len(x), dtype=probs.dtype), atol=2e-3 if x is logits else 1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_hard_questions_after_an_ordinary_fit(kind, dtype):
    calibrator = fitted(kind, *overconfident(100, 4, dtype=dtype))
    z = overconfident(10, 4, seed=1)[0]
    for x in (1e4 * z.sign(), 6e3 * z, 0 * z, 0 * z + 1e4, z[:1].expand(10, 4), z[:1], 1e-7 * z):
        x = x.to(dtype)
        log_probs = calibrator(x)
        assert not log_probs.isnan().any()
        assert dtype == torch.float16 or torch.isfinite(log_probs).all()  # which ends at -65504
        sums = calibrator.predict_proba(x).double().sum(1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorScaling(slope_sd=None, bias_sd=None),
        lambda: BetaCalibration(slope_sd=None, bias_sd=None),
        lambda: MatrixScaling(off_diagonal=0, intercept=0, diagonal=0),
        lambda: PlattScaling(smoothing=False),
        lambda: IsotonicCalibration(allow_zero=True),
        lambda: HistogramBinning(allow_zero=True),
        lambda: HistogramBinning(equal_mass=False),
    ],
)
@pytest.mark.parametrize("case", HARD, ids=lambda case: case[0])
def test_hard_calibration_sets_without_what_makes_them_easier(make, case):
    _, logits, labels, *weights = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        calibrator = make().fit(logits, labels, weights=weights[0] if weights else None)
    for x in (logits, 100 * torch.randn(40, logits.shape[1], generator=generator(3))):
        assert torch.isfinite(calibrator.predict_proba(x)).all()


# state


@every
def test_save_and_load_give_the_same_numbers(kind, tmp_path):
    logits, labels = overconfident(200, 3)
    calibrator = fit(kind, logits, labels)
    calibrator.save(tmp_path / "calibrator.safetensors")
    assert json.loads((tmp_path / "calibrator.json").read_text())["class"] == kind.__name__
    back = load(tmp_path / "calibrator.safetensors")
    assert type(back) is kind
    assert repr(back) == repr(calibrator)
    assert torch.equal(OfLogits(back)(logits), OfLogits(calibrator)(logits))
    assert back.state_dict().keys() == calibrator.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), calibrator.state_dict().values()))


def test_arguments_are_saved(tmp_path):
    made = [
        HistogramBinning(7, equal_mass=False, allow_zero=True),
        VectorScaling(slope_sd=None, bias_sd=2),
        MatrixScaling(off_diagonal=0.5, intercept=0.25, diagonal=0),
    ]
    for i, calibrator in enumerate(made):
        calibrator.fit(*overconfident(100, 3)).save(tmp_path / f"{i}.safetensors")
        assert repr(load(tmp_path / f"{i}.safetensors")) == repr(calibrator)


@every
def test_a_state_fits_a_calibrator_that_was_never_fitted(kind):
    logits, labels = overconfident(200, 3)
    calibrator = fitted(kind, logits, labels)
    model = nn.Sequential(nn.Identity(), OfLogits(make(kind)))
    model.load_state_dict(nn.Sequential(nn.Identity(), calibrator).state_dict())
    assert torch.equal(model(logits), calibrator(logits))
    larger = fitted(kind, *overconfident(300, 5))
    larger.load_state_dict(calibrator.state_dict())
    assert torch.equal(larger(logits), calibrator(logits))
    assert torch.equal(copy.deepcopy(calibrator)(logits), calibrator(logits))


@having("tracing")
def test_torch_export(kind):
    logits, labels = overconfident(200, 3, dtype=torch.float32)
    calibrator = fitted(kind, logits, labels)
    batch = torch.export.Dim("n")
    program = torch.export.export(nn.Sequential(nn.Tanh(), calibrator), (logits[:5],), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(logits), calibrator(logits.tanh()))


@every
def test_unfitted(kind, tmp_path):
    calibrator = make(kind)
    name = kind.__name__
    with pytest.raises(InputError, match=f"{name} is not fitted: call fit"):
        OfLogits(calibrator)(torch.zeros(2, 3))
    with pytest.raises(InputError, match=f"{name} is not fitted: call fit"):
        calibrator.save(tmp_path / "calibrator.safetensors")
    assert not list(tmp_path.iterdir())


@every
def test_another_number_of_classes(kind):
    calibrator = fitted(kind, *overconfident(100, 3))
    with pytest.raises(InputError, match=r"logits must have 3 columns as in fit, got \(5, 4\)"):
        calibrator(torch.zeros(5, 4))


def damage(folder, **changes):
    path = folder / "calibrator.safetensors"
    TemperatureScaling().fit(*overconfident(50, 3)).save(path)
    meta = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**meta, **changes}))
    return path


@pytest.mark.parametrize("name", ["Calibrator", "load", "CALIBRATORS", "Path", "os.system", "Weighted", None, 3])
def test_only_exported_calibrators_are_loaded(tmp_path, name):
    with pytest.raises(InputError, match=r"the class must be one of trimtab\.calibration"):
        load(damage(tmp_path, **{"class": name}))


@pytest.mark.bad_input
def test_files_that_are_no_calibrator(tmp_path):
    with pytest.raises(InputError, match="not a TemperatureScaling that this version of trimtab can read"):
        load(damage(tmp_path, arguments={"speed": 3}))
    with pytest.raises(InputError, match="not a VectorScaling that this version of trimtab can read"):
        load(damage(tmp_path, **{"class": "VectorScaling"}))
    path = damage(tmp_path)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(InputError, match="the class must be one of"):
        load(path)
    path = damage(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "nothing.safetensors")


def test_a_state_that_lacks_something(tmp_path):
    from safetensors.torch import load_file, save_file

    path = damage(tmp_path)
    state = load_file(str(path))
    save_file({"counts": state["counts"]}, str(path))
    with pytest.raises(InputError, match="a fitted TemperatureScaling must hold 'temperature'"):
        load(path)


# predictions, and what a calibrator may need beyond logits


def test_predictions_in_predictions_out():
    logits, labels = overconfident(200, 3)
    given_weights = torch.rand(200, generator=generator(1), dtype=torch.float64)
    predictions = Predictions(logits, labels, features=logits[:, :2], weights=given_weights)
    calibrator = TemperatureScaling().fit_predictions(predictions)
    assert torch.equal(
        calibrator.temperature, TemperatureScaling().fit(logits, labels, weights=given_weights).temperature
    )
    after = calibrator.transform(predictions)
    assert torch.equal(after.logits, calibrator(logits))
    assert after.labels is predictions.labels
    assert after.features is predictions.features
    assert after.weights is predictions.weights
    with pytest.raises(InputError, match="predictions must hold labels, found none"):
        TemperatureScaling().fit_predictions(Predictions(logits))


def test_what_a_calibrator_needs_is_asked_for_and_checked():
    logits, labels = overconfident(100, 3)
    features = torch.rand(100, 4, generator=generator(1), dtype=torch.float64)
    weights = torch.ones(100)
    weights[:50] = 0
    calibrator = Weighted().fit(logits, labels, weights=weights, features=features)
    assert torch.allclose(calibrator.factor, features[50:].mean())
    assert calibrator.predict_proba(logits, features=features).shape == (100, 3)
    predictions = Predictions(logits, labels, features=features)
    fitted = Weighted().fit_predictions(predictions)
    assert torch.equal(fitted.transform(predictions).logits, fitted(logits, features=features))
    with pytest.raises(InputError, match="Weighted works on features; it was given nothing else"):
        Weighted().fit(logits, labels)
    with pytest.raises(InputError, match=r"TemperatureScaling works on logits alone; it was given \['features'\]"):
        TemperatureScaling().fit(logits, labels, features=features)
    with pytest.raises(InputError, match="features must have 100 rows, got 99"):
        Weighted().fit(logits, labels, features=features[:99])
    with pytest.raises(InputError, match="features must be finite, found nan at row 3, column 0"):
        Weighted().fit(logits, labels, features=features.index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(InputError, match="predictions must hold features, found none"):
        Weighted().fit_predictions(Predictions(logits, labels))


def test_a_probability_of_zero_stays_finite_in_predictions():
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
    predictions = Predictions(logits, torch.tensor([0, 0, 1, 1]))
    calibrator = IsotonicCalibration(allow_zero=True).fit_predictions(predictions)
    assert torch.isinf(calibrator(logits)).any()
    assert torch.isfinite(calibrator.transform(predictions).logits).all()


# bad input


def put(x, row, value):
    x = x.clone()
    x[row] = value
    return x


CORRUPTIONS = {
    r"logits must have shape \(n, c\), got \(20,\)": lambda z, y, w: (z[:, 0], y, w),
    "logits must have at least 2 columns, got 1": lambda z, y, w: (z[:, :1], y, w),
    "logits must be floating point, got int64": lambda z, y, w: (z.long(), y, w),
    "logits must have at least one row": lambda z, y, w: (z[:0], y[:0], w[:0]),
    r"labels must lie in 0..2, found 3 at row 4": lambda z, y, w: (z, put(y, 4, 3), w),
    r"labels must lie in 0..2, found -1 at row 19": lambda z, y, w: (z, put(y, 19, -1), w),
    "labels must be integer class indices, got float32": lambda z, y, w: (z, y.float(), w),
    "labels must have 20 entries, one for each row, got 19": lambda z, y, w: (z, y[:-1], w),
    "labels must hold at least two classes to calibrate, found only class 2": lambda z, y, w: (z, y * 0 + 2, w),
    "labels must hold at least two classes to calibrate, found only class 1": lambda z, y, w: (z, y, (y == 1).float()),
    r"weights must have shape \(20,\), got \(19,\)": lambda z, y, w: (z, y, w[:-1]),
    "weights must be >= 0, found -1 at row 2": lambda z, y, w: (z, y, put(w, 2, -1)),
    "weights must be finite, found nan at row 2": lambda z, y, w: (z, y, put(w, 2, np.nan)),
    "weights must not be all zero": lambda z, y, w: (z, y, w * 0),
}  # fmt: skip


@every
@pytest.mark.bad_input
@pytest.mark.parametrize("message", CORRUPTIONS)
def test_bad_input_is_refused_at_the_door(kind, message):
    logits, labels = overconfident(20, 3, dtype=torch.float32)
    z, y, w = CORRUPTIONS[message](logits, labels, torch.ones(20))
    calibrator = make(kind)
    with pytest.raises(InputError, match=message):
        calibrator.fit(z, y, weights=w, **needed(kind, logits))
    with pytest.raises(InputError, match=message):
        calibrator.fit(z.numpy(), y.numpy(), weights=w.numpy(), **needed(kind, logits.numpy()))
    assert calibrator.counts is None


@every
@pytest.mark.bad_input
@pytest.mark.filterwarnings("ignore:SDM found no region")
def test_the_first_bad_number_is_named(kind):
    logits, labels = overconfident(20, 3)
    calibrator, extra = fit(kind, logits, labels), needed(kind, logits)

    @given(row=st.integers(0, 19), column=st.integers(0, 2), value=st.sampled_from([np.nan, np.inf, -np.inf]))
    def check(row, column, value):
        bad = logits.clone()
        bad[row, column] = value
        for refuse in (lambda: calibrator.fit(bad, labels, **extra), lambda: calibrator.predict_proba(bad, **extra)):
            with pytest.raises(InputError, match=f"logits must be finite, found {value} at row {row}, column {column}"):
                refuse()

    check()


@pytest.mark.parametrize("kind", [kind for kind in CALIBRATORS if kind.needs], ids=lambda kind: kind.__name__)
@pytest.mark.bad_input
@pytest.mark.filterwarnings("ignore:SDM found no region")
def test_what_else_is_needed_is_checked(kind):
    logits, labels = overconfident(20, 3)
    calibrator, extra = fit(kind, logits, labels), needed(kind, logits)
    (name,) = kind.needs
    value = extra[name]
    ragged = [row[: 1 + i % 2] for i, row in enumerate(value.tolist())]
    refused = f"{name} must (have|be)"
    for bad, message in (
        (value[:-1], f"{name} must have (20 rows|shape)"),
        (value[:0], refused),
        (value[:, None], refused),
        (value.long(), refused),
        (ragged, refused),
        (put(value, 4, np.nan), f"{name} must be finite, found nan at (row 4|axis 0 index 4)"),
    ):
        with pytest.raises(InputError, match=message):
            calibrator.fit(logits, labels, **{name: bad})
        with pytest.raises(InputError, match=message):
            calibrator.predict_proba(logits, **{name: bad})
    with pytest.raises(InputError, match=f"{kind.__name__} works on {name}; it was given nothing else"):
        calibrator.fit(logits, labels)
    with pytest.raises(InputError, match=f"{kind.__name__} works on {name}; it was given nothing else"):
        calibrator.predict_proba(logits)
    with pytest.raises(InputError, match=f"{name} must (have 3 columns|hold 3 copies as in fit)"):
        calibrator.predict_proba(logits, **{name: value[:, :-1]})


def test_a_refused_fit_leaves_the_calibrator_as_it_was():
    logits, labels = overconfident(100, 3)
    calibrator = TemperatureScaling().fit(logits, labels)
    before = float(calibrator.temperature)
    with pytest.raises(InputError, match="found only class"):
        calibrator.fit(2 * logits, labels * 0)
    assert float(calibrator.temperature) == before


def test_a_read_only_array_is_welcome():
    logits, labels = (x.numpy() for x in overconfident(100, 3))
    logits.flags.writeable = labels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TemperatureScaling().fit(logits, labels).predict_proba(logits)


# what theory promises


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 80), c=st.integers(2, 6), factor=st.floats(0.1, 5))
def test_richer_families_fit_the_calibration_set_no_worse(seed, n, c, factor):
    logits, labels = overconfident(n, c, seed, factor=factor)

    def loss(kind):
        return log_loss(kind().fit(logits, labels)(logits), labels)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        temperature = loss(TemperatureScaling)
        assert temperature <= loss(Uncalibrated) + 1e-9
        for richer in (EnsembleTemperatureScaling, VectorScaling, MatrixScaling):
            assert loss(richer) <= temperature + 1e-9
        if c == 2:
            assert loss(BetaCalibration) <= temperature + 1e-9


@pytest.mark.parametrize(
    "kind", [Uncalibrated, TemperatureScaling, EnsembleTemperatureScaling, HCalibration, CorrectnessAware]
)
def test_a_temperature_never_changes_the_prediction(kind):
    @given(seed=st.integers(0, 10**6), n=st.integers(5, 60), c=st.integers(2, 6))
    def check(seed, n, c):
        logits, labels = overconfident(n, c, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            calibrator = fitted(kind, logits, labels)
        if kind is EnsembleTemperatureScaling and calibrator.calibrator.mixture[2] > 1 - 1e-9:
            return  # nothing but the uniform part: all classes tie
        assert torch.equal(calibrator(logits).argmax(1), logits.argmax(1))

    check()


def test_calibrators_are_exported_by_name():
    import trimtab.calibration as stage

    assert all(getattr(stage, kind.__name__) is kind for kind in CALIBRATORS)
    assert {kind.__name__ for kind in CALIBRATORS} <= set(stage.__all__)
    for kind in CALIBRATORS:
        assert Path(stage.__file__).parent in Path(__import__(kind.__module__, fromlist=["x"]).__file__).parents
