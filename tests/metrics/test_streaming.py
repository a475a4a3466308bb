"""Tables on disk: exactly the numbers of tables in memory, in every layout, and intervals by subsampling."""

from dataclasses import replace

import definitions
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from trimtab import Predictions, metrics
from trimtab.core.checks import InputError
from trimtab.core.tables import Table
from trimtab.metrics import streaming


def write(path, scores, labels, layout):
    kind = "prob" if layout.startswith("prob") else "logit"
    scores = scores.softmax(1) if kind == "prob" else scores
    if layout.endswith("list"):
        columns = {f"{kind}s": list(scores.numpy())}
    else:
        columns = {f"{kind}_{k}": scores[:, k].numpy() for k in range(scores.shape[1])}
    table = pa.table(columns | {"label": labels.numpy()})
    if path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        pq.write_table(table, path, row_group_size=100)
    return path


def same_numbers(found, expected):
    assert set(found) == set(expected)
    for name in found:
        assert float(found[name]) == pytest.approx(float(expected[name]), abs=1e-12, rel=1e-12), name


@pytest.mark.parametrize("c", [2, 7])
@pytest.mark.parametrize("ending", ["parquet", "feather"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (layout, dtype)
        for layout in ("logit columns", "prob columns", "logit list", "prob list")
        for dtype in (torch.float16, torch.float32, torch.float64)
        if not (layout.startswith("prob") and dtype == torch.float16)  # rows that do not sum to one closely enough
    ],
)
def test_a_table_has_the_numbers_of_its_predictions(tmp_path, monkeypatch, c, ending, layout, dtype):
    monkeypatch.setattr(streaming, "_BLOCK_ELEMENTS", 150)
    monkeypatch.setattr(streaming, "_GROUP_ELEMENTS", 1200)
    logits, labels = definitions.some_logits(400, c, scale=2.0)
    logits[0, 1:] -= 1000  # probabilities that are exactly zero
    labels[0] = 0
    path = write(tmp_path / f"t.{ending}", logits.to(dtype), labels, layout)
    with Table.open(path) as table:
        found = metrics.table_suite(table, resamples=10)
    predictions = Predictions.read(path)
    in_memory = metrics.calibration_intervals(predictions.logits, predictions.labels, resamples=10)
    same_numbers({k: v.estimate for k, v in found.measures.items()}, {k: v.estimate for k, v in in_memory.items()})
    same_numbers({k: v.low for k, v in found.measures.items()}, {k: v.low for k, v in in_memory.items()})
    assert (found.n, found.n_fit, found.c) == (400, 400, c)
    for summary, temperature in ((found.before, 1.0), (found.after, found.temperature)):
        expected = metrics.summarise(predictions.logits, predictions.labels, resamples=10)
        if temperature != 1:
            wide = predictions.logits.float() if dtype == torch.float16 else predictions.logits
            expected = metrics.summarise(wide.double() / temperature, predictions.labels, resamples=10)
        exact = 1e-12 if temperature == 1 else 1e-5
        for name, interval in expected.headline.items():
            assert summary.headline[name].estimate == pytest.approx(interval.estimate, abs=exact), name
        assert summary.per_class["count"] == expected.per_class["count"]
        for name in ("recall", "mean_probability", "ece"):
            assert summary.per_class[name] == pytest.approx(expected.per_class[name], abs=exact)
        assert summary.interval_method == found.interval_method == expected.interval_method
        if temperature == 1:
            with Table.open(path) as table:
                alone = metrics.table_summary(table, resamples=10)
            for name, interval in summary.headline.items():
                assert alone.headline[name] == pytest.approx(interval, abs=1e-12), name
            assert replace(alone, headline=summary.headline) == summary
            assert summary.histogram == expected.histogram
            assert summary.reliability == expected.reliability
            assert summary.risk_coverage == expected.risk_coverage


@pytest.fixture
def large(tmp_path):
    logits, labels = definitions.some_logits(10_000, 3, dtype=torch.float32)
    with Table.open(write(tmp_path / "t.parquet", logits, labels, "logit columns")) as table:
        yield table, logits, labels


def test_subsampling_is_as_wide_as_the_bootstrap(large, monkeypatch):
    table = large[0]
    bootstrap = metrics.table_suite(table, temperature=1.7, resamples=200)
    monkeypatch.setattr(streaming, "_BOOTSTRAP_ELEMENTS", 100)
    subsampled = metrics.table_suite(table, temperature=1.7, resamples=200)
    assert "20 random disjoint subsets of 500 rows" in subsampled.interval_method
    assert subsampled.n_fit == 0
    for name in ("pre_ECE_15", "pre_cwCE_15", "pre_KSCE", "pre_MMCE", "post_NLL", "post_Brier"):
        ours, theirs = subsampled.measures[name], bootstrap.measures[name]
        assert ours.estimate == theirs.estimate
        assert 0.5 < (ours.high - ours.low) / (theirs.high - theirs.low) < 2, name
    for name, interval in subsampled.after.headline.items():
        assert interval.low <= interval.estimate <= interval.high, name
    assert metrics.table_suite(table, temperature=1.7, resamples=200) == subsampled


def test_the_temperature_of_a_large_table_is_fitted_on_a_sample(large, monkeypatch):
    table, logits, labels = large
    monkeypatch.setattr(streaming, "SAMPLE_ROWS", 5000)
    monkeypatch.setattr(streaming, "_BOOTSTRAP_ELEMENTS", 100)
    found = metrics.table_suite(table, resamples=10)
    assert found.n_fit == 5000
    assert found.temperature == pytest.approx(1.7, abs=0.1)
    exact = metrics.calibration_suite(logits, labels, temperature=found.temperature)
    same_numbers({name: interval.estimate for name, interval in found.measures.items()}, exact)


def test_sampled_rows_are_rows_of_the_table(large):
    table, logits, labels = large
    some, theirs = metrics.sample_rows(table, seed=1, rows=1000)
    where = {tuple(row): i for i, row in enumerate(logits.tolist())}
    places = [where[tuple(row)] for row in some.tolist()]
    assert places == sorted(set(places))
    assert len(places) == 1000
    assert torch.equal(labels[places], theirs)
    assert np.mean(places) == pytest.approx(5000, abs=500)
    everything, all_labels = metrics.sample_rows(table, seed=1)
    assert torch.equal(everything, logits)
    assert torch.equal(all_labels, labels)


@pytest.mark.bad_input
def test_bad_tables_are_refused(tmp_path):
    logits, labels = definitions.some_logits(20, 3)
    path = write(tmp_path / "t.parquet", logits, labels + 1, "logit columns")
    with Table.open(path) as table, pytest.raises(InputError, match=r"column 'label' must lie in 0..2"):
        metrics.table_suite(table)
    path = tmp_path / "without.parquet"
    pq.write_table(pa.table({f"logit_{k}": logits[:, k].numpy() for k in range(3)}), path)
    with Table.open(path) as table, pytest.raises(InputError, match="column 'label' is missing"):
        metrics.table_suite(table)
    logits[7, 1] = torch.nan
    with Table.open(write(tmp_path / "nan.parquet", logits, labels, "logit columns")) as table:
        with pytest.raises(InputError, match="must be finite, found nan at row 7, column 1"):
            metrics.table_suite(table)
        with pytest.raises(InputError, match="temperature must lie in"):
            metrics.table_suite(table, temperature=-1.0)
