"""Measuring: calibration, ranking and proper scores, as pure functions and as `torchmetrics.Metric`."""

from trimtab.metrics.binning import BINS
from trimtab.metrics.brier import BrierDecomposition, BrierParts, BrierScore, brier_decomposition, brier_score
from trimtab.metrics.calibration import CalibrationSuite, calibration_intervals, calibration_suite
from trimtab.metrics.classwise_ece import ClasswiseCalibrationError, classwise_calibration_error
from trimtab.metrics.classwise_ece_equal_mass import (
    ClasswiseCalibrationErrorEqualMass,
    classwise_calibration_error_equal_mass,
)
from trimtab.metrics.detection import (
    DetectionECE,
    LaACE,
    LaECE,
    LocalisationRecallPrecision,
    LRPParts,
    detection_ece,
    laace,
    laace_per_class,
    laece,
    laece_per_class,
    lrp,
    lrp_optimal_thresholds,
)
from trimtab.metrics.ece import ExpectedCalibrationError, expected_calibration_error
from trimtab.metrics.ece_equal_mass import ExpectedCalibrationErrorEqualMass, expected_calibration_error_equal_mass
from trimtab.metrics.harmonic import HarmonicCalibrationScore, harmonic_calibration_score
from trimtab.metrics.kdece import KernelDensityError, kernel_density_error
from trimtab.metrics.ksce import KolmogorovSmirnovError, kolmogorov_smirnov_error
from trimtab.metrics.matching import Matches, match_detections
from trimtab.metrics.mce import MaximumCalibrationError, maximum_calibration_error
from trimtab.metrics.measures import COLUMNS
from trimtab.metrics.mmce import MaximumMeanCalibrationError, maximum_mean_calibration_error
from trimtab.metrics.nll import NegativeLogLikelihood, negative_log_likelihood
from trimtab.metrics.reliability import Reliability, ReliabilityCurve, reliability_curve
from trimtab.metrics.risk_coverage import AURC, RiskCoverage, RiskCoverageCurve, aurc, risk_coverage_curve
from trimtab.metrics.roc import Roc, RocAuc, RocCurve, roc_auc, roc_curve
from trimtab.metrics.streaming import TableSuite, sample_rows, table_suite, table_summary
from trimtab.metrics.summary import Summary, compare, essentials, summarise
from trimtab.metrics.top_label import top_label_errors

__all__ = [
    "AURC",
    "BINS",
    "COLUMNS",
    "BrierDecomposition",
    "BrierParts",
    "BrierScore",
    "CalibrationSuite",
    "ClasswiseCalibrationError",
    "ClasswiseCalibrationErrorEqualMass",
    "DetectionECE",
    "ExpectedCalibrationError",
    "ExpectedCalibrationErrorEqualMass",
    "HarmonicCalibrationScore",
    "KernelDensityError",
    "KolmogorovSmirnovError",
    "LRPParts",
    "LaACE",
    "LaECE",
    "LocalisationRecallPrecision",
    "Matches",
    "MaximumCalibrationError",
    "MaximumMeanCalibrationError",
    "NegativeLogLikelihood",
    "Reliability",
    "ReliabilityCurve",
    "RiskCoverage",
    "RiskCoverageCurve",
    "Roc",
    "RocAuc",
    "RocCurve",
    "Summary",
    "TableSuite",
    "aurc",
    "brier_decomposition",
    "brier_score",
    "calibration_intervals",
    "calibration_suite",
    "classwise_calibration_error",
    "classwise_calibration_error_equal_mass",
    "compare",
    "detection_ece",
    "essentials",
    "expected_calibration_error",
    "expected_calibration_error_equal_mass",
    "harmonic_calibration_score",
    "kernel_density_error",
    "kolmogorov_smirnov_error",
    "laace",
    "laace_per_class",
    "laece",
    "laece_per_class",
    "lrp",
    "lrp_optimal_thresholds",
    "match_detections",
    "maximum_calibration_error",
    "maximum_mean_calibration_error",
    "negative_log_likelihood",
    "reliability_curve",
    "risk_coverage_curve",
    "roc_auc",
    "roc_curve",
    "sample_rows",
    "summarise",
    "table_suite",
    "table_summary",
    "top_label_errors",
]
