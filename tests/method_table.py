"""The table of methods in the documentation, generated from the code."""

from __future__ import annotations

import inspect
import re
from functools import cache

import torch
import yaml

import lkd.losses
import lkd.modules
from lkd.cli.config_files import configs_folder
from tests.losses.collected import FILES, PARITY

NO_METHOD = {"DistillLoss", "CompositeLoss", "PerAnchor", "PerPixel", "WeightedSum"}
NO_METHOD |= {"ClassificationModule", "DistillModule", "EarlyExitModule", "FineTuneModule"}
SEGMENTATION = "lkd.tasks.SemanticSegmentation"
TRAINED = {"SimKDModule": "tests/modules/test_simkd.py", "DOTModule": "tests/modules/test_dot.py"}
"""Modules that are compared with the authors' training loop by `test_module_equals_a_plain_loop`, and its file."""
COMPARED = {"OFAKD": "`ofa_loss`", "DeiT": "hard", "CrossKD": "its functions"} | dict.fromkeys(TRAINED, "training run")
"""What is compared, if it is not the whole method."""


def methods() -> dict[str, type]:
    """Return criteria, and modules with their own training loop, by class name."""
    found = {}
    for package in (lkd.losses, lkd.modules):
        for name in package.__all__:
            kind = getattr(package, name)
            if inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and name not in NO_METHOD:
                found[name] = kind
    return found


def paper(kind: type) -> str:
    """Return authors, year and arXiv id of the first reference in a class's docstring."""
    references = inspect.getdoc(kind).partition("References:")[2]
    first = " ".join(references.split())
    authors = re.match(r"(.*?):", first)
    year, arxiv = re.search(r"\b(?:19|20)\d\d\b", first), re.search(r"arXiv (\d{4}\.\d{4,5})", first)
    if not authors or not year:
        raise ValueError(f"{kind.__name__} names no paper in its docstring (References: authors: title, where, year)")
    link = f" ([{arxiv[1]}](https://arxiv.org/abs/{arxiv[1]}))" if arxiv and arxiv.start() < 250 else ""
    return f"{authors[1]} {year[0]}{link}"


def reads(kind: type) -> str:
    """Return what a criterion reads by default, according to its class attributes and the defaults of its layers."""
    if not issubclass(kind, lkd.losses.DistillLoss):
        return "what its criterion reads"
    parameters = inspect.signature(kind).parameters
    words = ["logits"] if kind.reads_logits is True or not kind.needs_teacher else []
    for name, parameter in parameters.items():
        default = parameter.default
        given = [layer for layer in (default if isinstance(default, (tuple, list)) else [default]) if layer]
        layers = [layer for layer in given if isinstance(layer, str)]
        if name.endswith(("_layer", "_layers", "_head")) or any(layer.startswith("@") for layer in layers):
            words += [f"`{layer}`" for layer in layers]
    words += ["sample indices"] if kind.needs_index is True else []
    words += [f"{kind.num_views} views"] if isinstance(kind.num_views, int) and kind.num_views > 1 else []
    words += ["no teacher"] if kind.needs_teacher is False else []
    unknown = "named layers" if "student_layers" in parameters else "what its criterion reads"
    return ", ".join(dict.fromkeys(words)) or unknown


def configs(name: str) -> list[str]:
    """Return overlays and complete configs that contain a class; overlays named after it come first."""
    key = name.lower()
    found = (config for config, names in _names_in_configs().items() if name in names)

    def place(config: str) -> tuple[bool, bool, int, str]:
        kind, _, stem = config.rpartition("/")
        return kind != "methods", not stem.replace("_", "").startswith(key), config.count("_"), config

    return sorted(found, key=place)


def is_for_segmentation(overlay: str) -> bool:
    """Return whether an overlay, such as `methods/cwd`, sets the segmentation task and so requires networks for it."""
    config = yaml.safe_load((configs_folder() / f"{overlay}.yaml").read_text())
    return SEGMENTATION in _strings(config)


@cache
def _names_in_configs() -> dict[str, set[str]]:
    """Return the last parts of all names in each config."""
    folder = configs_folder()
    return {
        str(path.relative_to(folder).with_suffix("")): {
            value.rpartition(".")[2] for value in _strings(yaml.safe_load(path.read_text()))
        }
        for path in folder.rglob("*.yaml")
    }


def _strings(value: object) -> list[str]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [string for part in parts for string in _strings(part)]


def parity() -> set[str]:
    """Return the names of the classes that tests/test_parity.py compares with the original, in lower case.

    A class is compared if its test file has reference values, or if a file of reference values has its name.
    """
    compared = {method for method, file in FILES.items() if hasattr(file, "PARITY")}
    return {name.replace("_", "").lower() for name in compared | set(PARITY)}


def equal(name: str) -> str:
    """Return whether a class is compared with the original, and which parts of it."""
    if name.lower() not in parity() and name not in TRAINED:
        return "no reference values"
    return f"value and gradient ({COMPARED[name]})" if name in COMPARED else "value and gradient"


def processes(kind: type) -> str:
    """Return how the gradient with DDP relates to that of one process (see tests/losses/test_processes.py)."""
    alone = getattr(kind, "per_process", None)
    if not isinstance(alone, str):
        return "as the criterion"
    return f"per process: {alone}" if alone else "same gradient"


def note() -> str:
    """Return the note below the table."""
    criteria = sorted((item for item in methods().items() if issubclass(item[1], lkd.losses.DistillLoss)), key=_by_name)
    skipping = ", ".join(f"`{name}`" for name, kind in criteria if kind.skips_unlabelled in (True, None))
    return (
        '"Value and gradient" means that both equal those of the original implementation in float64 '
        "(`tests/test_parity.py`); all other methods are tested against their formula. Where the original "
        "implementations differ from each other or from the paper, the docstring of the class describes the "
        "differences.\n\n"
        'Several processes: "same gradient" means that the gradient equals, up to rounding, that of one process with '
        'all samples (`tests/losses/test_processes.py`); "per process" states what each process computes from its own '
        "samples only. BatchNorm uses the statistics of each process unless `--trainer.sync_batchnorm true` "
        f"synchronizes them. If some samples have no label, the supervised loss and the terms of {skipping} are means "
        "over the labelled samples of each process. They equal the means of one process only if all processes have "
        "the same number of labelled samples."
    )


def _by_name(item: tuple[str, type]) -> str:
    return item[0].lower()


def table(link: str = "") -> str:
    """Return the table in Markdown, and the note below it.

    Args:
        link: Link of each method, in which `{name}` is replaced by its name.
    """
    lines = [
        "| Method | Paper | Reads | Config | Equal to the original | Several processes |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind in sorted(methods().items(), key=_by_name):
        files = ", ".join(f"`{file}`" for file in configs(name)[:2])
        cell = f"[{name}]({link.format(name=name)})" if link else f"`{name}`"
        lines.append(f"| {cell} | {paper(kind)} | {reads(kind)} | {files} | {equal(name)} | {processes(kind)} |")
    return "\n".join([*lines, "", note()])
