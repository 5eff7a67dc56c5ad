"""Module names of earlier versions, which occur in saved configs and checkpoints, are still supported."""

from __future__ import annotations

import importlib
import warnings

import pytest
from jsonargparse import ArgumentParser

import lkd.losses
from lkd._moved import MOVED, RENAMED
from lkd.cli.config_files import find_config, read_config
from lkd.datamodules import DeepInversion


@pytest.mark.parametrize("old", MOVED)
def test_former_modules_are_redirected(old: str) -> None:
    former = importlib.import_module(old)
    for new in MOVED[old]:
        module = importlib.import_module(new)
        for name, value in vars(module).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
                with pytest.warns(DeprecationWarning, match=f"import {name} from {new}"):
                    assert getattr(former, name) is value


def test_former_modules_are_attributes_of_their_package() -> None:
    with pytest.warns(DeprecationWarning, match="import FeatureExtractor from lkd.features.extractor"):
        assert lkd.taps.FeatureExtractor is lkd.FeatureExtractor


def test_config_with_a_former_module() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--criterion", type=lkd.losses.DistillLoss)
    settings = {"class_path": "lkd.losses.logit_target.DKD", "init_args": {"beta": 2.0}}
    with pytest.warns(DeprecationWarning, match=r"import DKD from lkd\.losses\.dkd"):
        criterion = parser.instantiate(parser.parse_object({"criterion": settings})).criterion
    assert type(criterion) is lkd.losses.DKD
    assert criterion.beta == 2


def test_other_names_are_not_found() -> None:
    former = importlib.import_module("lkd.losses.logit_target")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(former, "__file__")
        with pytest.raises(AttributeError, match=r"module 'lkd\.losses\.logit_target' has no attribute 'KD'"):
            _ = former.KD


@pytest.mark.parametrize(("module", "old"), [(module, old) for module, names in RENAMED.items() for old in names])
def test_former_names_of_objects(module: str, old: str) -> None:
    owner, new = importlib.import_module(module), RENAMED[module][old]
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is deprecated; use {new}"):
        assert getattr(owner, old) is getattr(owner, new)


def test_former_names_of_members(distill) -> None:
    module = distill()
    for old, new in (
        ("student_taps", "student_extractor"),
        ("asks_teacher", "uses_teacher"),
        ("recall", "teacher_cache"),
    ):
        with pytest.warns(DeprecationWarning, match=f"{old} is deprecated; use {new}"):
            assert getattr(module, old) is getattr(module, new)
    with pytest.warns(DeprecationWarning, match="DistillLoss.locate is deprecated; use resolve_layers"):
        module.criterion.locate(module.student, module.teacher)
    for kind, old, new in ((lkd.losses.SimKD, "answer", "predict"), (DeepInversion, "synthesise", "synthesize")):
        with pytest.warns(DeprecationWarning, match=f"{kind.__name__}.{old} is deprecated; use {new}"):
            assert getattr(kind, old) is getattr(kind, new)
    with pytest.warns(DeprecationWarning, match="recall is deprecated"):
        module.recall = module.teacher_outputs
    assert module.teacher_cache == module.teacher_outputs


def _own(*bases: type) -> type:
    class Own(*bases):
        def locate(self, student, teacher) -> None:
            super().locate(student, teacher)
            self.seen = student

    return Own


class Mixin:
    def locate(self, student, teacher) -> None:
        super().locate(student, teacher)
        self.seen = student


@pytest.mark.filterwarnings("ignore:DistillLoss.locate:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: _own(lkd.losses.AT),
        lambda: _own(_own(lkd.losses.AT)),
        lambda: type("Inherits", (_own(lkd.losses.AT),), {}),
        lambda: type("Mixed", (Mixin, lkd.losses.AT), {}),
    ],
    ids=["override", "two overrides", "inherited", "mixin"],
)
def test_overrides_of_former_members(distill, make) -> None:
    with pytest.warns(DeprecationWarning, match=r"(Own|Mixin)\.locate is deprecated; use resolve_layers"):
        criterion = make()(["@stages"], ["@stages"])
    student = distill(criterion=criterion).student
    assert criterion.seen is student
    assert criterion.student_layers == ("layer1", "layer2", "layer3")


def test_overridden_properties(distill) -> None:
    with pytest.warns(DeprecationWarning, match="Own.not_to_be_kept is deprecated; use cache_obstacle"):

        class Own(lkd.DistillModule):
            @property
            def not_to_be_kept(self) -> str:
                return super().not_to_be_kept or "never"

    module = distill()
    with pytest.warns(DeprecationWarning, match="DistillModule.not_to_be_kept is deprecated"):
        assert Own(module.student, module.teacher).cache_obstacle == "never"


def test_both_names_may_be_defined(distill) -> None:
    class Own(lkd.losses.KD):
        def resolve_layers(self, student, teacher) -> None:
            self.seen = student

        def locate(self, student, teacher) -> None:
            self.resolve_layers(student, teacher)

    criterion = Own()
    student = distill(criterion=criterion).student
    assert criterion.seen is student
    with pytest.warns(DeprecationWarning, match="DistillLoss.locate is deprecated"):
        assert lkd.losses.KD.locate is lkd.losses.KD.resolve_layers


def test_former_names_of_configs() -> None:
    with pytest.warns(
        FutureWarning, match=r"the config trainer/kept_answers\.yaml is deprecated; use trainer/teacher_cache"
    ):
        former = read_config(find_config("trainer/kept_answers.yaml"))
    assert former == read_config(find_config("trainer/teacher_cache"))
