"""The training step as one captured graph, within Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lkd import devices
from lkd._compat import parameter_slots, tree_map_only
from lkd.callbacks.graph_check import Outcome, disagreement
from lkd.callbacks.graph_constants import (
    Watched,
    attributes_of,
    constants_of,
    first_difference,
    numbers_of,
    plain,
)
from lkd.callbacks.graph_obstacles import has_foreign_code
from lkd.devices.capture import Capture, Snapshot, copy_into, flat, signature
from lkd.modules.meter import LOSS, ValueName, named
from lkd.types import Batch

_MANY = 3
"""Maximum number of captures in successive steps, after which ordinary steps are used."""


class StepGraph:
    """Captures the training step of a module, and replays it instead of the ordinary step.

    Lightning's loop is unchanged: `training_step` replays the graph, which includes the backward pass and the optimizer
    step; `backward`, `optimizer_zero_grad` and `optimizer_step` then do nothing. All Python values that the step reads
    are constants in the graph. Learning rates of fused optimizers are tensors. If another number changes (the weight of
    a term, the mode of a layer), the step is captured again.

    A graph is checked before it is used: a replay and two ordinary steps from the same state must agree. If they do
    not, or if the step cannot be captured, a warning gives the reason, and training continues with ordinary steps.
    Captures and checks do not change weights, buffers, optimizer state or random number generators.

    Args:
        trainer: Trainer of the run.
        module: A `ClassificationModule`.
        capture: Capture implementation of the device.

    Attributes:
        obstacle: Reason why training continues without a graph; empty while graphs are used.
        captures: Number of captures so far.
    """

    def __init__(self, trainer: L.Trainer, module: Any, capture: Capture) -> None:
        self.trainer, self.module, self.capture = trainer, module, capture
        self.obstacle = ""
        self.captures = 0
        self._optimizer = trainer.optimizers[0]
        self._replay: Callable[[], Any] | None = None
        self._row: Tensor | None = None
        self._names: tuple[ValueName, ...] = ()
        self._batch: Batch | None = None
        self._signature: tuple[Any, ...] = ()
        self._watched = Watched([])
        self._state_of_cache: Any = None
        self._constants: tuple[Any, ...] = ()
        self._slots: list[tuple[dict[str, Any], str, Tensor]] = []
        self._places: list[int] = []
        self._is_rechecked = False
        self._captures_in_a_row = 0
        self._rates = self._make_rates()
        self._is_fresh = trainer.global_step == 0 or not (self._optimizer.state or trainer.ckpt_path)
        self._has_foreign_code = has_foreign_code(module)
        self._check_due: Literal["", "in the next step", "in this epoch"] = ""

    def _make_rates(self) -> list[Tensor | None]:
        """Return a learning-rate tensor for each parameter group of a fused optimizer, and `None` for others."""
        groups = self._optimizer.param_groups
        self._filled = [group["lr"] for group in groups]
        return [
            torch.full((), float(group["lr"]), dtype=self.capture.scalar, device=_device(self._optimizer))
            if group.get("fused") and not isinstance(group["lr"], Tensor)
            else None
            for group in groups
        ]

    def recheck(self) -> None:
        """Recheck everything the graph depends on before the next step, as anything may change between epochs."""
        self._is_rechecked = False
        self._check_due = "in this epoch" if self._has_foreign_code and self._replay is not None else ""

    def prepare(self, batch: Batch) -> bool:
        """Prepare the graph for a batch, and capture the step if necessary.

        Args:
            batch: Batch of the next step.

        Returns:
            Whether to replay the step. If not, the caller must run an ordinary step.
        """
        if self.obstacle or self.trainer.accumulate_grad_batches > 1:  # callbacks may change this setting
            return False
        if self._is_fresh or len(self._rates) != len(self._optimizer.param_groups):
            # An ordinary step creates the optimizer state of all trainable parameters.
            self._is_fresh, self._replay, self._rates = False, None, self._make_rates()
            return False
        if self._replay is not None and not (self._is_current() and self._agrees(batch)):
            self._replay = self._row = None
        if self._replay is None and not self.obstacle:
            self._try_capture(batch)
        else:
            self._captures_in_a_row = 0
        return self._replay is not None and self._fits(batch)

    def _fits(self, batch: Batch) -> bool:
        return batch is self._batch or signature(batch) == self._signature

    def _agrees(self, batch: Batch) -> bool:
        """Return whether a replay still agrees with an ordinary step, if the module contains custom code.

        Custom code may read the number of the step or epoch, which is a constant in the graph.
        """
        due = self._check_due
        if not due or not self._fits(batch):
            return True
        self._check_due = ""
        before, random = Snapshot(self._state()), devices.rng_states(_device(self._optimizer))
        copy_into(self._batch, batch)
        usual = self._trial(lambda: self.capture.warm_up(self._step), before, random)
        found = self._trial(lambda: self._replayed(batch), before, random)
        before.restore()
        devices.set_rng_states(_device(self._optimizer), random)
        differs = disagreement([usual, usual], found, flat(before.copies))
        if differs and due == "in the next step":
            self._give_up(f"its result depends on the step number ({differs})")
        return not differs

    def _is_current(self) -> bool:
        """Return whether the constants of the graph are unchanged."""
        if not self._is_rechecked:
            self._is_rechecked = True
            if constants_of(self.module) != self._constants:
                return False
        is_moved = self._addresses() != self._places
        return not is_moved and self._watched.are_unchanged() and self._cache_state() == self._state_of_cache

    def _addresses(self) -> list[int]:
        """Return the address of each parameter; 0 for one that was replaced since the capture."""
        return [own.data_ptr() if slots.get(name) is own else 0 for slots, name, own in self._slots]

    def run(self, batch: Batch) -> tuple[tuple[ValueName, ...], Tensor]:
        """Replay the step.

        Args:
            batch: A batch for which `prepare` returned True.

        Returns:
            Names and values `(C,)` of loss, terms and counts, loss first. Each replay overwrites the values.
        """
        for number, (group, rate) in enumerate(zip(self._optimizer.param_groups, self._rates, strict=True)):
            new = group["lr"]
            if rate is not None and (isinstance(new, Tensor) or new != self._filled[number]):
                rate.fill_(new)
                self._filled[number] = new
        copy_into(self._batch, batch)
        self._replay()  # type: ignore[misc]
        return self._names, self._row  # type: ignore[return-value]

    def _numbers(self) -> tuple[Any, ...]:
        """Return the numbers of module, criterion and optimizer that may change in each step."""
        criterion = getattr(self.module, "criterion", None)
        parts = () if criterion is None else criterion.modules()
        groups = [
            [(name, value) for name, value in group.items() if name != "params" and (name != "lr" or rate is None)]
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True)
        ]
        numbers = [numbers_of(part) for part in parts]
        return numbers_of(self.module, public=True), numbers, plain(groups), self._cache_state()

    def _watch(self) -> Watched:
        """Collect the numbers that are compared before each step."""
        criterion = getattr(self.module, "criterion", None)
        parts = () if criterion is None else criterion.modules()
        hidden = [("params",) if rate is None else ("params", "lr") for rate in self._rates]
        groups = [
            (group, lambda name, hidden=names: name not in hidden)
            for group, names in zip(self._optimizer.param_groups, hidden, strict=True)
        ]
        clipping = vars(self.trainer), lambda name: name in ("gradient_clip_val", "gradient_clip_algorithm")
        return Watched([attributes_of(self.module, public=True), *map(attributes_of, parts), *groups, clipping])

    def _cache_state(self) -> Any:
        """Return whether the teacher's cached logits are read or written, and where."""
        return getattr(getattr(self.module, "teacher_cache", None), "state", None)

    def _try_capture(self, batch: Batch) -> None:
        self._captures_in_a_row += 1
        if self._captures_in_a_row > _MANY:
            self._give_up("Python values that the step reads change in every step")
            return
        if reason := getattr(getattr(self.module, "teacher_cache", None), "obstacle", ""):
            self._give_up(reason)
            return
        device = _device(self._optimizer)
        if any(tensor.device != device for tensor in self._state()):
            self._give_up(f"{type(self._optimizer).__name__} or the module has state on a different device")
            return
        random, before = devices.rng_states(device), Snapshot(self._state())
        buffers = dict(self.module.named_buffers())
        try:
            with _without_logging(self.module):
                reason = self._capture_and_check(batch, before, random)
        except Exception as error:  # custom code may raise anything; the ordinary step raises it again
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _put_back(self.module, buffers)
            self._optimizer.zero_grad()
        before.restore()
        devices.set_rng_states(device, random)
        if reason:
            self._give_up(reason)
            return
        self._watched, self._state_of_cache = self._watch(), self._cache_state()
        self._constants, self._is_rechecked = constants_of(self.module), True
        self._slots = parameter_slots(self.module)  # walking through the module tree in each step would take long
        self._places = self._addresses()
        self._check_due = "in the next step" if self._has_foreign_code else ""

    def _give_up(self, reason: str) -> None:
        self._replay = self._row = self._batch = None
        self.obstacle = reason
        rank_zero_warn(f"the training step runs without a graph: {reason}; --speed.graph off skips the attempt")

    def _capture_and_check(self, batch: Batch, before: Snapshot, random: list[Tensor]) -> str:
        """Capture and check the step; return why the graph cannot be used, or an empty string."""
        self._signature = signature(batch)
        is_static = getattr(self.trainer.datamodule, "is_static", lambda batch: False)(batch)  # type: ignore[attr-defined]
        self._batch = batch if is_static else tree_map_only(Tensor, torch.clone, batch)

        drawn = devices.host_random_states(_device(self._optimizer))
        first = self._trial(lambda: self.capture.warm_up(self._step), before, random)
        if devices.host_random_states(_device(self._optimizer)) != drawn:
            return "the step draws random numbers on the host"
        numbers = self._numbers(), constants_of(self.module)
        ordinary = [first, self._trial(lambda: self.capture.warm_up(self._step), before, random)]
        if changed := first_difference(numbers, (self._numbers(), constants_of(self.module))):
            return f"the step changes {changed}, which is not possible in a graph"
        if len(self._state()) != len(before.tensors):
            return "the step creates new state tensors in the module or optimizer"
        before.restore()
        with self._settings_of_capture():
            self._row, self._replay = self.capture.capture(self._step)
        self.captures += 1
        found = self._trial(lambda: self._replayed(batch), before, random)
        return disagreement(ordinary, found, flat(before.copies))

    def _trial(self, function: Callable[[], Tensor], before: Snapshot, random: list[Tensor]) -> Outcome:
        """Run a step from a given state and return its outcome, without restoring the state."""
        before.restore()
        devices.set_rng_states(_device(self._optimizer), random)
        row = function().clone()
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        return Outcome(row, norm, flat(before.tensors))

    def _replayed(self, batch: Batch) -> Tensor:
        return self.run(batch)[1]

    def _step(self) -> Tensor:
        """Run the training step as Lightning does, and return the logged values `(C,)`."""
        trainer, module, optimizer = self.trainer, self.module, self._optimizer
        buffers = {name: buffer for name, buffer in module.named_buffers() if buffer is not None}
        with trainer.precision_plugin.train_step_context():
            values = named(module.training_values(self._batch))
        optimizer.zero_grad()
        module.backward(values[LOSS])
        module.configure_gradient_clipping(
            optimizer,
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm,
        )
        optimizer.step()
        _keep_in_place(module, buffers)
        self._names = tuple(values)
        return torch.stack([value.detach().float() for value in values.values()])

    def _state(self) -> list[Tensor]:
        """Return all tensors that a step may change: parameters, buffers and optimizer state."""
        buffers = (buffer for name, buffer in self.module.named_buffers() if not name.startswith("metrics."))
        held = (value for state in self._optimizer.state.values() for value in state.values())
        return [*self.module.parameters(), *buffers, *(value for value in held if isinstance(value, Tensor))]

    @contextmanager
    def _settings_of_capture(self) -> Iterator[None]:
        """Make the optimizer capturable, with learning rates read from tensors, within this context."""
        groups = self._optimizer.param_groups
        own: list[dict[str, Any]] = [
            {name: group[name] for name in ("lr", "capturable") if name in group} for group in groups
        ]
        for group, rate in zip(groups, self._rates, strict=True):
            if rate is not None:
                group["lr"] = rate
            if group.get("fused") and "capturable" in group:  # fused optimizers count on the device anyway
                group["capturable"] = True
        try:
            yield
        finally:
            for group, settings in zip(groups, own, strict=True):
                group.update(settings)


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    device: torch.device = optimizer.param_groups[0]["params"][0].device
    return device


@contextmanager
def _without_logging(module: Any) -> Iterator[None]:
    """Make `self.log` raise an error in this context: in a graph, it would be called only once."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the step calls self.log, which is not possible in a graph")

    names = ("log", "log_dict")
    vars(module).update(dict.fromkeys(names, refuse))
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]


def _put_back(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Restore the buffers of a module that an incomplete step has replaced."""
    for name, old in buffers.items():
        owner, _, leaf = name.rpartition(".")
        if getattr(module.get_submodule(owner), leaf) is not old:
            setattr(module.get_submodule(owner), leaf, old)


def _keep_in_place(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Copy replaced buffers into the original tensors, since a graph reads buffers by address."""
    for name, old in buffers.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        new = getattr(holder, leaf)
        if new is not old:
            with torch.no_grad():
                old.copy_(new)
            setattr(holder, leaf, old)
