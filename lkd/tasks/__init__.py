"""Tasks: what a network returns, how it is supervised, and how it is evaluated."""

from lkd.tasks.base import Task
from lkd.tasks.classification import Classification
from lkd.tasks.detection import Detection
from lkd.tasks.segmentation import SemanticSegmentation

__all__ = ["Classification", "Detection", "SemanticSegmentation", "Task"]
