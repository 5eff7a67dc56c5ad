"""Evaluation of the student's features by classifiers, as part of the validation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from itertools import chain
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import LBFGS

from lkd import devices
from lkd.features.extractor import FeatureExtractor
from lkd.tasks.classification import check_is_classification
from lkd.types import IGNORE_INDEX

_CHUNK = 1024
"""Number of validation images that are compared with all training images at once."""


class FeatureEvaluation(L.Callback):
    """Fit a classifier to the features of the training images, and log its accuracy on the validation images.

    The trained network is evaluated in eval mode on the training images, without augmentation, and on the validation
    images. Images without a label are excluded. The training/eval modes, the random number generators and the position
    in the training data are not changed. With several processes, each computes the features of its share of the images,
    and all of them receive all features.

    The data module must have a method `plain_train_dataloader` that returns the training images without augmentation,
    as `ImageDataModule` has. It may return a subset of a large dataset.

    Args:
        layer: Layer of the network whose features `(B, D)` are classified. Feature maps `(B, D, H, W)` are averaged
            over the pixels. Either a name as in `named_modules()`, or a group such as `@pooled`
            (`lkd.features.layers.resolve_layers`).
        every_n_epochs: Interval between evaluations in epochs. The last epoch is always evaluated.

    Raises:
        ValueError: If `every_n_epochs` is less than 1, if the network has no such layer, or if its features have
            a different shape.
        TypeError: If the data module has no `plain_train_dataloader`.
    """

    curve: str
    """Name of the logged metric."""

    def __init__(self, layer: str = "@pooled", every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.layer = layer
        self.every_n_epochs = every_n_epochs

    @property
    def curves(self) -> tuple[str, ...]:
        """Names of the metrics that this callback logs, for `MonitorCheck`."""
        return (self.curve,)

    @abstractmethod
    def classify(self, bank: Tensor, target: Tensor, features: Tensor, num_classes: int) -> Tensor:
        """Classify the features of the validation images.

        Args:
            bank: Features of the training images `(N, D)`.
            target: Classes of the training images `(N,)`.
            features: Features of the validation images `(M, D)`.
            num_classes: Number of classes.

        Returns:
            Predicted classes `(M,)`.
        """

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check the layer and the data module.

        Raises:
            ValueError: If the task is not classification, or the layer does not exist or has no features `(B, D)`.
            TypeError: If the data module has no `plain_train_dataloader`.
        """
        if stage not in ("fit", "validate"):
            return
        check_is_classification(pl_module, type(self).__name__)
        if not hasattr(trainer.datamodule, "plain_train_dataloader"):  # type: ignore[attr-defined]
            raise TypeError(
                f"{type(self).__name__} requires the training images without augmentation; add a method "
                "plain_train_dataloader to the data module that returns a data loader of these images"
            )
        extractor = self._extractor(pl_module)
        try:
            if (example := pl_module.example_input()) is not None:
                _pooled(self.layer, extractor.probe(example).outputs.features)
        finally:
            extractor.remove()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Evaluate the features, except in the sanity check and in the epochs between two evaluations."""
        epoch, is_fit = trainer.current_epoch + 1, trainer.state.fn == TrainerFn.FITTING
        is_last = epoch == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
        is_due = not is_fit or epoch % self.every_n_epochs == 0 or is_last
        if is_due and not trainer.sanity_checking:
            pl_module.log(self.curve, self.evaluate(trainer, pl_module), sync_dist=True)

    def evaluate(self, trainer: L.Trainer, module: Any) -> float:
        """Compute the accuracy on the validation images.

        Args:
            trainer: Trainer with a data module.
            module: Module whose trained network is evaluated.

        Returns:
            Accuracy in [0, 1]; 0 if there are no labelled training or validation images.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        with devices.isolated_random_numbers(module.device):
            bank, target = self._features(trainer, module, data.plain_train_dataloader())
            held_out = data.val_dataloader()
            several = held_out if isinstance(held_out, (list, tuple)) else [held_out]
            features, wanted = self._features(trainer, module, chain.from_iterable(several))
            if not len(target) or not len(wanted):
                return 0.0
            num_classes = int(torch.cat((target, wanted)).max()) + 1
            found = self.classify(bank, target, features, num_classes)
        return float((found == wanted).float().mean())

    def _features(self, trainer: L.Trainer, module: Any, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Return float32 features `(N, D)` and classes `(N,)` of the labelled images from all processes."""
        extractor = self._extractor(module)
        features, targets = [], []
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for raw in batches:
                    batch = module.unpack(trainer.strategy.batch_to_device(raw))
                    found = extractor(batch.input).features
                    features.append(_pooled(self.layer, found).float())
                    targets.append(batch.target)
        finally:
            extractor.remove()
        feature, target = (
            module.all_gather(torch.cat(parts)).reshape(-1, *parts[0].shape[1:]) for parts in (features, targets)
        )
        labelled = target != IGNORE_INDEX
        return feature[labelled], target[labelled]

    def _extractor(self, module: Any) -> FeatureExtractor:
        return FeatureExtractor(getattr(module, module.network_names[0]), [self.layer])


def _pooled(name: str, features: Any) -> Tensor:
    (feature,) = features.values() if len(features) == 1 else (None,)
    if isinstance(feature, Tensor) and feature.ndim == 4:
        feature = feature.mean((2, 3))
    if not isinstance(feature, Tensor) or feature.ndim != 2:
        shape = tuple(feature.shape) if isinstance(feature, Tensor) else f"{len(features)} features"
        raise ValueError(
            f"the layer {name!r} must return features (B, D) or (B, D, H, W), got {shape}; select another layer"
        )
    return feature


class KNN(FeatureEvaluation):
    r"""Log `val/knn_acc`, the accuracy of a weighted k-nearest-neighbor classifier of the student's features.

    Each of the k training images with the most similar features votes for its class with the weight
    $\exp(\cos(f, f_i) / \tau)$.

    Args:
        k: Number of neighbors, at least 1. With fewer training images, all of them vote.
        temperature: Temperature $\tau$, greater than 0.
        layer: Layer whose features are classified; see `FeatureEvaluation`.
        every_n_epochs: Interval between evaluations in epochs. The last epoch is always evaluated.

    Raises:
        ValueError: If an argument is out of range, or if the network has no such layer.
        TypeError: If the data module has no `plain_train_dataloader`.

    References:
        Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018
        (arXiv 1805.01978), section 3.4, with k = 200 and a temperature of 0.07.

    Example:
        >>> bank, target = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> KNN(k=2).classify(bank, target, torch.tensor([[2.0, 0.5], [0.1, 3.0]]), 2)
        tensor([0, 1])
    """

    curve = "val/knn_acc"

    def __init__(self, k: int = 20, temperature: float = 0.07, layer: str = "@pooled", every_n_epochs: int = 1) -> None:
        super().__init__(layer, every_n_epochs)
        if k < 1 or not temperature > 0:
            raise ValueError(f"k must be at least 1 and temperature positive, got {k} and {temperature}")
        self.k = k
        self.temperature = temperature

    def classify(self, bank: Tensor, target: Tensor, features: Tensor, num_classes: int) -> Tensor:
        """Classify features by the weighted votes of their nearest neighbors.

        Args:
            bank: Features of the training images `(N, D)`.
            target: Classes of the training images `(N,)`.
            features: Features of the validation images `(M, D)`.
            num_classes: Number of classes.

        Returns:
            Predicted classes `(M,)`.
        """
        bank, features = F.normalize(bank, dim=1), F.normalize(features, dim=1)
        found = []
        for chunk in torch.split(features, _CHUNK):
            similarity, index = (chunk @ bank.T).topk(min(self.k, len(bank)), dim=1)
            weight = ((similarity - 1) / self.temperature).exp()  # at most 1; does not change the order of the sums
            votes = weight.new_zeros(len(chunk), num_classes).scatter_add_(1, target[index], weight)
            found.append(votes.argmax(1))
        return torch.cat(found)


class LinearProbe(FeatureEvaluation):
    r"""Log `val/probe_acc`, the accuracy of a linear classifier of the student's features.

    The classifier is a multinomial logistic regression on standardized features with the penalty
    $\frac{\lambda}{2} \lVert W \rVert^2$ on the weights. It is fitted to the training images by L-BFGS, starting from
    zero weights, so the result depends on the features only.

    Args:
        weight_decay: Penalty $\lambda$, at least 0.
        max_iter: Maximum number of L-BFGS iterations.
        layer: Layer whose features are classified; see `FeatureEvaluation`.
        every_n_epochs: Interval between evaluations in epochs. The last epoch is always evaluated.

    Raises:
        ValueError: If an argument is out of range, or if the network has no such layer.
        TypeError: If the data module has no `plain_train_dataloader`.

    Example:
        >>> bank, target = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 0, 1, 1])
        >>> LinearProbe().classify(bank, target, torch.tensor([[-5.0, 1.0], [9.0, 1.0]]), 2)
        tensor([0, 1])
    """

    curve = "val/probe_acc"

    def __init__(
        self, weight_decay: float = 1e-4, max_iter: int = 100, layer: str = "@pooled", every_n_epochs: int = 1
    ) -> None:
        super().__init__(layer, every_n_epochs)
        if weight_decay < 0 or max_iter < 1:
            raise ValueError(
                f"weight_decay must be at least 0 and max_iter at least 1, got {weight_decay} and {max_iter}"
            )
        self.weight_decay = weight_decay
        self.max_iter = max_iter

    def classify(self, bank: Tensor, target: Tensor, features: Tensor, num_classes: int) -> Tensor:
        """Classify features by logistic regression.

        Args:
            bank: Features of the training images `(N, D)`.
            target: Classes of the training images `(N,)`.
            features: Features of the validation images `(M, D)`.
            num_classes: Number of classes.

        Returns:
            Predicted classes `(M,)`.
        """
        mean, std = bank.mean(0), bank.std(0, correction=0).clamp(min=1e-6)
        with torch.inference_mode(False), torch.enable_grad():  # validation runs without gradients
            inputs, labels = ((bank - mean) / std).clone(), target.clone()
            weight = torch.zeros(num_classes, inputs.shape[1], device=inputs.device, requires_grad=True)
            bias = torch.zeros(num_classes, device=inputs.device, requires_grad=True)
            optimizer = LBFGS([weight, bias], max_iter=self.max_iter, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(F.linear(inputs, weight, bias), labels)
                loss = loss + self.weight_decay / 2 * weight.square().sum()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)  # type: ignore[no-untyped-call]
        return F.linear((features - mean) / std, weight.detach(), bias.detach()).argmax(1)
