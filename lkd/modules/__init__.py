"""LightningModules: how networks are trained."""

from lkd.modules.classification import ClassificationModule
from lkd.modules.distill import DistillModule

__all__ = ["ClassificationModule", "DistillModule"]
