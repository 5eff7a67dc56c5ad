"""Lightning data modules."""

from lkd.datamodules.archives import (
    ArchiveDataModule,
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
    STL10DataModule,
    SVHNDataModule,
)
from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.box_shapes import SyntheticDetectionDataModule
from lkd.datamodules.boxes import BoxDataset, BoxSource
from lkd.datamodules.coco import CocoDetectionDataModule
from lkd.datamodules.dataset import ImageDataset, ImageError
from lkd.datamodules.detection import DetectionDataModule
from lkd.datamodules.digits import DigitsDataModule
from lkd.datamodules.draws import permutation, uniform
from lkd.datamodules.extra import ExtraImages, UnlabelledFolder
from lkd.datamodules.folder import ImageFolderDataModule, ImageNetDataModule
from lkd.datamodules.inversion import DeepInversion
from lkd.datamodules.new_images import NewDetectionImages, NewImages, new_images
from lkd.datamodules.predicted import PredictedImages
from lkd.datamodules.sampler import EpochSampler, Key
from lkd.datamodules.segmentation import SegmentationDataModule
from lkd.datamodules.segmentation_archives import (
    ADE20KDataModule,
    CityscapesDataModule,
    SegmentationArchiveDataModule,
    VOCSegmentationDataModule,
)
from lkd.datamodules.segmentation_folder import MaskedFilesDataModule, SegmentationFolderDataModule
from lkd.datamodules.shapes import SyntheticSegmentationDataModule
from lkd.datamodules.sources import ImageSource
from lkd.datamodules.synthetic import SyntheticDataModule
from lkd.datamodules.tiny_imagenet import TinyImageNetDataModule
from lkd.datamodules.transforms.base import (
    BatchTransform,
    CenterCrop,
    ImageTransform,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from lkd.datamodules.transforms.color import ColorJitter
from lkd.datamodules.transforms.erasing import Cutout, RandomErasing
from lkd.datamodules.transforms.mixing import CutMix, Mix, Mixup
from lkd.datamodules.transforms.randaugment import RandAugment, TrivialAugment
from lkd.datamodules.transforms.scaling import PadToSize, RandomScaledCrop
from lkd.datamodules.transforms.views import ClassPartner, RotatedViews, StrongView, View, Views
from lkd.datamodules.webdataset import WebDatasetDataModule

__all__ = [
    "ADE20KDataModule",
    "ArchiveDataModule",
    "BatchTransform",
    "BoxDataset",
    "BoxSource",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CenterCrop",
    "CityscapesDataModule",
    "ClassPartner",
    "CocoDetectionDataModule",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "DeepInversion",
    "DetectionDataModule",
    "DigitsDataModule",
    "EpochSampler",
    "ExtraImages",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageDataset",
    "ImageError",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "ImageSource",
    "ImageTransform",
    "Key",
    "MNISTDataModule",
    "MaskedFilesDataModule",
    "Mix",
    "Mixup",
    "NewDetectionImages",
    "NewImages",
    "PadToSize",
    "PredictedImages",
    "RandAugment",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomScaledCrop",
    "RotatedViews",
    "STL10DataModule",
    "SVHNDataModule",
    "SegmentationArchiveDataModule",
    "SegmentationDataModule",
    "SegmentationFolderDataModule",
    "Split",
    "StrongView",
    "SyntheticDataModule",
    "SyntheticDetectionDataModule",
    "SyntheticSegmentationDataModule",
    "TinyImageNetDataModule",
    "TrivialAugment",
    "UnlabelledFolder",
    "VOCSegmentationDataModule",
    "View",
    "Views",
    "WebDatasetDataModule",
    "new_images",
    "permutation",
    "uniform",
]
