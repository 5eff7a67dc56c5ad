"""What is done to the command line's arguments before Lightning's CLI sees them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

import lkd

_CONFIG = ("--config", "-c")
_CLASS_KEYS = ("class_path", "init_args")
_CKPT_KEYWORDS = ("last", "best", "hpc", "null", "none")


def prepare(args: Sequence[str]) -> tuple[list[str], str]:
    """Find the configs that the arguments name, and the run's name.

    A checkpoint without a config stands for its run's own `config.yaml`.

    Args:
        args: The arguments behind `lkd`, the command first.

    Returns:
        The arguments with each config's path, and the run's name.

    Raises:
        FileNotFoundError: If a config or the checkpoint does not exist.
    """
    prepared, configs, ckpt_path = [args[0]], [], None
    for option, value in _pairs(args[1:]):
        if option in _CONFIG and value is not None:
            configs.append(find_config(value))
            prepared += ["--config", str(configs[-1])]
            continue
        if option == "--ckpt_path" and value is not None:
            ckpt_path = _existing_checkpoint(value)
        prepared += [option] if value is None else [option, value]
    if ckpt_path is not None and not configs:
        configs = [_config_of(ckpt_path)]
        prepared[1:1] = ["--config", str(configs[0])]
    return prepared, _run_name(configs)


def _pairs(args: Sequence[str]) -> list[tuple[str, str | None]]:
    """`--key=value` and `--key value` as pairs; what has no value goes with None."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(args)
    while rest:
        option = rest.pop(0)
        if option in (*_CONFIG, "--ckpt_path") and rest:
            pairs.append((option, rest.pop(0)))
        elif option.startswith(("--config=", "--ckpt_path=")):
            name, _, value = option.partition("=")
            pairs.append((name, value))
        else:
            pairs.append((option, None))
    return pairs


def configs_folder() -> Path:
    """Where lkd's own configs lie: in the package, or, in a checkout, beside it."""
    package = Path(lkd.__file__).parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """A config's path: the file itself, or one of lkd's own (`configs/digits/kd.yaml`, `digits/kd`).

    Args:
        name: What stands behind `--config`.

    Raises:
        FileNotFoundError: If there is none; the message names the nearest of lkd's own.
    """
    folder = configs_folder()
    own = name.removeprefix("configs/")
    for path in (Path(name), folder / own, folder / f"{own}.yaml"):
        if path.is_file():
            return _well_formed(path)
    known = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))
    nearest = difflib.get_close_matches(own, known, n=3, cutoff=0.4) or known
    raise FileNotFoundError(f"there is no config {name!r}; the nearest of lkd's own are {', '.join(nearest)}")


def _well_formed(path: Path) -> Path:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    for key, nearest in _misspelt(config):
        raise ValueError(f"{path} has a key {key!r}; did you mean {nearest!r}?")
    return path


def _misspelt(config: object) -> Iterator[tuple[str, str]]:
    """Keys that are nearly `class_path` or `init_args`: the parser would speak of everything but them."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _misspelt(value)
    for key in config if isinstance(config, dict) else ():
        for nearest in difflib.get_close_matches(str(key), _CLASS_KEYS, n=1, cutoff=0.8):
            if key not in _CLASS_KEYS:
                yield str(key), nearest


def _existing_checkpoint(name: str) -> Path | None:
    if name in _CKPT_KEYWORDS or Path(name).exists():
        return Path(name) if Path(name).is_file() else None
    near = sorted(str(path) for path in Path("runs").rglob("*.ckpt")) if Path("runs").is_dir() else []
    hint = f"; there are {', '.join(near[:4])}" if near else "; a run writes it to runs/<name>/version_<n>/checkpoints/"
    raise FileNotFoundError(f"there is no checkpoint {name!r}{hint}")


def _config_of(ckpt_path: Path) -> Path:
    config = ckpt_path.resolve().parent.parent / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(
            f"no --config is given, and the checkpoint {str(ckpt_path)!r} does not lie in a run's folder "
            f"({str(config)!r} does not exist); give the config that it was trained with"
        )
    return config


def _run_name(configs: Sequence[Path]) -> str:
    if not configs:
        return "run"
    if len(configs) > 1:
        return "+".join(path.stem for path in configs)
    path, folder = configs[0], configs_folder()
    if path.resolve().is_relative_to(folder.resolve()):
        return str(path.resolve().relative_to(folder.resolve()).with_suffix(""))
    if path.name == "config.yaml":  # a run's own, run again
        return path.resolve().parent.parent.name
    return path.stem
