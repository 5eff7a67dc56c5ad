"""`lkd layers`: list the layer names that `student_layers` and `teacher_layers` accept."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lkd._compat import tree_map
from lkd.callbacks.monitor import fitting
from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.features.extractor import FeatureExtractor
from lkd.features.layers import FeatureLayers, blank_image, feature_layers, layer_names

_T = TypeVar("_T")
_KEY = "settings"  # prefix of error messages about a setting
_NOTE = """\
A group name (@stages: all of @stage1, @stage2, ...) selects the corresponding layers of any network that defines the
group. The suffix :input selects the input of a layer instead of its output."""


def main(args: Sequence[str]) -> None:
    """Print the layers of a network, or of the networks of a run, whose outputs can be read.

    Args:
        args: Arguments after `lkd layers`: the `class_path` of a network and its settings, or the arguments of
            `lkd fit`; and `--input_size`.

    Raises:
        ValueError: If no network is given, or it does not accept the input.
    """
    size, args = _input_size(args)
    if not args:
        raise ValueError("lkd layers requires the class_path of a network, or --config FILE; see 'lkd layers --help'")
    example: Any = None
    if args[0].startswith("-"):
        networks, example = _read_config(args, with_data=not size)
    elif "." in args[0]:
        networks = {args[0]: _built(nn.Module, args[0], args[1:])}
    else:
        raise ValueError(
            f"{args[0]!r} is not a class_path; give the full import path, as in lkd.models.resnet20 or my_net.Net"
        )
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
            "--input_size must be one size (224), height and width (64 48), or channels, height and width (3 64 48), "
            f"got {' '.join(given) or 'nothing'}"
        )
    return [int(number) for number in given], rest


def _read_config(args: Sequence[str], with_data: bool) -> tuple[dict[str, nn.Module], Any]:
    """Return the networks of a run by name, and a blank input with the shape of its data, if that is known."""
    # A criterion may name layers that do not exist, so nothing is instantiated.
    config = LkdCLI(*prepare(["fit", *args]), until="parsed", needs_data=False).config["fit"]
    model = config["model"].get("init_args", {})
    settings = {name: model.get(name) for name in ("student", "teacher", "model")}
    settings |= {f"student {number}": given for number, given in enumerate(model.get("students") or (), start=1)}
    networks = {f"{name}: {given['class_path']}": _built(nn.Module, given) for name, given in settings.items() if given}
    if not networks:
        raise ValueError(
            f"the settings of {config['model']['class_path']} contain no student, students, teacher or model; give the "
            "class_path of a network"
        )
    if not (with_data and config.get("data")):
        return networks, None
    data = _built(L.LightningDataModule, config["data"])
    example, shape = getattr(data, "example_input", None), getattr(data, "input_shape", None)
    return networks, torch.zeros(1, *shape) if example is None and shape is not None else example


def _built(kind: type[_T], given: Any, settings: Sequence[str] = ()) -> _T:
    """Instantiate a `class_path` with its settings."""
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
    """Return the shape of a tensor, or the shapes of a structure of tensors, as text."""
    return str(tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, example))


def _listing(name: str, network: nn.Module, example: Any) -> Iterator[str]:
    """Yield the lines for one network: a heading, and a row for each layer."""
    groups = _groups(feature_layers(network))
    try:
        shapes = layer_names(network, example)
        inputs = [layer for layer in groups if layer.endswith(":input") and layer.removesuffix(":input") in shapes]
        features = FeatureExtractor(network, inputs, read=lambda output: torch.empty(0)).probe(example).outputs.features
    except Exception as error:  # a forward pass may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "an image" if _is_image(example) else "an input"
        raise ValueError(
            f"{type(network).__name__} does not accept {kind} of shape {_shape(example)}: {reason}; set a different "
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
    """Return the groups of each layer, by the name of the layer."""
    groups: dict[str, list[str]] = {}
    for field, value in layers._asdict().items():
        numbered = isinstance(value, tuple)
        for number, layer in enumerate(value if numbered else [value] if value else [], start=1):
            groups.setdefault(layer, []).append(f"@{field.removesuffix('s')}{number}" if numbered else f"@{field}")
    for layer in layers.stages[-1:]:
        groups[layer].append("@last_stage")
    return groups
