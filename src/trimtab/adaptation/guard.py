"""A guard beside an adapter: it sees a collapse coming and takes the adapter back before it does harm for long.

An adapter that fails tends to fail in one way: ever more inputs are given the same few classes, whatever they show. Two
signs tell, and both compare with the source model on the same inputs, so that a stream which really shows one class
alone raises no alarm: the marginal entropy (how evenly the predictions spread over the classes) falls far below the
source's, or the predictions agree with the source's no better than chance (Cohen's kappa).
"""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from trimtab.adaptation import state
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import held
from trimtab.core.predictions import logits_of

Action = Literal["reset", "roll back", "warn"]
_FEWEST = 20
_COUNTERS = ("samples", "updates", "skipped", "resets", "singles", "recent")


@runtime_checkable
class Watched(Protocol):
    """What a guard must know of an adapter."""

    samples: Tensor

    def summed(self, counts: Tensor) -> Tensor:
        """The counts of all processes of the stream."""

    def reset(self) -> None:
        """Return to the source."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there."""


class Guard(nn.Module):
    """Collapse detection for any classifying adapter: ``Tent(model, guard=Guard())``.

    It costs one forward pass of the source model at each look, and the memory of that model; rolling back costs that of
    two adapter states more.

    Args:
        action: ``"reset"`` returns to the source model; ``"roll back"`` to a healthy state from two to four times
            `memory` predictions ago, and to the source where there is none; ``"warn"`` does nothing else. All warn.
        every: look at every so-many-th batch, >= 1.
        memory: how many inputs of the stream the judgement reaches back, >= 2: a prediction counts exp(-age / memory),
            age in inputs, looked at or not. Nothing is judged before half of that has passed, and 20 predictions
            have been looked at.
        min_entropy: a collapse when the marginal entropy is below this share of the source's, in [0, 1].
        min_agreement: a collapse when Cohen's kappa with the source's predictions is below, in [-1, 1]. 0 is chance;
            the source is wrong under shift, so little can be asked: 0.05.

    Attributes:
        looks, collapses, rollbacks: counters (buffers).

    Raises:
        InputError: an argument is out of range, or the guard watches another adapter already.

    Example:
        >>> from trimtab.adaptation import Guard, Tent
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> tent = Tent(model, guard=Guard(every=1))
        >>> _ = tent(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        >>> int(tent.guard.looks), int(tent.guard.collapses)
        (1, 0)
    """

    looks: Tensor
    batches: Tensor
    collapses: Tensor
    rollbacks: Tensor
    ours: Tensor
    theirs: Tensor
    agreed: Tensor
    fresh: Tensor
    passed: Tensor
    age: Tensor

    def __init__(
        self,
        action: Action = "reset",
        *,
        every: int = 10,
        memory: int = 1000,
        min_entropy: float = 0.3,
        min_agreement: float = 0.05,
    ):
        super().__init__()
        self.action: Action = checks.one_of(action, "action", Action)
        self.every = checks.integer(every, "every", low=1)
        self.memory = checks.integer(memory, "memory", low=2)
        self.min_entropy = checks.number(min_entropy, "min_entropy", low=0.0, high=1.0)
        self.min_agreement = checks.number(min_agreement, "min_agreement", low=-1.0, high=1.0)
        self.source: nn.Module | None = None
        self.kept: list[dict[str, Tensor]] = []
        for name in ("looks", "batches", "collapses", "rollbacks"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("ours", torch.empty(0, dtype=torch.float64))
        self.register_buffer("theirs", torch.empty(0, dtype=torch.float64))
        self.register_buffer("agreed", torch.zeros((), dtype=torch.float64))
        for name in ("passed", "age", "fresh"):  # inputs since the last look, since a collapse, since one was kept
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def watching(self, model: nn.Module) -> Self:
        """The guard, with a copy of the source `model` to compare with."""
        if self.source is not None:
            raise InputError("guard must be a fresh one, it watches another adapter already")
        self.source = deepcopy(model).eval().requires_grad_(False)
        return self

    def look(self, adapter: Watched, x: Any, outputs: Tensor) -> None:
        """Compare what `adapter` said about the batch with the source model, and act on a collapse."""
        self.batches += 1
        self.passed += len(outputs)
        if int(self.batches) % self.every:
            return
        assert self.source is not None
        with torch.no_grad(), held(self.source):
            theirs = logits_of(self.source, x).argmax(1).flatten()
        classes = outputs.shape[1]
        self.looks += 1
        ours = outputs.argmax(1).flatten()
        self._count(adapter, ours, theirs, classes)
        if float(self.age) < self.memory / 2 or float(self.theirs.sum()) < _FEWEST:
            return
        if self.entropy_ratio() >= self.min_entropy and self.agreement() >= self.min_agreement:
            if self.action == "roll back":
                self._keep(adapter)
            return
        self.collapses += 1
        done = self._take_back(adapter)
        warnings.warn(
            f"{type(adapter).__name__} has collapsed after {int(adapter.samples)} inputs (marginal entropy "
            f"{self.entropy_ratio():.2f} of the source's, agreement with it {self.agreement():.2f}): {done}",
            RuntimeWarning,
            stacklevel=3,
        )
        self._forget()

    def entropy_ratio(self) -> float:
        """Marginal entropy of the adapter's recent predictions over the source's; 1 where the source has none."""
        ours, theirs = _entropy(self.ours), _entropy(self.theirs)
        return ours / theirs if theirs > 0 else 1.0

    def agreement(self) -> float:
        """Cohen's kappa of the adapter's recent predictions with the source's; 1 where they cannot but agree."""
        total = float(self.theirs.sum())
        observed = float(self.agreed) / total
        chance = float(self.ours @ self.theirs) / total**2
        return (observed - chance) / (1 - chance) if chance < 1 else 1.0

    def _count(self, adapter: Watched, ours: Tensor, theirs: Tensor, classes: int) -> None:
        ours_, theirs_ = torch.bincount(ours, minlength=classes), torch.bincount(theirs, minlength=classes)
        told = torch.cat((ours_, theirs_, (ours == theirs).sum()[None])).to(self.agreed.device, torch.float64)
        *counts, agreed, passed = adapter.summed(torch.cat((told, self.passed[None])))
        if not len(self.ours):
            self.ours, self.theirs = self.ours.new_zeros(classes), self.theirs.new_zeros(classes)
        fade = math.exp(-float(passed) / self.memory)
        self.ours = fade * self.ours + torch.stack(counts[:classes])
        self.theirs = fade * self.theirs + torch.stack(counts[classes:])
        self.agreed = fade * self.agreed + agreed
        self.age, self.fresh, self.passed = self.age + passed, self.fresh + passed, torch.zeros_like(passed)

    def _take_back(self, adapter: Watched) -> str:
        if self.action == "warn":
            return "it goes on"
        if self.action == "reset" or len(self.kept) < 2:
            adapter.reset()
            return "it was reset to the source model"
        now = adapter.state_dict()
        adapter.load_state_dict({**{name: value for name, value in now.items() if _stays(name)}, **self.kept[0]})
        self.kept = []
        self.rollbacks += 1
        return "it was rolled back to an earlier state"

    def _keep(self, adapter: Watched) -> None:
        """Remember a healthy state and the one before it, two memories apart: a collapse is seen no later than that."""
        if self.kept and float(self.fresh) < 2 * self.memory:
            return
        healthy = {name: value.clone() for name, value in adapter.state_dict().items() if not _stays(name)}
        self.kept = [*self.kept[-1:], healthy]
        self.fresh = torch.zeros_like(self.fresh)

    def _forget(self) -> None:
        self.ours, self.theirs = self.ours.new_empty(0), self.theirs.new_empty(0)
        zero = torch.zeros_like(self.agreed)
        self.agreed, self.fresh, self.age = zero, zero.clone(), zero.clone()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for place, healthy in enumerate(self.kept):
            for name, value in healthy.items():
                destination[f"{prefix}kept.{place}.{name}"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        kept: dict[int, dict[str, Tensor]] = {}
        start = f"{prefix}kept."
        for key in [key for key in state_dict if key.startswith(start)]:
            place, _, name = key.removeprefix(start).partition(".")
            kept.setdefault(int(place), {})[name] = state_dict.pop(key).clone()
        self.kept = [kept[place] for place in sorted(kept)]
        state.resize(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _entropy(counts: Tensor) -> float:
    return float(torch.special.entr(counts / counts.sum()).sum())


def _stays(name: str) -> bool:
    """Whether an entry of an adapter's state is a counter, the window or the guard's own: these are not rolled back."""
    return name in _COUNTERS or name.startswith("guard.")
