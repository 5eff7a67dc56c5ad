"""Former names, which programs, saved configs and checkpoints may contain. They will be removed in the next release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

MOVED = {
    "lkd.answers": ("lkd.callbacks.logit_table",),
    "lkd.arguments": ("lkd.checkpoints.find", "lkd.cli.arguments"),
    "lkd.callbacks.folding": ("lkd.models.fusion",),
    "lkd.checkpoint_io": ("lkd.checkpoints.io",),
    "lkd.compare.asking": ("lkd.compare.predictions",),
    "lkd.compare.figures": ("lkd.compare.metrics",),
    "lkd.datamodules.color": ("lkd.datamodules.transforms.color",),
    "lkd.datamodules.erasing": ("lkd.datamodules.transforms.erasing",),
    "lkd.datamodules.joined": ("lkd.datamodules.sources",),
    "lkd.datamodules.mixing": ("lkd.datamodules.transforms.mixing",),
    "lkd.datamodules.randaugment": ("lkd.datamodules.transforms.randaugment",),
    "lkd.datamodules.resident": ("lkd.datamodules.sources", "lkd.datamodules.decoding"),
    "lkd.datamodules.views": ("lkd.datamodules.transforms.views",),
    "lkd.layers": ("lkd.features.layers",),
    "lkd.losses.adaptation": ("lkd.losses.kta",),
    "lkd.losses.adapters": ("lkd.losses._adapters",),
    "lkd.losses.backbone": ("lkd.losses.backbonekd",),
    "lkd.losses.boundary": ("lkd.losses.ab", "lkd.losses.ofd"),
    "lkd.losses.channel": ("lkd.losses.ickd",),
    "lkd.losses.checks": ("lkd.losses._checks",),
    "lkd.losses.classifier": ("lkd.losses.catkd", "lkd.losses.srrl", "lkd.losses.simkd"),
    "lkd.losses.dist_plus": ("lkd.losses.distplus",),
    "lkd.losses.factor": ("lkd.losses.ft",),
    "lkd.losses.feature": ("lkd.losses.at", "lkd.losses.nst", "lkd.losses.fitnet"),
    "lkd.losses.flow": ("lkd.losses.fsp", "lkd.losses.kdsvd"),
    "lkd.losses.labels": ("lkd.losses._labels",),
    "lkd.losses.logit": ("lkd.losses._divergence", "lkd.losses.kd", "lkd.losses.logit_mse", "lkd.losses.ttm"),
    "lkd.losses.logit_relation": ("lkd.losses.dist", "lkd.losses.skd"),
    "lkd.losses.logit_target": ("lkd.losses.dkd", "lkd.losses.nkd", "lkd.losses.wsld", "lkd.losses.rld"),
    "lkd.losses.masked": ("lkd.losses.mgd",),
    "lkd.losses.ofa": ("lkd.losses.ofakd",),
    "lkd.losses.precision": ("lkd.losses._precision",),
    "lkd.losses.regression": ("lkd.losses.vid", "lkd.losses.pad", "lkd.losses.srd"),
    "lkd.losses.relation": ("lkd.losses.rkd", "lkd.losses.sp", "lkd.losses.pkt", "lkd.losses.cc"),
    "lkd.losses.review": ("lkd.losses.reviewkd",),
    "lkd.losses.shapes": ("lkd.losses._shapes",),
    "lkd.losses.standardization": ("lkd.losses.logit_standardization",),
    "lkd.losses.teacher_free": ("lkd.losses.tfkd", "lkd.losses.cskd", "lkd.losses.uskd"),
    "lkd.losses.vit": ("lkd.losses._tokens", "lkd.losses.vitkd", "lkd.losses.deit"),
    "lkd.plain_yaml": ("lkd.io.yaml",),
    "lkd.run_config": ("lkd.callbacks.config",),
    "lkd.store": ("lkd.io.tensor_cache",),
    "lkd.taps": ("lkd.features.extractor",),
    "lkd.trained": ("lkd.loading",),
    "lkd.untrusted": ("lkd.io.safe_load",),
}
"""Name of each former module, and of those that replaced it."""

RENAMED = {
    "lkd": {"FeatureTaps": "FeatureExtractor"},
    "lkd.callbacks.logit_table": {"Answers": "LogitTable"},
    "lkd.compare.predictions": {"Answers": "Predictions", "ask": "predict"},
    "lkd.features.extractor": {"FeatureTaps": "FeatureExtractor"},
    "lkd.loading": {"Answer": "ModuleLogits", "load_trained": "load_run"},
}
"""Former and new names of objects, by module."""

RENAMED_CONFIGS = {"trainer/kept_answers": "trainer/teacher_cache"}
"""Former and new names of configs. The former files remain, since the name of a run is derived from them."""

T = TypeVar("T")


def renamed(module: str, name: str) -> Any:
    """Return an object by its former name, for `__getattr__` of a module.

    Args:
        module: Name of the module.
        name: Name that the module does not have.

    Raises:
        AttributeError: If this is not a former name.
    """
    new = RENAMED[module].get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", new)
    return getattr(import_module(module), new)


def former_members(**names: str) -> Callable[[type[T]], type[T]]:
    """Keep former names of members of a class. Subclasses may also override members under these names.

    Args:
        names: New name of each former name.
    """

    def decorate(cls: type[T]) -> type[T]:
        for old, new in names.items():
            setattr(cls, old, _FormerMember(cls.__name__, old, new))
        init_subclass = getattr(cls.__init_subclass__, "__func__", None)

        def rename_overrides(subclass: type[T], /, **kwargs: Any) -> None:
            for old, new in names.items():
                _adopt(subclass, cls, old, new)
            if init_subclass is not None:
                init_subclass(subclass, **kwargs)

        cls.__init_subclass__ = classmethod(rename_overrides)  # type: ignore[assignment]
        return cls

    return decorate


def _adopt(subclass: type, base: type, old: str, new: str) -> None:
    """If a subclass overrides a member under its former name, make the override effective under the new name."""
    for owner in subclass.__mro__[: subclass.__mro__.index(base)]:
        if new in vars(owner):
            return
        if old in vars(owner):
            _warn(f"{owner.__name__}.{old}", new, level=4)
            setattr(subclass, new, vars(owner)[old])
            return


class _FormerMember:
    """Descriptor that gives access to a member by its former name."""

    def __init__(self, owner: str, old: str, new: str) -> None:
        self.owner, self.old, self.new = owner, old, new

    def __get__(self, instance: Any, kind: type) -> Any:
        _warn(f"{self.owner}.{self.old}", self.new, level=3)
        if instance is None:
            return getattr(kind, self.new)
        overriding = [
            owner for owner in type(instance).__mro__ if not isinstance(vars(owner).get(self.old, self), type(self))
        ]
        # If a subclass overrides the former name, only its `super().old` leads here.
        return getattr(super(overriding[-1], instance) if overriding else instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        _warn(f"{self.owner}.{self.old}", self.new, level=3)
        setattr(instance, self.new, value)


def _warn(old: str, new: str, level: int = 4) -> None:
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=level)


class _Moved(ModuleType):
    """A former module whose public names are found in the modules that replaced it."""

    def __getattr__(self, name: str) -> object:
        for new in () if name.startswith("_") else MOVED[self.__name__]:
            module = import_module(new)
            if hasattr(module, name):
                warnings.warn(
                    f"{self.__name__} is deprecated; import {name} from {new}", DeprecationWarning, stacklevel=2
                )
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Import former modules without importing those that replaced them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def add_former_modules() -> None:
    """Make the former modules importable."""
    sys.meta_path.append(_Finder())
