"""Networks, and reading trained weights into them."""

from lkd.models.factories import timm_model, torchvision_model
from lkd.models.resnet import (
    CIFARResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from lkd.models.weights import load_weights

__all__ = [
    "CIFARResNet",
    "load_weights",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
    "timm_model",
    "torchvision_model",
]
