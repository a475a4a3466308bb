"""Federated averaging with CCVR behind it, as a Flower app: clients train, then send class statistics once.

`client_app` and `server_app` are ordinary Flower apps for a federation of real machines (``flwr run``); `simulate` runs
both on this one, in Ray's worker processes. Whoever has the clients' statistics already needs none of this: `CCVR` is
a plain function of them, and gives exactly what the app gives.

A client sends its model and number of samples in every round of training, and in one more round the count, mean and
covariance of each class's features: never a sample (but see `trimtab.calibration.class_statistics` on what a mean may
tell). Nothing of ours is pickled: models and statistics travel as Flower's arrays, which are NumPy's without pickle;
`simulate` alone leaves it to Ray to bring model, data and training function to its processes on the same machine.

Needs ``trimtab[federated]``. Flower reports each simulation to its makers; `simulate` does not. For your own ``flwr``
commands, set ``FLWR_TELEMETRY_ENABLED=0``.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trimtab.calibration import CCVR, ClassStatistics, collect_class_statistics
from trimtab.calibration.class_statistics import Covariance, checked_options, classifier
from trimtab.core import checks, modules
from trimtab.core.checks import InputError
from trimtab.core.predictions import logits_of, take_apart

Data = Sequence[Dataset[Any]] | Callable[[int], Dataset[Any]]
Train = Callable[[nn.Module, Dataset[Any], torch.Generator], None]
_STATISTICS = "class_statistics"


@dataclass(frozen=True, eq=False)
class Federation:
    """What a federation ends with.

    Attributes:
        model: the average of the clients' models after the last round.
        calibrated: the same with its classifier recalibrated.
        statistics: of each client's features under `model`, in the order of their partitions.
    """

    model: nn.Module
    calibrated: nn.Module
    statistics: list[ClassStatistics]


def train_locally(
    model: nn.Module,
    data: Dataset[Any],
    generator: torch.Generator,
    *,
    epochs: int = 10,
    lr: float = 0.05,
    momentum: float = 0.9,
    batch_size: int = 32,
) -> None:
    """SGD on the cross-entropy, in place: what a client does in a round, unless told otherwise.

    Args:
        model: the global model's copy.
        data: (input, label) pairs, or what else `Predictions.collect` reads in batches.
        generator: orders the samples.
        epochs: passes over the data a round; 10 as in the paper of CCVR.
        lr: learning rate. Change these with ``functools.partial(train_locally, lr=0.01)``.
        momentum: of SGD.
        batch_size: samples a step.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from trimtab.federated import train_locally
        >>> model, data = torch.nn.Linear(2, 2), TensorDataset(torch.eye(2), torch.tensor([0, 1]))
        >>> train_locally(model, data, torch.Generator().manual_seed(0), epochs=50)
        >>> model(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """
    device = modules.device_of(model)
    optimizer = torch.optim.SGD(model.train().parameters(), lr, momentum)
    loader = DataLoader(data, batch_size, shuffle=True, generator=generator)
    for _ in range(epochs):
        for batch in loader:
            inputs, labels = take_apart(batch, device)
            if labels is None:
                raise InputError("data must hold labels, a batch has none")
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(logits_of(model, inputs), labels.to(device)))
            optimizer.step()


def client_app(model: nn.Module, data: Data, *, train: Train = train_locally, seed: int = 0) -> ClientApp:
    """What every client of a federation runs.

    Args:
        model: of the architecture that the server has; its weights do not matter.
        data: the data sets of the clients, or a function that gives that of a client's own number (``partition-id`` of
            the node's configuration).
        train: trains a model in place on a client's data.
        seed: together with the client's number and the round it seeds the generator that `train` is given.

    Returns:
        An app that answers ``train`` with its model, and ``query.class_statistics`` with its statistics.
    """
    client = _Client(copy.deepcopy(model), data, train, checks.integer(seed, "seed", low=0))
    app = ClientApp()
    app.train()(client.fit)
    app.query(_STATISTICS)(client.statistics)
    return app


def server_app(
    model: nn.Module,
    clients: int,
    finished: Callable[[Federation], object],
    *,
    rounds: int = 10,
    ccvr: CCVR | None = None,
    layer: str | None = None,
    covariance: Covariance = "full",
    tukey: float = 1.0,
    strategy: Strategy | None = None,
    timeout: float = 3600,
) -> ServerApp:
    """What the server of a federation runs.

    Args:
        model: where training starts; it stays as it is.
        clients: how many to wait for, >= 1.
        finished: called once, with the outcome: to write the models to disk, say.
        rounds: of training, >= 1; one of statistics follows.
        ccvr: recalibrates the classifier; ``CCVR()`` by default.
        layer: name of the linear layer that classifies; by default the model's last one.
        covariance: see `class_statistics`.
        tukey: see `class_statistics`.
        strategy: how models are averaged; by default over all clients, weighted by their samples, in the order of
            their numbers, so that a run can be repeated bit by bit, and ended by any client's failure. Flower's own
            `FedAvg` trains on without those that fail; the round of statistics needs all that are connected.
        timeout: seconds to wait for the clients in a round.

    Raises:
        InputError: an argument is out of range, or the model has no such layer.
        RuntimeError: (when run) a client failed, or did not answer in time.
    """
    checks.integer(clients, "clients", low=1)
    checks.integer(rounds, "rounds", low=1)
    checked_options(covariance, tukey)
    classifier(model, layer)
    recalibrate = CCVR() if ccvr is None else ccvr
    average = _OrderedAverage(clients) if strategy is None else strategy
    start = copy.deepcopy(model)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        averaged = copy.deepcopy(start)
        outcome = average.start(grid, _arrays(averaged), rounds, timeout)
        _load(averaged, outcome.arrays)
        options = ConfigRecord({"layer": layer or "", "covariance": covariance, "tukey": float(tukey)})
        content = RecordDict({"arrays": _arrays(averaged), "options": options})
        asked = [
            Message(content, dst_node_id=node, message_type=f"query.{_STATISTICS}") for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(asked, timeout=timeout))
        if len(replies) < len(asked):
            raise RuntimeError(
                f"{len(asked) - len(replies)} of {len(asked)} clients sent no statistics in {timeout:g} s"
            )
        statistics = [
            ClassStatistics(**reply.content["statistics"].to_torch_state_dict(), covariance=covariance, tukey=tukey)
            for reply in _in_order(replies)
        ]
        finished(Federation(averaged, recalibrate(averaged, statistics, layer=layer), statistics))

    return app


def simulate(
    model: nn.Module,
    clients: Sequence[Dataset[Any]],
    *,
    train: Train = train_locally,
    seed: int = 0,
    workers: int = 1,
    gpus: float = 0.0,
    verbose: bool = False,
    **options: Any,
) -> Federation:
    """Run a federation on this machine, in Flower's simulation.

    Args:
        model: where training starts; it stays as it is.
        clients: one data set each, as `dirichlet_partition` divides one.
        train: see `client_app`.
        seed: see `client_app`.
        workers: processes, one CPU each, in which clients train side by side; the outcome does not depend on it.
        gpus: share of a GPU that each process is given; `train` decides what it does with it.
        verbose: show Flower's log.
        **options: the keyword arguments of `server_app`.

    Raises:
        InputError: an argument is out of range.
        RuntimeError: a client failed; the message holds its error.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from safetensors.torch import save_file
        >>> from torch.utils.data import Subset
        >>> from trimtab.data import digits, dirichlet_partition
        >>> from trimtab.federated import simulate, train_locally
        >>> images = digits()
        >>> parts = dirichlet_partition(images.labels, 10, 0.05, torch.Generator().manual_seed(0))
        >>> clients = [Subset(images.dataset(), part.tolist()) for part in parts]
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        ... )
        >>> federation = simulate(model, clients, train=partial(train_locally, epochs=5))  # doctest: +SKIP
        >>> save_file(federation.calibrated.state_dict(), "model.safetensors")  # doctest: +SKIP
    """
    checks.integer(workers, "workers", low=1)
    checks.number(gpus, "gpus", low=0)
    if not len(clients) or not all(len(data) for data in clients):  # type: ignore[arg-type]
        raise InputError(f"clients must hold at least one data set and none that is empty, got {len(clients)}")
    outcomes: list[Federation] = []
    client = client_app(model, clients, train=train, seed=seed)
    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": float(gpus)},
        "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": verbose},
    }
    with _by_itself(verbose):
        server = server_app(model, len(clients), outcomes.append, **options)
        run_simulation(server, client, len(clients), backend_config=backend)
    return outcomes[0]


@dataclass(frozen=True)
class _Client:
    """Answers to the server's messages; no closure, so that it can be sent to another process."""

    model: nn.Module
    data: Data
    train: Train
    seed: int

    def fit(self, message: Message, context: Context) -> Message:
        number, data = self._own(context)
        model = self._received(message)
        chance = np.random.SeedSequence([self.seed, number, int(message.content["config"]["server-round"])])
        generator = torch.Generator().manual_seed(int(chance.generate_state(1)[0]))
        self.train(model, data, generator)
        metrics = MetricRecord({"num-examples": len(data)})  # type: ignore[arg-type]
        return _reply(message, number, arrays=_arrays(model), metrics=metrics)

    def statistics(self, message: Message, context: Context) -> Message:
        number, data = self._own(context)
        options: Any = message.content["options"]
        found = collect_class_statistics(
            self._received(message),
            DataLoader(data, batch_size=256, generator=torch.Generator()),
            layer=options["layer"] or None,
            covariance=options["covariance"],
            tukey=options["tukey"],
        )
        state = {"counts": found.counts, "means": found.means, "covariances": found.covariances}
        return _reply(message, number, statistics=ArrayRecord(state))

    def _own(self, context: Context) -> tuple[int, Dataset[Any]]:
        number = context.node_config.get("partition-id")
        if number is None:
            raise InputError("the node's configuration must hold partition-id, the client's number")
        return int(number), self.data(int(number)) if callable(self.data) else self.data[int(number)]

    def _received(self, message: Message) -> nn.Module:
        model = copy.deepcopy(self.model)
        _load(model, message.content["arrays"])
        return model


class _OrderedAverage(FedAvg):
    """Flower's average over all clients, summed in the order of their numbers."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.clients = clients

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        answers = _in_order(replies)
        if len(answers) < self.clients:
            raise RuntimeError(f"round {server_round}: only {len(answers)} of {self.clients} clients answered in time")
        return super().aggregate_train(server_round, answers)


def _reply(message: Message, number: int, **records: Any) -> Message:
    return Message(RecordDict({**records, "client": ConfigRecord({"number": number})}), reply_to=message)


def _in_order(replies: Iterable[Message]) -> list[Message]:
    """The replies by the number of the client, if none of them failed."""
    replies = list(replies)
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"client {reply.metadata.src_node_id} failed: {reply.error.reason}")
    return sorted(replies, key=lambda reply: int(reply.content["client"]["number"]))


def _arrays(model: nn.Module) -> ArrayRecord:
    return ArrayRecord(dict(model.state_dict()))


def _load(model: nn.Module, arrays: Any) -> None:
    """Load an average, whose counters are no integers any more."""
    state = arrays.to_torch_state_dict()
    for name, own in model.state_dict().items():
        if name in state and not own.is_floating_point():
            state[name] = state[name].double().round()
    model.load_state_dict(state)


@contextmanager
def _by_itself(verbose: bool) -> Iterator[None]:
    """A simulation that reports to nobody, and leaves the environment and, if not verbose, the log as they were."""
    environment, logger = dict(os.environ), logging.getLogger("flwr")
    level = logger.level
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    if not verbose:
        logger.setLevel(logging.ERROR)
    try:
        # Flower reads its variable once, at import, and this process may have imported it before
        with mock.patch.object(sys.modules[run_simulation.__module__], "event"):
            yield
    finally:
        logger.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
