"""Private parts of other libraries, with the reason why lkd uses them. `tests/test_compat.py` fails if one changes."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm  # BatchNorm layers have no public base class
from torch.nn.modules.dropout import _DropoutNd as AnyDropout  # dropout layers have no public base class
from torch.optim.lr_scheduler import LRScheduler, SequentialLR
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only  # documented by torch.export only

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger
    from optuna.trial import BaseTrial, FrozenTrial, Trial
    from tensorboard.compat.proto.event_pb2 import Event
    from torchmetrics import Metric

__all__ = ["AnyBatchNorm", "AnyDropout", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only"]


# PyTorch


def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors in one operation, for which PyTorch has no public function."""
    torch._foreach_copy_(list(targets), list(sources))


def cpu_has_avx512_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16 vectors; `torch.cpu` reports it in private functions only."""
    return torch.cpu._is_avx512_bf16_supported()


def cpu_has_amx() -> bool:
    """Return whether the CPU has matrix units (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def modifications(tensor: Tensor) -> int:
    """Return the counter that increases when a tensor is modified in place; autograd uses it for the same purpose."""
    return tensor._version


def wrapped_by_compile(network: nn.Module) -> Any:
    """Return the network that `torch.compile(network)` wraps; any other network unchanged."""
    return getattr(network, "_orig_mod", network)


def remove_compiled_call(network: nn.Module) -> None:
    """Undo `network.compile()`; PyTorch offers no inverse."""
    network._compiled_call_impl = None


def parameter_slots(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return each parameter with the dict in which its layer registers it and its name there."""
    return [
        (layer._parameters, name, parameter)
        for layer in module.modules()
        for name, parameter in layer._parameters.items()
        if parameter is not None
    ]


def has_forward_hooks(layer: nn.Module) -> bool:
    """Return whether a layer has forward hooks."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def parts_of(schedule: Any) -> Sequence[LRScheduler]:
    """Return the parts of a `SequentialLR` or `ChainedScheduler`; none for other schedules."""
    parts: Sequence[LRScheduler] = getattr(schedule, "_schedulers", ())
    return parts


def last_milestone(schedule: SequentialLR) -> int:
    """Return the step at which the last part of a schedule begins."""
    return schedule._milestones[-1]


# Lightning, torchmetrics, TensorBoard, Optuna


class ModuleHooks:
    """Mixin of LightningModules that calls public methods where Lightning and PyTorch call private ones."""

    def saved_hyperparameters(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters that checkpoints store, given the arguments of the constructor."""
        return values

    def apply_to_others(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a function that moves or casts tensors to those that are not in the module tree."""

    def _set_hparams(self, hp: Any) -> None:
        super()._set_hparams(self.saved_hyperparameters(self._to_hparams_dict(hp)))  # type: ignore[misc, attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        if recurse:
            self.apply_to_others(fn)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Bypass the checks of `nn.Module` for an attribute that Lightning sets 40 times in each step."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


def apply_to_tensors(network: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply a function to all parameters and buffers, as `nn.Module.to` does."""
    network._apply(fn)  # type: ignore[no-untyped-call]


class CLIHooks:
    """Mixin of a `LightningCLI` that calls public methods where Lightning calls private ones."""

    def seed(self, seed_everything: Callable[[], None]) -> None:
        """Seed the random number generators by calling a function."""
        seed_everything()

    def run_command(self, run: Callable[[], None]) -> None:
        """Run the subcommand by calling a function."""
        run()

    def _parse_ckpt_path(self) -> None:
        """Keep the settings of the config; Lightning would override them with the checkpoint's hyperparameters."""

    def _dump_config(self) -> None:
        """Store the settings for the checkpoints without validating them again, which takes four times as long."""
        self.parser.dump = partial(self.parser.dump, skip_validation=True)  # type: ignore[attr-defined]
        try:
            super()._dump_config()  # type: ignore[misc]
        finally:
            del self.parser.dump  # type: ignore[attr-defined]

    def _set_seed(self) -> None:
        self.seed(super()._set_seed)  # type: ignore[misc]

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(partial(super()._run_subcommand, subcommand))  # type: ignore[misc]


def detects_anomalies(trainer: L.Trainer) -> bool:
    """Return the trainer's setting `detect_anomaly`, for which it has no public attribute."""
    return bool(trainer._detect_anomaly)


def validates_in_epoch(loop: Any) -> bool:
    """Return whether the epoch of a training loop includes validation."""
    return bool(loop._should_check_val_epoch())


def parser_of(cli: LightningCLI, command: str) -> Any:
    """Return the parser of a subcommand."""
    return cli._parser(command)


def write_event(logger: TensorBoardLogger, event: Event, step: int) -> None:
    """Write an event, such as one that marks a restart, after which TensorBoard drops later points of the first run."""
    logger.experiment._get_file_writer().add_event(event, step)


class MetricHooks:
    """Mixin of metrics that calls a public method where torchmetrics calls a private one."""

    def gather_states(self, gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Replace the states of this process by those of all processes.

        Args:
            gather: Function that returns a tensor of each process; their sizes may differ.
        """

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] | None = None, process_group: Any | None = None
    ) -> None:
        from torchmetrics.utilities.distributed import gather_all_tensors

        group = process_group or self.process_group  # type: ignore[attr-defined]
        self.gather_states(partial(dist_sync_fn or gather_all_tensors, group=group))


def default_states(metric: Metric) -> Mapping[str, Any]:
    """Return the states of a metric, and their values after a reset."""
    return metric._defaults


def update_count(metric: Metric) -> int:
    """Return how often a metric was updated since the last reset."""
    return metric._update_count


def set_update_count(metric: Metric, count: int) -> None:
    """Set how often a metric was updated and discard its computed value, which an update replayed by a graph omits."""
    metric._update_count, metric._computed = count, None


def trial_id(trial: BaseTrial | FrozenTrial | Trial) -> int:
    """Return the ID of a trial in its storage, which differs from its number."""
    number: int = trial._trial_id  # type: ignore[union-attr]
    return number


# argparse and jsonargparse


def options_of(parser: ArgumentParser) -> list[str]:
    """Return the first name of each option or positional argument of a parser."""
    return [(action.option_strings or [action.dest])[0] for action in parser._actions]


def destinations_of(parser: ArgumentParser) -> set[str]:
    """Return the top-level keys that a parser sets."""
    return {action.dest.partition(".")[0] for action in parser._actions}


@contextmanager
def changed_parser(**changes: Callable[..., Any]) -> Iterator[None]:
    """Replace functions of jsonargparse that decide how settings of nested classes are merged and passed on.

    Args:
        changes: Replacements by the name of the replaced function, which each receives as its first argument.
    """
    from jsonargparse import _typehints as typehints

    own = {name: getattr(typehints, name) for name in changes}
    for name, change in changes.items():
        setattr(typehints, name, partial(change, own[name]))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(typehints, name, function)


def nested_value(parsed: Any) -> tuple[str, Any] | None:
    """Return the key and value that jsonargparse passes to a nested class; `None` for other values."""
    from jsonargparse._util import NestedArg

    return (parsed.key, parsed.val) if isinstance(parsed, NestedArg) else None


def import_class(path: str) -> Any:
    """Import a class or function by its path, like jsonargparse."""
    from jsonargparse._util import import_object

    return import_object(path)
