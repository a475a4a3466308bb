"""After training, on scores: calibrators that turn logits into true probabilities."""

from trimtab.calibration.base import Calibrator, load
from trimtab.calibration.beta import BetaCalibration
from trimtab.calibration.ccvr import CCVR, calibrate_classifier
from trimtab.calibration.class_statistics import (
    ClassStatistics,
    class_statistics,
    collect_class_statistics,
    merge_class_statistics,
)
from trimtab.calibration.conformal import ConformalSets
from trimtab.calibration.correctness_aware import CorrectnessAware, CorrectnessAwareLoss, version_features
from trimtab.calibration.demonstrations import DemonstrationSampler
from trimtab.calibration.detection import DetectionCalibrator
from trimtab.calibration.ensemble_temperature import EnsembleTemperatureScaling
from trimtab.calibration.h_calibration import HCalibration, HCalibrationLoss
from trimtab.calibration.histogram import HistogramBinning
from trimtab.calibration.isotonic import IsotonicCalibration
from trimtab.calibration.label_words import LabelWords
from trimtab.calibration.matrix import MatrixScaling
from trimtab.calibration.pareto import ParetoSelfSupervision, reweight_sources, risk_score
from trimtab.calibration.pareto_loss import ParetoLoss
from trimtab.calibration.platt import PlattScaling
from trimtab.calibration.risk import apply_sources, choose_examples, error_calibration, reask
from trimtab.calibration.sdm import SDM
from trimtab.calibration.sdm_loss import SDMLoss, sdm_activation
from trimtab.calibration.selective import SelectivePrediction
from trimtab.calibration.self_ensemble import SelfEnsemble, batch_calibration, self_ensemble
from trimtab.calibration.temperature import TemperatureScaling
from trimtab.calibration.uncalibrated import Uncalibrated
from trimtab.calibration.vector import VectorScaling
from trimtab.calibration.virtual_features import sample_virtual_features

# from the simplest to the most flexible: the order in which the one-standard-error rule prefers them
CALIBRATORS: tuple[type[Calibrator], ...] = (
    Uncalibrated,
    TemperatureScaling,
    EnsembleTemperatureScaling,
    PlattScaling,
    BetaCalibration,
    VectorScaling,
    MatrixScaling,
    HCalibration,
    CorrectnessAware,
    HistogramBinning,
    IsotonicCalibration,
    SDM,
)

__all__ = [
    "CALIBRATORS",
    "CCVR",
    "SDM",
    "BetaCalibration",
    "Calibrator",
    "ClassStatistics",
    "ConformalSets",
    "CorrectnessAware",
    "CorrectnessAwareLoss",
    "DemonstrationSampler",
    "DetectionCalibrator",
    "EnsembleTemperatureScaling",
    "HCalibration",
    "HCalibrationLoss",
    "HistogramBinning",
    "IsotonicCalibration",
    "LabelWords",
    "MatrixScaling",
    "ParetoLoss",
    "ParetoSelfSupervision",
    "PlattScaling",
    "SDMLoss",
    "SelectivePrediction",
    "SelfEnsemble",
    "TemperatureScaling",
    "Uncalibrated",
    "VectorScaling",
    "apply_sources",
    "batch_calibration",
    "calibrate_classifier",
    "choose_examples",
    "class_statistics",
    "collect_class_statistics",
    "error_calibration",
    "load",
    "merge_class_statistics",
    "reask",
    "reweight_sources",
    "risk_score",
    "sample_virtual_features",
    "sdm_activation",
    "self_ensemble",
    "version_features",
]
