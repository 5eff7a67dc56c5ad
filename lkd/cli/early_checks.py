"""Checks of the command line that require neither torch nor Lightning, whose imports take seconds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from lkd.cli.config_files import KEYS, configs_folder, find_config, is_config, read_config

OPTIONS = ("config", "help", "resume", "seeds", "images", "output", "print_config", "debug")
"""Options that are not settings of a run."""
_FLAGS = ("--resume", "--print_config", "--debug", "--help", "-h")
_TRAINED = ("student", "students", "model")  # arguments of lkd's modules for the networks that are trained
_SECTIONS = {
    "model.init_args": (
        *("optimizer", "lr_scheduler", "criterion", "student", "teacher", "teacher_ckpt", "student_ckpt", "model_ckpt"),
        *("distill_weight", "hard_weight", "label_smoothing", "teacher_normalization"),
    ),
    "data.init_args": ("batch_size", "num_workers", "root", "val_size", "image_size", "views"),
    "trainer": ("max_epochs", "max_steps", "devices", "accelerator", "precision", "strategy", "logger", "callbacks"),
}
"""Sections of settings that users may expect at the top level."""
USUAL = {
    "seed": "seed_everything",
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "lr": "model.init_args.optimizer.init_args.lr",
    "learning_rate": "model.init_args.optimizer.init_args.lr",
    "temperature": "model.init_args.criterion.init_args.temperature",
}
"""Common names of settings in other programs, and their names in lkd."""
_NESTED = ("optimizer", "lr_scheduler", "criterion", "student", "teacher")
_PAGE = ("jinja2", "matplotlib", "scipy")
_REQUIRED = {"compare": _PAGE, "sweep": (*_PAGE, "optuna", "optuna-integration")}
"""Packages of optional dependencies by the command that requires them."""
_EXAMPLES = {
    "fit": "for example 'lkd fit --config digits/kd', or 'lkd fit --config data/cifar10 --config "
    "pairs/resnet56_resnet20_10 --config methods/dkd'; 'lkd fit --help' lists modules, data and settings",
    "validate": "for example 'lkd validate --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt'",
    "test": "for example 'lkd test --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt'",
    "predict": "for example 'lkd predict --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt'",
}


def check(args: Sequence[str]) -> None:
    """Check the arguments and configs as far as possible without importing torch.

    Args:
        args: Arguments after `lkd`: the command, followed by its options.

    Raises:
        FileNotFoundError: If a config does not exist.
        ValueError: If an argument or a config is invalid, or a required part or package is missing.
    """
    command, rest = args[0], args[1:]
    _check_installed(command)
    if command in _EXAMPLES:
        if not rest:
            needed = "a config" if command == "fit" else "a checkpoint"
            raise ValueError(f"lkd {command} requires {needed}, {_EXAMPLES[command]}")
        options = dict(_options(command, rest))
        for option in options:
            _check_option(command, option)
    paths = [find_config(name) for name in _configs(rest)]
    if command in _EXAMPLES:
        configs = [read_config(path) for path in paths]
        for path, config in zip(paths, configs, strict=True):
            for key in config:
                if str(key).partition(".")[0] not in KEYS:
                    raise ValueError(f"{path}: lkd has no setting {key!r}{_hint(str(key))}")
        if command == "fit" and configs and "ckpt_path" not in options:
            _check_complete(configs, list(options))


def _check_installed(command: str) -> None:
    missing = [name for name in _REQUIRED.get(command, ()) if not _is_installed(name)]
    if missing:
        raise ValueError(
            f"lkd {command} requires {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed; run pip install 'lightning-kd[{command}]'"
        )


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _configs(rest: Sequence[str]) -> list[str]:
    """Return the values of `--config`. The parser reports a missing value."""
    found = []
    for arg, following in zip(rest, [*rest[1:], "--"], strict=True) if rest else ():
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and (equals or not following.startswith("--")):
            found.append(value if equals else following)
    return found


def _options(command: str, rest: Sequence[str]) -> list[tuple[str, str]]:
    """Return the name and value of each option.

    Raises:
        ValueError: If an argument does not belong to an option, or has one dash instead of two.
    """
    found: list[tuple[str, str]] = []
    waiting = False  # whether the next argument is a value
    for arg in rest:
        if waiting and not arg.startswith("--"):
            found[-1] = (found[-1][0], arg)
            waiting = False
        elif arg.startswith("--") or arg in ("-c", "-h"):
            name, equals, value = arg.partition("=")
            found.append((name.lstrip("-").rstrip("+"), value))
            waiting = not equals and arg not in _FLAGS
        elif arg.startswith("-"):
            name = arg.partition("=")[0].lstrip("-")
            raise ValueError(f"lkd {command} has no option {arg!r}{_nearest(f'--{name}', _known())}")
        elif is_config(arg):
            raise ValueError(f"configs are passed with --config: lkd {command} --config {arg}")
        else:
            raise ValueError(
                f"lkd {command}: unexpected argument {arg!r}; pass configs as --config FILE, settings as --KEY VALUE"
            )
    return found


def _known() -> list[str]:
    return [f"--{name}" for name in (*KEYS, *OPTIONS)]


def _check_option(command: str, option: str) -> None:
    top = re.split(r"[.\[]", option)[0]
    if top not in (*KEYS, *OPTIONS, "c", "h"):
        raise ValueError(f"lkd has no setting {top!r}{_hint(option)}")


def _hint(option: str) -> str:
    """Return a hint for an unknown setting: its full name, or the setting with the most similar name."""
    top, _, own = option.partition(".")
    if top in USUAL:
        return f"; use --{USUAL[top]}"
    for section, names in _SECTIONS.items():
        if top in names:
            own = own.removeprefix("init_args.")
            below = f".init_args.{own}" if own and top in _NESTED else f".{own}" if own else ""
            return f"; use --{section}.{top}{below}"
    places = [*USUAL, *(name for names in _SECTIONS.values() for name in names)]
    nearest = difflib.get_close_matches(top, (*KEYS, *OPTIONS, *places), n=1, cutoff=0.75)
    if nearest and nearest[0] in places:  # a misspelled name
        return _hint(".".join([nearest[0], own] if own else nearest))
    return _nearest(top, (*KEYS, *OPTIONS))


def _nearest(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; available: {', '.join(sorted(set(known)))}"


def _check_complete(configs: Sequence[Mapping[str, Any]], options: Sequence[str]) -> None:
    """Check that the configs of a run specify data and, for lkd's modules, networks.

    Raises:
        ValueError: If networks or data are missing; the message lists configs that provide them.
    """
    missing = []
    models = [config["model"] for config in configs if "model" in config]
    given = {key for model in models if isinstance(model, Mapping) for key in model.get("init_args") or {}}
    given |= {part for option in options if option.startswith("model.") for part in option.split(".")[1:]}
    is_named = any(difflib.get_close_matches(name, _TRAINED, cutoff=0.7) for name in given)  # possibly misspelled
    if "model" not in options and all(_is_own(model) for model in models) and not is_named:
        missing.append(("networks", "pairs"))
    named = any(_names_class(config.get("data")) for config in configs)
    if not named and not {"data", "data.class_path"} & set(options):
        missing.append(("data", "data"))
    if missing:
        what = " and no ".join(name for name, _ in missing)
        wanted = " ".join(f"--config {folder}/NAME" for _, folder in missing)
        names = "; ".join(f"{folder}/ contains {_names(folder)}" for _, folder in missing)
        raise ValueError(f"the configs specify no {what}; add {wanted} ({names}), or your own config")


def _is_own(model: Any) -> bool:
    return isinstance(model, Mapping) and str(model.get("class_path", "lkd.")).startswith("lkd.")


def _names_class(data: Any) -> bool:
    return isinstance(data, str) or (isinstance(data, Mapping) and "class_path" in data)


def _names(folder: str) -> str:
    return ", ".join(sorted(path.stem for path in (configs_folder() / folder).glob("*.yaml")))
