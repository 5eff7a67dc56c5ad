"""Criteria: what a student is asked to imitate."""

from lkd.losses.base import DistillLoss, WeightedSum, named_terms
from lkd.losses.logit import KD

__all__ = ["KD", "DistillLoss", "WeightedSum", "named_terms"]
