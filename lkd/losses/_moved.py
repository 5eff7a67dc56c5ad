"""Former module names, which saved configs and checkpoints may contain."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType

_MOVED = {
    "adaptation": ("kta",),
    "adapters": ("_adapters",),
    "backbone": ("backbonekd",),
    "boundary": ("ab", "ofd"),
    "channel": ("ickd",),
    "checks": ("_checks",),
    "classifier": ("catkd", "srrl", "simkd"),
    "dist_plus": ("distplus",),
    "factor": ("ft",),
    "feature": ("at", "nst", "fitnet"),
    "flow": ("fsp", "kdsvd"),
    "labels": ("_labels",),
    "logit": ("_divergence", "kd", "logit_mse", "ttm"),
    "logit_relation": ("dist", "skd"),
    "logit_target": ("dkd", "nkd", "wsld", "rld"),
    "masked": ("mgd",),
    "ofa": ("ofakd",),
    "precision": ("_precision",),
    "regression": ("vid", "pad", "srd"),
    "relation": ("rkd", "sp", "pkt", "cc"),
    "review": ("reviewkd",),
    "shapes": ("_shapes",),
    "standardization": ("logit_standardization",),
    "teacher_free": ("tfkd", "cskd", "uskd"),
    "vit": ("_tokens", "vitkd", "deit"),
}


class _Moved(ModuleType):
    """A former module whose public names are found in the modules that replaced it."""

    def __getattr__(self, name: str) -> object:
        package, _, old = self.__name__.rpartition(".")
        for new in () if name.startswith("_") else _MOVED[old]:
            module = import_module(f"{package}.{new}")
            if hasattr(module, name):
                warnings.warn(
                    f"{self.__name__} is deprecated; import {name} from {module.__name__}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def add_former_modules(package: str) -> None:
    """Make the former modules of a package importable.

    Args:
        package: Name of the package, `lkd.losses`.
    """
    for old in _MOVED:
        sys.modules[f"{package}.{old}"] = _Moved(f"{package}.{old}")
