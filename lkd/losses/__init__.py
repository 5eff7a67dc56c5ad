"""Criteria: what a student is asked to imitate."""

from lkd.losses.base import CompositeLoss, DistillLoss, WeightedSum, named_terms
from lkd.losses.byot import BYOT
from lkd.losses.ctkd import CTKD
from lkd.losses.feature import AT, FitNet
from lkd.losses.logit import KD, TTM, WTTM, LogitMSE, LogitStandardization
from lkd.losses.logit_relation import DIST, SKD
from lkd.losses.logit_target import DKD, NKD, RLD, WSLD
from lkd.losses.multi_teacher import MultiTeacher
from lkd.losses.teacher_free import USKD, TfKD

__all__ = [
    "AT",
    "BYOT",
    "CTKD",
    "DIST",
    "DKD",
    "KD",
    "NKD",
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
    "MultiTeacher",
    "TfKD",
    "WeightedSum",
    "named_terms",
]
