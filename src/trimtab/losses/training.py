"""Train a classifier with an objective called by name: what each of them asks of the loop, in one place.

`train` is the plain loop: forward, loss, backward, step. An `Objective` is what differs: how a batch becomes a loss,
and what is to be done after a step. `OBJECTIVES` holds all that a classifier with logits (n, c) can be trained with, at
their defaults, beside cross-entropy, label smoothing and focal loss. The audit and the comparison in the docs train
with them; in a loop of your own the losses are one line each.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks, modules, progress
from trimtab.core.checks import InputError
from trimtab.core.optimizers import ADAM, OptimizerFactory, built
from trimtab.core.predictions import take_apart
from trimtab.losses.anyloss import AnyLoss
from trimtab.losses.base import logits_from, pair, scalar
from trimtab.losses.calibration_terms import DCA, MDCA, MMCE
from trimtab.losses.direct_coverage import DirectCoverage
from trimtab.losses.ensloss import EnsLoss
from trimtab.losses.indexed import numbered
from trimtab.losses.mann_whitney import MannWhitney
from trimtab.losses.mixtures import make_mixtures
from trimtab.losses.mixup import DMixup
from trimtab.losses.rankmixup import MNDCG, RankMixup
from trimtab.losses.saf import MESA, SAF
from trimtab.losses.spherical import SquaredErrorLoss, TaylorSoftmaxLoss
from trimtab.losses.z_loss import ZLoss

Loss = Callable[[Tensor, Tensor], Tensor]
_UNNUMBERED = (
    "loader must be a DataLoader over a dataset with a length and numbered items for SAF, which has to know each "
    "sample again; an iterable dataset or a list of batches does not tell"
)


class Batch(NamedTuple):
    """What a step sees: inputs, labels (n,), the samples' numbers (n,) where the loader tells, epochs that are over."""

    inputs: Any
    labels: Int[Tensor, " n"]
    numbers: Int[Tensor, " n"] | None
    epoch: int


class Task(NamedTuple):
    """What an objective may have to know: the network, its classes, the size of the training set, how long, a seed."""

    model: nn.Module
    classes: int
    samples: int | None
    epochs: int
    seed: int

    def logits(self, model: nn.Module, inputs: Any) -> Float[Tensor, "n c"]:
        """What the network in training gives for a batch, refused where it is not of these classes."""
        return logits_from(model, inputs, classes=self.classes)


@dataclass(frozen=True)
class Objective:
    """How a batch becomes a loss, and what follows a step.

    Attributes:
        loss: called with the network and the batch, returns a scalar.
        after: called with the network after each step of the optimizer.
        numbers: whether the loss asks for the samples' numbers: `train` then adds them to the batches of a DataLoader.
    """

    loss: Callable[[nn.Module, Batch], Float[Tensor, ""]]
    after: Callable[[nn.Module], object] = lambda model: None
    numbers: bool = False


def train(
    model: nn.Module,
    loader: Iterable[Any],
    objective: str | Loss | Objective,
    *,
    epochs: int,
    classes: int,
    optimizer: OptimizerFactory = ADAM,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Train `model` in place, and return it in the mode that it was in.

    Args:
        model: a classifier, logits (n, c); on its device.
        loader: batches of (inputs, labels), or mappings with ``labels``. Gone through once an epoch. SAF asks for the
            samples' numbers: a DataLoader over a dataset with a length and numbered items gets them here; anything else
            is to yield them, as a third item or as ``index``.
        objective: a name of `OBJECTIVES`, a loss called with logits and labels that has nothing to train itself, or an
            `Objective`.
        epochs: how often the loader is gone through, >= 1; >= 3 for SAF and MESA.
        classes: number of classes c.
        optimizer: builds the optimizer from the parameters; Adam 1e-3.
        schedule: builds a schedule from the optimizer; stepped once an epoch.
        seed: of whatever is drawn: dropout, mixtures, and the order of a loader that shuffles without a generator.

    Raises:
        InputError: an argument is not what it must be, a batch has no labels, an epoch no batches, the model gives
            logits of other classes, the objective refuses a batch, or a loss or the trained weights are not finite.
        OutOfTime: the time `limit` was reached.

    Example:
        >>> from functools import partial
        >>> from trimtab.losses import train
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> labels = x.argmax(1)
        >>> model = nn.Linear(4, 4)
        >>> model = train(model, [(x, labels)] * 20, "Focal", epochs=3, classes=4, optimizer=partial(ADAM, lr=0.05))
        >>> bool((model(x).argmax(1) == labels).float().mean() > 0.9)
        True
    """
    checks.integer(epochs, "epochs", low=1)
    checks.integer(seed, "seed", low=0)
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model must have parameters that train, all are frozen")
    checks.loader(loader)
    device = modules.device_of(model)
    task = Task(model, checks.integer(classes, "classes", low=2), _samples(loader), epochs, seed)
    name = objective if isinstance(objective, str) else _name(objective)
    objective = _objective(objective, task)
    if objective.numbers:
        loader = numbered(loader)
    parameters = (parameter for parameter in model.parameters() if parameter.requires_grad)
    moving = built(optimizer, parameters, "optimizer", torch.optim.Optimizer)
    scheduled = None if schedule is None else built(schedule, moving, "schedule", torch.optim.lr_scheduler.LRScheduler)
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for epoch in progress.track(range(epochs), f"train with {name}"):
                step = -1
                for step, batch in enumerate(loader):
                    progress.in_time()
                    loss = scalar(objective.loss(model, _batch(batch, epoch, device)), f"objective {name}")
                    if not loss.requires_grad:
                        raise InputError(f"objective must give a loss with a gradient, that of {name} is detached")
                    if not bool(loss.isfinite()):
                        raise InputError(f"{name} gave a loss of {loss.item()} in epoch {epoch}, step {step}")
                    moving.zero_grad()
                    loss.backward()
                    moving.step()
                    objective.after(model)
                if step < 0:
                    raise InputError(f"loader must yield batches in every epoch, it yielded none in epoch {epoch}")
                if scheduled is not None:
                    scheduled.step()
    finally:
        model.train(training)
    for parameter_name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"{name} left {parameter_name} not finite: the learning rate is too high")
    return model


def _objective(objective: str | Loss | Objective, task: Task) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):
        return _of_logits(_loss(objective), task)
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return OBJECTIVES[objective](task)


def _loss(objective: Any) -> Loss:
    """A loss that needs no more than logits and labels, and has nothing to train itself."""
    call, own, name = checks.function(objective, "objective"), [], _name(objective)
    if isinstance(objective, nn.Module):
        call, own = objective.forward, [key for key, value in objective.named_parameters() if value.requires_grad]
    instead = f'give its name, "{name}"' if name in OBJECTIVES else "write the loop"
    try:
        inspect.signature(call).bind(None, None)
    except TypeError as error:
        raise InputError(
            f"objective must need logits and labels alone, {name} does not ({error}); {instead}"
        ) from error
    except ValueError:
        pass  # what is written in C may not tell
    if own:
        raise InputError(f"objective must have no parameters of its own, {name} has {own[0]}; {instead}")
    return objective


def _name(objective: Any) -> str:
    return getattr(objective, "__name__", type(objective).__name__)


def _samples(loader: Iterable[Any]) -> int | None:
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def _batch(batch: Any, epoch: int, device: torch.device) -> Batch:
    numbers = None
    if isinstance(batch, dict) and "index" in batch:
        numbers = batch["index"]
        batch = {name: value for name, value in batch.items() if name != "index"}
    elif isinstance(batch, (tuple, list)) and len(batch) == 3:
        *batch, numbers = batch
    if numbers is not None and (not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.ndim != 1):
        raise InputError("loader must yield whole sample numbers (n,) as a third item, as Indexed does, or none")
    inputs, labels = take_apart(batch, device)
    if labels is None:
        raise InputError("loader must yield labels, a batch came without")
    return Batch(inputs, labels, numbers, epoch)


def _of_logits(loss: Loss, task: Task) -> Objective:
    return Objective(lambda model, batch: loss(task.logits(model, batch.inputs), batch.labels))


def _with_term(term: Loss) -> Callable[[Task], Objective]:
    """Cross-entropy plus a calibration term."""

    return _plain(lambda logits, labels: _cross_entropy(logits, labels) + term(logits, labels))


def _plain(loss: Loss) -> Callable[[Task], Objective]:
    return partial(_of_logits, loss)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(*pair(logits, labels), label_smoothing=smoothing)


def _focal(logits: Tensor, labels: Tensor) -> Tensor:
    logits, labels = pair(logits, labels)
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()).square() * log_p).mean()


def _mixed(points: int) -> Callable[[Task], Objective]:
    def build(task: Task) -> Objective:
        generator = torch.Generator().manual_seed(task.seed)
        loss = DMixup(points=points, generator=generator)

        def step(model: nn.Module, batch: Batch) -> Tensor:
            mixed = loss.mix(batch.inputs)
            return loss(task.logits(model, mixed.inputs), batch.labels, mixed)

        return Objective(step)

    return build


def _ranked(ranking: RankMixup | MNDCG, sets: int) -> Callable[[Task], Objective]:
    def build(task: Task) -> Objective:
        generator = torch.Generator().manual_seed(task.seed)

        def step(model: nn.Module, batch: Batch) -> Tensor:
            mixed = make_mixtures(batch.inputs, batch.labels, classes=task.classes, sets=sets, generator=generator)
            logits = task.logits(model, batch.inputs)
            return ranking(logits, batch.labels, task.logits(model, mixed.inputs), mixed.targets)

        return Objective(step)

    return build


def _remembered(task: Task) -> Objective:
    if task.samples is None:
        raise InputError(_UNNUMBERED)
    lookback, start = _delays(task, "SAF")
    saf = SAF(samples=task.samples, classes=task.classes, start=start, lookback=lookback)

    def step(model: nn.Module, batch: Batch) -> Tensor:
        if batch.numbers is None:
            raise InputError(_UNNUMBERED)
        return saf(task.logits(model, batch.inputs), batch.labels, batch.numbers, batch.epoch)

    return Objective(step, numbers=True)


def _averaged(task: Task) -> Objective:
    _, start = _delays(task, "MESA")
    mesa = MESA(task.model, decay=0.99, start=start)

    def step(model: nn.Module, batch: Batch) -> Tensor:
        return mesa(task.logits(model, batch.inputs), batch.labels, batch.inputs, batch.epoch)

    return Objective(step, mesa.update)


def _delays(task: Task, name: str) -> tuple[int, int]:
    """Look-back and start of SAF and MESA: 3 and 5, sooner in a training of few epochs (the authors: 30 % of them)."""
    if task.epochs < 3:
        raise InputError(f"epochs must be at least 3 for {name}, in fewer it is plain cross-entropy, got {task.epochs}")
    start = min(5, math.ceil(0.3 * task.epochs))
    return min(3, start), start


def _binary(loss: Loss, name: str) -> Callable[[Task], Objective]:
    """A loss of one score for the second of two classes: the difference of the logits."""

    def build(task: Task) -> Objective:
        if task.classes != 2:
            raise InputError(f"classes must be 2 for {name}, got {task.classes}")

        def of_difference(logits: Tensor, labels: Tensor) -> Tensor:
            negative, positive = checks.logits(logits, classes=2).unbind(1)
            return loss(positive - negative, labels)

        return _of_logits(of_difference, task)

    return build


def _ensemble(task: Task) -> Objective:
    loss = EnsLoss(generator=torch.Generator().manual_seed(task.seed))
    return _binary(loss, "EnsLoss")(task)


OBJECTIVES: dict[str, Callable[[Task], Objective]] = {
    "CrossEntropy": _plain(_cross_entropy),
    "LabelSmoothing": _plain(partial(_cross_entropy, smoothing=0.1)),
    "Focal": _plain(_focal),
    "DCA": _with_term(DCA()),
    "MDCA": _with_term(MDCA()),
    "MMCE": _with_term(MMCE()),
    "Mixup": _mixed(2),
    "DMixup": _mixed(3),
    "RankMixup": _ranked(RankMixup(), 1),
    "MNDCG": _ranked(MNDCG(), 3),
    "SAF": _remembered,
    "MESA": _averaged,
    "DirectCoverage": _plain(DirectCoverage(samples=8)),
    "MannWhitney": _plain(MannWhitney(temperature=1.0)),
    "ZLoss": _plain(ZLoss()),
    "TaylorSoftmaxLoss": _plain(TaylorSoftmaxLoss()),
    "SquaredErrorLoss": _plain(SquaredErrorLoss()),
    "EnsLoss": _ensemble,
    "AnyLoss": _binary(AnyLoss(from_logits=True, on_missing_class="skip"), "AnyLoss"),
}
"""By name, what a classifier can be trained with; the first three are what the others are compared with. MESA averages
with a decay of 0.99 instead of the authors' 0.9998, whose memory of 5000 steps is longer than a short training. The
spherical softmax is not among them: it goes by the squares of the scores, of which the largest score says nothing."""
