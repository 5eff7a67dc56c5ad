"""LightningModules: how networks are trained."""

from lkd.modules.classification import ClassificationModule
from lkd.modules.distill import DistillModule
from lkd.modules.noisy_student import NoisyStudentModule
from lkd.modules.simkd import SimKDModule

__all__ = [
    "ClassificationModule",
    "DistillModule",
    "NoisyStudentModule",
    "SimKDModule",
]
