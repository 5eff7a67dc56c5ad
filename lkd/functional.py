"""The losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`."""

from lkd.losses.feature import at_loss
from lkd.losses.logit import kd_loss, logit_mse_loss, standardize, ttm_loss, wttm_loss
from lkd.losses.logit_relation import dist_loss, skd_direction_loss, skd_instance_loss
from lkd.losses.logit_target import dkd_loss, nckd_loss, nkd_loss, rld_loss, tckd_loss, wsld_loss
from lkd.losses.multi_teacher import mixture_loss, teacher_confidence
from lkd.losses.teacher_free import tfkd_loss, uskd_loss

__all__ = [
    "at_loss",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "logit_mse_loss",
    "mixture_loss",
    "nckd_loss",
    "nkd_loss",
    "rld_loss",
    "skd_direction_loss",
    "skd_instance_loss",
    "standardize",
    "tckd_loss",
    "teacher_confidence",
    "tfkd_loss",
    "ttm_loss",
    "uskd_loss",
    "wsld_loss",
    "wttm_loss",
]
