"""Measuring: calibration, ranking and proper scores, as pure functions and as `torchmetrics.Metric`."""
