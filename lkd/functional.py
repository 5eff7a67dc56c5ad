"""The losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`."""

from lkd.losses.adaptation import affinity_loss, kta_loss
from lkd.losses.crd import crd_loss
from lkd.losses.feature import at_loss, nst_loss
from lkd.losses.logit import kd_loss, logit_mse_loss, standardize, ttm_loss, wttm_loss
from lkd.losses.logit_relation import dist_loss, skd_direction_loss, skd_instance_loss
from lkd.losses.logit_target import dkd_loss, nckd_loss, nkd_loss, rld_loss, tckd_loss, wsld_loss
from lkd.losses.masked import mgd_loss
from lkd.losses.regression import pad_loss, srd_loss, vid_loss
from lkd.losses.relation import cc_loss, cc_neighbour_loss, pkt_loss, rkd_angle_loss, rkd_distance_loss, sp_loss
from lkd.losses.teacher_free import tfkd_loss, uskd_loss

__all__ = [
    "affinity_loss",
    "at_loss",
    "cc_loss",
    "cc_neighbour_loss",
    "crd_loss",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "kta_loss",
    "logit_mse_loss",
    "mgd_loss",
    "nckd_loss",
    "nkd_loss",
    "nst_loss",
    "pad_loss",
    "pkt_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rld_loss",
    "skd_direction_loss",
    "skd_instance_loss",
    "sp_loss",
    "srd_loss",
    "standardize",
    "tckd_loss",
    "tfkd_loss",
    "ttm_loss",
    "uskd_loss",
    "vid_loss",
    "wsld_loss",
    "wttm_loss",
]
