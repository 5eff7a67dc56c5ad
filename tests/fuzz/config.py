"""Fuzz `lkd fit --config FILE` up to the instantiation of modules and networks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from lkd.cli.arguments import prepare
from lkd.cli.config_files import find_config
from lkd.cli.errors import explain
from lkd.cli.lightning_cli import LkdCLI
from lkd.cli.main import _MISTAKES
from tests.fuzz.mutate import mutate

REFUSALS = _MISTAKES
MEMORY = 2**29
_CLASSES = [
    *("os.system", "subprocess.Popen", "builtins.eval", "tests.fuzz.canary.ring", "torch.hub.load", "torch.load", "os"),
    *("lkd.DistillModule", "lkd.losses.KD", "lkd.models.resnet8", "lkd.DigitsDataModule", "torch.nn.Linear", "lkd", ""),
    *("lkd.losses.DKD", "torch.optim.SGD", "nowhere.Nothing", ".", "a..b", "torch.nn.Module", "lkd.losses.AT", "1.2"),
]
_SCALARS = [
    *(
        "null",
        "true",
        "~",
        "1",
        "-1",
        "0",
        "1e3",
        "1e999",
        ".inf",
        ".nan",
        "9" * 4000,
        "9" * 5000,
        "0x_",
        "0b",
        "1:59:59",
    ),
    *(
        "2001-99-99",
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system",
        "!foo x",
        "!!binary x",
        "!!set {a}",
    ),
    *(
        "!!int x",
        "!!float y",
        "'@stages'",
        "@stages",
        "*a",
        "*nowhere",
        "&a 3",
        '"\\ud800"',
        '"\\0"',
        "[",
        "{",
        "- -",
        "?",
        "|",
        "x" * 5000,
    ),
    *(
        "[1, 2]",
        "{a: 1}",
        "{class_path: 3}",
        "{init_args: {}}",
        "[[[[]]]]",
        "text",
        "/dev/zero",
        "config.yaml",
        "!!timestamp 1",
    ),
]


class ParseOnly(LkdCLI):
    """A command line that only parses its arguments."""

    def instantiate_classes(self) -> None:
        """Skip the instantiation."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Skip the command."""


class Fuzz:
    """Create and read configs."""

    def __init__(self) -> None:
        names = ("digits/kd", "digits/teacher", "digits/mutual", "cifar10/kd_resnet56_resnet20")
        self.texts = [find_config(name).read_text() for name in names]
        self.settings = [yaml.safe_load(text) for text in self.texts]
        self.cli = ParseOnly(*prepare(["fit", "--config", "digits/kd"]))

    def make(self, rng: random.Random, folder: Path) -> Path:
        """Write one malicious config."""
        path, way = folder / "config.yaml", rng.random()
        if way < 0.03:
            content = rng.choice(self.texts).encode()
        elif way < 0.3:
            content = mutate(rng, rng.choice(self.texts).encode())
        elif way < 0.5:
            content = self._changed(rng).encode()
        elif way < 0.6:
            content = yaml.safe_dump(_swapped(rng, rng.choice(self.settings))).encode()
        elif way < 0.75:
            content = (rng.choice(self.texts) + _explosion(rng)).encode()
        else:
            top = ("model", "data", "trainer", "seed_everything", "checkpoint", "speed", "x", "ckpt_path", "config")
            content = "\n".join(f"{rng.choice(top)}: {_value(rng, 3)}" for _ in range(rng.randint(1, 5))).encode()
        path.write_bytes(content)
        return path

    def _changed(self, rng: random.Random) -> str:
        """Return a valid config in which the value, key or indentation of one line is changed."""
        lines = rng.choice(self.texts).splitlines()
        number = rng.randrange(len(lines))
        line = lines[number]
        key, _, _ = line.partition(":")
        indent = line[: len(line) - len(line.lstrip())]
        lines[number] = rng.choice(
            [
                f"{key}: {_value(rng, 2)}",
                "\t" + line,
                "  " + line,
                line + "\n" + line,
                f"{indent}{rng.choice(_SCALARS)}: 1",
                "",
            ]
        )
        return "\n".join(lines)

    def read(self, path: Path) -> str:
        """Parse the config."""
        try:
            args = prepare(["fit", "--config", str(path)]).args
            self.cli.parse_arguments(self.cli.parser, args)
        except REFUSALS as error:
            explain(error)
            raise
        return "accepted"


def _value(rng: random.Random, depth: int) -> str:
    way = rng.random()
    if depth == 0 or way < 0.4:
        return rng.choice(_SCALARS)
    if way < 0.7:
        return f"{{class_path: {rng.choice(_CLASSES)}, init_args: {_value(rng, depth - 1)}}}"
    if way < 0.85:
        return f"[{_value(rng, depth - 1)}, {_value(rng, depth - 1)}]"
    return f"{{{rng.choice(['a', 'lr', 'class_path', 'max_epochs', '<<', '? x'])}: {_value(rng, depth - 1)}}}"


def _swapped(rng: random.Random, settings: Any) -> Any:
    """Return the settings with one class or value replaced."""
    if isinstance(settings, dict) and settings:
        chosen = rng.choice(list(settings))
        new = rng.choice(_CLASSES) if chosen == "class_path" and rng.random() < 0.7 else _swapped(rng, settings[chosen])
        return {**settings, chosen: new}
    if isinstance(settings, list) and settings:
        return [_swapped(rng, settings[0]), *settings[1:]]
    return rng.choice([*_CLASSES, None, 0, -1, 2**70, 1e400, float("nan"), [], {}, True, "None", "x\ny"])


def _explosion(rng: random.Random) -> str:
    """Return YAML anchors that contain each other, whose expansion is exponentially large."""
    levels, width = rng.choice([(3, 3), (10, 10), (30, 9), (200, 2)]), 0
    depth, width = levels
    merge = rng.random() < 0.4
    lines = ["\nl0: &l0 {k: 1}" if merge else "\nl0: &l0 [x]"]
    for level in range(1, depth):
        parts = ", ".join([f"*l{level - 1}"] * width)
        lines.append(f"l{level}: &l{level} {{<<: [{parts}]}}" if merge else f"l{level}: &l{level} [{parts}]")
    lines.append(rng.choice(["", "c: &c [*c]", "c: &c {x: *c}", "d: " + "[" * rng.choice([50, 2000, 100_000])]))
    return "\n".join(lines)
