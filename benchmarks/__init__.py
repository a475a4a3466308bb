"""Benchmarks against peers, side by side in one run: `python -m benchmarks.bench_metrics` and so on."""
