"""The losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`.

Each function checks the shapes that its docstring gives, and raises a `ValueError` for any others.
"""

from lkd.losses.adaptation import affinity_loss, kta_loss
from lkd.losses.backbone import feature_matching_loss
from lkd.losses.boundary import ab_loss, ofd_loss, ofd_margin
from lkd.losses.channel import ickd_loss
from lkd.losses.classifier import catkd_loss, class_activation_maps, srrl_loss
from lkd.losses.crd import crd_loss
from lkd.losses.dist_plus import channel_relation_loss, spatial_relation_loss
from lkd.losses.factor import ft_loss
from lkd.losses.feature import at_loss, nst_loss
from lkd.losses.flow import fsp_loss, fsp_matrix, kdsvd_loss
from lkd.losses.logit import kd_loss, logit_mse_loss, ttm_loss, wttm_loss
from lkd.losses.logit_relation import dist_loss, skd_direction_loss, skd_instance_loss
from lkd.losses.logit_target import dkd_loss, nckd_loss, nkd_loss, rld_loss, tckd_loss, wsld_loss
from lkd.losses.masked import mgd_loss
from lkd.losses.mlkd import mlkd_batch_loss, mlkd_class_loss, mlkd_loss
from lkd.losses.multi_teacher import mixture_loss, teacher_confidence
from lkd.losses.ofa import ofa_loss
from lkd.losses.regression import pad_loss, srd_loss, vid_loss
from lkd.losses.relation import cc_loss, cc_neighbour_loss, pkt_loss, rkd_angle_loss, rkd_distance_loss, sp_loss
from lkd.losses.review import hcl_loss
from lkd.losses.semckd import semckd_attention, semckd_loss
from lkd.losses.sskd import sskd_ss_loss, sskd_tf_loss
from lkd.losses.standardization import standardize
from lkd.losses.teacher_free import cskd_loss, tfkd_loss, uskd_loss
from lkd.losses.vit import deit_loss, vitkd_generation_loss, vitkd_mimicking_loss

__all__ = [
    "ab_loss",
    "affinity_loss",
    "at_loss",
    "catkd_loss",
    "cc_loss",
    "cc_neighbour_loss",
    "channel_relation_loss",
    "class_activation_maps",
    "crd_loss",
    "cskd_loss",
    "deit_loss",
    "dist_loss",
    "dkd_loss",
    "feature_matching_loss",
    "fsp_loss",
    "fsp_matrix",
    "ft_loss",
    "hcl_loss",
    "ickd_loss",
    "kd_loss",
    "kdsvd_loss",
    "kta_loss",
    "logit_mse_loss",
    "mgd_loss",
    "mixture_loss",
    "mlkd_batch_loss",
    "mlkd_class_loss",
    "mlkd_loss",
    "nckd_loss",
    "nkd_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "ofd_margin",
    "pad_loss",
    "pkt_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rld_loss",
    "semckd_attention",
    "semckd_loss",
    "skd_direction_loss",
    "skd_instance_loss",
    "sp_loss",
    "spatial_relation_loss",
    "srd_loss",
    "srrl_loss",
    "sskd_ss_loss",
    "sskd_tf_loss",
    "standardize",
    "tckd_loss",
    "teacher_confidence",
    "tfkd_loss",
    "ttm_loss",
    "uskd_loss",
    "vid_loss",
    "vitkd_generation_loss",
    "vitkd_mimicking_loss",
    "wsld_loss",
    "wttm_loss",
]
