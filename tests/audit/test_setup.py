"""The door of a model audit: what a setup function may return, and what is said when it does not."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab.audit.setup import Setup, load
from trimtab.core.checks import InputError


def loader():
    return DataLoader(TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), batch_size=2)


def write(folder, body):
    path = folder / "my_project.py"
    path.write_text(body)
    return f"{path}:setup"


GOOD = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from trimtab.audit import Setup
import beside
def setup():
    data = DataLoader(TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
    return Setup(torch.nn.Linear(3, beside.CLASSES, device="meta"), calibration=data, test=data)
"""


def test_a_file_is_loaded_and_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("CLASSES = 2")
    assert load(write(tmp_path, GOOD)).model.out_features == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def setup(:", "cannot be imported: SyntaxError"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def set_up(): ...", "has no function 'setup'"),
        ("def setup(): raise RuntimeError('no weights here')", "raised RuntimeError: no weights here"),
        ("def setup(): return 3", "must return a trimtab.audit.Setup, returned int"),
        ("def setup(needed): ...", "raised TypeError"),
    ],
)
def test_what_is_wrong_with_a_setup_file_is_said(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, body))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:setup", "no such file"),
        ("no.such.package:setup", "cannot be imported"),
        ("setup", "must have the form"),
        (":setup", "must have the form"),
    ],
)
def test_a_place_that_does_not_exist_is_named(spec, message):
    with pytest.raises(InputError, match=message):
        load(spec)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "model must be a torch.nn.Module, got int"),
        ({"test": None}, "test must be an iterable of batches, got NoneType"),
        ({"calibration": iter([])}, "calibration must be iterable more than once"),
        ({"shifts": {"none": []}}, "must not use the name 'none'"),
        ({"shifts": {"fog": 1}}, "fog must be an iterable of batches"),
    ],
)
def test_a_setup_that_cannot_be_audited_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        Setup(**{"model": nn.Identity(), "calibration": loader(), "test": loader(), **change})
