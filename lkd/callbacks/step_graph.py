"""The training step as one captured graph, within Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map_only

from lkd import devices
from lkd.capture import Capture, Snapshot, copy_into, flat, signature
from lkd.types import Batch

_WITHIN_STEP = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
"""Hooks that Lightning calls within a step, where a graph has no place for them."""

_OF_MODULE = ("training_step", "backward", "optimizer_step", "optimizer_zero_grad", *_WITHIN_STEP)
_PLAIN = (bool, int, float, str)
_NOT_READ = (frozenset(vars(nn.Module())) - {"training"}) | {"flushes"}
"""Attributes of modules that are no numbers, or that no step reads."""

_TOLERANCE = 1e-5
"""Relative difference between a replay and an ordinary step that is rounding: the graph's learning rate is a float32."""

_REPEATABLE = 1e-3
"""Relative difference between two ordinary steps up to which the step counts as the same computation."""

_MANY = 3
"""Captures in successive steps after which the step is taken for one that changes all the time."""


class Outcome(NamedTuple):
    """What a step did.

    Attributes:
        row: Loss, terms and counts `(C,)`.
        norm: The norm of the gradient.
        state: Weights, buffers and optimizer state after the step, as `flat` joins them.
    """

    row: Tensor
    norm: Tensor
    state: list[Tensor]


class StepGraph:
    """Captures the training step of a module, and replays it in place of the ordinary step.

    Lightning's loop stays as it is: `training_step` replays the graph, which also runs the backward pass and the
    optimizer; `backward`, `optimizer_zero_grad` and `optimizer_step` then have nothing left to do. Whatever the step
    reads from Python is a constant in the graph. Learning rates of fused optimizers are tensors; when another number
    changes (the weight of a term, the mode of a layer), the step is captured again.

    A graph is checked before it is used: a replay and two ordinary steps from the same state must agree. If they do
    not, or the step cannot be captured, a warning gives the reason and ordinary steps go on. Captures and checks leave
    no trace in weights, buffers, optimizer state and random numbers.

    Args:
        trainer: The trainer of the run.
        module: A `ClassificationModule`.
        capture: How the device captures.

    Attributes:
        obstacle: Why the step is not captured any more; empty while it is.
        captures: How many times the step was captured.
    """

    def __init__(self, trainer: L.Trainer, module: Any, capture: Capture) -> None:
        self.trainer, self.module, self.capture = trainer, module, capture
        self.obstacle = ""
        self.captures = 0
        self._optimizer = trainer.optimizers[0]
        self._replay: Callable[[], Any] | None = None
        self._row: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._batch: Batch | None = None
        self._signature: tuple[Any, ...] = ()
        self._step_token: tuple[Any, ...] = ()
        self._epoch_token: tuple[Any, ...] = ()
        self._is_looked_at = False
        self._steps_in_a_row = 0
        self._rates = [
            torch.full((), float(group["lr"]), dtype=capture.scalar, device=_device(self._optimizer))
            if group.get("fused") and not isinstance(group["lr"], Tensor)
            else None
            for group in self._optimizer.param_groups
        ]

    def look_again(self) -> None:
        """Look at everything the graph depends on before the next step: between epochs, anything may have changed."""
        self._is_looked_at = False

    def prepare(self, batch: Batch) -> bool:
        """Make the graph ready for a batch, capturing the step if needed.

        Args:
            batch: The batch of the next step.

        Returns:
            Whether the step is to be replayed; otherwise an ordinary step is due.
        """
        if self.obstacle or self.trainer.global_step == 0:  # the first step creates the optimizer's state
            return False
        if self._replay is not None and not self._is_current():
            self._replay = self._row = None
        if self._replay is None:
            self._try_capture(batch)
        elif self._steps_in_a_row:
            self._steps_in_a_row = 0
        return self._replay is not None and signature(batch) == self._signature

    def _is_current(self) -> bool:
        """Whether the graph's constants are still what Python says."""
        if not self._is_looked_at:
            self._is_looked_at = True
            if self._look_everywhere() != self._epoch_token:
                return False
        return self._look() == self._step_token

    def run(self, batch: Batch) -> tuple[tuple[str, ...], Tensor]:
        """Take a step.

        Args:
            batch: A batch for which `prepare` returned True.

        Returns:
            Names and values `(C,)` of loss, terms and counts, the loss first. The values are the graph's own memory.
        """
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if rate is not None:
                rate.fill_(group["lr"])
        copy_into(self._batch, batch)
        self._replay()  # type: ignore[misc]
        return self._names, self._row  # type: ignore[return-value]

    def _look(self) -> tuple[Any, ...]:
        """Numbers of module, criterion and optimizer that a step may read: they may change with each step."""
        criterion = getattr(self.module, "criterion", None)
        parts = () if criterion is None else criterion.modules()
        groups = [
            [(name, value) for name, value in group.items() if name != "params" and (name != "lr" or rate is None)]
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True)
        ]
        recall = getattr(self.module, "recall", None)
        numbers = [_numbers(part) for part in parts]
        return _numbers(self.module, public=True), numbers, _plain(groups), getattr(recall, "state", None)

    def _look_everywhere(self) -> tuple[Any, ...]:
        """Also numbers, modes and addresses in the networks, and which parameters train."""
        return constants_of(self.module)

    def _try_capture(self, batch: Batch) -> None:
        self._steps_in_a_row += 1
        if self._steps_in_a_row > _MANY:
            self._give_up("numbers that the step reads change in every step")
            return
        if reason := getattr(getattr(self.module, "recall", None), "obstacle", ""):
            self._give_up(reason)
            return
        device = _device(self._optimizer)
        if any(tensor.device != device for tensor in self._state()):
            self._give_up(f"{type(self._optimizer).__name__} or the module keeps part of its state on another device")
            return
        random, before = devices.rng_states(device), Snapshot(self._state())
        try:
            reason = self._capture_and_check(batch, before, random)
        except Exception as error:  # whatever the step of a user raises: the ordinary step raises it again
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        before.restore()
        devices.set_rng_states(device, random)
        if reason:
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self._replay = self._row = self._batch = None
        self.obstacle = reason
        rank_zero_warn(f"the training step runs without a graph: {reason}; --speed.graph off leaves out the attempt")

    def _capture_and_check(self, batch: Batch, before: Snapshot, random: list[Tensor]) -> str:
        """Capture; return what speaks against using the graph, or an empty text."""
        device = _device(self._optimizer)
        self._signature = signature(batch)
        is_static = getattr(self.trainer.datamodule, "is_static", lambda batch: False)(batch)  # type: ignore[attr-defined]
        self._batch = batch if is_static else tree_map_only(Tensor, torch.clone, batch)

        def trial(function: Callable[[], Tensor]) -> Outcome:
            before.restore()
            devices.set_rng_states(device, random)
            row = function().clone()
            gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            return Outcome(row, get_total_norm(gradients), flat(before.tensors))

        first = trial(lambda: self.capture.warm_up(self._step))
        numbers = self._look(), self._look_everywhere()
        ordinary = [first, trial(lambda: self.capture.warm_up(self._step))]
        if changed := _first_difference(numbers, (self._look(), self._look_everywhere())):
            return f"the step changes {changed}, which a graph cannot do"
        if len(self._state()) != len(before.tensors):
            return "the step creates tensors that belong to the state of the module or optimizer"
        before.restore()
        with self._rates_as_tensors():
            self._row, self._replay = self.capture.capture(self._step)
        self.captures += 1

        def replayed() -> Tensor:
            self.run(batch)
            return self._row  # type: ignore[return-value]

        found = trial(replayed)
        self._step_token, self._epoch_token, self._is_looked_at = self._look(), self._look_everywhere(), True
        return _disagreement(ordinary, found, flat(before.copies))

    def _step(self) -> Tensor:
        """What Lightning does for one batch, and the values of its curves `(C,)`."""
        trainer, module, optimizer = self.trainer, self.module, self._optimizer
        buffers = {name: buffer for name, buffer in module.named_buffers() if buffer is not None}
        with trainer.precision_plugin.train_step_context():
            values = module.training_values(self._batch)
        optimizer.zero_grad()
        module.backward(values["loss"])
        module.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm  # type: ignore[attr-defined]
        )
        optimizer.step()
        _keep_in_place(module, buffers)
        self._names = tuple(values)
        return torch.stack([value.detach().float() for value in values.values()])

    def _state(self) -> list[Tensor]:
        """All that a step may change: parameters, buffers, and the state of the optimizer."""
        buffers = (buffer for name, buffer in self.module.named_buffers() if not name.startswith("metrics."))
        held = (value for state in self._optimizer.state.values() for value in state.values())
        return [*self.module.parameters(), *buffers, *(value for value in held if isinstance(value, Tensor))]

    @contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from tensors."""
        groups = self._optimizer.param_groups
        own = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = group["lr"] if rate is None else rate
        try:
            yield
        finally:
            for group, rate in zip(groups, own, strict=True):
                group["lr"] = rate


def constants_of(module: Any) -> tuple[Any, ...]:
    """What a graph takes for constant in the networks of a module: numbers, modes, addresses, and what trains.

    Args:
        module: A `ClassificationModule`.
    """
    networks = [getattr(module, name) for name in module.network_names]
    layers = [layer for network in networks for layer in network.modules()]
    tensors = chain.from_iterable(chain(network.parameters(), network.buffers()) for network in networks)
    places = [(id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
    return [_numbers(layer) for layer in layers], places, id(getattr(module, "teacher_taps", None))


def obstacle(trainer: L.Trainer, module: Any) -> str:
    """Why the step of a run cannot be one graph; empty if that can be tried.

    Args:
        trainer: The trainer, with its optimizers.
        module: The module that it trains.
    """
    if not hasattr(module, "training_values"):
        return f"{type(module).__name__} is not a module of lkd"
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        return "several processes or sharded weights"
    if trainer.accumulate_grad_batches > 1:
        return "gradients are accumulated"
    if str(trainer.precision).startswith("16"):
        return "float16 scales its gradients on the host"
    if len(trainer.optimizers) != 1 or not module.automatic_optimization:
        return "several optimizers or manual optimization"
    if trainer._detect_anomaly:
        return "detect_anomaly looks at each operation"
    if own := [name for name in _OF_MODULE if not _is_known(type(module), name)]:
        return f"{type(module).__name__} has its own {own[0]}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in _WITHIN_STEP:
            if getattr(type(callback), name) is not getattr(L.Callback, name):
                return f"{type(callback).__name__} uses {name}"
    return ""


def _is_known(kind: type, name: str) -> bool:
    """Whether a hook of a module is Lightning's or lkd's."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return owner.__module__.partition(".")[0] in ("lightning", "lkd")


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    device: torch.device = optimizer.param_groups[0]["params"][0].device
    return device


def _plain(value: Any) -> Any:
    """The numbers and texts in a value; `None` in place of everything else."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, _plain(part)) for name, part in value.items() if isinstance(name, _PLAIN))
    return None


def _numbers(part: nn.Module, public: bool = False) -> tuple[Any, ...]:
    """The numbers and texts among a module's attributes, by name; of a LightningModule only the public ones."""
    return tuple(
        (name, _plain(value))
        for name, value in vars(part).items()
        if name not in _NOT_READ and not (public and name.startswith("_"))
    )


def _first_difference(before: Any, after: Any, name: str = "an attribute") -> str:
    """The name of an attribute whose number differs; empty if all are equal."""
    if before == after:
        return ""
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after):
        if len(before) == 2 and isinstance(before[0], str) and before[0] == after[0]:
            return _first_difference(before[1], after[1], f"{before[0]!r}") or name
        return next((found for pair in zip(before, after, strict=True) if (found := _first_difference(*pair, name))), "")
    return f"{name} ({before} to {after})" if type(before) in _PLAIN and type(after) in _PLAIN else name


def _keep_in_place(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Let buffers that a step replaced by other tensors be the old ones, with the new numbers: their addresses count."""
    for name, old in buffers.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        new = getattr(holder, leaf)
        if new is not old:
            with torch.no_grad():
                old.copy_(new)
            setattr(holder, leaf, old)


def _disagreement(ordinary: list[Outcome], replay: Outcome, before: list[Tensor]) -> str:
    """In what a replay differs from ordinary steps by more than rounding; empty if it does not."""
    first, second = ordinary
    noise = _distances(first, second, before)
    if worst := [name for name, distance in noise.items() if not distance <= _REPEATABLE]:
        return f"two ordinary steps from the same state differ in {worst[0]} (by {noise[worst[0]]:.1g})"
    found = _distances(first, replay, before)
    for name, distance in found.items():
        if not distance <= max(_TOLERANCE, 10 * noise[name]):
            return f"a replay of the graph differs from an ordinary step in {name} (by {distance:.1g} of it)"
    return ""


def _distances(one: Outcome, other: Outcome, before: list[Tensor]) -> dict[str, float]:
    """Relative differences of the losses, the gradients' norms and the updates of all state."""
    tiny = 1e-30
    loss = (_gap(one.row, other.row).abs() / (one.row.abs() + tiny)).max()
    norm = _gap(one.norm, other.norm).abs() / (one.norm.abs() + tiny)
    apart, change, size = (torch.zeros((), dtype=torch.float64, device=one.row.device) for _ in range(3))
    for ours, theirs, old in zip(one.state, other.state, before, strict=True):
        apart += _gap(ours, theirs).square().sum()
        change += _gap(ours, old).square().sum()
        size += ours.double().nan_to_num().square().sum()
    rounding = 2.0**-22 * size.sqrt()
    update = (apart.sqrt() - rounding).clamp(min=0) / (change.sqrt() + tiny)
    values = torch.stack((loss.double(), norm.double(), update)).tolist()
    return dict(zip(("the loss", "the gradient", "the updated weights"), values, strict=True))


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """The difference, in float64; 0 where both are NaN, or infinite, as in a run that has diverged."""
    one, other = one.double(), other.double()
    return torch.where((one == other) | (one.isnan() & other.isnan()), torch.zeros_like(one), one - other)
