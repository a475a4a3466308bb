"""The catalogue promises nothing that is not there."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

from trimtab import catalog
from trimtab.claims import run as runner
from trimtab.core.checks import InputError

TESTS = Path(__file__).parent
METHODS = catalog.methods()
SYMBOLS = [(method, *name.rsplit(".", 1)) for method in METHODS for name in method.names]


def test_slugs_and_symbols_are_unique():
    assert METHODS
    assert len({m.slug for m in METHODS}) == len(METHODS)
    assert len({name for m in METHODS for name in m.names}) == len(SYMBOLS)


@pytest.mark.parametrize(("method", "stage", "symbol"), SYMBOLS, ids=[symbol for *_, symbol in SYMBOLS])
def test_every_symbol_is_there_and_its_example_runs(method, stage, symbol):
    found = getattr(import_module(stage), symbol)
    assert symbol in import_module(stage).__all__
    assert found.__doc__
    assert "Example:" in found.__doc__
    assert method.docstring(symbol).partition("\n")[0] == found.__doc__.partition("\n")[0]
    module = import_module(found.__module__)
    tests = [
        t for t in doctest.DocTestFinder(recurse=False).find(found, symbol, globs=vars(module).copy()) if t.examples
    ]
    assert tests, f"{symbol} has no example that runs"
    examples = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with torch.random.fork_rng(devices=[]):
        assert [examples.run(test).failed for test in tests] == [0] * len(tests)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_the_files_are_where_the_catalogue_says(method):
    assert all(file.is_file() for file in method.files)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_a_test_names_the_method(method):
    naming = [path for path in (TESTS / method.stage).rglob("test_*.py") if method.slug in path.read_text()]
    assert naming, f"no test in tests/{method.stage} names {method.slug}"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_the_claim_has_a_committed_result_of_its_own_expectations(method):
    claim = runner.load(method)
    result = catalog.result(method.slug)
    assert result is not None, f"trimtab claims run {method.slug}"
    assert result["statement"] == claim.statement
    assert [e["text"] for e in result["expectations"]] == [str(e) for e in claim.expectations]
    assert [int(seed) for seed in result["values"]] == list(claim.seeds)
    judged = claim.judge({int(seed): values for seed, values in result["values"].items()})
    assert [j.verdict for j in judged] == [e["verdict"] for e in result["expectations"]]


def test_a_method_is_found_by_slug_name_or_symbol():
    for name in ("24-eata", "EATA", "eata", "ETA"):
        assert catalog.find(name).slug == "24-eata"
    with pytest.raises(InputError, match="did you mean"):
        catalog.find("tentt")
    with pytest.raises(InputError, match="`trimtab list` shows what there is"):
        catalog.find("???")


def test_a_symbol_that_is_not_in_the_files():
    with pytest.raises(InputError, match=r"Nothing is not in adaptation/eata\.py"):
        catalog.find("eata").docstring("Nothing")


def test_parts_are_imported_and_read_from_where_they_lie():
    method = catalog.find("FactoredOutput")
    assert method.slug == "34-z-loss"
    assert method.imports.splitlines() == [
        f"from trimtab.losses import {', '.join(method.symbols)}",
        "from trimtab.nn import FactoredOutput",
    ]
    assert method.files == (*method.rooms, catalog.PACKAGE / "nn" / "factored_output.py")
    assert method.docstring("FactoredOutput").startswith("A linear layer without bias")
