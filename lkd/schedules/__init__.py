"""Learning-rate schedules relative to the length of the run."""

from lkd.schedules.relative import CosineDecay, StepDecay

__all__ = ["CosineDecay", "StepDecay"]
