"""LightningModules: how networks are trained."""

from lkd.modules.classification import ClassificationModule
from lkd.modules.distill import DistillModule
from lkd.modules.dot import DOT, DOTModule
from lkd.modules.early_exit import EarlyExitModule
from lkd.modules.finetune import FineTuneModule
from lkd.modules.mutual import MutualModule
from lkd.modules.noisy_student import NoisyStudentModule
from lkd.modules.past_teacher import PastTeacherModule
from lkd.modules.simkd import SimKDModule

__all__ = [
    "DOT",
    "ClassificationModule",
    "DOTModule",
    "DistillModule",
    "EarlyExitModule",
    "FineTuneModule",
    "MutualModule",
    "NoisyStudentModule",
    "PastTeacherModule",
    "SimKDModule",
]
