"""The losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`."""

from lkd.losses.feature import at_loss
from lkd.losses.logit import kd_loss, logit_mse_loss, standardize, ttm_loss, wttm_loss
from lkd.losses.logit_relation import dist_loss, skd_direction_loss, skd_instance_loss
from lkd.losses.logit_target import dkd_loss, nckd_loss, nkd_loss, rld_loss, tckd_loss, wsld_loss
from lkd.losses.mlkd import mlkd_batch_loss, mlkd_class_loss, mlkd_loss
from lkd.losses.sskd import sskd_ss_loss, sskd_tf_loss
from lkd.losses.teacher_free import cskd_loss, tfkd_loss, uskd_loss

__all__ = [
    "at_loss",
    "cskd_loss",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "logit_mse_loss",
    "mlkd_batch_loss",
    "mlkd_class_loss",
    "mlkd_loss",
    "nckd_loss",
    "nkd_loss",
    "rld_loss",
    "skd_direction_loss",
    "skd_instance_loss",
    "sskd_ss_loss",
    "sskd_tf_loss",
    "standardize",
    "tckd_loss",
    "tfkd_loss",
    "ttm_loss",
    "uskd_loss",
    "wsld_loss",
    "wttm_loss",
]
