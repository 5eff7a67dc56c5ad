"""The private parts of other libraries in `lkd/_compat.py` still behave as lkd expects."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import jsonargparse
import lightning as L
import optuna
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, SequentialLR, StepLR
from torchmetrics import MeanMetric

import lkd
from lkd import _compat

PACKAGE = Path(lkd.__file__).parent
LIBRARIES = ("torch", "lightning", "jsonargparse", "torchmetrics", "torchvision", "optuna", "tensorboard")
PUBLIC = {"_replace", "_asdict", "_fields"}
"""Public methods of named tuples, whose underscore avoids conflicts with field names."""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_compat_imports_private_modules(path: Path) -> None:
    if path.name == "_compat.py":
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        assert not [name for name in names if name.startswith("_")], f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_attributes_belong_to_their_file(path: Path) -> None:
    """An attribute with an underscore belongs to a class or function of the same file, or to a named tuple."""
    if path.name == "_compat.py":
        return
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))} | PUBLIC
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    for node in attributes:
        is_private = node.attr.startswith("_") and not node.attr.startswith("__")
        of_self = ast.unparse(node.value) in ("self", "cls", "super()", "os")
        assert not is_private or of_self or node.attr in own, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_tensors_are_copied_and_modifications_counted() -> None:
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    before = _compat.modifications(targets[0])
    _compat.copy_tensors(targets, sources)
    assert [tensor.tolist() for tensor in targets] == [[1, 1], [2, 2, 2]]
    assert _compat.modifications(targets[0]) > before


def test_cpu_name() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" in flags:
        assert _compat.cpu_has_avx512_bf16() == ("avx512_bf16" in flags)
        assert _compat.cpu_has_amx() == ("amx_tile" in flags)


def test_compiled_networks() -> None:
    network = nn.Linear(2, 2)
    assert _compat.wrapped_by_compile(torch.compile(network)) is network
    assert _compat.wrapped_by_compile(network) is network
    network.compile(backend="eager")
    _compat.remove_compiled_call(network)
    assert network._compiled_call_impl is None
    assert not _compat.has_forward_hooks(network)
    network.register_forward_hook(lambda *_: None)
    assert _compat.has_forward_hooks(network)


def test_layers_without_a_public_base_class() -> None:
    assert all(isinstance(kind(2), _compat.AnyBatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    assert all(isinstance(kind(), _compat.AnyDropout) for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout))


def test_schedules_have_parts() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = [ConstantLR(optimizer), StepLR(optimizer, 3)]
    schedule = SequentialLR(optimizer, parts, milestones=[7])
    assert list(_compat.parts_of(schedule)) == parts
    assert _compat.last_milestone(schedule) == 7
    assert not _compat.parts_of(parts[0])


def test_metrics() -> None:
    metric = MeanMetric()
    metric.update(2.0)
    assert set(_compat.default_states(metric)) == {"mean_value", "weight"}
    assert _compat.update_count(metric) == 1
    assert metric.compute() == 2
    metric.mean_value += 4.0  # as a replayed graph does
    metric.weight += 1.0
    _compat.set_update_count(metric, 2)
    assert metric.compute() == 3


def test_trainer() -> None:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    assert _compat.detects_anomalies(L.Trainer(detect_anomaly=True, **settings))
    trainer = L.Trainer(**settings)
    assert not _compat.detects_anomalies(trainer)
    assert _compat.validates_in_epoch(trainer.fit_loop.epoch_loop) is False  # no validation data


def test_events(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": 1.0}, step)
    _compat.write_event(logger, Event(step=2, session_log=SessionLog(status=SessionLog.START)), 2)
    logger.log_metrics({"loss": 5.0}, 2)
    logger.finalize("success")
    events = EventAccumulator(str(logger.log_dir))
    events.Reload()
    assert [point.value for point in events.Scalars("loss")] == [1, 5]


def test_trials() -> None:
    study = optuna.create_study()
    trial = study.ask()
    assert _compat.trial_id(trial) == _compat.trial_id(study.trials[0])


def test_parsers() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("runs")
    parser.add_argument("--output", "-o")
    parser.add_argument("--data.root")
    assert _compat.options_of(parser) == ["runs", "--output", "--data.root"]
    assert _compat.destinations_of(parser) == {"runs", "output", "data"}


class Part:
    def __init__(self, size: int = 1, name: str | None = "a") -> None:
        self.size, self.name = size, name


class Whole:
    def __init__(self, part: Part) -> None:
        self.part = part


def test_parser_functions_are_replaced_temporarily() -> None:
    seen: list[str] = []

    def discard(own, parser, old, new):
        seen.append(new["class_path"])
        return own(parser, old, new)

    def parse(own, value, **settings):
        parsed, path = own(value, **settings)
        if nested := _compat.nested_value(parsed):
            seen.append(nested[0])
        return parsed, path

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Whole, "whole")
    home = f"{__name__}."
    args = [f"--whole={home}Whole", f"--whole.part={home}Part", "--whole.part.init_args.size=2"]
    with _compat.changed_parser(discard_init_args_on_class_path_change=discard, parse_value_or_config=parse):
        assert parser.parse_args(args).whole.init_args.part.init_args.size == 2
    assert f"{home}Part" in seen
    assert "part.init_args.size" in seen
    count = len(seen)
    parser.parse_args(args)
    assert len(seen) == count
    assert _compat.import_class(f"{home}Part") is Part


def _classes() -> list[type]:
    names = [module.name for module in pkgutil.walk_packages(lkd.__path__, "lkd.") if "__main__" not in module.name]
    members = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return [value for value in dict.fromkeys(filter(inspect.isclass, members)) if value.__module__.startswith("lkd.")]


def test_only_compat_overrides_private_methods() -> None:
    for kind in _classes():
        private = [name for name in vars(kind) if name.startswith("_") and not name.startswith("__")]
        for base in kind.__mro__[1:]:
            library = base.__module__.partition(".")[0]
            overridden = set(private) & set(vars(base)) if library in LIBRARIES else set()
            assert kind.__module__ == "lkd._compat" or not overridden - {"_abc_impl"}, f"{kind}: {overridden}"


class Hooked(_compat.ModuleHooks, L.LightningModule):
    def __init__(self, width: int, secret: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.other = (torch.zeros(width),)

    def saved_hyperparameters(self, values: dict[str, int]) -> dict[str, int]:
        return {"width": values["width"]}

    def apply_to_others(self, fn) -> None:
        self.other = (fn(self.other[0]),)


def test_private_methods_of_modules_call_hooks() -> None:
    module = Hooked(2, secret=3)
    assert dict(module.hparams) == {"width": 2}
    assert module.double() is module
    assert module.other[0].dtype == torch.float64
    assert "_current_fx_name" in inspect.getsource(L.pytorch.trainer.call)


def test_private_methods_of_the_cli_call_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    class CLI(_compat.CLIHooks, LightningCLI):
        def seed(self, seed_everything) -> None:
            called.append("seed")

        def run_command(self, run) -> None:
            called.append("run")

    monkeypatch.chdir(tmp_path)
    torch.save({"hyper_parameters": {"_class_path": "a.B"}}, "some.ckpt")
    CLI(BoringModel, args=["fit", "--ckpt_path", "some.ckpt"])
    assert called == ["seed", "run"]


def test_settings_are_stored_without_a_second_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    class CLI(_compat.CLIHooks, LightningCLI):
        pass

    validated: list[bool] = []
    cli = CLI(BoringModel, args=["--trainer.max_epochs=2"], run=False)
    stored = cli.__dict__.pop("config_dump", None)
    monkeypatch.setattr(cli.parser, "validate", lambda *_, **__: validated.append(True))
    cli._dump_config()
    assert not validated
    assert cli.config_dump["trainer"]["max_epochs"] == 2
    assert stored in (None, cli.config_dump)
    text = cli.parser.dump(cli.config, skip_link_targets=False, skip_none=False)
    assert validated
    assert yaml.safe_load(text) == cli.config_dump
