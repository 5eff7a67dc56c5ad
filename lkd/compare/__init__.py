"""Comparison of networks on the same images: accuracy, calibration, agreement with a teacher, and cost."""

from lkd.compare.command import main, write
from lkd.compare.comparison import Comparison, compare
from lkd.compare.predictions import Candidate

__all__ = ["Candidate", "Comparison", "compare", "main", "write"]
