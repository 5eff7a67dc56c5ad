"""Criteria: what a student is asked to imitate."""

from lkd.losses.base import CompositeLoss, DistillLoss, WeightedSum, named_terms
from lkd.losses.ctkd import CTKD
from lkd.losses.feature import AT, FitNet
from lkd.losses.logit import KD, TTM, WTTM, LogitMSE, LogitStandardization
from lkd.losses.logit_relation import DIST, SKD
from lkd.losses.logit_target import DKD, NKD, RLD, WSLD
from lkd.losses.mlkd import MLKD
from lkd.losses.sskd import SSKD
from lkd.losses.teacher_free import CSKD, USKD, TfKD

__all__ = [
    "AT",
    "CSKD",
    "CTKD",
    "DIST",
    "DKD",
    "KD",
    "MLKD",
    "NKD",
    "RLD",
    "SKD",
    "SSKD",
    "TTM",
    "USKD",
    "WSLD",
    "WTTM",
    "CompositeLoss",
    "DistillLoss",
    "FitNet",
    "LogitMSE",
    "LogitStandardization",
    "TfKD",
    "WeightedSum",
    "named_terms",
]
