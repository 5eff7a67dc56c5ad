"""Lightning Knowledge Distillation: train small networks to match large ones, with PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lkd.__about__ import __version__
from lkd._moved import add_former_modules, renamed

if TYPE_CHECKING:
    from lkd.datamodules import (
        ADE20KDataModule,
        CIFAR10DataModule,
        CIFAR100DataModule,
        CityscapesDataModule,
        CocoDetectionDataModule,
        DetectionDataModule,
        DigitsDataModule,
        FashionMNISTDataModule,
        ImageDataModule,
        ImageFolderDataModule,
        ImageNetDataModule,
        MNISTDataModule,
        SegmentationDataModule,
        SegmentationFolderDataModule,
        STL10DataModule,
        SVHNDataModule,
        SyntheticDataModule,
        SyntheticDetectionDataModule,
        SyntheticSegmentationDataModule,
        TinyImageNetDataModule,
        VOCSegmentationDataModule,
        WebDatasetDataModule,
    )
    from lkd.features.extractor import FeatureExtractor
    from lkd.loading import load_run
    from lkd.losses import DistillLoss
    from lkd.modules import (
        DOT,
        ClassificationModule,
        DistillModule,
        DOTModule,
        EarlyExitModule,
        FineTuneModule,
        MutualModule,
        NoisyStudentModule,
        PastTeacherModule,
        SimKDModule,
    )
    from lkd.types import Batch, Mixed, Normalization, Outputs, Predictions, Probe

_HOMES = {
    "lkd.datamodules": (
        "ADE20KDataModule",
        "CIFAR10DataModule",
        "CIFAR100DataModule",
        "CityscapesDataModule",
        "CocoDetectionDataModule",
        "DetectionDataModule",
        "DigitsDataModule",
        "FashionMNISTDataModule",
        "ImageDataModule",
        "ImageFolderDataModule",
        "ImageNetDataModule",
        "MNISTDataModule",
        "STL10DataModule",
        "SVHNDataModule",
        "SegmentationDataModule",
        "SegmentationFolderDataModule",
        "SyntheticDataModule",
        "SyntheticDetectionDataModule",
        "SyntheticSegmentationDataModule",
        "TinyImageNetDataModule",
        "VOCSegmentationDataModule",
        "WebDatasetDataModule",
    ),
    "lkd.losses": ("DistillLoss",),
    "lkd.modules": (
        "ClassificationModule",
        "DOT",
        "DOTModule",
        "DistillModule",
        "EarlyExitModule",
        "FineTuneModule",
        "MutualModule",
        "NoisyStudentModule",
        "PastTeacherModule",
        "SimKDModule",
    ),
    "lkd.features.extractor": ("FeatureExtractor",),
    "lkd.loading": ("load_run",),
    "lkd.types": ("Batch", "Mixed", "Normalization", "Outputs", "Predictions", "Probe"),
}

__all__ = [
    "DOT",
    "ADE20KDataModule",
    "Batch",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CityscapesDataModule",
    "ClassificationModule",
    "CocoDetectionDataModule",
    "DOTModule",
    "DetectionDataModule",
    "DigitsDataModule",
    "DistillLoss",
    "DistillModule",
    "EarlyExitModule",
    "FashionMNISTDataModule",
    "FeatureExtractor",
    "FineTuneModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "MNISTDataModule",
    "Mixed",
    "MutualModule",
    "NoisyStudentModule",
    "Normalization",
    "Outputs",
    "PastTeacherModule",
    "Predictions",
    "Probe",
    "STL10DataModule",
    "SVHNDataModule",
    "SegmentationDataModule",
    "SegmentationFolderDataModule",
    "SimKDModule",
    "SyntheticDataModule",
    "SyntheticDetectionDataModule",
    "SyntheticSegmentationDataModule",
    "TinyImageNetDataModule",
    "VOCSegmentationDataModule",
    "WebDatasetDataModule",
    "__version__",
    "load_run",
]


_SUBMODULES = (
    "callbacks",
    "compare",
    "datamodules",
    "export",
    "features",
    "functional",
    "layers",  # former name, like taps
    "losses",
    "models",
    "modules",
    "sweep",
    "tasks",
    "taps",
    "types",
)


add_former_modules()


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `lkd --help` does not import torch."""
    if name in _SUBMODULES:
        return import_module(f"lkd.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    return renamed("lkd", name)


def __dir__() -> list[str]:
    """List the public names, for tab completion."""
    return sorted({*__all__, *_SUBMODULES} - {"layers", "taps"})
