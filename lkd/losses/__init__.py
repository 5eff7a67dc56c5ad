"""Criteria: what a student is asked to imitate."""

from lkd.losses.adaptation import KTA
from lkd.losses.backbone import BackboneKD
from lkd.losses.base import CompositeLoss, DistillLoss, WeightedSum, named_terms
from lkd.losses.boundary import AB, OFD
from lkd.losses.byot import BYOT
from lkd.losses.channel import ICKD
from lkd.losses.classifier import CATKD, SRRL, SimKD
from lkd.losses.crd import CRD
from lkd.losses.ctkd import CTKD, InstanceCTKD
from lkd.losses.dist_plus import DISTPlus
from lkd.losses.factor import FT
from lkd.losses.feature import AT, NST, FitNet
from lkd.losses.flow import FSP, KDSVD
from lkd.losses.logit import KD, TTM, WTTM, LogitMSE
from lkd.losses.logit_relation import DIST, SKD
from lkd.losses.logit_target import DKD, NKD, RLD, WSLD
from lkd.losses.masked import MGD
from lkd.losses.mlkd import MLKD
from lkd.losses.multi_teacher import MultiTeacher
from lkd.losses.ofa import OFAKD
from lkd.losses.regression import PAD, SRD, VID
from lkd.losses.relation import CC, PKT, RKD, SP
from lkd.losses.review import ReviewKD
from lkd.losses.semckd import SemCKD
from lkd.losses.sskd import SSKD
from lkd.losses.standardization import LogitStandardization
from lkd.losses.teacher_free import CSKD, USKD, TfKD
from lkd.losses.vit import DeiT, ViTKD

__all__ = [
    "AB",
    "AT",
    "BYOT",
    "CATKD",
    "CC",
    "CRD",
    "CSKD",
    "CTKD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "ICKD",
    "KD",
    "KDSVD",
    "KTA",
    "MGD",
    "MLKD",
    "NKD",
    "NST",
    "OFAKD",
    "OFD",
    "PAD",
    "PKT",
    "RKD",
    "RLD",
    "SKD",
    "SP",
    "SRD",
    "SRRL",
    "SSKD",
    "TTM",
    "USKD",
    "VID",
    "WSLD",
    "WTTM",
    "BackboneKD",
    "CompositeLoss",
    "DISTPlus",
    "DeiT",
    "DistillLoss",
    "FitNet",
    "InstanceCTKD",
    "LogitMSE",
    "LogitStandardization",
    "MultiTeacher",
    "ReviewKD",
    "SemCKD",
    "SimKD",
    "TfKD",
    "ViTKD",
    "WeightedSum",
    "named_terms",
]
