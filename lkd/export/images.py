"""Images of an export: preprocessing, test images for the comparison, and training images for the calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lkd.datamodules import ImageDataModule, WebDatasetDataModule
from lkd.datamodules.transforms.base import CenterCrop
from lkd.export.files import Network
from lkd.modules import ClassificationModule
from lkd.types import Batch

_CALIBRATION, _PIECE = 512, 32
_PAD = {"pad": "right and bottom, to a multiple of size_step and at least min_size", "value": 0}
_CHANNELS = {1: ("L", "gray"), 3: ("RGB", "red, green, blue")}


def preprocessing(data: L.LightningDataModule, network: Network) -> dict[str, Any]:
    """Describe the preprocessing of an image and the outputs of the network: the content of `preprocessing.json`.

    If the data names its classes, `class_names` contains a name for each class that the network distinguishes. Outputs
    without a class in the data are named by their index.

    Args:
        data: Data module of the run, after setup.
        network: Network of the run.
    """
    image, num_outputs = network.blank, network.num_outputs
    facts: dict[str, Any] = {
        "input": "image",
        "output": "output of the network" if num_outputs is None else "logits, before softmax",
        "output_shape": list(network.output_shape),
        "shape": list(image.shape[1:]),
        "size_step": network.size_step,
        "min_size": network.min_size if network.size_step else None,
        "layout": "batch of any size, channels, height, width" if image.dim() == 4 else "batch of any size, ...",
        "dtype": str(image.dtype).removeprefix("torch."),
    }
    if isinstance(data, ImageDataModule | WebDatasetDataModule):
        mode, channels = _CHANNELS.get(len(data.mean), (None, "as in the data"))
        resize = _PAD if network.size_step else _resize(data)
        facts |= {"mode": mode, "channels": channels, "resize": resize, "value_range": [0, 1]}
        facts |= {"divide_by": 255, "mean": list(data.mean), "std": list(data.std)}
    if num_outputs is None:
        return facts
    num_classes = getattr(data, "num_classes", None) or num_outputs
    facts |= {"num_outputs": num_outputs, "num_classes": min(num_classes, num_outputs)}
    if names := getattr(data, "class_names", None):
        facts["class_names"] = [*names[:num_outputs], *map(str, range(len(names), num_outputs))]
    return facts


def _resize(data: ImageDataModule | WebDatasetDataModule) -> dict[str, Any]:
    if type(data.resize) is not CenterCrop:
        return {"by": repr(data.resize)}
    return {
        "unless": "the image already has this size",
        "cover": [round(side / data.resize.ratio) for side in data.input_shape[1:]],
        "interpolation": "bilinear, with antialiasing, as Pillow's",
        "crop": "center",
    }


def test_loader(data: L.LightningDataModule, limit: int) -> DataLoader[Any]:
    """Return a loader of the test images, limited to a number of evenly spaced images.

    Args:
        data: Data module of the run, after setup for testing.
        limit: Maximum number of images.

    Raises:
        TypeError: If the test loader of the data is not a DataLoader.
    """
    loader = data.test_dataloader()
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"lkd export requires a single DataLoader of test images, got {type(loader)} from {type(data).__name__}"
        )
    dataset: Any = loader.dataset
    if not hasattr(dataset, "__len__") or len(dataset) <= limit:
        return loader
    return DataLoader(
        Subset(dataset, _spread(len(dataset), limit)),
        batch_size=loader.batch_size or 1,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )


def _spread(number: int, limit: int) -> list[int]:
    """Return at most `limit` positions that are evenly spaced among `number` images, which may be sorted by class."""
    return torch.linspace(0, number - 1, min(number, limit), dtype=torch.float64).long().tolist()


def batches(loader: DataLoader[Any], data: L.LightningDataModule, module: ClassificationModule) -> Iterator[Batch]:
    """Yield the batches of a loader on the CPU, after the batch hooks of the data module.

    Args:
        loader: The loader.
        data: Data module of the loader.
        module: Module that unpacks the batches.

    Raises:
        TypeError: If the input of the network is not a single tensor.
    """
    for raw in loader:
        batch = module.unpack(data.on_after_batch_transfer(data.on_before_batch_transfer(raw, 0), 0))
        if not isinstance(batch.input, Tensor):
            raise TypeError(
                f"lkd export supports only networks that take one tensor, but the input of this data is a "
                f"{type(batch.input).__name__}"
            )
        yield batch._replace(input=batch.input.cpu(), target=batch.target.cpu())


def training_images(data: L.LightningDataModule, module: ClassificationModule) -> Iterator[Tensor]:
    """Yield training images with the preprocessing of inference: resized, but not augmented or mixed.

    For data modules other than lkd's, the batches of the training loader are used.

    Args:
        data: Data module of the run.
        module: Module that unpacks the batches.

    Yields:
        Batches `(B, C, H, W)`.
    """
    data.setup("fit")
    if isinstance(data, ImageDataModule):
        dataset = data.datasets["train"]
        plain = dataset.variant(0, [data.resize])
        plain.shape = (plain.shape[0], *data.whole_shape[1:])
        for index in dataset.index[_spread(len(dataset), _CALIBRATION)].split(_PIECE):  # type: ignore[no-untyped-call]
            yield plain.unmixed(torch.zeros_like(index), index).input
        return
    seen = 0
    for batch in batches(data.train_dataloader(), data, module):
        if seen >= _CALIBRATION:
            return
        seen += len(batch.input)
        yield batch.input
