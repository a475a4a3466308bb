"""ONNX files, run by ONNX Runtime."""

import numpy as np
import pytest
import torch
from kinds import fit, fitted, having, on_logits_alone
from score_sets import generator, overconfident
from torch import nn

from trimtab import calibration
from trimtab.calibration import Calibrator, TemperatureScaling
from trimtab.calibration.export import to_onnx
from trimtab.core.checks import InputError

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path, x):
    session = onnxruntime.InferenceSession(path)
    (name,) = (node.name for node in session.get_inputs())
    (out,) = session.run(None, {name: x.numpy()})
    return out


@on_logits_alone
@pytest.mark.parametrize("c", [2, 4])
def test_the_file_says_what_the_calibrator_says(kind, c, tmp_path):
    logits, labels = overconfident(300, c, dtype=torch.float32)
    calibrator = fit(kind, logits, labels)
    to_onnx(None, calibrator, logits[:3], tmp_path / "calibrator.onnx")
    far = 50 * torch.randn(100, c, generator=generator(1))
    for x in (logits, far, logits[:1]):
        expected = calibrator(x)
        near = torch.stack([calibrator(x * (1 + 1e-5)), calibrator(x * (1 - 1e-5))])
        smooth = (
            ((near - expected).abs() < 1e-3 * expected.abs() + 1e-4).all(2).all(0).numpy()
        )  # no step within a rounding
        assert smooth.mean() > 0.9
        found = run(tmp_path / "calibrator.onnx", x)
        np.testing.assert_allclose(found[smooth], expected.numpy()[smooth], atol=1e-3, rtol=1e-3)


def test_a_model_and_its_calibrator_in_one_file(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    calibrator = TemperatureScaling().fit(*overconfident(100, 3, dtype=torch.float32))
    model.train()
    model[0].eval()
    x = torch.randn(20, 6, generator=generator(1))
    to_onnx(model, calibrator, x[:2], tmp_path / "model.onnx")
    assert [module.training for module in model] == [False, True, True, True, True]
    with torch.no_grad():
        expected = calibrator(model.eval()(x)).numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", x), expected, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_nothing_is_left_of_a_model_that_cannot_be_traced(tmp_path):
    class Stubborn(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    calibrator = TemperatureScaling().fit(*overconfident(100, 3, dtype=torch.float32))
    with pytest.raises(Exception, match="export"):
        to_onnx(Stubborn(), calibrator, torch.randn(2, 3, generator=generator(0)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
def test_what_cannot_be_exported_is_refused(tmp_path):
    class NeedsFeatures(Calibrator):
        needs = frozenset({"features"})

        def _fit(self, logits, labels, weights, features):
            pass

    logits, labels = overconfident(20, 3)
    with pytest.raises(InputError, match="this TemperatureScaling is not fitted"):
        to_onnx(None, TemperatureScaling(), logits, tmp_path / "calibrator.onnx")
    with pytest.raises(InputError, match=r"this NeedsFeatures needs \['features'\]"):
        to_onnx(None, NeedsFeatures().fit(logits, labels, features=logits), logits, tmp_path / "calibrator.onnx")
    with pytest.raises(InputError, match="calibrator must map logits to log-probabilities; a Softmax does not"):
        to_onnx(None, nn.Softmax(1), logits, tmp_path / "calibrator.onnx")


PUBLIC = [getattr(calibration, name) for name in calibration.__all__]
NEEDY = [kind for kind in PUBLIC if isinstance(kind, type) and issubclass(kind, Calibrator) and kind.needs]


@pytest.mark.parametrize("kind", NEEDY, ids=lambda kind: kind.__name__)
def test_whoever_needs_more_than_logits_is_refused(kind, tmp_path):
    with pytest.raises(InputError, match=f"this {kind.__name__} needs .'{min(kind.needs)}'"):
        to_onnx(None, kind(), torch.zeros(2, 3), tmp_path / "calibrator.onnx")


@having("tracing")
@pytest.mark.parametrize("c", [2, 4])
def test_a_model_and_its_calibrator_under_torch_export(kind, c):
    logits, labels = overconfident(300, c, dtype=torch.float32)
    model = nn.Sequential(nn.utils.skip_init(nn.Linear, 3, c), nn.Tanh())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(2)))
    chain = nn.Sequential(model, fitted(kind, logits, labels)).eval()
    x = 3 * torch.randn(50, 3, generator=generator(1))
    exported = torch.export.export(chain, (x[:7],), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    for batch in (x, x[:1], x[:7]):
        torch.testing.assert_close(exported(batch), chain(batch))
