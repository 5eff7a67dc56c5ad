"""Model card: description of the network, its training, its evaluation, and its use without lkd."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lkd.__about__ import __version__
from lkd.export.files import INT8_FILE, WRITERS, Network
from lkd.export.measure import Checked, percent
from lkd.export.snippets import made, preparation, use
from lkd.loading import Trained

CARD = "README.md"
_NETWORKS = ("student", "model")


def card(
    trained: Trained,
    network: Network,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    checked: Sequence[Checked],
) -> str:
    """Create the model card, with metadata for Hugging Face.

    Args:
        trained: Exported run.
        network: Exported network.
        facts: Content of `preprocessing.json`.
        metrics: Test metrics, in float32.
        checked: Comparison of the files with the checkpoint.
    """
    settings = _plain(dict(trained.config.as_dict()))
    model, data = settings["model"], settings["data"]
    own, name = _network(model), type(network.model).__name__
    if network.prefix:
        name = type(trained.module).__name__
    files = [one.file for one in checked]
    network_made = made(own) if own and not network.prefix else None
    title = f"{name}, {_dataset(trained)}"
    parts = [
        f"---\n{_front(trained, title, facts['license'], metrics)}---",
        f"# {title}",
        f"{_description(network, facts)}, trained with lkd {__version__} (Lightning Knowledge Distillation). "
        f"{_license_line(facts['license'])}",
        "## Training",
        _table(("", ""), _training(trained, own, model, data)),
        "## Evaluation",
        "Metrics on all test images, in float32 (`lkd test` uses the precision of the run):",
        _table(("", "test images"), [(key.removeprefix("test/"), f"{value:.4f}") for key, value in metrics.items()]),
        *_compared(checked),
        "## Input",
        preparation(facts),
        _outputs(facts),
        "## Use",
        *(use(file, files, facts, network_made) for file in files),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _description(network: Network, facts: Mapping[str, Any]) -> str:
    task = network.task
    purpose = task.pipeline_tag.replace("-", " ") or f"the task {type(task).__name__}"
    classes = f"{facts['num_classes']:,} classes and " if "num_classes" in facts else ""
    return f"A network for {purpose} with {classes}{network.num_parameters:,} parameters"


def _front(trained: Trained, title: str, license: str, metrics: Mapping[str, float]) -> str:
    dataset, task = _dataset(trained), trained.module.task
    tag, metric = task.pipeline_tag, task.metric_title.lower().replace(" ", "_")
    found: dict[str, Any] = {
        "license": license,
        **({"pipeline_tag": tag} if tag else {}),
        "tags": [*([tag] if tag else []), "knowledge-distillation", "lkd"],
        "datasets": [dataset],
        "metrics": [metric],
    }
    if tag and f"test/{task.metric}" in metrics:
        result = {
            "task": {"type": tag},
            "dataset": {"name": dataset, "type": dataset, "split": "test"},
            "metrics": [{"type": metric, "value": round(metrics[f"test/{task.metric}"], 6)}],
        }
        found["model-index"] = [{"name": title, "results": [result]}]
    text: str = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)
    return text


def _outputs(facts: Mapping[str, Any]) -> str:
    """Describe the outputs of the network that have no class in the data; empty if there are none."""
    known, outputs = facts.get("num_classes", 0), facts.get("num_outputs", 0)
    if known == outputs:
        return ""
    named = " and are named by their index" if "class_names" in facts else ""
    return (
        f"The network has {outputs:,} outputs, but the data of this run has {known:,} classes: the outputs from "
        f"{known:,} on had no training images{named}."
    )


def _license_line(license: str) -> str:
    return "No license is specified." if license == "unknown" else f"License: `{license}`."


def _dataset(trained: Trained) -> str:
    """Return the name of the dataset: from the class of the data module, or from the folder of an image folder."""
    name = type(trained.data).__name__.removesuffix("DataModule")
    root = getattr(trained.data, "root", None)
    return Path(root).absolute().name if name == "ImageFolder" and root else name.lower()


def _training(trained: Trained, own: Any, model: Any, data: Any) -> Iterator[tuple[str, str]]:
    settings = model.get("init_args", {})
    yield "data", _shown(data)
    yield "network", _shown(own)
    if teacher := settings.get("teacher"):
        yield "teacher", _shown(teacher)
    for name in ("teacher_ckpt", "student_ckpt", "model_ckpt"):
        if settings.get(name):
            yield name, f"`{settings[name]}`"
    yield "module", f"`{model['class_path']}`"
    criterion = getattr(trained.module, "criterion", None)
    if criterion is not None:
        yield "criterion", _shown(settings.get("criterion") or _described(criterion))
    shown = {*_NETWORKS, "students", "teacher", "teacher_ckpt", "student_ckpt", "model_ckpt", "criterion"}
    for name, value in settings.items():
        if name not in shown and value is not None:
            yield name, _shown(value)
    yield "epochs at this checkpoint", str(_epochs(trained.checkpoint))
    yield "steps at this checkpoint", f"{trained.checkpoint.get('global_step', 0):,}"


def _epochs(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of started epochs; `epoch` is the current one in `best.ckpt` and the next in `last.ckpt`."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    return int(loop["epoch_progress"]["total"]["started"]) if loop else int(checkpoint.get("epoch", -1)) + 1


def _network(model: Any) -> Any:
    """Return the settings of the trained network; if there are several, those of the first one."""
    settings = model.get("init_args", {})
    found = next((settings[name] for name in _NETWORKS if settings.get(name)), None)
    return found or next(iter(settings.get("students") or ()), None)


def _described(criterion: Any) -> dict[str, Any]:
    """Describe a criterion that is not in the settings: its class, and its arguments that are numeric attributes."""
    names = inspect.signature(type(criterion)).parameters
    plain = {
        name: getattr(criterion, name) for name in names if isinstance(getattr(criterion, name, None), (int, float))
    }
    return {"class_path": f"{type(criterion).__module__}.{type(criterion).__name__}", "init_args": plain}


def _shown(value: Any) -> str:
    """Format a setting on one line."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return f"`{value}`"
    own = {name: one for name, one in (value.get("init_args") or {}).items() if one is not None}
    text = yaml.safe_dump(own, default_flow_style=True, width=10**6, sort_keys=False).strip() if own else ""
    return f"`{value['class_path']}`" + (f" `{text}`" if text else "")


def _plain(value: Any) -> Any:
    """Convert settings to plain values, and shorten absolute paths to their last part, to hide local folders."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, str | Path) and (Path(value).is_absolute() or str(value).startswith("~")):
        return Path(value).name
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _compared(checked: Sequence[Checked]) -> Iterator[str]:
    first, task = checked[0], checked[0].task
    title, expected = task.metric_title, task.formatted(first.expected_score)
    yield (
        f"Comparison of the files with the checkpoint ({title} {expected}), on {first.images:,} test images. "
        "The logit differences include single images and, if the size is not fixed, a second image size."
    )
    yield _table(
        ("file", "bytes", "maximum logit difference", "same prediction", title),
        [
            (f"`{c.file}`", f"{c.size:,}", f"{c.difference:.2g}", percent(c.agreement), task.formatted(c.score))
            for c in checked
        ],
    )
    sizes = {one.file: one.size for one in checked}
    for one in checked:
        if one.file == INT8_FILE:
            yield (
                f"With 8 bits, the {title} changes by {task.formatted_difference(one.score - one.expected_score)}, "
                f"and the file has {one.size / sizes[WRITERS['onnx'][0]]:.0%} of the size of float32 ONNX."
            )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
