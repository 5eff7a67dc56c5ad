from __future__ import annotations

from itertools import chain
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD

from lkd import PastTeacherModule
from lkd.__main__ import main
from lkd.losses import FitNet

SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
SHORT += ["--trainer.enable_progress_bar=false"]


def _state(network: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in chain(network.parameters(), network.buffers())]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def _module(tiny, **settings) -> PastTeacherModule:
    return PastTeacherModule(tiny(), optimizer=lambda parameters: SGD(parameters, lr=0.1, momentum=0.9), **settings)


class RecordStates(Callback):
    """Records the student after each epoch and step, and the teacher after each step."""

    def __init__(self) -> None:
        self.ends: list[list[Tensor]] = []
        self.teachers: list[list[Tensor]] = []
        self.steps: list[tuple[int, list[Tensor], list[Tensor]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        assert not any(module.training for module in pl_module.teacher.modules())
        self.steps.append((trainer.global_step, _state(pl_module.student), _state(pl_module.teacher)))
        if batch_idx == 0:
            self.teachers.append(_state(pl_module.teacher))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.ends.append(_state(pl_module.student))


def test_teacher_is_the_student_of_the_last_epoch(tiny, data, trainer) -> None:
    watch, module = RecordStates(), _module(tiny)
    before = _state(module.student)
    trainer(max_epochs=3, callbacks=[watch]).fit(module, data)
    for teacher, student in zip(watch.teachers, [before, *watch.ends[:2]], strict=True):
        assert _equal(teacher, student)
    assert not _equal(watch.ends[0], watch.ends[1])
    assert len(watch.steps) == 9
    for number, (_, _, teacher) in enumerate(watch.steps):
        assert _equal(teacher, watch.teachers[number // 3])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_average_over_steps(tiny, data, trainer, accumulated: int) -> None:
    """Recompute the average from the students of all steps, including statistics; accumulated batches are one step."""
    watch, module = RecordStates(), _module(tiny, ema_decay=0.7)
    average = _state(module.student)
    trainer(max_epochs=2, callbacks=[watch], accumulate_grad_batches=accumulated).fit(module, data)
    assert [step for step, _, _ in watch.steps] == ([1, 2, 3, 4, 5, 6] if accumulated == 1 else [0, 1, 2, 2, 3, 4])
    last = 0
    for step, student, teacher in watch.steps:
        if step > last:
            last = step
            decay = min(0.7, step / (step + 1))
            average = [
                decay * old + (1 - decay) * new if new.is_floating_point() else new
                for old, new in zip(average, student, strict=True)
            ]
        for found, wanted in zip(teacher, average, strict=True):
            torch.testing.assert_close(found, wanted)


def test_teacher_is_not_trained(tiny, data, trainer) -> None:
    module = _module(tiny, criterion=FitNet())
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    trained = {id(parameter) for group in engine.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in chain(module.model.parameters(), module.criterion.parameters())}
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    module.train()
    assert not any(part.training for part in module.teacher.modules())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_teacher_is_restored(tiny, resume, ema_decay: float | None) -> None:
    saved = resume(lambda: _module(tiny, ema_decay=ema_decay))
    assert {name.split(".")[0] for name in saved} == {"model", "teacher"}
    assert not torch.equal(saved["teacher.fc.weight"], saved["model.fc.weight"])


def test_teacher_is_restored_within_an_epoch(tiny, data, trainer, tmp_path) -> None:
    """After five steps of three per epoch, the teacher is the student of the third step, not of the fifth."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5)
    watch = RecordStates()
    trainer(max_epochs=2, callbacks=[keep, watch], enable_checkpointing=True).fit(_module(tiny), data)
    module, again = _module(tiny), RecordStates()
    trainer(max_epochs=2, callbacks=[again]).fit(module, data, ckpt_path=tmp_path / "step=5.ckpt")
    assert _equal(_state(module.teacher), watch.ends[0])
    assert _equal(again.steps[0][2], watch.ends[0])


def test_checkpoint_is_loaded(tiny, data, trainer, tmp_path) -> None:
    module = _module(tiny, ema_decay=0.9)
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    engine.save_checkpoint(tmp_path / "past.ckpt")
    loaded = PastTeacherModule.load_from_checkpoint(tmp_path / "past.ckpt", student=tiny(5))
    assert _equal(_state(loaded.teacher), _state(module.teacher))
    assert loaded.ema_decay == 0.9
    warm = _module(tiny, student_ckpt=str(tmp_path / "past.ckpt"))
    assert _equal(_state(warm.teacher), _state(module.student))


def test_untrained_teacher_causes_no_warning(tiny, data, trainer, recwarn, capsys) -> None:
    trainer(max_epochs=1, num_sanity_val_steps=-1).fit(_module(tiny), data)
    assert not [warning for warning in recwarn if "near chance" in str(warning.message)]
    assert "Teacher accuracy" not in capsys.readouterr().out


def test_invalid_arguments(tiny) -> None:
    with pytest.raises(ValueError, match=r"ema_decay must be at least 0 and less than 1, got 1.0; a typical"):
        _module(tiny, ema_decay=1.0)
    with pytest.raises(ValueError, match="hard_weight must be a finite number of at least 0"):
        _module(tiny, hard_weight=-1.0)


def test_command_line() -> None:
    """The past's weight increases, that of the labels decreases, and the run resumes from its last checkpoint."""
    configs = ["--config", "data/digits", "--config", "pairs/digits", "--config", "methods/pskd"]
    assert main(["fit", *configs, *SHORT, "--trainer.max_epochs=1"]) == 0
    (last,) = Path("runs").rglob("last.ckpt")
    assert main(["fit", "--ckpt_path", str(last), *SHORT, "--trainer.max_epochs=2"]) == 0
    again = L.LightningModule.load_from_checkpoint(last)
    saved = torch.load(last, weights_only=True)["state_dict"]
    assert isinstance(again, PastTeacherModule)
    assert torch.equal(again.teacher.fc.weight, saved["teacher.fc.weight"])
