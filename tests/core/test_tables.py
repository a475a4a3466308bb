"""Tables on disk: every format, every layout, and everything that can be wrong with a file."""

from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from trimtab.core import tables
from trimtab.core.checks import InputError
from trimtab.core.tables import Table

ENDINGS = ("parquet", "feather", "csv", "npz")


def write_columns(path, columns, **settings):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **settings)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        pyarrow.csv.write_csv(table, path)
    return path


def some_fields(n=20, c=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(n, c, generator=g, dtype=dtype),
        "labels": torch.randint(c, (n,), generator=g),
        "features": torch.randn(n, 4, generator=g, dtype=dtype),
        "views": torch.randn(n, 2, c, generator=g, dtype=dtype),
        "weights": torch.rand(n, generator=g, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read_back_exactly(tmp_path, ending, dtype):
    fields = some_fields(dtype=dtype)
    tables.write(tmp_path / f"t.{ending}", fields)
    with Table.open(tmp_path / f"t.{ending}") as table:
        assert (table.n, table.c, table.kind, table.labelled, table.columnar) == (20, 3, "logit", True, True)
        found = table.read()
    assert set(found) == set(fields)
    for name, value in fields.items():
        exact = found[name].to(value.dtype) if ending == "csv" else found[name]  # text has no precision of its own
        assert exact.dtype == value.dtype
        assert torch.equal(exact, value), name


@pytest.mark.parametrize("ending", ENDINGS)
def test_only_the_fields_that_are_there(tmp_path, ending):
    tables.write(tmp_path / f"t.{ending}", {"logits": torch.zeros(2, 3), "labels": None})
    with Table.open(tmp_path / f"t.{ending}") as table:
        assert not table.labelled
        assert set(table.read()) == {"logits"}
        with pytest.raises(InputError, match="column 'label' is missing; found"):
            table.labels()


@pytest.mark.parametrize("name", ["logits", "probs"])
@pytest.mark.parametrize("kind", ["list", "fixed_size_list", "large_list"])
@pytest.mark.parametrize("ending", ["parquet", "feather"])
def test_list_columns(tmp_path, ending, kind, name):
    rows = np.array([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]], dtype=np.float32)
    types = {"list": pa.list_, "large_list": pa.large_list, "fixed_size_list": lambda t: pa.list_(t, 2)}
    column = pa.array(rows.tolist(), type=types[kind](pa.float32()))
    path = write_columns(tmp_path / f"t.{ending}", {name: column, "label": [0, 1, 0]})
    with Table.open(path) as table:
        assert (table.c, table.columnar) == (2, False)
        scores = table.scores()
        with pytest.raises(InputError, match="single classes can be read only from columns"):
            table.column(0)
    wanted = torch.from_numpy(rows)
    assert torch.allclose(scores if name == "logits" else scores.exp(), wanted)
    assert torch.isfinite(scores).all()


def test_probabilities_become_finite_log_probabilities(tmp_path):
    path = write_columns(tmp_path / "t.parquet", {"prob_0": [1.0, 0.25], "prob_1": [0.0, 0.75]})
    with Table.open(path) as table:
        scores = table.scores()
        assert torch.equal(table.column(1), torch.tensor([0.0, 0.75], dtype=torch.float64))
    assert scores[0, 1] == np.log(np.finfo(np.float64).tiny)
    assert torch.allclose(scores[1].exp(), torch.tensor([0.25, 0.75], dtype=torch.float64))


def test_columns_are_ordered_by_number_not_by_place(tmp_path):
    columns = {f"logit_{k}": [float(k)] for k in reversed(range(11))}
    with Table.open(write_columns(tmp_path / "t.parquet", columns)) as table:
        assert table.scores().tolist() == [[float(k) for k in range(11)]]


@pytest.mark.parametrize("rows", [1, 3, 7, 20, 100])
def test_blocks_cover_the_table_in_order(tmp_path, rows):
    fields = some_fields()
    tables.write(tmp_path / "t.parquet", fields)
    with Table.open(tmp_path / "t.parquet") as table:
        blocks = list(table.blocks(rows))
    assert [start for start, _ in blocks] == list(range(0, 20, rows))
    assert torch.equal(torch.cat([block for _, block in blocks]), fields["logits"])


def test_integer_scores_are_taken_as_numbers(tmp_path):
    path = write_columns(tmp_path / "t.csv", {"logit_0": [1, 2], "logit_1": [3, 0], "label": [0, 1]})
    with Table.open(path) as table:
        assert table.scores().dtype == torch.float64
        assert table.labels().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1.0]}, r"columns logit_0, logit_1, ... must be there, found \['x'\]|must be there, found \['x'\]"),
        ({"logit_0": [1.0], "logit_2": [1.0]}, "column 'logit_1' is missing"),
        ({"logit_1": [1.0], "logit_2": [1.0]}, "column 'logit_0' is missing"),
        ({"logit_0": [1.0, None], "logit_1": [0.0, 0.0]}, r"values must not be missing, found a null at row 1"),
        ({"logit_0": [1.0, np.nan], "logit_1": [0.0, 0.0]}, "must be finite, found nan at row 1, column 0"),
        ({"logit_0": ["a", "b"], "logit_1": [0.0, 0.0]}, "columns must be numeric, found one of type string"),
        ({"logit_0": [1.0]}, "must have at least 2 columns, got 1"),
        ({"prob_0": [0.5, 0.7], "prob_1": [0.5, 0.7]}, "must sum to one in every row .*, row 1 sums to 1.4"),
        ({"prob_0": [-0.5], "prob_1": [1.5]}, r"must lie in \[0, 1\], found -0.5 at row 0, column 0"),
        ({"logits": [[1.0, 2.0], [1.0]]}, "column 'logits' must hold 2 numbers a row"),
        ({"logits": [1.0, 2.0]}, "column 'logits' must hold lists, holds double"),
        ({"logit_0": [0.0], "logit_1": [0.0], "label": [2]}, r"column 'label' must lie in 0..1, found 2 at row 0"),
        ({"logit_0": [0.0], "logit_1": [0.0], "label": [0.0]}, "column 'label' must be integer class indices"),
        ({"logit_0": [0.0], "logit_1": [0.0], "label": ["cat"]}, "columns must be numeric, found one of type string"),
        ({"logit_0": [0.0], "logit_1": [0.0], "label": [None]}, "must"),
        ({"logit_0": [0.0], "logit_1": [0.0], "feature_1": [0.0]}, "column 'feature_0' is missing"),
        ({"logit_0": [0.0], "logit_1": [0.0], "view_0_0": [0.0]}, "column 'view_0_1' is missing"),
        ({"logit_0": pa.array([], pa.float64())}, "the table must have at least one row, found none"),
        ({"logits": [[1.0, 2.0], [1.0], [1.0, 2.0, 3.0]]}, "column 'logits' must hold 2 numbers a row, row 1 holds 1"),
        ({"logits": [[1.0, 2.0], None]}, "column 'logits' must hold 2 numbers a row, row 1 holds 0"),
        ({"logits": [[1.0, 2.0], [None, 1.0]]}, "values must not be missing, found a null at row 1"),
        ({"logits": [None, [1.0, 2.0]]}, "column 'logits' must hold lists, row 0 holds none"),
        ({"logits": [["a", "b"]]}, "columns must be numeric, found one of type string"),
    ],
)
@pytest.mark.bad_input
def test_a_column_is_missing_or_malformed(tmp_path, columns, message):
    path = write_columns(tmp_path / "scores.parquet", columns)
    with pytest.raises(InputError, match=message) as caught, Table.open(path) as table:
        table.read()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_way_to_be_no_table(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    with pytest.raises(InputError, match="no such file"):
        Table.open(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="the file is empty"):
        Table.open(path)
    path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(InputError, match=str(path)):
        Table.open(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="no such file"):
        Table.open(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("ending", ["parquet", "feather", "npz"])
def test_a_truncated_file(tmp_path, ending, share):
    path = tmp_path / f"t.{ending}"
    tables.write(path, some_fields(n=2000))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=str(path)), Table.open(path) as table:
        table.read()


@pytest.mark.parametrize("ending", ["parquet", "feather"])
def test_a_damaged_middle_gives_an_input_error_or_the_numbers_of_the_file(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    tables.write(path, some_fields(n=2000))
    whole = bytearray(path.read_bytes())
    for start in range(64, len(whole) - 64, len(whole) // 16):
        damaged = whole.copy()
        damaged[start : start + 32] = b"\xff" * 32
        path.write_bytes(damaged)
        with suppress(InputError), Table.open(path) as table:
            assert table.read()["logits"].shape == (2000, 3)


def test_an_unknown_ending(tmp_path):
    message = "the ending must be one of .parquet, .feather, .csv, .npz"
    with pytest.raises(InputError, match=message):
        Table.open(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match=message):
        tables.write(tmp_path / "t.xlsx", {"logits": torch.zeros(1, 2)})
    assert list(tmp_path.iterdir()) == []


def test_csv_without_rows(tmp_path):
    (tmp_path / "t.csv").write_text("logit_0,logit_1,label\n")
    with pytest.raises(InputError, match="the table must have at least one row, found none"):
        Table.open(tmp_path / "t.csv")


def test_csv_with_a_short_row(tmp_path):
    (tmp_path / "t.csv").write_text("logit_0,logit_1\n1,2\n3\n")
    with pytest.raises(InputError, match="cannot be read as csv"):
        Table.open(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"scores": np.zeros((2, 2))}, r"an array 'logits' or 'probs' must be there, found \['scores'\]"),
        (
            {"logits": np.zeros((2, 2)), "labels": np.zeros(3, int)},
            r"array 'labels' must have shape \(2,\), got \(3,\)",
        ),
        ({"logits": np.zeros(2)}, "array 'logits' must have 2 rows and the right axes"),
        ({"logits": np.float64(0)}, "array 'logits' must have 0 rows and the right axes"),
        ({"logits": np.zeros((2, 2)), "views": np.zeros((2, 2))}, "array 'views' must have 2 rows and the right axes"),
        ({"logits": np.zeros((0, 2))}, "the table must have at least one row, found none"),
        ({"logits": np.array([[object(), 1.0]], dtype=object)}, "cannot be read as npz"),
    ],
)
def test_malformed_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(InputError, match=message):
        Table.open(tmp_path / "t.npz")
