"""Criteria: what a student is asked to imitate."""

from lkd.losses.base import CompositeLoss, DistillLoss, WeightedSum, named_terms
from lkd.losses.boundary import AB, OFD
from lkd.losses.channel import ICKD
from lkd.losses.ctkd import CTKD
from lkd.losses.factor import FT
from lkd.losses.feature import AT, FitNet
from lkd.losses.flow import FSP, KDSVD
from lkd.losses.logit import KD, TTM, WTTM, LogitMSE, LogitStandardization
from lkd.losses.logit_relation import DIST, SKD
from lkd.losses.logit_target import DKD, NKD, RLD, WSLD
from lkd.losses.review import ReviewKD
from lkd.losses.teacher_free import USKD, TfKD

__all__ = [
    "AB",
    "AT",
    "CTKD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "ICKD",
    "KD",
    "KDSVD",
    "NKD",
    "OFD",
    "RLD",
    "SKD",
    "TTM",
    "USKD",
    "WSLD",
    "WTTM",
    "CompositeLoss",
    "DistillLoss",
    "FitNet",
    "LogitMSE",
    "LogitStandardization",
    "ReviewKD",
    "TfKD",
    "WeightedSum",
    "named_terms",
]
