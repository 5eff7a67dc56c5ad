from __future__ import annotations

import math
from collections.abc import Callable

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lkd import DistillModule, MutualModule
from lkd.callbacks import Schedule
from lkd.losses import CTKD, KD, MultiTeacher, WeightedSum
from lkd.models import Ensemble


class RecordValues(L.Callback):
    """Records values of the module in each step, together with the epoch."""

    def __init__(self, *reads: Callable[[DistillModule], float]) -> None:
        self.reads = reads
        self.seen: list[tuple[float, ...]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append((trainer.current_epoch, *(read(pl_module) for read in self.reads)))


def test_warmup(distill, trainer, data) -> None:
    """The authors of DKD use min(epoch / 20, 1), where the first epoch is 1."""
    module, watch = distill(distill_weight=0.8), RecordValues(lambda module: module.distill_weight)
    trainer(max_epochs=4, callbacks=[Schedule("distill_weight", epochs=3), watch]).fit(module, data)
    expected = [0.8 / 3, 1.6 / 3, 0.8, 0.8]
    assert len(watch.seen) == 4 * len(data.train_dataloader())
    for epoch, weight in watch.seen:
        assert weight == pytest.approx(expected[epoch])
    assert module.distill_weight == 0.8


def test_cosine_equals_ctkds_curriculum() -> None:
    """CTKD's lambda changes from 0 to -1: (cos(pi * epoch / 10) + 1) / 2 - 1, where the first epoch is 1."""
    schedule = Schedule("criterion.reversal", epochs=10, shape="cosine")
    for epoch in range(15):
        progress = min(epoch + 1, 10) / 10
        assert schedule.factor(epoch) == pytest.approx(1 - (math.cos(math.pi * progress) + 1) / 2)


def test_decay() -> None:
    schedule = Schedule("hard_weight", epochs=4, start=1.0, end=0.2)
    assert [schedule.factor(epoch) for epoch in range(5)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])


def test_several_schedules_of_a_sum(distill, trainer, data) -> None:
    criterion = WeightedSum({"kd": KD(), "ctkd": CTKD(reversal=0.5)}, weights={"kd": 2.0})
    watch = RecordValues(lambda _: criterion.weights["kd"], lambda _: criterion.criteria["ctkd"].reversal)
    schedules = [
        Schedule("criterion.weights.kd", epochs=2),
        Schedule("criterion.criteria.ctkd.reversal", epochs=2, start=1.0, end=0.0),
    ]
    module = distill(criterion=criterion)
    trainer(max_epochs=2, callbacks=[*schedules, watch]).fit(module, data)
    assert set(watch.seen) == {(0, 1.0, 0.25), (1, 2.0, 0.0)}
    assert criterion.weights["kd"] == 2.0


def _reversals(module: DistillModule) -> tuple[float, ...]:
    return tuple(part.reversal for part in module.criterion.modules() if isinstance(part, CTKD))


@pytest.mark.parametrize("students", [2, 3])
def test_schedule_of_all_pairs_of_students(tiny, trainer, data, students) -> None:
    """methods/ctkd schedules `criterion.reversal`, and each pair of students has its own copy of the criterion."""
    module = MutualModule([tiny(seed) for seed in range(students)], CTKD(reversal=0.5))
    watch = RecordValues(lambda module: set(_reversals(module)))
    trainer(max_epochs=2, callbacks=[Schedule("criterion.reversal", epochs=2), watch]).fit(module, data)
    assert all(seen == ({0.25} if epoch == 0 else {0.5}) for epoch, seen in watch.seen)
    assert _reversals(module) == (0.5,) * students * (students - 1)


def test_schedule_of_all_teachers(tiny, trainer, data) -> None:
    """The schedule applies to the sums of all teachers; only one criterion of each sum has the setting."""
    criterion = MultiTeacher(WeightedSum({"kd": KD(), "ctkd": CTKD()}, weights={"ctkd": 2.0}))
    module = DistillModule(tiny(0), Ensemble([tiny(1), tiny(2)]), criterion)
    schedules = [Schedule("criterion.reversal", epochs=2), Schedule("criterion.weights.ctkd", epochs=4)]
    watch = RecordValues(_reversals, lambda module: tuple(part.weights["ctkd"] for part in module.criterion.parts))
    trainer(max_epochs=2, callbacks=[*schedules, watch]).fit(module, data)
    assert set(watch.seen) == {(0, (0.5, 0.5), (0.5, 0.5)), (1, (1.0, 1.0), (1.0, 1.0))}


def test_criteria_keep_their_own_final_values(distill, trainer, data) -> None:
    module = distill(criterion=WeightedSum({"one": CTKD(reversal=0.5), "two": CTKD(reversal=1.0)}))
    watch = RecordValues(_reversals)
    trainer(max_epochs=1, callbacks=[Schedule("criterion.reversal", epochs=2), watch]).fit(module, data)
    assert set(watch.seen) == {(0, (0.25, 0.5))}
    assert _reversals(module) == (0.5, 1.0)


def test_temperature_is_learned(distill, trainer, data) -> None:
    """Without gradient reversal, the temperature does not change."""
    still, learned = (distill(criterion=CTKD(reversal=reversal)) for reversal in (0.0, 1.0))
    for module in (still, learned):
        trainer(max_epochs=2, callbacks=[Schedule("criterion.reversal", epochs=2, shape="cosine")]).fit(module, data)
    assert still.criterion.theta.item() == 1
    assert learned.criterion.theta.item() != 1


def test_resume_within_an_epoch(distill, trainer, data, tmp_path) -> None:
    """Lightning skips the start of the epoch; theta and the schedule continue, and the data restarts its epoch."""
    module, resumed = (distill(criterion=CTKD()) for _ in range(2))
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    before, after = (RecordValues(lambda module: module.criterion.reversal, _theta) for _ in range(2))
    schedules = [Schedule("criterion.reversal", epochs=4) for _ in range(2)]
    trainer(max_epochs=3, enable_checkpointing=True, callbacks=[schedules[0], before, save]).fit(module, data)
    trainer(max_epochs=3, callbacks=[schedules[1], after]).fit(resumed, data, ckpt_path=tmp_path / "step=4.ckpt")
    assert after.seen[0] == before.seen[4]
    assert [seen[:2] for seen in after.seen] == [(1, 0.5)] * 2 + [(2, 0.75)] * 3


def _theta(module: DistillModule) -> float:
    return module.criterion.theta.item()


def test_failure_restores_the_value(distill, trainer, data) -> None:
    class Fail(L.Callback):
        def on_train_batch_end(self, *args) -> None:
            raise RuntimeError("stop")

    module = distill(distill_weight=0.8)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(callbacks=[Schedule("distill_weight", epochs=9), Fail()]).fit(module, data)
    assert module.distill_weight == 0.8


@pytest.mark.parametrize("attribute", ["distil_weight", "criterion.weights.kd", "student", "criterion", "training"])
def test_attribute_must_be_a_number(distill, trainer, data, attribute) -> None:
    with pytest.raises(ValueError, match=f"'{attribute}' of .*; select a number .* such as 'distill_weight'"):
        trainer(callbacks=[Schedule(attribute, epochs=2)]).fit(distill(), data)


def test_read_only_attribute(distill, trainer, data) -> None:
    with pytest.raises(ValueError, match=r"cannot set 'global_step', which is read-only .* such as 'distill_weight'"):
        trainer(callbacks=[Schedule("global_step", epochs=2)]).fit(distill(), data)


def test_weights_must_not_all_be_zero(distill, trainer, data) -> None:
    schedules = [Schedule(name, epochs=2, shape="step") for name in ("distill_weight", "hard_weight")]
    with pytest.raises(ValueError, match="distill_weight and hard_weight are both 0 in this step"):
        trainer(callbacks=schedules).fit(distill(), data)


def test_invalid_number_of_epochs() -> None:
    with pytest.raises(ValueError, match="at least 1 epoch, got 0"):
        Schedule("distill_weight", epochs=0)
