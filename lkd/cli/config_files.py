"""Finding and checking config files. Imports nothing heavy, so that mistakes are reported within a second."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lkd.io.yaml import load_yaml

KEYS = (
    "trainer",
    "model",
    "data",
    "checkpoint",
    "last_checkpoint",
    "speed",
    "teacher_cache",
    "seed_everything",
    "name",
    "ckpt_path",
    "weights_only",
    "verbose",
    "return_predictions",
    "config",
)
"""The top-level keys of a config for `lkd fit`, `validate`, `test` and `predict`."""
_CLASS_KEYS = ("class_path", "init_args")


def configs_folder() -> Path:
    """Return the folder of lkd's own configs: inside the package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """Return a config's path.

    Args:
        name: A file, or the name of one of lkd's own configs (`configs/digits/kd.yaml`, `digits/kd`).

    Raises:
        FileNotFoundError: If there is no such config; the message names the most similar ones.
        ValueError: If the file is not a valid config.
    """
    folder = configs_folder()
    own = name.removeprefix("configs/")
    for path in (Path(name), folder / own, folder / f"{own}.yaml"):
        if path.is_file():
            read_config(path)
            return path
    known = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))
    nearest = difflib.get_close_matches(own, known, n=3, cutoff=0.4) or known
    raise FileNotFoundError(f"there is no config {name!r}; the nearest of lkd's own are {', '.join(nearest)}")


def is_config(name: str) -> bool:
    """Return whether a name is that of a config file."""
    folder, own = configs_folder(), name.removeprefix("configs/")
    return any(path.is_file() for path in (Path(name), folder / own, folder / f"{own}.yaml"))


def read_config(path: Path) -> dict[str, Any]:
    """Return a config's settings.

    Raises:
        ValueError: If the file is not valid YAML, or its layout is not that of a config.
    """
    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} contains no settings; it should have keys such as model, data and trainer")
    for key in {"model", "data", "trainer"} & set(config):
        if not isinstance(config[key], dict) and not (isinstance(config[key], str) and key != "trainer"):
            raise ValueError(f"{path} should have settings below {key!r}, got {config[key]!r}")
    if not isinstance(config.get("config"), list | None):  # a run's own config may list the files it was made from
        raise ValueError(f"{path} has a key 'config'; pass each file on the command line with its own --config")
    for key, nearest in _misspelt(config):
        raise ValueError(f"{path} has a key {key!r}; did you mean {nearest!r}?")
    for key, kind in _misplaced(config):
        raise ValueError(f"{path} has {key!r} beside 'class_path: {kind}'; move it below 'init_args'")
    return config


def _misspelt(config: object) -> Iterator[tuple[str, str]]:
    """Yield keys that are nearly `class_path` or `init_args`: the parser would complain about something else."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _misspelt(value)
    for key in config if isinstance(config, dict) else ():
        for nearest in difflib.get_close_matches(str(key), _CLASS_KEYS, n=1, cutoff=0.8):
            if key not in _CLASS_KEYS:
                yield str(key), nearest


def _misplaced(config: object) -> Iterator[tuple[str, str]]:
    """Yield keys beside `class_path` that should be below `init_args`, and the class."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _misplaced(value)
    if isinstance(config, dict) and isinstance(config.get("class_path"), str):
        for key in config:
            if str(key).partition(".")[0].rstrip("+") not in (*_CLASS_KEYS, "dict_kwargs"):
                yield str(key), config["class_path"]


def run_name(configs: Sequence[Path], root: Path) -> str:
    """Return a run's name, which is its folder below `root`.

    Args:
        configs: The config files. The last one with a top-level `name` decides; without one, the name is made from the
            files' names.
        root: The folder of all runs.
    """
    named = [name for path in configs if (name := read_config(path).get("name")) is not None]
    if named:
        return checked_name(named[-1])
    if not configs:
        return "run"
    if len(configs) > 1:
        return "+".join(dict.fromkeys(path.stem for path in configs))
    path, folder = configs[0], configs_folder()
    if path.resolve().is_relative_to(folder.resolve()):
        return str(path.resolve().relative_to(folder.resolve()).with_suffix(""))
    if path.name == "config.yaml":  # a run's own config: the new run belongs beside it
        run, root = path.resolve().parent.parent, root.resolve()
        return str(run.relative_to(root)) if root in run.parents else run.name
    if path.resolve().is_relative_to(root.resolve()):  # the best config of a sweep
        return str(path.resolve().relative_to(root.resolve()).with_suffix(""))
    return path.stem


def checked_name(name: object) -> str:
    """Return a run's name if it is a relative path inside the folder of all runs.

    Raises:
        ValueError: If it is not.
    """
    parts = Path(name).parts if isinstance(name, str) else ()
    if not parts or Path(*parts).is_absolute() or {"..", "."} & set(parts):
        raise ValueError(f"name must be a relative path such as 'baseline' or 'digits/baseline', got {name!r}")
    return str(Path(*parts))
