"""Translation of exceptions into one-sentence error messages."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import lightning as L
from torch import nn

from lkd.callbacks import BestCheckpoint, LastCheckpoint, Speed, TeacherCache
from lkd.callbacks.monitored import no_curve
from lkd.cli.early_checks import USUAL

CALLBACKS: dict[str, type[L.Callback]] = {
    "checkpoint": BestCheckpoint,
    "last_checkpoint": LastCheckpoint,
    "speed": Speed,
    "teacher_cache": TeacherCache,
}
"""Callbacks with their own section in a config, by the name of the section."""

_KEY = re.compile(r'Parser key "(.*)":$')
_CLASS = re.compile(r"Problem with given class_path '(.*)':$")
_SCAFFOLD = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value type: "
    r"|Expected a <class 'NoneType'>|Expected a path but "
    r"|Subclass types expect one of:|a class path \(str\)$|a dict with"
)
_NO_CURVE = re.compile(  # messages of ModelCheckpoint, ReduceLROnPlateau and EarlyStopping
    r"(?:monitor='|conditioned on metric `?)(?P<name>[^'` ]+)['`]?"
    r"(?:\)` could not find the monitored key .*?: \[| which is not available\.(?: Available metrics are: \["
    r"|.* any of the following: ))(?P<known>[^]]*)"
)
_TOP = ("trainer", "model", "data", *CALLBACKS, "seed_everything", "ckpt_path", "resume", "config", "print_config")


def explain(error: BaseException) -> str:
    """Translate an exception into a one-sentence error message.

    Args:
        error: Exception raised while parsing, building or running.

    Returns:
        What is wrong and how to fix it, without the parser's nested report or the traceback of a worker.
    """
    text = str(error) or type(error).__name__
    if "Original Traceback" in text:  # from a data loader worker: the message is in the last line
        text = re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
    if text.startswith("Expected more than 1 value per channel when training"):  # PyTorch
        return f"{text}; set batch_size to at least 2, or use larger images"
    if found := re.search(r"restored a checkpoint with current_epoch=(\d+)", text):  # Lightning
        return (
            f"this run has already completed {found[1]} epochs; set --trainer.max_epochs above {found[1]} to continue"
        )
    if found := re.search(r"Requirement '(mlflow|wandb)\b.*?' not met", text):  # Lightning
        return f"the logger requires {found[1]}, which is not installed; run pip install 'lightning-kd[loggers]'"
    if found := re.search(r"No supported (\w+) backend found", text):  # Lightning
        return f"no {found[1]} found on this machine; remove --trainer.accelerator, or set it to auto or cpu"
    if found := _NO_CURVE.search(text):
        return no_curve(found["name"], set(re.findall(r"[\w/.-]+", found["known"])))
    keys, classes, reasons, value = _read(text)
    if len(reasons) == len(text.splitlines()):
        return _unknown_option(text) or text
    where, reason = ".".join(keys), " ".join(reasons)
    return (
        _unknown_setting(classes, reason)
        or _unknown_class(classes, reason, where)
        or _other(where, classes, reason, value)
    )


def is_no_curve(error: BaseException) -> bool:
    """Return whether an exception reports a monitored metric that does not exist.

    EarlyStopping raises a RuntimeError in this case.

    Args:
        error: The exception.
    """
    return _NO_CURVE.search(str(error)) is not None


def _read(text: str) -> tuple[list[str], list[str], list[str], str | None]:
    """Split a message of the parser into the path of keys, the classes along it, the reasons and the given value."""
    keys: list[str] = []
    classes: list[str] = []
    reasons: list[str] = []
    value = None
    for line in (line.strip().removeprefix("- ") for line in text.splitlines()):
        if key := _KEY.match(line):
            keys.append(key[1])
        elif kind := _CLASS.match(line):
            classes.append(kind[1])
        elif line.startswith("Given value: "):
            value = value or line.removeprefix("Given value: ")
        elif line and not _SCAFFOLD.match(line):
            reasons.append(line)
    specific = [reason for reason in reasons if not reason.startswith("Not a valid subclass of ")]
    return keys, classes, specific or reasons, value


def _unknown_option(text: str) -> str | None:
    found = re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)", text)
    if not found:
        return None
    sections: dict[str, type] = {"trainer": L.Trainer, **CALLBACKS}
    known = [*_TOP, *(f"{section}.{name}" for section, kind in sections.items() for name in _settings(kind))]
    option = found[1]
    if option.split(".")[0] not in _TOP:
        option = option.split(".")[0]
    return f"lkd has no setting {option!r}{_nearest(option, known)}"


def _unknown_setting(classes: list[str], reason: str) -> str | None:
    found = re.search(r"Option '(.*?)' is not accepted(?:\. Got value: Namespace\(class_path='(.*?)')?", reason)
    if not found or not classes:
        return None
    setting, kind = found[1].split(".")[0], found[2] or classes[-1]
    if _find(kind) is L.LightningDataModule:  # the overlay of a method sets the views of the data
        return f"a config sets {setting!r} of the data before the data module is given; put --config data/NAME first"
    if _find(kind) is nn.Module:
        return f"{setting!r} is set for a network without class_path; give class_path and init_args in a --config"
    if setting == "teacher_ckpt" and inspect.isclass(_find(kind)) and issubclass(_find(kind), L.LightningModule):
        return f"{kind} has no teacher and therefore no 'teacher_ckpt'; use --model lkd.DistillModule, with a student"
    known = _settings(_find(kind))
    nearest = difflib.get_close_matches(setting, [*known, *USUAL], n=1, cutoff=0.75)
    if nearest and nearest[0] not in known:
        return f"{kind} has no setting {setting!r}; use --{USUAL[nearest[0]]}"
    return f"{kind} has no setting {setting!r}{_nearest(setting, known)}"


def _unknown_class(classes: list[str], reason: str, where: str) -> str | None:
    if missing := re.search(r"No module named '(.*?)'", reason):
        where = f" (required to import {classes[-1]!r})" if classes else ""
        nearest = difflib.get_close_matches(missing[1], sys.modules, n=1, cutoff=0.75)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "your own modules must be in the current folder"
        return f"there is no module {missing[1]!r}{where}; {hint}"
    if short := re.search(r"Expected a dot import path string: (\w+)(?: |$)", reason):
        return f"there is no class {short[1]!r}{_nearest_class(short[1], where)}"
    found = re.search(r"module '(.*?)' has no attribute '(.*?)'", reason)
    if not found:
        return None
    path, name = found[1], found[2]
    module = import_module(path)
    known = getattr(module, "__all__", None) or _own_names(module)
    return f"there is no {name!r} in {path}{_nearest(name, known)}"


_HOMES = {
    "criterion": ("lkd.losses",),
    "task": ("lkd.tasks",),
    "optimizer": ("torch.optim",),
    "lr_scheduler": ("torch.optim.lr_scheduler",),
    "callbacks": ("lkd.callbacks", "lightning.pytorch.callbacks"),
    "logger": ("lightning.pytorch.loggers",),
    "model": ("lkd",),
    "data": ("lkd",),
}
"""Packages of the classes that a setting can name."""


def _nearest_class(name: str, where: str) -> str:
    """Return a hint: the class with the most similar name among those that a setting can name."""
    homes = _HOMES.get(where.rpartition(".")[2], ("lkd.models", "lkd.losses"))
    paths = {known: f"{home}.{known}" for home in homes for known in import_module(home).__all__}
    nearest = difflib.get_close_matches(name, paths, n=1, cutoff=0.5)
    return f"; did you mean {paths[nearest[0]]!r}?" if nearest else "; give its import path, as in 'my_file.MyClass'"


def _other(where: str, classes: list[str], reason: str, value: str | None) -> str:
    if found := re.search(r"the following arguments are required: (.*)", reason):
        own = re.search(r"class_path='(.*?)'", value or "")
        if len(classes) > 1:  # a class inside of another one
            setting = f"{where.replace('.', '.init_args.')}.init_args.{found[1]}"
            return f"{classes[-1]} requires a value for {found[1]}; set --{setting}"
        return f"{own[1] if own else classes[-1] if classes else 'lkd'} requires values for {found[1]}"
    reason = re.sub(r"Expected an? (?:<class '([\w.]+)'>|typing\.)", r"expected \1", reason)
    reason = re.sub(r"\. Got value: ", ", got ", reason)
    reason = _in_words(reason.replace(" expected ", " or "))
    if value is not None and "got " not in reason and not value.startswith(("NestedArg", "Namespace", "{")):
        reason = f"{reason}, got {value}"
    if re.search(r"got \[\s*@", reason):  # reserved in YAML
        reason += "; put names of layer groups in quotes, as in ['@stages']"
    return f"{where}: {reason}" if where else reason


_IN_WORDS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "str": "a string",
    "tuple": "a list",
}
"""Readable names of Python types."""


def _in_words(reason: str) -> str:
    """Replace the names of Python types with readable ones."""
    reason = re.sub(r"\b(expected|or) (\w+)\b", lambda found: f"{found[1]} {_IN_WORDS.get(found[2], found[2])}", reason)
    choices = re.compile(r"Literal\[(.*?)\]")
    reason = choices.sub(lambda found: "one of " + found[1].replace("'", ""), reason)
    return reason.replace("an integer or a number", "a number").replace(" or one of ", ", ")


def _find(class_path: str) -> Any:
    path, _, name = class_path.rpartition(".")
    return getattr(import_module(path), name)


def _own_names(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]


def _settings(kind: Any) -> list[str]:
    """Return the names of the arguments of a function, or of a class and the bases to which it forwards `**kwargs`."""
    own = [vars(base).get("__init__") for base in kind.__mro__] if inspect.isclass(kind) else [kind]
    names: set[str] = set()
    for maker in filter(inspect.isfunction, own):
        parameters = inspect.signature(maker).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        names |= {parameter.name for parameter in parameters if parameter.kind not in variable}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return sorted(names - {"self"})


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    if not known:
        return "; none are available"
    return f"; available: {', '.join(sorted(known))}" if len(known) <= 30 else "; 'lkd COMMAND --help' lists them"
