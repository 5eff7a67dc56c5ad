"""`lkd layers`: the names that can stand in `student_layers` and `teacher_layers`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lkd.callbacks.monitor import fitting
from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.features.extractor import FeatureTaps
from lkd.features.layers import FeatureLayers, blank_image, feature_layers, layer_names

_T = TypeVar("_T")
_KEY = "settings"  # what a message about one of them begins with
_NOTE = """\
A group's name (@stages: all of @stage1, @stage2, ...) stands for its layers in every network that knows it. With :input
behind a layer's name, what goes into the layer is read."""


class _ConfigReader(LkdCLI):
    """Reads a run's settings and builds nothing: a criterion that does not find its layers could not be built."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of `lkd fit`, but settings need not name the data."""
        self.datamodule_class = None  # Lightning then does not ask for one
        super().add_core_arguments_to_parser(parser)

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main(args: Sequence[str]) -> None:
    """Print the layers of a network, or of a run's networks, that can be tapped.

    Args:
        args: The arguments behind `lkd layers`: a network's `class_path` and its settings, or what `lkd fit` takes;
            and `--input_size`.

    Raises:
        ValueError: If there is no network, or it cannot take the image.
    """
    size, args = _input_size(args)
    if not args:
        raise ValueError("lkd layers needs a network's class_path, or --config FILE; see 'lkd layers --help'")
    example: Any = None
    if args[0].startswith("-"):
        networks, example = _read_config(args, with_data=not size)
    elif "." in args[0]:
        networks = {args[0]: _built(nn.Module, args[0], args[1:])}
    else:
        raise ValueError(f"{args[0]!r} is no class_path; say where it lies, as in lkd.models.resnet20 or my_net.Net")
    lines: list[str] = []
    for name, network in networks.items():
        given = blank_image(network, size or [32]) if example is None else fitting(example, network)
        lines += [*_listing(name, network, given), ""]
    print(*lines, _NOTE, sep="\n")


def _input_size(args: Sequence[str]) -> tuple[list[int], list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--input_size", nargs="*")
    found, rest = parser.parse_known_args(list(args))
    given = found.input_size
    if given is None:
        return [], rest
    if len(given) not in (1, 2, 3) or not all(number.isdecimal() and int(number) for number in given):
        raise ValueError(
            f"--input_size takes the image's size (224), height and width (64 48), or channels, height and width "
            f"(3 64 48), got {' '.join(given) or 'nothing'}"
        )
    return [int(number) for number in given], rest


def _read_config(args: Sequence[str], with_data: bool) -> tuple[dict[str, nn.Module], Any]:
    """The networks of a run, by name, and a blank input of its data's, if that tells one."""
    config = _ConfigReader(*prepare(["fit", *args])).config["fit"]
    model = config["model"].get("init_args", {})
    settings = {name: model.get(name) for name in ("student", "teacher", "model")}
    settings |= {f"student {number}": given for number, given in enumerate(model.get("students") or (), start=1)}
    networks = {f"{name}: {given['class_path']}": _built(nn.Module, given) for name, given in settings.items() if given}
    if not networks:
        raise ValueError(
            f"{config['model']['class_path']} has no student, students, teacher or model in its settings; give the "
            "network's class_path"
        )
    if not (with_data and config.get("data")):
        return networks, None
    data = _built(L.LightningDataModule, config["data"])
    example, shape = getattr(data, "example_input", None), getattr(data, "input_shape", None)
    return networks, torch.zeros(1, *shape) if example is None and shape is not None else example


def _built(kind: type[_T], given: Any, settings: Sequence[str] = ()) -> _T:
    """What a `class_path` and its settings stand for."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{_KEY}", type=kind)
    if isinstance(given, str):
        own = [f"--{_KEY}.{arg[2:]}" if arg.startswith("--") else arg for arg in settings]
        config = parser.parse_args([f"--{_KEY}={given}", *own])
    else:
        config = parser.parse_object({_KEY: given})
    found: _T = parser.instantiate(config)[_KEY]
    return found


def _is_image(example: Any) -> bool:
    return isinstance(example, Tensor) and example.dim() == 4


def _shape(example: Any) -> str:
    """The shape of a tensor; of several tensors, each one's."""
    return str(tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, example))


def _listing(name: str, network: nn.Module, example: Any) -> Iterator[str]:
    """The lines for one network."""
    groups = _groups(feature_layers(network))
    try:
        shapes = layer_names(network, example)
        inputs = [layer for layer in groups if layer.endswith(":input") and layer.removesuffix(":input") in shapes]
        features = FeatureTaps(network, inputs).probe(example).outputs.features
    except Exception as error:  # whatever someone's forward pass raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "an image" if _is_image(example) else "an input"
        raise ValueError(
            f"{type(network).__name__} cannot take {kind} of the shape {_shape(example)}: {reason}; give another "
            "--input_size"
        ) from error
    rows = [("layer", "shape", "groups" if groups else "")]
    for layer, shape in shapes.items():
        if (read := f"{layer}:input") in features:
            rows.append((read, str(tuple(features[read].shape)), ", ".join(groups[read])))
        rows.append((layer, str(shape), ", ".join(groups.get(layer, []))))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    yield f"{name}, {parameters:,} parameters, for one {'image' if _is_image(example) else 'input'} {_shape(example)}"
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    yield from (f"  {layer:{first}}  {shape:{second}}  {group}".rstrip() for layer, shape, group in rows)


def _groups(layers: FeatureLayers) -> dict[str, list[str]]:
    """A layer's name to the groups that it is in or is."""
    groups: dict[str, list[str]] = {}
    for field, value in layers._asdict().items():
        numbered = isinstance(value, tuple)
        for number, layer in enumerate(value if numbered else [value] if value else [], start=1):
            groups.setdefault(layer, []).append(f"@{field.removesuffix('s')}{number}" if numbered else f"@{field}")
    for layer in layers.stages[-1:]:
        groups[layer].append("@last_stage")
    return groups
