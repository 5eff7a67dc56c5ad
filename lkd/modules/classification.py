"""Supervised training of a single network: a teacher, or a student without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lkd.__about__ import __version__
from lkd.features.extractor import FeatureExtractor, tensors_in
from lkd.features.layers import device_of
from lkd.models import load_weights
from lkd.models.weights import misfit
from lkd.modules.checks import (
    check_covers_classes,
    check_finite,
    check_saved_by,
    checked_names,
    evaluated_size,
    probe_network,
    warn_of_unused_outputs,
)
from lkd.modules.evaluated import EvaluatedModule
from lkd.modules.hyperparameters import inner_arguments, is_plain, is_safe, name_default
from lkd.modules.meter import CORRECT, LABELLED, LOSS, Meter, ValueName, named
from lkd.modules.recorded import global_seed
from lkd.modules.training_curves import curves_of, is_due, log_curves
from lkd.schedules.relative import Interval
from lkd.schedules.run import fit_schedules, with_schedule
from lkd.tasks import Classification, Task
from lkd.types import Batch, Mixed, Outputs, Probe

FROM_DATA = ("num_samples", "batch_size", "train_index")
"""Attributes of a criterion that are filled in from the data module if they are None."""


class ClassificationModule(EvaluatedModule):
    """Train one network with labels; by default, a classifier.

    Batches are `Batch`, `(input, target)`, `(input, target, index)` or a dict with these keys. Override `unpack` to
    support other formats. Logged metrics: `train/loss`, `train/<term>` and `train/acc`, averaged over the steps since
    they were last logged, and in each epoch `val/loss` (cross-entropy) and `val/acc`.

    Args:
        model: Network to train; returns logits `(B, K)`.
        optimizer: Function that creates the optimizer from the trainable parameters.
        lr_scheduler: Function that creates the learning rate scheduler from the optimizer. `None` keeps the learning
            rate constant. `lkd.schedules` provides schedules that adapt to the length of the run.
        label_smoothing: Label smoothing factor, in [0, 1).
        model_ckpt: File with initial weights, in any format that `lkd.models.load_weights` supports.
        lr_scheduler_interval: Whether the scheduler steps after each `epoch` or each optimizer `step`.
        task: What the network returns, and how it is supervised and evaluated. `None` uses `Classification()`.

    Attributes:
        flushes: Number of times training metrics were read from the device and logged.

    Raises:
        FileNotFoundError: If the file with the weights does not exist.
        ValueError: If `label_smoothing` is out of range or the weights in the file do not match the network.
    """

    network_names: tuple[str, ...] = ("model",)
    """Names of the attributes that hold networks, starting with the trained one."""
    replaced_arguments: tuple[str, ...] = ()
    """Arguments of the base class that the constructor sets itself, so `**kwargs` must not contain them."""
    _is_warned = False  # about outputs without a class

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        model_ckpt: str | None = None,
        lr_scheduler_interval: Interval = "epoch",
        task: Task | None = None,
    ) -> None:
        super().__init__()
        # Under the CLI these are the values of the config, from which load_from_checkpoint rebuilds the module.
        self.save_hyperparameters(ignore=inner_arguments(type(self)))
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
        self.model = load_weights(model, model_ckpt) if model_ckpt else model
        self.label_smoothing = label_smoothing
        self.task = task if task is not None else Classification()
        self.task_metrics = checked_names(self.task)
        self.logit_metrics = (*self.logit_metrics, *self.task_metrics)
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict(self.make_metrics()) for stage in ("val", "test")})
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self._meter = Meter()
        self._kept_facts: dict[str, Any] = {}  # properties of the data, from a checkpoint
        self._watched: dict[ValueName, Tensor] = {}
        self.flushes = 0

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        name_default(cls)

    def saved_hyperparameters(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return only plain values, since networks would be pickled into checkpoints."""
        return {name: value for name, value in values.items() if is_plain(value)}

    def unpack(self, batch: Any) -> Batch:
        """Convert a batch from the data module to a `Batch`; override this to support other formats.

        Callbacks call it as well, so expensive conversions belong in the data module's `on_after_batch_transfer`.

        Args:
            batch: A `Batch`, `(input, target)`, `(input, target, index)`, or a dict with these keys.

        Raises:
            TypeError: If the batch has a different format.
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
            return Batch(*batch)
        if isinstance(batch, Mapping) and {"input", "target"} <= set(batch):
            return Batch(batch["input"], batch["target"], batch.get("index"))
        raise TypeError(
            f"a batch must be (input, target), (input, target, index) or a dict with these keys, got {type(batch)}; "
            f"override {type(self).__name__}.unpack to support other formats"
        )

    def read(self, batch: Any) -> Batch:
        """Convert a batch from the data module to one that the task understands: `unpack`, then `Task.prepare`.

        Args:
            batch: A batch in any format that `unpack` supports.
        """
        return self.task.prepare(self.unpack(batch))

    def forward(self, input: Any) -> Tensor:
        """Compute the logits of the trained network: `(B, K)`, or as the task defines them."""
        return cast("Tensor", self.task.logits(self.model(input)))

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the terms of the loss for one batch.

        Args:
            batch: One batch.

        Returns:
            The logits `(B, K)`, and a mapping from names to weighted terms, whose sum is the loss.
        """
        if type(self).forward is not ClassificationModule.forward:  # training uses the subclass's forward
            outputs = Outputs(self(batch.input), {})
        else:
            output = self.model(batch.input)
            outputs = Outputs(self.task.logits(output), {}, output)
        return outputs.logits, {"hard": self._labels_loss(outputs, batch)}

    def _labels_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the supervised loss, including that of an auxiliary head, with its weight."""
        loss, *auxiliary = [self._head_loss(logits, batch) for logits in self._supervised_logits(outputs)]
        return loss + self.task.aux_weight * auxiliary[0] if auxiliary else loss

    def _supervised_logits(self, outputs: Outputs) -> list[Tensor]:
        """Return the logits of the network and, if it has one, of its auxiliary head."""
        auxiliary = self.task.auxiliary_logits(outputs.raw)
        return [outputs.logits] if auxiliary is None else [outputs.logits, auxiliary]

    def _head_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        mixed = () if batch.mixed is None else (batch.mixed,)  # overrides need not accept it
        return self.hard_loss(logits, batch.target, *mixed)

    def hard_loss(self, logits: Tensor, target: Tensor, mixed: Mixed | None = None) -> Tensor:
        """Compute the supervised loss of the task: for classification, the mean cross-entropy of the labelled images.

        Args:
            logits: Output of the network.
            target: Targets; missing labels are `IGNORE_INDEX`.
            mixed: Partners of mixed images and their weights. The labels of an image and of its partner, if it has one,
                are weighted accordingly.

        Returns:
            Scalar loss in nats; 0 if no image has a label.

        Raises:
            ValueError: If a label is out of range. This is checked on the CPU; a GPU raises a device-side assertion.
        """
        return self.task.loss(logits, target, self.label_smoothing, mixed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of one batch: the sum of the terms of `losses`."""
        batch = self.read(batch)
        if self.step_graph is not None and self._replays:
            names, row = self.step_graph.run(batch)
            row = row.clone()
            self._meter.add(names, row, self.global_step)
            return row[0]
        values = named(self.training_values(batch))
        self._meter.update(values, self.global_step)
        return values[LOSS]

    def training_values(self, batch: Batch) -> dict[ValueName, Tensor]:
        """Compute the loss and all other logged values of a training step.

        Args:
            batch: One batch.

        Returns:
            A mapping from names to scalars. The loss, which carries the gradient, comes first.
        """
        logits, terms = self.losses(batch)
        loss = reduce(torch.add, terms.values())
        self.watch(self.network_names[0], logits)
        named = {ValueName("term", name): term for name, term in terms.items()}
        correct = self.task.correct(logits, batch.target)
        counts = {} if correct is None else {CORRECT: correct, LABELLED: self.task.labelled(batch.target)}
        return {LOSS: loss, **named, **counts, **self._watched}

    def watch(self, network: str, logits: Tensor) -> None:
        """Track whether the logits of a network are finite, so that an error message can name the source of NaNs.

        Args:
            network: Name of the network.
            logits: Its logits in this step.
        """
        means = [leaf.detach().float().mean() for leaf in tensors_in(logits)]
        self._watched[ValueName("logits", network)] = reduce(torch.add, means)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log training metrics every `log_every_n_steps` optimizer steps, and at least once per epoch."""
        if is_due(self.trainer, batch_idx):
            self._log_training()

    def on_validation_epoch_start(self) -> None:
        """Raise an error if the training loss is not finite, before a checkpoint is saved."""
        if not self.trainer.sanity_checking:
            check_finite(self._meter.first_bad(self._gather))

    def on_validation_epoch_end(self) -> None:
        """Raise an error if the validation loss is not finite, as after a divergence in the last training steps."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        total = cast("Tensor", self.stage_metrics("val")["loss"].total)
        if not self._gather(total).isfinite().all():
            names = LOSS, ValueName("term", "val/loss"), ValueName("logits", self.network_names[0])
            check_finite(dict.fromkeys(names, self.global_step))

    def on_train_epoch_end(self) -> None:
        """Raise an error if the training loss is not finite; needed for runs without validation."""
        check_finite(self._meter.first_bad(self._gather))

    def _gather(self, tensor: Tensor) -> Tensor:
        """Gather a tensor `(...)` from all processes as `(world, ...)`; a single process returns it unchanged."""
        return cast("Tensor", self.all_gather(tensor))

    def _log_training(self) -> None:
        check_finite(self._meter.first_bad(self._gather))
        if means := self._meter.means(self._gather):  # empty if a custom training_step does its own logging
            self.flushes += 1
            log_curves(self, curves_of(means, self.trains_logits))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Predict the logits of one batch. Labels are not read."""
        with evaluated_size(self._trainer, images := self.unpack(batch).input):
            return cast("Tensor", self(images))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Create the optimizer of the trainable parameters, which never include the teacher's, and the scheduler."""
        optimizer = self.make_optimizer()
        if self._make_lr_scheduler is None:
            return optimizer
        return with_schedule(optimizer, self._make_lr_scheduler(optimizer), self.lr_scheduler_interval)

    def on_train_start(self) -> None:
        """Set the length of schedules that adapt to the run, now that it is known, and check the other schedules."""
        fit_schedules(self.trainer)

    def make_optimizer(self) -> Optimizer:
        """Create the optimizer of all trainable parameters; override this to use parameter groups."""
        return self._make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])

    @property
    def only_labels(self) -> bool:
        """Whether the labels are the only training signal."""
        return True

    def setup(self, stage: str) -> None:
        """Check that the networks match the data and that there is a training signal, before the run starts."""
        super().setup(stage)
        if stage == TrainerFn.FITTING:
            self._meter = Meter()  # an earlier run of this module may have left values, or may have diverged
        if stage == TrainerFn.FITTING and self.only_labels and self._data_attribute("num_labelled") == 0:
            raise ValueError(
                "no training image has a label, but this run learns from labels only; increase label_size of the data "
                "module, or train with a teacher (DistillModule with distill_weight above 0)"
            )
        example = self.example_input()
        if example is not None:
            self.build(example)

    def example_input(self) -> Any | None:
        """Return one blank input on the device of the network's weights, or None if the input is unknown.

        The input is `example_input_array` if set, otherwise `example_input` of the data module, which may be a dict or
        a tuple of tensors, otherwise an image of the data module's `input_shape`.
        """
        example, shape = self.example_input_array, self._data_attribute("input_shape")
        if example is None:
            example = self._data_attribute("example_input")
        if example is None and shape is not None:
            example = torch.zeros(1, *shape)
        return move_data_to_device(example, device_of(self.model))

    def _data_attribute(self, name: str) -> Any | None:
        """Return a property of the data module, or else of the checkpoint, as testing opens no training data."""
        found = getattr(getattr(self._trainer, "datamodule", None), name, None)
        return self._kept_facts.get(name) if found is None else found

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names from the data module or else from the checkpoint; empty if unknown."""
        found = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        return tuple(found or self._kept_facts.get("class_names") or ())

    def build(self, example: Any) -> None:
        """Run a blank input through the trained networks and check their outputs.

        Args:
            example: One blank input.

        Raises:
            ValueError: If a network fails on the input or has fewer classes than the data.
        """
        self.probe("model", FeatureExtractor(self.model, read=self.task.logits), example)

    def probe(self, name: str, extractor: FeatureExtractor, example: Any, is_classifier: bool = True) -> Probe:
        """Run a blank input through one network and check its outputs.

        Args:
            name: Name of the network in error messages.
            extractor: The network and the layers whose features are read.
            example: One blank input.
            is_classifier: Whether the logits must cover the classes of the data.

        Returns:
            The network and its outputs.

        Raises:
            ValueError: If the network fails on the input or has fewer classes than the data.
        """
        probe = probe_network(name, extractor, example)
        self.task.check(name, probe.outputs.logits)
        if name != "teacher" and (auxiliary := self.task.auxiliary_logits(probe.outputs.raw)) is not None:
            self.task.check(f"auxiliary head of the {name}", auxiliary)
        num_classes, in_data = self.task.num_outputs(probe.outputs.logits), self._data_attribute("num_classes")
        if num_classes is None:
            return probe
        if is_classifier:
            check_covers_classes(name, num_classes, in_data)
        if name == self.network_names[0] and not self._is_warned:
            self._is_warned = warn_of_unused_outputs(self._trainer, name, num_classes, in_data)
        return probe

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the properties of the data that `on_load_checkpoint` needs to rebuild the module."""
        shape, example = self._data_attribute("input_shape"), self._data_attribute("example_input")
        facts = {name: fact for name in FROM_DATA if not isinstance(fact := self._data_attribute(name), Tensor)}
        checkpoint["lkd"] = {
            "version": __version__,
            **global_seed(),
            "input_shape": None if shape is None else tuple(shape),
            "example_input": move_data_to_device(example, "cpu") if is_safe(example) else None,
            "class_names": list(self.class_names),
            "meter": self._meter.state(self._gather),
            **facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build what depends on the data before the weights are loaded; within a Trainer, also check the weights."""
        check_saved_by(checkpoint, type(self))
        self._kept_facts = dict(checkpoint.get("lkd", {}))
        if "meter" in self._kept_facts and self._trainer is not None:
            self._meter.restore(self._kept_facts.pop("meter"), self.global_rank, self.trainer.strategy.root_device)
        if (example := self.example_input()) is not None:
            self.build(example)
        state = checkpoint.get("state_dict")
        problems = misfit(state, self) if self._trainer is not None and self.strict_loading and state else ""
        if problems:
            raise ValueError(
                f"the checkpoint does not match this {type(self).__name__}; {problems}; use the config of the run that "
                "saved it"
            )


name_default(ClassificationModule)
