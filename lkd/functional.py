"""The losses as pure functions: `from lkd import functional as KF; KF.kd_loss(student, teacher)`."""

from lkd.losses.logit import kd_loss

__all__ = ["kd_loss"]
