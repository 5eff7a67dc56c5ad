"""Callbacks: what is shown and kept of a run."""

from lkd.callbacks.monitor import ImagesPerSecond, NetworkSummary
from lkd.callbacks.predictions import PredictionWriter
from lkd.callbacks.progress import ProgressBar
from lkd.callbacks.report import FitReport

__all__ = ["FitReport", "ImagesPerSecond", "NetworkSummary", "PredictionWriter", "ProgressBar"]
