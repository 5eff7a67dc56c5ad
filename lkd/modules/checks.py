"""Checks that a network matches its data, and that training stays finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lkd._compat import tree_leaves
from lkd.features.extractor import FeatureExtractor
from lkd.io.refused import first_line
from lkd.losses import DistillLoss
from lkd.modules.meter import LOSS, ValueName
from lkd.tasks.base import Task
from lkd.types import Batch, Probe


def mismatch(network: nn.Module, example: Any) -> str:
    """Describe a mismatch of devices or data types between a network and its input; empty if there is none."""
    inputs = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    tensors = [*network.parameters(), *network.buffers(), *inputs]
    places = sorted({str(tensor.device) for tensor in tensors})
    if len(places) > 1:
        return f"its weights, buffers and input are on different devices ({', '.join(places)}); move them to one device"
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()})
    if len(kinds) > 1:
        return (
            f"its weights and input have different dtypes ({', '.join(kinds)}); convert the network with .float(), and "
            "set the compute precision with --trainer.precision"
        )
    return ""


def probe_network(name: str, extractor: FeatureExtractor, example: Any) -> Probe:
    """Run a blank input through a network and check the shape of its logits.

    Args:
        name: Name of the network in error messages.
        extractor: The network and the layers whose features are read.
        example: One blank input.

    Returns:
        The network and its outputs.

    Raises:
        ValueError: If the network fails on the input.
    """
    try:
        probe = extractor.probe(example)
    except RuntimeError as error:
        shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        reason = first_line(error)
        remedy = mismatch(extractor.network, example) or (
            "the number of channels (in_channels) and the image size must be the same in network and data"
        )
        raise ValueError(f"the {name} does not accept inputs of shape {shape}: {reason}; {remedy}") from error
    return probe


@contextmanager
def evaluated_size(trainer: L.Trainer | None, input: Any) -> Iterator[None]:
    """Explain errors of networks that accept the training crops, but not whole images in evaluation.

    Args:
        trainer: Trainer of the module, if any.
        input: Input of the networks.

    Raises:
        ValueError: If a network fails on images of another size than the training crops.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        data = getattr(trainer, "datamodule", None)
        trained = getattr(data, "input_shape", None)
        if not hasattr(data, "eval_size") or not isinstance(input, Tensor) or input.shape[1:] == trained:
            raise
        height, width = input.shape[2:]
        raise ValueError(
            f"the evaluation of images of {width}x{height} pixels failed: {first_line(error)}; if a network "
            "requires other sizes, set eval_size of the data module"
        ) from error


def check_covers_classes(name: str, num_outputs: int, num_classes: int | None) -> None:
    """Check that a network has an output for each class of the data.

    Raises:
        ValueError: If it has fewer.
    """
    if num_classes is not None and num_classes > num_outputs:
        raise ValueError(
            f"the data has {num_classes} classes, but the {name} has only {num_outputs}; "
            f"set num_classes of the network to {num_classes}"
        )


def warn_of_unused_outputs(trainer: L.Trainer | None, name: str, num_outputs: int, num_classes: int | None) -> bool:
    """Warn before training if a network, such as a pretrained one, has more outputs than the data has classes.

    Args:
        trainer: Trainer of the module, if any.
        name: Name of the network in the message.
        num_outputs: Number of logits.
        num_classes: Number of classes of the data, if known.

    Returns:
        Whether the warning was issued.
    """
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or num_classes is None or num_outputs <= num_classes:
        return False
    rank_zero_warn(
        f"the {name} has {num_outputs:,} outputs, but the data has only {num_classes:,} classes; set num_classes to "
        f"{num_classes:,}, unless you want to keep a pretrained classifier"
    )
    return True


def check_weights(distill_weight: float, hard_weight: float) -> None:
    """Check the weights of the criterion and of the cross-entropy.

    Raises:
        ValueError: If a weight is negative or not finite, or if both are 0.
    """
    for name, weight in (("distill_weight", distill_weight), ("hard_weight", hard_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {weight}")
    if distill_weight == hard_weight == 0:
        raise ValueError("distill_weight and hard_weight are both 0; set at least one of them above 0")


def check_batch(criterion: DistillLoss, batch: Batch) -> None:
    """Check that a training batch contains the indices and views that a criterion requires.

    Raises:
        ValueError: If it does not.
    """
    name = type(criterion).__name__
    if criterion.needs_index and batch.index is None:
        raise ValueError(
            f"the criterion {name} requires sample indices, but the batches have none; return (input, target, "
            "index), where index is the position of each sample in the dataset"
        )
    if criterion.num_views > 1 and batch.views != criterion.num_views:
        raise ValueError(
            f"the criterion {name} requires {criterion.num_views} views of each image, but the batches have "
            f"{batch.views}; set `views` of the data module, as in the overlay of the method in configs/methods/"
        )


def check_not_reserved(criterion: str, names: Iterable[str], reserved: Collection[str]) -> None:
    """Check that no term of a criterion has the name of another logged value.

    Args:
        criterion: Name of the criterion.
        names: Names of its terms.
        reserved: Names of other logged values, such as the metrics of the task.

    Raises:
        ValueError: If a name is reserved.
    """
    for name in names:
        if name in reserved:
            raise ValueError(
                f"the criterion {criterion} would be logged as {name!r}, which is reserved for another logged value; "
                "rename the criterion or its term"
            )


def check_same_classes(criterion: str, student: int | None, teacher: int | None) -> None:
    """Check that student and teacher have the same number of logits.

    Args:
        criterion: Name of the criterion that compares them.
        student: Number of classes of the student, if it has any.
        teacher: Number of classes of the teacher, if it has any.

    Raises:
        ValueError: If the numbers differ.
    """
    if student != teacher:
        raise ValueError(
            f"the student has {student} classes, but the teacher has {teacher}; {criterion} "
            "compares logits, so num_classes must be the same in both"
        )


def check_saved_by(checkpoint: Mapping[str, Any], kind: type) -> None:
    """Check that a checkpoint was saved by a class or one of its bases.

    Raises:
        ValueError: If it was saved by another class.
    """
    saved_by = str(checkpoint.get("hyper_parameters", {}).get("_class_path", kind.__name__))
    if saved_by.rpartition(".")[2] not in {base.__name__ for base in kind.__mro__}:
        raise ValueError(
            f"this checkpoint was saved by {saved_by}, not by {kind.__name__}; "
            "LightningModule.load_from_checkpoint(path) selects the right class"
        )


def check_not_shared(module: nn.Module, teacher: nn.Module) -> None:
    """Check that a module has no parameter or buffer of its teacher, which would be trained and saved.

    Raises:
        ValueError: If it has one.
    """
    hidden = {id(tensor) for tensor in chain(teacher.parameters(), teacher.buffers())}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if id(tensor) in hidden:
            raise ValueError(
                f"{name} belongs to the teacher, but would be trained and saved in checkpoints; use copy.deepcopy to "
                "train a copy, or store the layer in a tuple, which PyTorch does not register, to only read it"
            )


def check_finite(first_bad: dict[ValueName, int]) -> None:
    """Check that the training loss is finite.

    Args:
        first_bad: First step at which each term, the loss and the logits of each network were not finite; empty if all
            were.

    Raises:
        ValueError: If the loss was not finite; the message names the responsible terms and networks.
    """
    if LOSS not in first_bad:
        return
    step = first_bad[LOSS]
    values = [value for value, bad_step in first_bad.items() if bad_step <= step]
    terms = [value.name for value in values if value.kind == "term"]
    networks = [f"{value.name} logits" for value in values if value.kind == "logits"]
    blame = f"{' and '.join(networks)} not finite at that step" if networks else "all logits finite at that step"
    remedy = (
        "check its weights, input normalization and precision; if its logits are cached, "
        "--teacher_cache.dtype bfloat16 has a larger range"
        if any(name.startswith("teacher") for name in networks)
        else "lower the learning rate, clip gradients (--trainer.gradient_clip_val 1) or use a higher precision"
    )
    raise ValueError(f"the loss is not finite from step {step} on (terms: {', '.join(terms)}; {blame}); {remedy}")


def checked_names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's metrics.

    Args:
        task: The task.

    Raises:
        ValueError: If the main metric is missing, or a name is that of another metric of lkd.
    """
    names, kind = tuple(task.metrics()), type(task).__name__
    if task.metric not in names:
        raise ValueError(
            f"the main metric {task.metric!r} of {kind} is not among its metrics {', '.join(names)}; set `metric` to "
            "one of them, or add it to `metrics`"
        )
    for name in names:
        if name in ("loss", "agreement") or name.startswith("teacher_"):
            raise ValueError(f"{kind} has a metric {name!r}, which is the name of another logged value; rename it")
    return names
