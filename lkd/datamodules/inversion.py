"""Training images synthesized from the teacher: data-free distillation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lkd._compat import AnyBatchNorm
from lkd._moved import former_members
from lkd.datamodules.extra import ExtraImages
from lkd.io.refused import first_line
from lkd.io.tensor_cache import cache_folder, fingerprint, load_tensors, network_fingerprint, save_tensors
from lkd.types import Normalization

_FORMAT = 1  # increase when the same settings result in different images


def total_variation(image: Tensor) -> Tensor:
    r"""Measure the roughness of images: $\sum_d \lVert x - x_d \rVert_2$ over four neighbors $d$, two of them diagonal.

    Args:
        image: Images `(B, C, H, W)`.

    Returns:
        Scalar; each norm is over the whole batch, as in the authors' code.

    References:
        Yin et al.: Dreaming to distill: Data-free knowledge transfer via DeepInversion, CVPR 2020 (arXiv 1912.08795),
        equation 3; the paper does not specify the neighbors.
    """
    return (
        _norm(image[..., 1:] - image[..., :-1])
        + _norm(image[..., 1:, :] - image[..., :-1, :])
        + _norm(image[..., 1:, 1:] - image[..., :-1, :-1])
        + _norm(image[..., 1:, :-1] - image[..., :-1, 1:])
    )


def statistics_distance(input: Tensor, norm: AnyBatchNorm) -> Tensor:
    r"""Compare a batch with BatchNorm statistics: $\lVert\mu-\hat\mu\rVert_2 + \lVert\sigma^2-\hat\sigma^2\rVert_2$.

    Args:
        input: Input of the layer `(B, C, ...)`.
        norm: The layer, with running mean and variance `(C,)`.

    Returns:
        Scalar; 0 if mean and (biased) variance of each channel equal those of the layer.

    References:
        Yin et al. 2020 (arXiv 1912.08795), equation 4.
    """
    dims = [dim for dim in range(input.dim()) if dim != 1]
    variance, mean = torch.var_mean(input, dims, correction=0)
    return _norm(mean - cast("Tensor", norm.running_mean)) + _norm(variance - cast("Tensor", norm.running_var))


def _norm(value: Tensor) -> Tensor:
    """Return the Euclidean norm, with gradient 0 at 0."""
    return cast("Tensor", torch.linalg.vector_norm(value))


@dataclass(frozen=True)
@former_members(synthesise="synthesize")
class DeepInversion(ExtraImages):
    r"""Images synthesized from a trained network by gradient descent on noise.

    The loss, minimized over the pixels of `batch_size` images at once, is the cross-entropy with the target classes,
    plus `statistics_weight` times the `statistics_distance` summed over all BatchNorm layers, plus `variation_weight`
    times the `total_variation`, plus `l2_weight` times the norm of the normalized pixels. It is minimized by Adam, on
    images that are rolled by up to `jitter` pixels. Pixels are clamped to their valid range.

    All classes are targeted equally often. The target class is the label of the image, so every criterion can be used;
    set `hard_weight` to 0 to ignore these labels. The images are cached on disk for later runs with the same weights
    and settings. On a CPU, equal settings give equal images.

    Adaptive DeepInversion, the variant of the paper that also uses the student, is not implemented: the images are
    created before training.

    Args:
        network: Trained network with BatchNorm: the teacher. `lkd.models.load_weights` loads one from a file.
        number: Number of images.
        steps: Number of optimization steps per batch.
        batch_size: Number of images that are optimized together; their statistics are matched to those of the network.
        lr: Learning rate, for normalized pixels.
        statistics_weight: Weight of the statistics. If it is too large, the network does not recognize the target
            classes: with 100, the ResNet-8 for digits classifies 33 of 256 images as intended after 200 steps, with 1
            it classifies 225. The number is printed at the end.
        variation_weight: Weight of the total variation.
        l2_weight: Weight of the norm of the pixels.
        jitter: Maximum shift of the images in pixels; 0 for none.
        normalization: Input normalization of the network, if it differs from that of the data module.
        seed: Seed of noise and shifts.

    Raises:
        ValueError: If a number is out of range, or the network has no BatchNorm statistics.

    References:
        Yin et al.: Dreaming to distill: Data-free knowledge transfer via DeepInversion, CVPR 2020 (arXiv 1912.08795).
        The authors' script for CIFAR-10 uses 2,000 steps on 256 images, a learning rate of 0.1, the weights 100, 2.5e-5
        and 0, and a jitter of 2. It uses BatchNorm2d only, and does not clamp pixels to the valid range.
    """

    network: nn.Module = field(repr=False)
    number: int = 1000
    steps: int = 2000
    batch_size: int = 256
    lr: float = 0.1
    statistics_weight: float = 1.0
    variation_weight: float = 2.5e-5
    l2_weight: float = 0.0
    jitter: int = 2
    normalization: Normalization | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("number", 1), ("steps", 1), ("batch_size", 1), ("jitter", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"DeepInversion: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("statistics_weight", "variation_weight", "l2_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"DeepInversion: {name} must be at least 0, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"DeepInversion: the learning rate lr must be greater than 0, got {self.lr}")
        if not _norms(self.network):
            raise ValueError(
                f"DeepInversion requires BatchNorm statistics, and {type(self.network).__name__} has none; use a "
                "teacher with BatchNorm, or images from a folder (lkd.datamodules.UnlabelledFolder)"
            )

    def images(
        self, shape: tuple[int, int, int], num_classes: int, normalization: Normalization, device: torch.device
    ) -> TensorDataset:
        """Load the images from the cache or synthesize them; see `ExtraImages.images`."""
        normalization = self.normalization or normalization
        made_from = {
            "network": network_fingerprint(self.network),
            "settings": repr(self),
            "data": repr((shape, num_classes, normalization)),
            "versions": repr((_FORMAT, torch.__version__, device.type)),
        }
        file = cache_folder("inversion") / f"{fingerprint(sorted(made_from.items()))}.safetensors"
        kept = load_tensors(file, made_from)
        if kept is not None and (kept["image"].dtype, kept["image"].shape) == (torch.uint8, (self.number, *shape)):
            return TensorDataset(kept["image"], kept["target"])
        image, target = self.synthesize(shape, num_classes, normalization, device)
        try:
            save_tensors(file, {"image": image, "target": target}, made_from)
        except OSError as error:
            rank_zero_warn(
                f"synthesized images cannot be cached in {file.parent} ({error}), so every run will synthesize them "
                "again; set LKD_CACHE to a folder with enough free space"
            )
        return TensorDataset(image, target)

    def synthesize(
        self, shape: tuple[int, int, int], num_classes: int, normalization: Normalization, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Synthesize the images, ignoring the cache.

        Args:
            shape: Channels, height and width.
            num_classes: Number of classes.
            normalization: Input normalization of the network.
            device: Device for the computation.

        Returns:
            Images `(N, C, H, W)`, uint8, and their target classes `(N,)`, int64; on the CPU.
        """
        network = deepcopy(self.network).to(device).eval().requires_grad_(False)
        _check_fit(network, torch.zeros(1, *shape, device=device), num_classes)
        target = torch.arange(self.number) % num_classes
        generator = torch.Generator().manual_seed(self.seed)
        console = Console(stderr=True)
        hidden = getattr(rank_zero_only, "rank", 0) != 0 or not console.is_terminal
        found, correct = [], 0
        batches = target.tensor_split(-(-self.number // self.batch_size))  # of equal size
        for classes in track(batches, "synthesizing images", console=console, transient=True, disable=hidden):
            image, right = _descend(self, network, classes, shape, normalization, generator)
            found.append(image)
            correct += right
        _print(f"Synthesized {self.number:,} images; the network assigns {correct:,} of them to their target class")
        return torch.cat(found), target


def _descend(
    settings: DeepInversion,
    network: nn.Module,
    target: Tensor,
    shape: tuple[int, int, int],
    normalization: Normalization,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Synthesize one batch of images `(B, C, H, W)`, uint8. Also return how many are classified as intended."""
    device = next(network.parameters()).device
    mean, std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (normalization.mean, normalization.std))
    noise = torch.randn(len(target), *shape, generator=generator).to(device)
    image = torch.minimum(torch.maximum(noise, -mean / std), (1 - mean) / std).requires_grad_()
    wanted = target.to(device)
    optimizer = torch.optim.Adam([image], lr=settings.lr)
    with torch.enable_grad(), _Statistics(network) as statistics:
        for _ in range(settings.steps):
            shift = torch.randint(-settings.jitter, settings.jitter + 1, (2,), generator=generator).tolist()
            moved = image.roll(shift, (2, 3))
            loss = F.cross_entropy(network(moved), wanted) + settings.statistics_weight * statistics.distance()
            loss = loss + settings.variation_weight * total_variation(moved) + settings.l2_weight * _norm(moved)
            (image.grad,) = torch.autograd.grad(loss, [image])
            optimizer.step()
            with torch.no_grad():
                image.copy_(torch.minimum(torch.maximum(image, -mean / std), (1 - mean) / std))
    with torch.no_grad():
        pixels = ((image * std + mean) * 255).round().clamp(0, 255)
        right = (network((pixels / 255 - mean) / std).argmax(1) == wanted).sum()
    return pixels.to(torch.uint8).cpu(), int(right)


def _check_fit(network: nn.Module, blank: Tensor, num_classes: int) -> None:
    """Check that a network accepts images of this shape and has the classes of the dataset."""
    shape = tuple(blank.shape[1:])
    try:
        logits = network(blank)
    except RuntimeError as error:
        reason = first_line(error)
        raise ValueError(
            f"DeepInversion: the network does not accept images of shape {shape}: {reason}; use a teacher that was "
            "trained on this dataset"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < num_classes:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"DeepInversion: the network must return logits of shape (batch, {num_classes}), got {got}; use a teacher "
            "that was trained on this dataset"
        )


def _norms(network: nn.Module) -> list[AnyBatchNorm]:
    """Return the BatchNorm layers with running statistics."""
    return [part for part in network.modules() if isinstance(part, AnyBatchNorm) and part.running_var is not None]


class _Statistics:
    """Context manager that records the distances of a network's batches to its BatchNorm statistics."""

    def __init__(self, network: nn.Module) -> None:
        self._norms, self._distances = _norms(network), list[Tensor]()

    def __enter__(self) -> _Statistics:
        self._hooks = [norm.register_forward_pre_hook(self._take) for norm in self._norms]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, norm: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._distances.append(statistics_distance(inputs[0], cast("AnyBatchNorm", norm)))

    def distance(self) -> Tensor:
        """Return the sum over the layers of the last forward pass."""
        total, self._distances = torch.stack(self._distances).sum(), []
        return total


@rank_zero_only
def _print(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)
