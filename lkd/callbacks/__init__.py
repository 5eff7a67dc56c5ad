"""Callbacks for checkpoints, resuming, reports, speed, teacher caching, feature evaluation and weight schedules."""

from lkd.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from lkd.callbacks.features import KNN, FeatureEvaluation, LinearProbe
from lkd.callbacks.monitor import ImagesPerSecond, NetworkSummary
from lkd.callbacks.monitored import MonitorCheck
from lkd.callbacks.prediction_images import PredictionImages
from lkd.callbacks.predictions import PredictionWriter
from lkd.callbacks.progress import EpochLines, ProgressBar
from lkd.callbacks.record import RunRecord
from lkd.callbacks.report import FitReport, LimitReport
from lkd.callbacks.schedule import Schedule
from lkd.callbacks.speed import Speed
from lkd.callbacks.step_seed import StepSeed
from lkd.callbacks.teacher_cache import TeacherCache

__all__ = [
    "KNN",
    "BestCheckpoint",
    "EpochLines",
    "FeatureEvaluation",
    "FitReport",
    "ImagesPerSecond",
    "LastCheckpoint",
    "LimitReport",
    "LinearProbe",
    "MonitorCheck",
    "NetworkSummary",
    "PredictionImages",
    "PredictionWriter",
    "ProgressBar",
    "RunRecord",
    "Schedule",
    "Speed",
    "StepSeed",
    "TeacherCache",
]
