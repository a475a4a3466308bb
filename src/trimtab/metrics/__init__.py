"""Measuring: calibration, ranking and proper scores, as pure functions and as `torchmetrics.Metric`."""

from trimtab.metrics.ace import AverageCalibrationError, average_calibration_error
from trimtab.metrics.adjusted_rand import AdjustedRandIndex, adjusted_rand_index
from trimtab.metrics.binary import BinaryCalibrationError, binary_calibration_error
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
    detection_ece,
    laace,
    laace_per_class,
    laece,
    laece_per_class,
)
from trimtab.metrics.ece import ExpectedCalibrationError, expected_calibration_error
from trimtab.metrics.ece_equal_mass import ExpectedCalibrationErrorEqualMass, expected_calibration_error_equal_mass
from trimtab.metrics.ence import ExpectedNormalisedCalibrationError, expected_normalised_calibration_error
from trimtab.metrics.harmonic import HarmonicCalibrationScore, harmonic_calibration_score
from trimtab.metrics.intervals import IntervalCoverage, IntervalWidth, interval_coverage, interval_width
from trimtab.metrics.kdece import KernelDensityError, kernel_density_error
from trimtab.metrics.ksce import KolmogorovSmirnovError, kolmogorov_smirnov_error
from trimtab.metrics.kuiper import KuiperError, kuiper_error
from trimtab.metrics.localisation import LocalisationRecallPrecision, LRPParts, lrp, lrp_optimal_thresholds
from trimtab.metrics.matching import Matches, match_detections
from trimtab.metrics.mce import MaximumCalibrationError, maximum_calibration_error
from trimtab.metrics.measures import COLUMNS
from trimtab.metrics.mmce import MaximumMeanCalibrationError, maximum_mean_calibration_error
from trimtab.metrics.nll import NegativeLogLikelihood, negative_log_likelihood
from trimtab.metrics.pinball import PinballLoss, pinball_loss
from trimtab.metrics.prediction_sets import (
    Coverage,
    SetSize,
    SizeStrata,
    SizeStratifiedCoverage,
    coverage,
    set_size,
    size_stratified_coverage,
)
from trimtab.metrics.qce import QuantileCalibrationError, quantile_calibration_error
from trimtab.metrics.reliability import Reliability, ReliabilityCurve, reliability_curve
from trimtab.metrics.retrieval import PooledRetrievalAUC, pooled_retrieval_auc
from trimtab.metrics.risk_coverage import AURC, RiskCoverage, RiskCoverageCurve, aurc, risk_coverage_curve
from trimtab.metrics.rmsce import RootMeanSquareCalibrationError, root_mean_square_calibration_error
from trimtab.metrics.roc import Roc, RocAuc, RocCurve, TarAtFar, roc_auc, roc_curve, tar_at_far
from trimtab.metrics.smece import SmoothCalibrationError, smooth_calibration_error
from trimtab.metrics.streaming import TableSuite, sample_rows, table_suite, table_summary
from trimtab.metrics.structural_similarity import MultiScaleSSIM, ms_ssim, ssim
from trimtab.metrics.summary import Summary, compare, essentials, summarise
from trimtab.metrics.tace import ThresholdedAdaptiveCalibrationError, thresholded_adaptive_calibration_error
from trimtab.metrics.top_label import top_label_errors
from trimtab.metrics.uce import UncertaintyCalibrationError, uncertainty_calibration_error

__all__ = [
    "AURC",
    "BINS",
    "COLUMNS",
    "AdjustedRandIndex",
    "AverageCalibrationError",
    "BinaryCalibrationError",
    "BrierDecomposition",
    "BrierParts",
    "BrierScore",
    "CalibrationSuite",
    "ClasswiseCalibrationError",
    "ClasswiseCalibrationErrorEqualMass",
    "Coverage",
    "DetectionECE",
    "ExpectedCalibrationError",
    "ExpectedCalibrationErrorEqualMass",
    "ExpectedNormalisedCalibrationError",
    "HarmonicCalibrationScore",
    "IntervalCoverage",
    "IntervalWidth",
    "KernelDensityError",
    "KolmogorovSmirnovError",
    "KuiperError",
    "LRPParts",
    "LaACE",
    "LaECE",
    "LocalisationRecallPrecision",
    "Matches",
    "MaximumCalibrationError",
    "MaximumMeanCalibrationError",
    "MultiScaleSSIM",
    "NegativeLogLikelihood",
    "PinballLoss",
    "PooledRetrievalAUC",
    "QuantileCalibrationError",
    "Reliability",
    "ReliabilityCurve",
    "RiskCoverage",
    "RiskCoverageCurve",
    "Roc",
    "RocAuc",
    "RocCurve",
    "RootMeanSquareCalibrationError",
    "SetSize",
    "SizeStrata",
    "SizeStratifiedCoverage",
    "SmoothCalibrationError",
    "Summary",
    "TableSuite",
    "TarAtFar",
    "ThresholdedAdaptiveCalibrationError",
    "UncertaintyCalibrationError",
    "adjusted_rand_index",
    "aurc",
    "average_calibration_error",
    "binary_calibration_error",
    "brier_decomposition",
    "brier_score",
    "calibration_intervals",
    "calibration_suite",
    "classwise_calibration_error",
    "classwise_calibration_error_equal_mass",
    "compare",
    "coverage",
    "detection_ece",
    "essentials",
    "expected_calibration_error",
    "expected_calibration_error_equal_mass",
    "expected_normalised_calibration_error",
    "harmonic_calibration_score",
    "interval_coverage",
    "interval_width",
    "kernel_density_error",
    "kolmogorov_smirnov_error",
    "kuiper_error",
    "laace",
    "laace_per_class",
    "laece",
    "laece_per_class",
    "lrp",
    "lrp_optimal_thresholds",
    "match_detections",
    "maximum_calibration_error",
    "maximum_mean_calibration_error",
    "ms_ssim",
    "negative_log_likelihood",
    "pinball_loss",
    "pooled_retrieval_auc",
    "quantile_calibration_error",
    "reliability_curve",
    "risk_coverage_curve",
    "roc_auc",
    "roc_curve",
    "root_mean_square_calibration_error",
    "sample_rows",
    "set_size",
    "size_stratified_coverage",
    "smooth_calibration_error",
    "ssim",
    "summarise",
    "table_suite",
    "table_summary",
    "tar_at_far",
    "thresholded_adaptive_calibration_error",
    "top_label_errors",
    "uncertainty_calibration_error",
]
