"""The Flower app of card 47-ccvr: what it gives is what the plain functions give."""

import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

pytest.importorskip("flwr")
pytest.importorskip("ray")

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from trimtab.calibration import CCVR, class_statistics
from trimtab.core.checks import InputError
from trimtab.data import digits, dirichlet_partition
from trimtab.federated import client_app, server_app, simulate, train_locally

QUICK = partial(train_locally, epochs=1)
CONTEXT = Context(0, 0, {}, RecordDict(), {})


@pytest.fixture(autouse=True)
def _messages_can_be_made_outside_a_run(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Room(Grid):
    """A federation in this process; Flower's simulation without Ray."""

    def __init__(self, app, numbers):
        self.app = app
        self.contexts = {
            100 - number: Context(0, 100 - number, {"partition-id": number}, RecordDict(), {}) for number in numbers
        }

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        return [self.answer(message) for message in messages]

    def answer(self, message):
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(0, str(error)), reply_to=message)

    def set_run(self, run): ...
    def create_message(self, *arguments, **more): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...

    run = None


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10)
        )


def federation(clients=3, samples=120, seed=0):
    images = digits()[slice(samples)]
    parts = dirichlet_partition(images.labels, clients, 0.5, torch.Generator().manual_seed(seed))
    return [Subset(images.dataset(), part.tolist()) for part in parts]


def run_here(model, clients, numbers=None, data=None, train=QUICK, seed=0, grid=Room, **options):
    outcomes, numbers = [], numbers or range(len(clients))
    server = server_app(model, len(clients), outcomes.append, **options)
    client = client_app(network(1), data or clients, train=train, seed=seed)
    server(grid(client, numbers), CONTEXT)
    return outcomes[0]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def check_against_plain_functions(outcome, clients, ccvr):
    for data, found in zip(clients, outcome.statistics, strict=True):
        x, y = (torch.stack([torch.as_tensor(row[i]) for row in data]) for i in (0, 1))
        with torch.no_grad():
            plain = class_statistics(outcome.model.eval()[:-1](x), y, 10)
        assert torch.equal(found.counts, plain.counts)
        assert torch.equal(found.means, plain.means)
        assert torch.equal(found.covariances, plain.covariances)
    assert equal(outcome.calibrated, ccvr(outcome.model, outcome.statistics))
    assert not equal(outcome.calibrated, outcome.model)


@pytest.mark.filterwarnings("ignore:no virtual features")
def test_a_simulation_gives_what_the_plain_functions_give(monkeypatch):
    reports, environment = [], dict(os.environ)
    monkeypatch.setattr("flwr.supercore.telemetry.create_event", lambda *event: reports.append(event))
    model, clients, ccvr = network(), federation(2), CCVR(20, epochs=2, seed=3)
    outcome = simulate(model, clients, train=QUICK, rounds=2, ccvr=ccvr)
    check_against_plain_functions(outcome, clients, ccvr)
    again = run_here(model, clients, rounds=2, ccvr=ccvr)
    assert all(
        torch.allclose(a.float(), b.float(), atol=1e-5)
        for a, b in zip(outcome.model.state_dict().values(), again.model.state_dict().values())
    )
    assert equal(model, network())
    assert not reports
    assert dict(os.environ) == environment


@pytest.mark.filterwarnings("ignore:no virtual features")
def test_the_app_in_one_process():
    clients, ccvr = federation(), CCVR(20, epochs=2)
    outcome = run_here(network(), clients, rounds=2, ccvr=ccvr)
    check_against_plain_functions(outcome, clients, ccvr)
    assert outcome.model[2].num_batches_tracked.dtype == torch.int64
    reordered = run_here(network(), clients, numbers=[2, 0, 1], rounds=2, ccvr=ccvr)
    assert equal(reordered.calibrated, outcome.calibrated)
    assert not equal(run_here(network(), clients, seed=1, rounds=2, ccvr=ccvr).model, outcome.model)
    loaded = run_here(network(), clients, data=lambda number: clients[number], rounds=2, ccvr=ccvr)
    assert equal(loaded.model, outcome.model)


@pytest.mark.filterwarnings("ignore:no virtual features")
def test_the_average_is_weighted_by_samples():
    x, y = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
    clients = [TensorDataset(x[:10], y[:10]), TensorDataset(x[10:], y[10:])]

    def set_to_size(model, data, generator):
        with torch.no_grad():
            model[1].bias.fill_(len(data))

    outcome = run_here(network(), clients, train=set_to_size, rounds=1, covariance="shared", tukey=0.5)
    torch.testing.assert_close(outcome.model[1].bias, torch.full((16,), (10 * 10 + 20 * 20) / 30))
    assert {(s.covariance, s.tukey) for s in outcome.statistics} == {("shared", 0.5)}


def test_a_client_that_fails_is_named():
    def fail(model, data, generator):
        raise OSError("disk on fire")

    with pytest.raises(RuntimeError, match=r"client \d+ failed: disk on fire"):
        run_here(network(), federation(), train=fail)


@pytest.mark.filterwarnings("ignore:no virtual features")
def test_clients_that_do_not_answer():
    class Deaf(Room):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive(list(messages)[1:])

    with pytest.raises(RuntimeError, match="round 1: only 2 of 3 clients answered in time"):
        run_here(network(), federation(), grid=Deaf)
    with pytest.raises(RuntimeError, match="1 of 3 clients sent no statistics in 5 s"):
        run_here(network(), federation(), rounds=1, grid=Deaf, timeout=5, strategy=FedAvg(fraction_evaluate=0.0))


@pytest.mark.bad_input
def test_bad_input():
    clients = federation()
    with pytest.raises(InputError, match="none that is empty"):
        simulate(network(), [clients[0], Subset(clients[0].dataset, [])])
    with pytest.raises(InputError, match="at least one data set"):
        simulate(network(), [])
    with pytest.raises(InputError, match="workers must be at least 1"):
        simulate(network(), clients, workers=0)
    with pytest.raises(InputError, match="rounds must be at least 1"):
        simulate(network(), clients, rounds=0)
    with pytest.raises(InputError, match="model has no module named 'head'"):
        simulate(network(), clients, layer="head")
    with pytest.raises(InputError, match="covariance must be one of"):
        simulate(network(), clients, covariance="round")
    with pytest.raises(InputError, match="seed must be at least 0"):
        simulate(network(), clients, seed=-1)
    with pytest.raises(RuntimeError, match="must hold partition-id"):
        run_here(network(), clients, grid=lambda app, numbers: nameless(Room(app, numbers)))


def nameless(room):
    for context in room.contexts.values():
        context.node_config.clear()
    return room
