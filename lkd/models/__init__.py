"""Networks for classification, segmentation and detection, and loading of trained weights."""

from lkd.features.layers import layer_names
from lkd.models.detection import Detector, FasterRCNNDetector, FCOSDetector, RetinaNetDetector, SSDDetector
from lkd.models.detectors import faster_rcnn, fcos, retinanet, ssdlite
from lkd.models.ensemble import Ensemble
from lkd.models.factories import timm_model, torchvision_model
from lkd.models.imagenet_resnet import ImageNetResNet, resnet18, resnet50
from lkd.models.mobilenet import MobileNetV2, mobilenetv2
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
from lkd.models.segmentation import smp_model, torchvision_segmentation
from lkd.models.shufflenet import ShuffleNetV1, ShuffleNetV2, shufflev1, shufflev2
from lkd.models.unet import UNet
from lkd.models.vgg import VGG, vgg8, vgg11, vgg13, vgg16, vgg19
from lkd.models.weights import load_weights
from lkd.models.wide_resnet import WideResNet, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "VGG",
    "CIFARResNet",
    "Detector",
    "Ensemble",
    "FCOSDetector",
    "FasterRCNNDetector",
    "ImageNetResNet",
    "MobileNetV2",
    "RetinaNetDetector",
    "SSDDetector",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "UNet",
    "WideResNet",
    "faster_rcnn",
    "fcos",
    "layer_names",
    "load_weights",
    "mobilenetv2",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "retinanet",
    "shufflev1",
    "shufflev2",
    "smp_model",
    "ssdlite",
    "timm_model",
    "torchvision_model",
    "torchvision_segmentation",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
