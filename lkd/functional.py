"""Distillation losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`.

Each function checks the tensor shapes given in its docstring and raises a `ValueError` if they do not match.
"""

from lkd.losses.ab import ab_loss
from lkd.losses.at import at_loss
from lkd.losses.backbonekd import feature_matching_loss
from lkd.losses.catkd import catkd_loss, class_activation_maps
from lkd.losses.cc import cc_loss, cc_neighbour_loss
from lkd.losses.cirkd import cirkd_batch_loss, cirkd_memory_loss
from lkd.losses.cirkd_channel import cirkd_channel_loss, cirkd_channel_memory_loss
from lkd.losses.crd import crd_loss
from lkd.losses.crosskd import crosskd_aligned, crosskd_box_loss, crosskd_class_loss
from lkd.losses.cskd import cskd_loss
from lkd.losses.cwd import cwd_loss
from lkd.losses.deit import deit_loss
from lkd.losses.dist import dist_loss
from lkd.losses.distplus import channel_relation_loss, spatial_relation_loss
from lkd.losses.dkd import dkd_loss, nckd_loss, tckd_loss
from lkd.losses.dsd import dsd_category_loss, dsd_pixel_loss
from lkd.losses.fbkd import fbkd_feature_loss
from lkd.losses.fgd import fgd_attention_loss, fgd_feature_loss, fgd_masks
from lkd.losses.fsp import fsp_loss, fsp_matrix
from lkd.losses.ft import ft_loss
from lkd.losses.ickd import ickd_loss
from lkd.losses.ifvd import ifvd_loss
from lkd.losses.kd import kd_loss
from lkd.losses.kdsvd import kdsvd_loss
from lkd.losses.kta import affinity_loss, kta_loss
from lkd.losses.ld import ld_loss
from lkd.losses.logit_mse import logit_mse_loss
from lkd.losses.logit_standardization import standardize
from lkd.losses.maskd import maskd_diversity_loss, maskd_loss, maskd_masks
from lkd.losses.mgd import mgd_loss
from lkd.losses.mlkd import mlkd_batch_loss, mlkd_class_loss, mlkd_loss
from lkd.losses.multi_teacher import mixture_loss, teacher_confidence
from lkd.losses.nkd import nkd_loss
from lkd.losses.nst import nst_loss
from lkd.losses.ofakd import ofa_loss
from lkd.losses.ofd import ofd_loss, ofd_margin
from lkd.losses.pad import pad_loss
from lkd.losses.pkd import pkd_loss
from lkd.losses.pkt import pkt_loss
from lkd.losses.reviewkd import hcl_loss
from lkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from lkd.losses.rld import rld_loss
from lkd.losses.semckd import semckd_attention, semckd_loss
from lkd.losses.skd import skd_direction_loss, skd_instance_loss
from lkd.losses.skds import skds_loss
from lkd.losses.sp import sp_loss
from lkd.losses.srd import srd_loss
from lkd.losses.srrl import srrl_loss
from lkd.losses.sskd import sskd_ss_loss, sskd_tf_loss
from lkd.losses.tfkd import tfkd_loss
from lkd.losses.ttm import ttm_loss, wttm_loss
from lkd.losses.uskd import uskd_loss
from lkd.losses.vid import vid_loss
from lkd.losses.vitkd import vitkd_generation_loss, vitkd_mimicking_loss
from lkd.losses.wsld import wsld_loss

__all__ = [
    "ab_loss",
    "affinity_loss",
    "at_loss",
    "catkd_loss",
    "cc_loss",
    "cc_neighbour_loss",
    "channel_relation_loss",
    "cirkd_batch_loss",
    "cirkd_channel_loss",
    "cirkd_channel_memory_loss",
    "cirkd_memory_loss",
    "class_activation_maps",
    "crd_loss",
    "crosskd_aligned",
    "crosskd_box_loss",
    "crosskd_class_loss",
    "cskd_loss",
    "cwd_loss",
    "deit_loss",
    "dist_loss",
    "dkd_loss",
    "dsd_category_loss",
    "dsd_pixel_loss",
    "fbkd_feature_loss",
    "feature_matching_loss",
    "fgd_attention_loss",
    "fgd_feature_loss",
    "fgd_masks",
    "fsp_loss",
    "fsp_matrix",
    "ft_loss",
    "hcl_loss",
    "ickd_loss",
    "ifvd_loss",
    "kd_loss",
    "kdsvd_loss",
    "kta_loss",
    "ld_loss",
    "logit_mse_loss",
    "maskd_diversity_loss",
    "maskd_loss",
    "maskd_masks",
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
    "pkd_loss",
    "pkt_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rld_loss",
    "semckd_attention",
    "semckd_loss",
    "skd_direction_loss",
    "skd_instance_loss",
    "skds_loss",
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
