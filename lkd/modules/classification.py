"""Training one network with labels: teachers, and students alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import reduce
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lkd.__about__ import __version__
from lkd.features.extractor import FeatureTaps, logits_of
from lkd.features.layers import device_of
from lkd.losses._labels import cross_entropies
from lkd.models import load_weights
from lkd.models.weights import misfit
from lkd.modules.checks import mismatch, warn_of_unused_outputs
from lkd.modules.evaluated import EvaluatedModule, mean_cross_entropy
from lkd.modules.meter import Meter
from lkd.modules.recorded import global_seed, inner_arguments
from lkd.schedules.relative import Interval
from lkd.schedules.run import fit_schedules, with_schedule
from lkd.types import IGNORE_INDEX, Batch, Mixed, Probe

_LOGITS = " logits"
RUNNING_HOOK = "_current_fx_name"
FROM_DATA = ("num_samples", "batch_size", "train_index")
"""What a criterion may leave to the datamodule: attributes of these names that are None."""


def _is_plain(value: Any) -> bool:
    return all(type(leaf) in (bool, int, float, str, type(None)) for leaf in tree_leaves(value))


def _is_safe(example: Any) -> bool:
    """Whether a checkpoint can hold it without code of the user's, and be read with `weights_only`."""
    if type(example) in (dict, list, tuple):
        return all(_is_safe(part) for part in (example.values() if type(example) is dict else example))
    return type(example) in (Tensor, str)


def _name_default(kind: type[L.LightningModule]) -> None:
    """Let pickle find a class's default optimizer, for strategies that spawn their processes.

    It is a lambda, which the command line can show and change; pickle looks it up by its name, `<lambda>`.
    """
    optimizer = inspect.signature(kind).parameters.get("optimizer")
    if optimizer is not None and getattr(optimizer.default, "__name__", "") == "<lambda>":
        setattr(kind, "<lambda>", optimizer.default)


class ClassificationModule(EvaluatedModule):
    """Train a classifier with labels.

    Batches are `Batch`, `(input, target)`, `(input, target, index)` or a dict with these keys; override `unpack`
    for others. Curves: `train/loss`, `train/<term>`, `train/acc` (means over the steps since the last point), and
    per epoch `val/loss` (cross-entropy), `val/acc`.

    Args:
        model: The network; returns logits `(B, K)`.
        optimizer: Makes the optimizer from the parameters that train.
        lr_scheduler: Makes the learning rate's schedule from the optimizer; None: constant. `lkd.schedules` has
            schedules that follow the length of the run.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).
        model_ckpt: File with weights to start from: anything that `lkd.models.load_weights` reads.
        lr_scheduler_interval: Whether the schedule is stepped after each `epoch` or each optimizer `step`.

    Attributes:
        flushes: How many times curves of the training were read from the device and logged.

    Raises:
        ValueError: If `label_smoothing` is out of range, or the file's weights do not fit.
    """

    network_names: tuple[str, ...] = ("model",)
    """Attributes that hold networks, the one in training first."""
    _is_warned = False  # of outputs without a class

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        model_ckpt: str | None = None,
        lr_scheduler_interval: Interval = "epoch",
    ) -> None:
        super().__init__()
        # From the CLI these are the config's values, from which load_from_checkpoint rebuilds everything.
        self.save_hyperparameters(ignore=inner_arguments(type(self)))
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
        self.model = load_weights(model, model_ckpt) if model_ckpt else model
        self.label_smoothing = label_smoothing
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict(self.make_metrics()) for stage in ("val", "test")})
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self._meter = Meter()
        self._kept_facts: dict[str, Any] = {}  # what a checkpoint tells of the data
        self._watched: dict[str, Tensor] = {}
        self.flushes = 0

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        _name_default(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set Lightning's note of the hook that runs without nn.Module's checks: it is set 40 times in a step."""
        if name == RUNNING_HOOK:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _set_hparams(self, hp: Any) -> None:
        """Keep plain values only, whoever calls `save_hyperparameters`: networks would be pickled into checkpoints."""
        super()._set_hparams({name: value for name, value in self._to_hparams_dict(hp).items() if _is_plain(value)})

    def unpack(self, batch: Any) -> Batch:
        """What the data gave, as a `Batch`; override it for data of other forms.

        Callbacks ask it too: what takes long belongs in the data module's `on_after_batch_transfer`.

        Args:
            batch: A `Batch`, `(input, target)`, `(input, target, index)`, or a dict with these keys.

        Raises:
            TypeError: If it is none of these.
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
            return Batch(*batch)
        if isinstance(batch, Mapping) and {"input", "target"} <= set(batch):
            return Batch(batch["input"], batch["target"], batch.get("index"))
        raise TypeError(
            f"a batch must be (input, target), (input, target, index) or a dict with these keys, got {type(batch)}; "
            f"override {type(self).__name__}.unpack for other data"
        )

    def forward(self, input: Any) -> Tensor:
        """Logits `(B, K)` of the network in training."""
        return logits_of(self.model(input))

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is to be minimised.

        Args:
            batch: One batch.

        Returns:
            The logits `(B, K)`, and named weighted terms; the loss is their sum.
        """
        logits = self(batch.input)
        return logits, {"hard": self._labels_loss(logits, batch)}

    def _labels_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """`hard_loss`, which need not know of mixed images where there are none."""
        if batch.mixed is None:
            return self.hard_loss(logits, batch.target)
        return self.hard_loss(logits, batch.target, batch.mixed)

    def hard_loss(self, logits: Tensor, target: Tensor, mixed: Mixed | None = None) -> Tensor:
        """Cross-entropy with the labels, the mean over the images that have one.

        Args:
            logits: `(B, K)`.
            target: `(B,)`; `IGNORE_INDEX` where there is no label.
            mixed: With what the images are mixed: both labels count, by their shares, the partner's if it has one.

        Returns:
            A scalar in nats; 0 if no image has a label.

        Raises:
            ValueError: If a label is out of range (noticed on the CPU; a GPU stops with an assertion).
        """
        if mixed is None:
            return mean_cross_entropy(logits, target, self.label_smoothing)
        labelled = target != IGNORE_INDEX
        own = cross_entropies(logits, target, self.label_smoothing)
        other = cross_entropies(logits, mixed.target, self.label_smoothing) * labelled
        return (mixed.weight * own + (1 - mixed.weight) * other).sum() / labelled.sum().clamp(min=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of `losses`."""
        batch = self.unpack(batch)
        if self.step_graph is not None and self._replays:
            names, row = self.step_graph.run(batch)
            row = row.clone()
            self._meter.add(names, row, self.global_step)
            return row[0]
        values = self.training_values(batch)
        self._meter.update(values, self.global_step)
        return values["loss"]

    def training_values(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss and everything else that is logged of a training step.

        Args:
            batch: One batch.

        Returns:
            Name to scalar: `loss`, with its gradient, comes first.
        """
        logits, terms = self.losses(batch)
        loss = reduce(torch.add, terms.values())
        self.watch(self.network_names[0], logits)
        counts = {
            "correct answers": (logits.argmax(1) == batch.target).sum(),
            "labelled images": (batch.target != IGNORE_INDEX).sum(),
        }
        return {"loss": loss, **terms, **counts, **self._watched}

    def watch(self, network: str, logits: Tensor) -> None:
        """Remember whether a network's logits are finite: the error message names who failed first.

        Args:
            network: The network's name.
            logits: What it answered in this step.
        """
        self._watched[f"{network}{_LOGITS}"] = logits.detach().float().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log a point every `log_every_n_steps` steps of the optimizer, and at least one an epoch."""
        every = cast("int", self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        last, summed = self.trainer.is_last_batch, self.trainer.accumulate_grad_batches
        seen, rest = divmod(batch_idx + 1, summed)
        if every and ((last and seen < every) or (not rest and seen % every == 0)):
            self._log_training()

    def on_validation_epoch_start(self) -> None:
        """Notice a loss that is not finite before a checkpoint is written."""
        if not self.trainer.sanity_checking:
            self._check_finite(self._meter.first_bad(self._gather))

    def on_validation_epoch_end(self) -> None:
        """The same for a loss that only the last steps have spoilt."""
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        total = cast("Tensor", self.stage_metrics("val")["loss"].total)
        if not self._gather(total).isfinite().all():
            names = "loss", "val/loss", f"{self.network_names[0]}{_LOGITS}"
            self._check_finite(dict.fromkeys(names, self.global_step))

    def on_train_epoch_end(self) -> None:
        """The loss in training, where there is no validation."""
        self._check_finite(self._meter.first_bad(self._gather))

    def _gather(self, tensor: Tensor) -> Tensor:
        """`(...)` of all processes as `(world, ...)`; unchanged where there is one."""
        return cast("Tensor", self.all_gather(tensor))

    def _log_training(self) -> None:
        self._check_finite(self._meter.first_bad(self._gather))
        means = self._meter.means(self._gather)
        if not means:  # a training_step of the user's own, which logs for itself
            return
        self.flushes += 1
        acc = means.pop("correct answers") / max(means.pop("labelled images"), 1e-9)
        if self.trains_logits:
            means["acc"] = acc
        curves = {f"train/{name}": mean for name, mean in means.items() if not name.endswith(_LOGITS)}
        # Not by `self.log`: Lightning would read what the bar shows from the device again in each of the next steps.
        shown = ("train/loss", "train/acc")
        self.trainer.progress_bar_metrics.update({name: mean for name, mean in curves.items() if name in shown})
        self.trainer.callback_metrics.update({name: torch.tensor(mean) for name, mean in curves.items()})
        for logger in self.loggers:
            logger.log_metrics(curves, step=self.global_step - 1)  # as Lightning counts

    def _check_finite(self, first_bad: dict[str, int]) -> None:
        if "loss" not in first_bad:
            return
        step = first_bad["loss"]
        names = [name for name, bad_step in first_bad.items() if bad_step <= step]
        terms = [name for name in names if name != "loss" and not name.endswith(_LOGITS)]
        networks = [name for name in names if name.endswith(_LOGITS)]
        blame = f"{' and '.join(networks)} were not finite there" if networks else "all logits were still finite there"
        remedy = (
            "check its weights, its input normalization and the precision it runs in; if its answers are kept, "
            "--teacher_cache.dtype bfloat16 holds larger ones"
            if any(name.startswith("teacher") for name in networks)
            else "lower the learning rate, clip gradients (--trainer.gradient_clip_val 1) or take a wider precision"
        )
        raise ValueError(f"the loss is not finite since step {step}, in {', '.join(terms)}; {blame}; {remedy}")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits `(B, K)`."""
        logits: Tensor = self(self.unpack(batch).input)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what trains (never a teacher), and the schedule."""
        optimizer = self.make_optimizer()
        if self._make_lr_scheduler is None:
            return optimizer
        return with_schedule(optimizer, self._make_lr_scheduler(optimizer), self.lr_scheduler_interval)

    def on_train_start(self) -> None:
        """Set the length of schedules that follow the run, which is known from here on; check the others."""
        fit_schedules(self.trainer)

    def make_optimizer(self) -> Optimizer:
        """The optimizer of all parameters that train; override it for groups of parameters."""
        return self._make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])

    @property
    def only_labels(self) -> bool:
        """Whether there is nothing to learn from but labels."""
        return True

    def setup(self, stage: str) -> None:
        """Check that networks and data fit before anything runs."""
        for metric in self.modules():
            if isinstance(metric, Metric):  # validate leaves inference tensors, which fit could not update
                metric.reset()
        if stage == TrainerFn.FITTING and self.only_labels and self._data_attribute("num_labelled") == 0:
            raise ValueError(
                "no training image has a label, and labels are all that this run learns from; raise the data module's "
                "label_size, or let a teacher say what the images are (DistillModule, distill_weight above 0)"
            )
        example = self.example_input()
        if example is not None:
            self.build(example)

    def example_input(self) -> Any | None:
        """One blank input, on the device of the network's weights.

        It is `example_input_array` if that is set, else the data module's `example_input`, which may be a dict or a
        tuple of tensors, else an image of its `input_shape`.
        """
        example, shape = self.example_input_array, self._data_attribute("input_shape")
        if example is None:
            example = self._data_attribute("example_input")
        if example is None and shape is not None:
            example = torch.zeros(1, *shape)
        return move_data_to_device(example, device_of(self.model))

    def _data_attribute(self, name: str) -> Any | None:
        """What the data module tells, else what a checkpoint does: in a test, no training images are opened."""
        told = getattr(getattr(self._trainer, "datamodule", None), name, None)
        return self._kept_facts.get(name) if told is None else told

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes: the data module's, else those that the checkpoint holds; empty if not known."""
        told = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        return tuple(told or self._kept_facts.get("class_names") or ())

    def build(self, example: Any) -> None:
        """Run a blank input through what is trained, and check what comes out.

        Args:
            example: One blank input.

        Raises:
            ValueError: If a network cannot take it, or has fewer classes than the data.
        """
        self.probe("model", FeatureTaps(self.model), example)

    def probe(self, name: str, taps: FeatureTaps, example: Any, is_classifier: bool = True) -> Probe:
        """Run a blank input through one network.

        Args:
            name: What the network is called in the error message.
            taps: The network, with the layers to read.
            example: One blank input.
            is_classifier: Whether its logits must be of the data's classes.

        Returns:
            The network and its outputs.

        Raises:
            ValueError: If the network cannot take the input, or has fewer classes than the data.
        """
        try:
            probe = taps.probe(example)
        except RuntimeError as error:
            shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
            reason = str(error).splitlines()[0]
            remedy = mismatch(taps.network, example) or (
                "give the network the data's number of channels (in_channels) and image size, or the data the network's"
            )
            raise ValueError(f"the {name} cannot take this data's input {shape}: {reason}; {remedy}") from error
        shape = tuple(probe.outputs.logits.shape)
        if len(shape) != 2:
            raise ValueError(f"the {name} must return logits (batch, classes), got the shape {shape} for one input")
        num_classes, in_data = shape[1], self._data_attribute("num_classes")
        if is_classifier and in_data is not None and in_data > num_classes:
            raise ValueError(
                f"the data has {in_data} classes, the {name} only {num_classes}; "
                f"set the network's num_classes to {in_data}"
            )
        if name == self.network_names[0] and not self._is_warned:
            self._is_warned = warn_of_unused_outputs(self._trainer, name, num_classes, in_data)
        return probe

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what of the data `on_load_checkpoint` needs to build what depends on it."""
        shape, example = self._data_attribute("input_shape"), self._data_attribute("example_input")
        facts = {name: fact for name in FROM_DATA if not isinstance(fact := self._data_attribute(name), Tensor)}
        checkpoint["lkd"] = {
            "version": __version__,
            **global_seed(),
            "input_shape": None if shape is None else tuple(shape),
            "example_input": move_data_to_device(example, "cpu") if _is_safe(example) else None,
            "class_names": list(self.class_names),
            "meter": self._meter.state(self._gather),
            **facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the weights arrive: build what depends on the data, if that waited; in a Trainer, see if they fit."""
        made_by = str(checkpoint.get("hyper_parameters", {}).get("_class_path", type(self).__name__))
        if made_by.rpartition(".")[2] not in {kind.__name__ for kind in type(self).__mro__}:
            raise ValueError(
                f"this checkpoint was made by {made_by}, not by {type(self).__name__}; "
                "LightningModule.load_from_checkpoint(path) finds the right class"
            )
        self._kept_facts = dict(checkpoint.get("lkd", {}))
        if "meter" in self._kept_facts and self._trainer is not None:
            self._meter.restore(self._kept_facts.pop("meter"), self.global_rank, self.trainer.strategy.root_device)
        if (example := self.example_input()) is not None:
            self.build(example)
        state = checkpoint.get("state_dict")
        problems = misfit(state, self) if self._trainer is not None and self.strict_loading and state else ""
        if problems:
            raise ValueError(
                f"the checkpoint does not fit this {type(self).__name__}; {problems}; take the config of the run that "
                "wrote it"
            )


_name_default(ClassificationModule)
