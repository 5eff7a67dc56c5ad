"""The losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`."""

from lkd.losses.adaptation import affinity_loss, kta_loss
from lkd.losses.backbone import feature_matching_loss
from lkd.losses.classifier import catkd_loss, class_activation_maps, srrl_loss
from lkd.losses.dist_plus import channel_relation_loss, spatial_relation_loss
from lkd.losses.feature import at_loss, nst_loss
from lkd.losses.logit import kd_loss, logit_mse_loss, standardize, ttm_loss, wttm_loss
from lkd.losses.logit_relation import dist_loss, skd_direction_loss, skd_instance_loss
from lkd.losses.logit_target import dkd_loss, nckd_loss, nkd_loss, rld_loss, tckd_loss, wsld_loss
from lkd.losses.masked import mgd_loss
from lkd.losses.ofa import ofa_loss
from lkd.losses.regression import pad_loss, srd_loss, vid_loss
from lkd.losses.semckd import semckd_attention, semckd_loss
from lkd.losses.teacher_free import tfkd_loss, uskd_loss
from lkd.losses.vit import deit_loss, vitkd_generation_loss, vitkd_mimicking_loss

__all__ = [
    "affinity_loss",
    "at_loss",
    "catkd_loss",
    "channel_relation_loss",
    "class_activation_maps",
    "deit_loss",
    "dist_loss",
    "dkd_loss",
    "feature_matching_loss",
    "kd_loss",
    "kta_loss",
    "logit_mse_loss",
    "mgd_loss",
    "nckd_loss",
    "nkd_loss",
    "nst_loss",
    "ofa_loss",
    "pad_loss",
    "rld_loss",
    "semckd_attention",
    "semckd_loss",
    "skd_direction_loss",
    "skd_instance_loss",
    "spatial_relation_loss",
    "srd_loss",
    "srrl_loss",
    "standardize",
    "tckd_loss",
    "tfkd_loss",
    "ttm_loss",
    "uskd_loss",
    "vid_loss",
    "vitkd_generation_loss",
    "vitkd_mimicking_loss",
    "wsld_loss",
    "wttm_loss",
]
