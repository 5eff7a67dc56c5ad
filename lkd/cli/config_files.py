"""Lookup and validation of config files. No heavy imports, so errors are reported within a second."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lkd._moved import RENAMED_CONFIGS
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
"""Top-level keys of a config for `lkd fit`, `validate`, `test` and `predict`."""
_CLASS_KEYS = ("class_path", "init_args")


def configs_folder() -> Path:
    """Return the folder of the configs provided by lkd: inside the package, or next to it in a checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def find_config(name: str, kind: str = "") -> Path:
    """Return the path of a config.

    Args:
        name: A file, or the name of a config provided by lkd (`configs/digits/kd.yaml`, `digits/kd`).
        kind: Folder of the provided configs that the error message may suggest; empty for all.

    Raises:
        FileNotFoundError: If the config does not exist; the message lists the most similar names.
        ValueError: If the file is not a valid config.
    """
    folder = configs_folder()
    own = name.removeprefix("configs/")
    if new := RENAMED_CONFIGS.get(own.removesuffix(".yaml")):
        warnings.warn(f"the config {name} is deprecated; use {new}", FutureWarning, stacklevel=2)
    for path in (Path(name), folder / own, folder / f"{own}.yaml"):
        if path.is_file():
            read_config(path)
            return path
    names = {str(path.relative_to(folder)) for path in (folder / kind).rglob("*.yaml")}
    known = sorted(names - {f"{former}.yaml" for former in RENAMED_CONFIGS})
    if nearest := difflib.get_close_matches(own, known, n=3, cutoff=0.4):
        raise FileNotFoundError(f"config {name!r} not found; similar configs provided by lkd: {', '.join(nearest)}")
    folders = sorted({Path(each).parent.name for each in known})
    provided = ", ".join(known) if kind else f"configs in {', '.join(folders)}"
    raise FileNotFoundError(f"config {name!r} not found; lkd provides {provided}")


def is_config(name: str) -> bool:
    """Return whether a config file of this name exists."""
    folder, own = configs_folder(), name.removeprefix("configs/")
    return any(path.is_file() for path in (Path(name), folder / own, folder / f"{own}.yaml"))


def read_config(path: Path) -> dict[str, Any]:
    """Read and check the settings of a config.

    Raises:
        ValueError: If the file is not valid YAML, or does not have the structure of a config.
    """
    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} contains no settings; expected keys such as model, data and trainer")
    for key in {"model", "data", "trainer"} & set(config):
        if not isinstance(config[key], dict) and not (isinstance(config[key], str) and key != "trainer"):
            raise ValueError(f"{path}: expected settings below {key!r}, got {config[key]!r}")
    if not isinstance(config.get("config"), list | None):  # the saved config of a run may list its source files
        raise ValueError(f"{path} has a key 'config'; pass each file on the command line with its own --config")
    for key, nearest in _misspelt(config):
        raise ValueError(f"{path} has a key {key!r}; did you mean {nearest!r}?")
    for key, kind in _misplaced(config):
        raise ValueError(f"{path} has {key!r} next to 'class_path: {kind}'; move it below 'init_args'")
    return config


def _misspelt(config: object) -> Iterator[tuple[str, str]]:
    """Yield misspelled `class_path` and `init_args`, for which the parser would report a different error."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _misspelt(value)
    for key in config if isinstance(config, dict) else ():
        for nearest in difflib.get_close_matches(str(key), _CLASS_KEYS, n=1, cutoff=0.8):
            if key not in _CLASS_KEYS:
                yield str(key), nearest


def _misplaced(config: object) -> Iterator[tuple[str, str]]:
    """Yield keys next to `class_path` that belong below `init_args`, each with its class."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _misplaced(value)
    if isinstance(config, dict) and isinstance(config.get("class_path"), str):
        for key in config:
            if str(key).partition(".")[0].rstrip("+") not in (*_CLASS_KEYS, "dict_kwargs"):
                yield str(key), config["class_path"]


def run_name(configs: Sequence[Path], root: Path) -> str:
    """Return the name of a run, which is also its folder below `root`.

    Args:
        configs: Config files. The last top-level `name` is used; if there is none, the name is derived from the names
            of the files.
        root: Folder of all runs.
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
    if path.name == "config.yaml":  # saved config of a run: the new run gets the same name
        run, root = path.resolve().parent.parent, root.resolve()
        return str(run.relative_to(root)) if root in run.parents else run.name
    if path.resolve().is_relative_to(root.resolve()):  # the best config of a sweep
        return str(path.resolve().relative_to(root.resolve()).with_suffix(""))
    return path.stem


def checked_name(name: object) -> str:
    """Return the name of a run, normalized as a path relative to the folder of all runs.

    Raises:
        ValueError: If the name is not a relative path inside this folder.
    """
    parts = Path(name).parts if isinstance(name, str) else ()
    if not parts or Path(*parts).is_absolute() or {"..", "."} & set(parts):
        raise ValueError(f"name must be a relative path such as 'baseline' or 'digits/baseline', got {name!r}")
    return str(Path(*parts))
