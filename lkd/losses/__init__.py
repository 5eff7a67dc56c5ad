"""Criteria: what a student is asked to imitate."""

from lkd.losses.adaptation import KTA
from lkd.losses.backbone import BackboneKD
from lkd.losses.base import CompositeLoss, DistillLoss, WeightedSum, named_terms
from lkd.losses.classifier import CATKD, SRRL, SimKD
from lkd.losses.ctkd import CTKD
from lkd.losses.dist_plus import DISTPlus
from lkd.losses.feature import AT, NST, FitNet
from lkd.losses.logit import KD, TTM, WTTM, LogitMSE, LogitStandardization
from lkd.losses.logit_relation import DIST, SKD
from lkd.losses.logit_target import DKD, NKD, RLD, WSLD
from lkd.losses.masked import MGD
from lkd.losses.ofa import OFAKD
from lkd.losses.regression import PAD, SRD, VID
from lkd.losses.semckd import SemCKD
from lkd.losses.teacher_free import USKD, TfKD
from lkd.losses.vit import DeiT, ViTKD

__all__ = [
    "AT",
    "CATKD",
    "CTKD",
    "DIST",
    "DKD",
    "KD",
    "KTA",
    "MGD",
    "NKD",
    "NST",
    "OFAKD",
    "PAD",
    "RLD",
    "SKD",
    "SRD",
    "SRRL",
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
    "LogitMSE",
    "LogitStandardization",
    "SemCKD",
    "SimKD",
    "TfKD",
    "ViTKD",
    "WeightedSum",
    "named_terms",
]
