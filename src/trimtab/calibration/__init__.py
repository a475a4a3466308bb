"""After training, on scores: calibrators that turn logits into true probabilities."""

from trimtab.calibration.base import Calibrator, load
from trimtab.calibration.beta import BetaCalibration
from trimtab.calibration.conformal import ConformalSets
from trimtab.calibration.ensemble_temperature import EnsembleTemperatureScaling
from trimtab.calibration.histogram import HistogramBinning
from trimtab.calibration.isotonic import IsotonicCalibration
from trimtab.calibration.matrix import MatrixScaling
from trimtab.calibration.platt import PlattScaling
from trimtab.calibration.self_ensemble import SelfEnsemble, batch_calibration, self_ensemble
from trimtab.calibration.selective import SelectivePrediction
from trimtab.calibration.temperature import TemperatureScaling
from trimtab.calibration.uncalibrated import Uncalibrated
from trimtab.calibration.vector import VectorScaling

# from the simplest to the most flexible: the order in which the one-standard-error rule prefers them
CALIBRATORS: tuple[type[Calibrator], ...] = (
    Uncalibrated,
    TemperatureScaling,
    EnsembleTemperatureScaling,
    PlattScaling,
    BetaCalibration,
    VectorScaling,
    MatrixScaling,
    HistogramBinning,
    IsotonicCalibration,
)

__all__ = [
    "CALIBRATORS",
    "BetaCalibration",
    "Calibrator",
    "ConformalSets",
    "EnsembleTemperatureScaling",
    "HistogramBinning",
    "IsotonicCalibration",
    "MatrixScaling",
    "PlattScaling",
    "SelfEnsemble",
    "SelectivePrediction",
    "TemperatureScaling",
    "Uncalibrated",
    "VectorScaling",
    "batch_calibration",
    "load",
    "self_ensemble",
]
