"""The contract of every adapter, and what all of them share: a model that follows its stream without labels.

A method subclasses `Adapter`, configures ``self.model`` in its constructor, ends that with ``self._begin(...)``, and
says in ``_adapt`` what happens to one batch (and in ``_predict``, where it differs, what is said without adapting).
It says in class attributes what it costs and needs. What it must remember goes into buffers, whose shapes may change,
or into submodules; then saving, restoring and moving come by themselves. It restores in ``reset`` whatever it
changes besides the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, Literal, Self, TypedDict

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from trimtab.adaptation import processes, state
from trimtab.adaptation.batch_stats import MixedBatchNorm, source_statistics
from trimtab.adaptation.guard import Guard
from trimtab.adaptation.inputs import Inputs as Inputs
from trimtab.adaptation.inputs import checked_size, usable
from trimtab.adaptation.prepared import Prepared
from trimtab.core import checks, modules
from trimtab.core.checks import InputError
from trimtab.core.modules import BATCH_NORMS, device_of, held
from trimtab.core.optimizers import ADAM as ADAM
from trimtab.core.optimizers import OptimizerFactory as OptimizerFactory
from trimtab.core.precision import HALF, widened
from trimtab.core.predictions import logits_of

Choice = Callable[[nn.Module], Mapping[str, nn.Parameter]]


class Options(TypedDict, total=False):
    """Keyword arguments that every adapter takes; see `Adapter`."""

    steps: int
    episodic: bool
    reset_every: int | None
    window: int
    inplace: bool
    guard: Guard | None


class Adapter(nn.Module):
    """A model that predicts each batch of an unlabelled stream and learns from it as it goes.

    ``adapter(x)`` returns what is said about the batch, and may change the wrapped model; gradients are switched on
    inside, whatever the caller's mode. ``state_dict()`` holds everything, flat and in tensors: saved in the middle of
    a stream and loaded into an adapter that was built in the same way, it goes on bit by bit. The modes of the wrapped
    networks are fixed at construction: ``adapter.train()`` and ``adapter.eval()`` do not reach them. Move the model to
    its device and precision before it is wrapped.

    Args:
        model: a classifier that maps a batch of n inputs to logits (n, c), c >= 2, or to an object with ``.logits``.
            It is copied, and stays as it is, unless `inplace`. Segmenters, with logits (n, c, ...), are taken by the
            adapters that say `dense`. In a `DistributedDataParallel`, every process adapts to its own part of the
            stream, gradients are averaged, and what moves stays the same everywhere.
        steps: updates a batch; 1 as in all papers. What is returned comes from the last forward pass before an update.
        episodic: reset before every batch.
        reset_every: reset after so many updates, as RDumb does (Press et al. 2023); None never does.
        window: for streams that come one input at a time. With w > 1, the last w inputs stay in a buffer, which is
            passed through the model for its batch statistics; the model is updated each time that the buffer has been
            renewed; the current input's row is returned.
        inplace: change the given model instead of a copy of it.
        guard: watches for collapse and takes the adapter back; see `Guard`.

    Attributes:
        outputs: whether the adapter returns ``"logits"`` or ``"probabilities"``.
        forwards, backwards: passes of the whole model that one batch implies, at most.
        dense: whether logits may have more axes after the classes: one prediction a pixel, say.
        preparation: whether `prepare` must be called before the stream (``"required"``), may be (``"optional"``), or
            has nothing to do (``"none"``).
        samples, updates, skipped, resets: counters (buffers): inputs seen, optimizer steps made, steps left out because
            the loss or its gradient was not finite, resets. A reset does not clear them.

    Raises:
        InputError: an option is out of range; or, at a call, the input holds NaN or infinities, is empty, comes with
            labels, or is too small for batch statistics.
    """

    outputs: ClassVar[Literal["logits", "probabilities"]] = "logits"
    forwards: float = 1
    backwards: float = 0
    dense: ClassVar[bool] = False
    preparation: ClassVar[Literal["none", "optional", "required"]] = "none"
    samples: Tensor
    updates: Tensor
    skipped: Tensor
    resets: Tensor
    singles: Tensor
    recent: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 1,
        episodic: bool = False,
        reset_every: int | None = None,
        window: int = 1,
        inplace: bool = False,
        guard: Guard | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, Adapter):
            raise InputError(f"model must be a network to adapt, it is a {type(model).__name__} already")
        if guard is not None and not isinstance(guard, Guard):
            raise InputError(f"guard must be a Guard, such as Guard('reset'), got {guard!r}")
        model, self._group = processes.unwrapped(model)
        self.model = model if inplace else deepcopy(model)
        self.model.eval()
        self.guard = None if guard is None else guard.watching(self.model)
        self.steps = checks.integer(steps, "steps", low=1)
        self.episodic = episodic
        self.reset_every = None if reset_every is None else checks.integer(reset_every, "reset_every", low=1)
        self.window = checks.integer(window, "window", low=1)
        self.moving: dict[str, nn.Parameter] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.generator: torch.Generator | None = None
        self._frozen = False
        for name in ("samples", "updates", "skipped", "resets", "singles"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("recent", torch.empty(0, device=device_of(self.model)))

    @classmethod
    def prepare(cls, model: nn.Module, loader: Iterable[Any]) -> Prepared:
        """What this adapter must know before the stream, from batches of the source's data; see `preparation`.

        Adapters that need one override this, with settings of their own.
        """
        raise InputError(f"{cls.__name__} needs no preparation")

    def _begin(self, choice: Choice | None = None, optimizer: OptimizerFactory | None = None) -> None:
        """Fix what moves and remember where it starts; the last line of every adapter's constructor."""
        self.model.requires_grad_(False)
        if choice is not None:
            known = dict(self.model.named_parameters(remove_duplicate=False))
            chosen = choice(self.model) if callable(choice) else choice
            if not isinstance(chosen, Mapping):
                raise InputError(
                    "parameters_of must be a function of the model that returns parameters by name, "
                    f"got {type(chosen).__name__}"
                )
            for name, parameter in chosen.items():
                if known.get(name) is not parameter:
                    raise InputError(
                        f"parameters_of must choose parameters of the model by their full names in it, {name!r} is none"
                    )
                if parameter.dtype in HALF:
                    raise InputError(
                        f"model must hold the parameters that move in float32, {name!r} is {parameter.dtype}: "
                        "small updates would be lost; keep them in float32 and run the stream under torch.autocast"
                    )
                if not parameter.requires_grad:  # a shared parameter moves once
                    self.moving[name] = parameter
                    parameter.requires_grad_(True).grad = None
            if not self.moving:
                raise InputError("parameters_of must choose at least one parameter, it chose none")
            if optimizer is not None and (not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer)):
                raise InputError(
                    "optimizer must be a function of the parameters that move, such as partial(torch.optim.Adam, "
                    f"lr=1e-3), got {type(optimizer).__name__}"
                )
            self.optimizer = (optimizer or ADAM)(list(self.moving.values()))
        self.source = state.Tensors({**self.moving, **dict(self.model.named_buffers())})
        self._rows_interact = any(
            (isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None))
            or (isinstance(module, MixedBatchNorm) and not module.follow)
            for module in self.model.modules()
        )

    def _adapt(self, x: Inputs) -> Tensor:
        """Predict one batch, gradients switched on, and learn from it."""
        raise NotImplementedError

    def _predict(self, x: Inputs) -> Tensor:
        """Predict one batch and change nothing."""
        return self._call(self.model, x)

    def forward(self, x: Inputs, labels: None = None) -> Shaped[Tensor, "n ..."]:
        """Predict and adapt.

        Args:
            x: n >= 1 inputs: a tensor (n, ...), or a mapping that holds the model's keyword arguments.
            labels: refused; adapters never see labels.
        """
        if labels is not None:
            raise InputError("labels must not be given: an adapter learns from inputs alone")
        n = checked_size(x)
        if self._frozen:
            with torch.no_grad(), held(self):
                return self._slide(x) if self.window > 1 and n == 1 else self._predict(x)
        with torch.inference_mode(False), torch.enable_grad():
            x = usable(x)
            if self.episodic:
                self._restart()
            outputs = self._slide(x) if self.window > 1 and n == 1 else self._learn(x)
            self.samples += n
            if self.guard is not None:
                self.guard.look(self, x, outputs.detach())
            return outputs.detach()

    def log_probs(self, x: Inputs) -> Float[Tensor, "n c *rest"]:
        """Predict and adapt, as a call does; returns log-probabilities whatever the adapter's `outputs`."""
        outputs: Tensor = self(x)
        if self.outputs == "logits":
            return outputs.log_softmax(1)
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()

    def reset(self) -> None:
        """Return to the source model, with a fresh optimizer and an empty window; counters go on."""
        self._restore(self.model)
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self.singles.zero_()
        self.recent = self.recent.new_empty(0)
        self.resets += 1

    @contextmanager
    def frozen(self) -> Iterator[Self]:
        """Predict without adapting: nothing of the adapter changes in this block."""
        before, self._frozen = self._frozen, True
        try:
            yield self
        finally:
            self._frozen = before

    def train(self, mode: bool = True) -> Self:
        """Set the flag of the adapter alone: the networks inside keep the modes that they were configured with."""
        self.training = mode
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Go on where `state_dict`, taken from an adapter that was built in the same way, stopped."""
        if not hasattr(state_dict, "_metadata"):  # from a file, it lacks the versions of the layers: they are these
            versions = self.state_dict()._metadata  # type: ignore[attr-defined]
            state_dict = OrderedDict(state_dict)
            state_dict._metadata = versions  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if any(parameter.dtype in HALF for parameter in self.moving.values()):
            raise InputError("the adapter must stay in float32: small updates would be lost; use torch.autocast")
        return self

    def _call(self, network: Callable[..., Any], x: Inputs) -> Float[Tensor, "n c *rest"]:
        """The logits of `network`, in single precision at least."""
        try:
            logits = logits_of(network, x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"x must give every channel more than one value for batch statistics ({error}); "
                "pass larger batches, or set window"
            ) from error
        ranked = isinstance(logits, Tensor) and (logits.ndim == 2 or (self.dense and logits.ndim > 2))
        if not ranked or logits.shape[1] < 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            wanted = "(n, c) or (n, c, ...)" if self.dense else "(n, c)"
            raise InputError(f"model must return logits {wanted} with c >= 2, it returned {shape}")
        return widened(logits)

    def _with_features(
        self, network: Callable[..., Any], head: nn.Module, x: Inputs
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"]]:
        """What `head`, a layer of `network`, is given in one pass, and the logits; gradients flow through both."""
        with modules.watch_input(head, detach=False) as seen:
            logits = self._call(network, x)
        if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != len(logits):
            shapes = [tuple(features.shape) for features in seen]
            raise InputError(f"model must pass its head one feature vector an input, it passed {shapes}; name the head")
        return seen[0], logits

    def _backward(self, loss: Tensor | None) -> bool:
        """Leave the gradient of `loss` where the optimizer finds it; False, and counted, where it is not finite.

        None says that nothing is to be learnt from here. In a distributed stream all processes must meet here: each
        gets the mean over those that do learn.
        """
        assert self.optimizer is not None
        sound = loss is None or bool(loss.isfinite())
        if loss is not None and not loss.requires_grad:
            raise InputError("model must let gradients flow from its output to the parameters that move, it does not")
        if loss is not None and sound:
            with torch.autocast(loss.device.type, enabled=False):  # each operation goes back as precisely as it went
                torch.autograd.backward(loss)
        learnt, parameters = loss is not None, list(self.moving.values())
        if self._group is not None:
            learnt, sound = processes.share_gradients(parameters, learnt, sound, self._group)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sound = sound and (not learnt or bool(get_total_norm(gradients).isfinite()))
        if not sound:
            self.skipped += 1
        if not (learnt and sound):
            self.optimizer.zero_grad()
        return learnt and sound

    def summed(self, counts: Tensor) -> Tensor:
        """`counts`, summed over the processes of a distributed stream."""
        return processes.summed(counts, self._group)

    def _step(self) -> None:
        """Let the optimizer step along the gradients that are there."""
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def _descend(self, loss: Tensor | None) -> bool:
        """One optimizer step down `loss`, where there is one and its gradient is finite; whether it was made."""
        sound = self._backward(loss)
        if sound:
            self._step()
        return sound

    def _restore(self, network: nn.Module) -> None:
        """Copy the source's values into `network`, which has the model's names."""
        live = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
        with torch.no_grad():
            for name, value in self.source.named().items():
                live[name].copy_(value)

    def _learn(self, x: Inputs) -> Tensor:
        for _ in range(self.steps):
            before = int(self.updates) if self.reset_every else 0
            outputs = self._adapt(x)
            if self.reset_every and int(self.updates) // self.reset_every > before // self.reset_every:
                self._restart()
        return outputs

    def _restart(self) -> None:
        """Reset what was learnt, not which inputs came last."""
        recent, singles = self.recent, self.singles.clone()
        self.reset()
        self.recent, self.singles = recent, singles

    def _slide(self, x: Inputs) -> Tensor:
        """One input of a stream that comes one by one: its prediction among the last `window` inputs."""
        if not isinstance(x, Tensor):
            raise InputError(f"x must be a tensor where window > 1, got {type(x).__name__}")
        if self.recent.numel() and self.recent.shape[1:] != x.shape[1:]:
            kept, got = tuple(self.recent.shape[1:]), tuple(x.shape[1:])
            raise InputError(f"x must have the shape of the inputs in the window, {kept}, got {got}")
        rows = torch.cat((self.recent, x))[-self.window :] if self.recent.numel() else x.clone()
        if not self._frozen:
            self.recent = rows
            self.singles += 1
            if int(self.singles) % self.window == 0:
                return self._learn(rows)[-1:]
        with torch.no_grad(), held(self), source_statistics(self if len(rows) == 1 else nn.Identity()):
            return self._predict(rows if self._rows_interact else x)[-1:]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.optimizer is not None:
            for name, tensor in state.pack(self.optimizer, self.moving).items():
                destination[f"{prefix}optimizer.{name}"] = tensor
        if self.generator is not None:
            destination[f"{prefix}generator"] = self.generator.get_state()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.optimizer is not None:
            start = f"{prefix}optimizer."
            packed = {key[len(start) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
            unexpected_keys += [start + name for name in state.unpack(self.optimizer, self.moving, packed)]
            missing_keys += [] if "lr" in packed else [f"{start}lr"]
        if self.generator is not None:
            if f"{prefix}generator" in state_dict:
                self.generator.set_state(state_dict.pop(f"{prefix}generator").cpu())
            else:
                missing_keys.append(f"{prefix}generator")
        state.resize(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def rows(logits: Float[Tensor, "n c *rest"]) -> Float[Tensor, "m c"]:
    """One row a prediction: dense logits (n, c, ...) as (n * ..., c), others as they are."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def entropy(logits: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n *rest"]:
    """Shannon entropy of softmax(logits) in nats, prediction by prediction."""
    log_probs = logits.log_softmax(1).clamp_min(torch.finfo(logits.dtype).min)  # -inf for a class that is masked
    return -(log_probs.exp() * log_probs).sum(1)


def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Mean teacher: every parameter of `teacher` becomes momentum x itself + (1 - momentum) x the student's."""
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)
