"""The losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`."""

from lkd.losses.boundary import ab_loss, ofd_loss, ofd_margin
from lkd.losses.channel import ickd_loss
from lkd.losses.factor import ft_loss
from lkd.losses.feature import at_loss
from lkd.losses.flow import fsp_loss, fsp_matrix, kdsvd_loss
from lkd.losses.logit import kd_loss, logit_mse_loss, standardize, ttm_loss, wttm_loss
from lkd.losses.logit_relation import dist_loss, skd_direction_loss, skd_instance_loss
from lkd.losses.logit_target import dkd_loss, nckd_loss, nkd_loss, rld_loss, tckd_loss, wsld_loss
from lkd.losses.review import hcl_loss
from lkd.losses.teacher_free import tfkd_loss, uskd_loss

__all__ = [
    "ab_loss",
    "at_loss",
    "dist_loss",
    "dkd_loss",
    "fsp_loss",
    "fsp_matrix",
    "ft_loss",
    "hcl_loss",
    "ickd_loss",
    "kd_loss",
    "kdsvd_loss",
    "logit_mse_loss",
    "nckd_loss",
    "nkd_loss",
    "ofd_loss",
    "ofd_margin",
    "rld_loss",
    "skd_direction_loss",
    "skd_instance_loss",
    "standardize",
    "tckd_loss",
    "tfkd_loss",
    "ttm_loss",
    "uskd_loss",
    "wsld_loss",
    "wttm_loss",
]
