"""A killed audit goes on from its finished pieces, and never from another audit's."""

import math

import pytest
import torch

from trimtab.audit.workspace import Workspace
from trimtab.core.predictions import Predictions


def test_a_piece_is_made_once_and_survives_the_run(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"ece": 0.25, "kdece": math.nan}

    first = Workspace(tmp_path, {"seed": 0}).number("measure", make)
    again = Workspace(tmp_path, {"seed": 0})
    second = again.number("measure", make)
    assert len(made) == 1
    assert first["ece"] == second["ece"] == 0.25
    assert math.isnan(second["kdece"])
    assert again.seconds["measure"] >= 0


def test_predictions_come_back_exactly(tmp_path):
    predictions = Predictions(
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    )
    Workspace(tmp_path, {}).predictions("test", lambda: predictions)
    back = Workspace(tmp_path, {}).predictions("test", lambda: pytest.fail("made twice"))
    assert torch.equal(back.logits, predictions.logits)
    assert torch.equal(back.labels, predictions.labels)


@pytest.mark.parametrize(("identity", "fresh"), [({"seed": 1}, False), ({"seed": 0}, True)])
def test_pieces_of_another_audit_are_not_used(tmp_path, identity, fresh):
    Workspace(tmp_path, {"seed": 0}).number("measure", lambda: 1)
    assert Workspace(tmp_path, identity, fresh=fresh).number("measure", lambda: 2) == 2


def test_a_failing_piece_leaves_nothing(tmp_path):
    work = Workspace(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        work.number("measure", lambda: 1 / 0)
    assert not work.folder.exists()
