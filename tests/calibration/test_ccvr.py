"""Card 47-ccvr: a classifier retrained on virtual features, and nothing else of the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from score_sets import generator
from torch import nn

from trimtab.calibration import CCVR, ClassStatistics, calibrate_classifier, class_statistics, collect_class_statistics
from trimtab.core.checks import InputError

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "47-ccvr").glob("*.npz"))


def linear(d, c, weight=None, bias=None):
    layer = nn.utils.skip_init(nn.Linear, d, c, bias=bias is not False)
    with torch.no_grad():
        layer.weight.copy_(torch.zeros(c, d) if weight is None else weight)
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros(c) if bias is None else bias)
    return layer


def clusters(c=3, n=300, seed=0):
    y = torch.arange(c).repeat(n // c)
    return torch.eye(c)[y] + 0.3 * torch.randn(len(y), c, generator=generator(seed)), y


@pytest.mark.golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_parity_of_the_retraining(path):
    with np.load(path) as arrays:
        g = {name: torch.from_numpy(array) for name, array in arrays.items()}
    c, d = g["clf_w0"].shape
    head = linear(d, c).double()
    head.load_state_dict({"weight": g["clf_w0"], "bias": g["clf_b0"]})
    whole = CCVR(lr=0.01, momentum=0.9, weight_decay=0.0, epochs=5, batch_size=len(g["virtual_x"]))
    whole._retrain(head, g["virtual_x"], g["virtual_y"], generator(0))
    torch.testing.assert_close(head.weight.detach(), g["clf_w5"], rtol=0, atol=1e-10)
    torch.testing.assert_close(head.bias.detach(), g["clf_b5"], rtol=0, atol=1e-10)


def test_golden_files_are_there():
    assert GOLDEN


@pytest.mark.parametrize("kind", ["full", "diagonal", "shared"])
def test_a_classifier_that_favours_a_class_is_mended(kind):
    x, y = clusters()
    statistics = [class_statistics(x[y != k], y[y != k], 3, covariance=kind) for k in range(3)]
    biased = linear(3, 3, torch.eye(3), torch.tensor([3.0, 0.0, 0.0]))
    accuracy = [(head(x).argmax(1) == y).double().mean() for head in (biased, CCVR(lr=0.1)(biased, statistics))]
    assert accuracy[0] < 0.5
    assert accuracy[1] > 0.9


def test_only_the_last_layer_of_a_copy_changes():
    x, y = clusters()
    model = nn.Sequential(linear(3, 3, torch.eye(3)), nn.BatchNorm1d(3), nn.ReLU(), linear(3, 3, bias=False)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = collect_class_statistics(model, [(x, y)])
    calibrated = CCVR()(model, [statistics])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in calibrated.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"3.weight"}
    assert [m.training for m in calibrated.modules()] == [m.training for m in model.modules()]
    assert all(p.requires_grad and p.grad is None for p in calibrated.parameters())
    assert type(calibrated[3]) is nn.Linear
    chosen = CCVR()(model, [class_statistics(x, y, 3)], layer="0")
    assert not torch.equal(chosen[0].weight, model[0].weight)
    assert torch.equal(chosen[3].weight, model[3].weight)


def test_a_weight_that_is_tied_to_another_layer_is_untied():
    x, y = clusters()
    model = nn.Sequential(linear(3, 3, torch.eye(3), False), nn.ReLU(), linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    calibrated = CCVR()(model, [collect_class_statistics(model, [(x, y)])])
    assert torch.equal(calibrated[0].weight, torch.eye(3))
    assert not torch.equal(calibrated[2].weight, torch.eye(3))


def test_frozen_and_half_precision_layers_stay_so():
    x, y = clusters()
    frozen = linear(3, 3).half().requires_grad_(False)
    with torch.no_grad():
        new = CCVR(lr=0.1)(frozen, [class_statistics(x, y, 3)])
    assert new.weight.dtype == torch.float16
    assert not any(p.requires_grad for p in new.parameters())
    assert (new.float()(x).argmax(1) == y).double().mean() > 0.9


def test_the_seed_decides():
    x, y = clusters()
    statistics, head = [class_statistics(x, y, 3)], linear(3, 3)
    first, again, other = (CCVR(seed=seed)(head, statistics).weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_absent_class_is_pushed_down():
    x, y = clusters()
    statistics = class_statistics(x[y != 2], y[y != 2], 3)
    with pytest.warns(UserWarning, match=r"no virtual features for classes \[2\]"):
        new = calibrate_classifier(linear(3, 3), statistics, generator=generator(0))
    assert new(x[y != 2]).argmax(1).max() < 2


@pytest.mark.bad_input
@pytest.mark.filterwarnings("ignore:no virtual features")
def test_what_does_not_fit_is_refused():
    x, y = clusters()
    statistics = class_statistics(x, y, 3)
    with pytest.raises(InputError, match="3 classes and 3 features do not fit a classifier of 2 classes and 3"):
        CCVR()(linear(3, 2), [statistics])
    with pytest.raises(InputError, match="3 features do not fit a classifier of 3 classes and 4"):
        CCVR()(linear(4, 3), [statistics])
    with pytest.raises(InputError, match="at least one client's"):
        CCVR()(linear(3, 3), [])
    with pytest.raises(InputError, match=r"must have an nn.Linear"):
        CCVR()(nn.ReLU(), [statistics])
    with pytest.raises(InputError, match=r"linear must be an nn.Linear, got ReLU"):
        calibrate_classifier(nn.ReLU(), statistics, generator=generator(0))
    with pytest.raises(InputError, match="at least two classes must have virtual features, only class 1 has"):
        CCVR()(linear(3, 3), [class_statistics(x[y == 1], y[y == 1], 3)])
    far = ClassStatistics(torch.tensor([9, 9, 9]), 1e300 * statistics.means, statistics.covariances)
    with pytest.raises(InputError, match=r"lr must be smaller than 0.01: the classifier diverged"):
        CCVR()(linear(3, 3).double(), [far])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "argument",
    [{"samples": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"epochs": 0}, {"batch_size": 0}],
)
def test_settings_out_of_range(argument):
    with pytest.raises(InputError, match=next(iter(argument))):
        CCVR(**argument)
    with pytest.raises(InputError, match=next(iter(argument))):
        calibrate_classifier(linear(3, 3), class_statistics(*clusters(), 3), generator=generator(0), **argument)
