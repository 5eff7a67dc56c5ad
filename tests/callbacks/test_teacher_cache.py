"""Teacher cache: cached logits equal the teacher's, and stale or corrupt files are never used."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from benchmarks import warm
from lkd import Batch, DistillModule, NoisyStudentModule, Normalization, Outputs, PastTeacherModule, SyntheticDataModule
from lkd.callbacks import TeacherCache
from lkd.callbacks.logit_table import LogitTable, Storage
from lkd.datamodules import Mixup, RandomCrop, RandomHorizontalFlip, RotatedViews
from lkd.losses import AT, KD, TfKD

SAMPLE = 16  # number of images for which the teacher is run to verify a cached variant
NUM_TRAIN = 80  # five batches of 16; with batches of 24, three and a remainder


class CountingTeacher(nn.Module):
    """A teacher that counts its input images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.images = 0

    def forward(self, input: Tensor) -> Tensor:
        self.images += len(input)
        logits: Tensor = self.network(input)
        return logits


class RecordTeacherLogits(L.Callback):
    """Records the teacher logits that the criterion gets, by (epoch, index)."""

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        own = pl_module.distill_loss

        def listen(student: Outputs, teacher: Outputs, batch: Batch) -> Any:
            for index, logits in zip(batch.index.tolist(), teacher.logits, strict=True):
                self.logits[trainer.current_epoch, index] = logits.clone()
            return own(student, teacher, batch)

        pl_module.distill_loss = listen


def images(**settings: Any) -> SyntheticDataModule:
    defaults = {"train_size": NUM_TRAIN + 16, "test_size": 24, "val_size": 16, "batch_size": 16, "seed": 0}
    augment = [RandomCrop(2), RandomHorizontalFlip()]
    return SyntheticDataModule(
        **{"num_classes": 4, "input_shape": (3, 8, 8), "augment": augment, **defaults, **settings}
    )


@pytest.fixture
def run(tiny, trainer) -> Callable[..., tuple[DistillModule, RecordTeacherLogits, int]]:
    """Return a function that trains with a teacher cache.

    It returns the module, the recorded teacher logits, and the number of images for which the teacher was run.
    Validation, which would increase that number, is disabled.
    """

    def make(
        epochs: int = 3,
        teacher: int = 2,
        data: dict[str, Any] | None = None,
        criterion: Any = None,
        module: dict[str, Any] | None = None,
        fit: dict[str, Any] | None = None,
        **cache: Any,
    ) -> tuple[DistillModule, RecordTeacherLogits, int]:
        counting, record = CountingTeacher(tiny(seed=teacher)), RecordTeacherLogits()
        trained = DistillModule(tiny(seed=1), counting, criterion or KD(temperature=2.0), **(module or {}))
        callbacks = [TeacherCache(**{"versions": 2, **cache}), record]
        engine = trainer(max_epochs=epochs, callbacks=callbacks, limit_val_batches=0, **(fit or {}))
        engine.fit(trained, images(**(data or {})))
        return trained, record, counting.images - 1  # minus the blank image of the probe

    return make


def same(first: DistillModule, second: DistillModule) -> bool:
    pairs = zip(first.student.state_dict().values(), second.student.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def files() -> list[Path]:
    return sorted(Path().rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cached_logits_are_those_of_the_variant(run, dtype: str) -> None:
    module, record, computed = run(epochs=6, dtype=dtype)
    assert computed == 2 * NUM_TRAIN
    data = images()
    data.setup("fit")
    train = data.datasets["train"]
    assert len(record.logits) == 6 * NUM_TRAIN
    for epoch in range(6):
        index = torch.tensor([i for e, i in record.logits if e == epoch])
        fresh = module.teacher(train.make(torch.full_like(index, epoch % 2), index).input)
        kept = torch.stack([record.logits[epoch, i] for i in index.tolist()])
        assert torch.equal(kept, fresh.to(getattr(torch, dtype)).float())
        other = module.teacher(train.make(torch.full_like(index, (epoch + 1) % 2), index).input)
        assert not torch.allclose(kept, other, atol=1e-2)


def test_second_run_reads_the_cache_and_gives_the_same_result(run) -> None:
    first, _, computed = run()
    assert computed == 2 * NUM_TRAIN
    assert len(files()) == 2
    second, _, computed = run()
    assert computed == 2 * SAMPLE
    assert same(first, second)


def test_images_of_a_dropped_batch_are_computed_at_the_end(run) -> None:
    _, record, computed = run(epochs=1, data={"batch_size": 24})
    assert len(record.logits) == 72
    assert computed == NUM_TRAIN
    assert run(epochs=1, data={"batch_size": 16})[2] == SAMPLE


def test_incomplete_epochs_are_not_cached(tiny, trainer) -> None:
    module = DistillModule(tiny(seed=1), tiny(seed=2))
    fit = trainer(max_epochs=1, callbacks=[TeacherCache(versions=1)], limit_train_batches=2)
    with pytest.warns(UserWarning, match="variant 0 .* was not cached: the epoch contained only 32 of 80 images"):
        fit.fit(module, images())
    assert not files()
    assert not list(Path().rglob(".filling*"))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="cut in half"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-200] + bytes(reversed(content[-200:])), id="overwritten"),
        pytest.param(lambda content: b"\xff" * len(content), id="noise"),
    ],
)
def test_corrupt_files_are_rebuilt(run, spoil: Callable[[bytes], bytes]) -> None:
    first, _, _ = run()
    whole = [file.read_bytes() for file in files()]
    files()[1].write_bytes(spoil(whole[1]))
    with pytest.warns(UserWarning, match=r"1.safetensors is ignored and will be recreated"):
        second, _, computed = run()
    assert computed == NUM_TRAIN + SAMPLE
    assert same(first, second)
    assert [file.read_bytes() for file in files()] == whole


def test_file_of_another_variant_is_not_used(run) -> None:
    first, _, _ = run()
    files()[1].write_bytes(files()[0].read_bytes())
    with pytest.warns(UserWarning, match="it was created with different inputs: version"):
        second, _, computed = run()
    assert computed == NUM_TRAIN + SAMPLE
    assert same(first, second)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("teacher", {"teacher": 3}),
        ("seed", {"data": {"seed": 1}}),
        ("augmentation", {"data": {"augment": [RandomCrop(1)]}}),
        ("augmentation", {"data": {"mean": (0.1, 0.2, 0.3)}}),
        ("augmentation", {"data": {"mix": Mixup()}}),
        ("choice of images", {"data": {"val_size": 32}}),
        ("images", {"data": {"train_size": NUM_TRAIN + 17}}),
        ("storage", {"dtype": "float32"}),
        ("storage", {"top_k": 2}),
        ("precision", {"fit": {"precision": "bf16-mixed"}}),
        ("teacher_normalization", {"module": {"teacher_normalization": Normalization((0.1,) * 3, (0.4,) * 3)}}),
    ],
)
def test_stale_files_are_not_used(run, capfd, what: str, change: dict[str, Any]) -> None:
    run(epochs=1)
    capfd.readouterr()
    _, _, computed = run(epochs=1, **change)
    assert computed >= 64
    output = capfd.readouterr().out
    assert re.search(rf"0 of 2 variants found .*another cache in this folder differs in .*{what}", output), output
    (kept,) = {file.parent for file in files()} - {max(files(), key=lambda f: f.stat().st_mtime_ns).parent}
    (new,) = {file.parent for file in files()} - {kept}
    for file in files():  # even under the correct name
        (new / "0.safetensors").write_bytes((kept / file.name).read_bytes())
    with pytest.warns(UserWarning, match=f"created with different inputs: .*{what}"):
        assert run(epochs=1, **change)[2] >= 64


def test_other_teacher_with_the_same_weights(run, tiny, trainer) -> None:
    run(epochs=1)
    teacher = CountingTeacher(tiny(seed=2))
    teacher.network.forward = lambda image, own=teacher.network.forward: own(image).flip(1)
    module = DistillModule(tiny(seed=1), teacher, KD(temperature=2.0))
    record = RecordTeacherLogits()
    with pytest.warns(UserWarning, match=r"0.safetensors is rebuilt: its logits of 16 sample images differ from the"):
        trainer(max_epochs=1, callbacks=[TeacherCache(versions=2), record], limit_val_batches=0).fit(module, images())
    assert teacher.images - 1 == SAMPLE + NUM_TRAIN


def test_logits_too_large_for_the_dtype(trainer) -> None:
    class Large(KD):
        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
            return super().forward(student, Outputs(teacher.logits * 1e-5, {}), batch)

    def fit(dtype: str) -> None:
        teacher = CountingTeacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)))
        nn.init.constant_(teacher.network[1].bias, 1e6)
        module = DistillModule(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), teacher, Large())
        cache = TeacherCache(versions=1, dtype=dtype)
        trainer(max_epochs=1, callbacks=[cache], limit_val_batches=0).fit(module, images())

    with pytest.raises(ValueError, match=r"teacher logits not finite at that step.* --teacher_cache.dtype bfloat16"):
        fit("float16")
    fit("bfloat16")


def test_labels_do_not_invalidate_the_cache(run) -> None:
    run(epochs=1)
    assert run(epochs=1, data={"label_size": 0.5})[2] == SAMPLE


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest() -> None:
    logits = 3 * torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    storage = Storage(torch.float32, top_k=3)
    stored = storage.pack(logits)
    assert [tuple(part.shape) for part in stored] == [(5, 4), (5, 3)]
    back = storage.unpack(stored, 10)
    largest = logits.topk(3).indices
    assert torch.equal(back.gather(1, largest), logits.gather(1, largest))
    probability = back.softmax(1)
    torch.testing.assert_close(probability.gather(1, largest), logits.softmax(1).gather(1, largest))
    others = probability.scatter(1, largest, torch.nan)
    for row in others:
        assert len(row[row.isfinite()].unique()) == 1
    assert len(Storage(torch.float32, top_k=10).pack(logits)) == 1


def test_load_resets_the_seen_rows() -> None:
    storage = Storage(torch.float32)
    table = LogitTable(storage, (torch.zeros(3, 1, 2),), torch.tensor([4, 0, 2]), 2, torch.device("cpu"))
    table.write(torch.tensor([2, 4]), torch.ones(2, 2))
    assert table.seen.tolist() == [True, False, True]
    assert table.load((torch.full((3, 1, 2), 5.0),))
    assert not table.seen.any()
    assert table.read(torch.tensor([0, 2])).tolist() == [[5, 5], [5, 5]]
    assert not table.load((torch.zeros(3, 1, 4),))


class _FourViews(KD):
    """KD over all rotated views that compares the cached teacher logits with fresh ones."""

    num_views = 4

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = (teacher,)  # not part of the module tree

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        torch.testing.assert_close(teacher.logits, self.teacher[0](batch.input), atol=2e-3, rtol=1e-3)
        return super().forward(student, teacher, batch)


def test_top_k_logits_are_reused(run) -> None:
    first, _, _ = run(epochs=2, top_k=2)
    second, _, computed = run(epochs=2, top_k=2)
    assert computed == 2 * SAMPLE
    assert same(first, second)


def test_failed_run_restores_module_and_data(tiny, trainer) -> None:
    data, module = images(), DistillModule(tiny(seed=1), tiny(seed=2))

    class Stop(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop")

    run = trainer(callbacks=[TeacherCache(versions=2), Stop()], limit_val_batches=0)
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(module, data)
    assert module.teacher_cache is None
    assert data.datasets["train"].replay is None
    assert not list(Path().rglob(".filling*"))


def test_resume_within_an_epoch(tiny, trainer, tmp_path: Path) -> None:
    def fit(ckpt: Path | None = None) -> tuple[DistillModule, RecordTeacherLogits]:
        module, record = DistillModule(tiny(seed=1), tiny(seed=2)), RecordTeacherLogits()
        saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=7)
        run = trainer(max_epochs=3, callbacks=[TeacherCache(versions=1), record, saved], enable_checkpointing=True)
        run.fit(module, images(val_size=0), ckpt_path=ckpt)
        return module, record

    module, _ = fit()
    _, record = fit(tmp_path / "step=7.ckpt")
    data = images(val_size=0)
    data.setup("fit")
    for (epoch, index), logits in record.logits.items():
        image = data.datasets["train"].make(torch.zeros(1, dtype=torch.int64), torch.tensor([index])).input
        torch.testing.assert_close(logits, module.teacher(image)[0], rtol=1e-2, atol=1e-3)
        assert epoch >= 1


def test_rejected_file_is_rejected_in_each_epoch(tiny, trainer) -> None:
    def fit(teacher: nn.Module, **settings: Any) -> None:
        trainer(callbacks=[TeacherCache(versions=1)], limit_val_batches=0, **settings).fit(
            DistillModule(tiny(seed=1), teacher), images()
        )

    fit(tiny(seed=2), max_epochs=1)
    other = tiny(seed=2)
    other.forward = lambda image, own=other.forward: own(image).flip(1)
    with pytest.warns(UserWarning, match="sample images differ from the teacher's") as output:
        fit(other, max_epochs=2, limit_train_batches=2)
    assert sum("sample images differ from the teacher's" in str(warning.message) for warning in output) == 2


def test_teacher_modified_during_training(tiny, trainer) -> None:
    class Change(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.teacher.conv1.weight.data.mul_(2)
            pl_module.teacher.conv1.weight.mul_(2)

    run = trainer(callbacks=[TeacherCache(versions=1), Change()], limit_val_batches=0)
    with pytest.raises(ValueError, match="the teacher has changed since the start of fit"):
        run.fit(DistillModule(tiny(seed=1), tiny(seed=2)), images())


def test_several_views(tiny, trainer) -> None:
    modules, computed = [], []
    for _ in range(2):
        teacher = CountingTeacher(tiny(seed=2))
        module = DistillModule(tiny(seed=1), teacher, criterion=_FourViews(tiny(seed=2).eval()))
        fit = trainer(max_epochs=3, callbacks=[TeacherCache(versions=1)], limit_val_batches=0)
        fit.fit(module, images(views=RotatedViews()))
        modules.append(module)
        computed.append(teacher.images - 1)
    assert computed == [4 * NUM_TRAIN, 4 * SAMPLE]
    assert same(*modules)


def test_two_processes_fill_one_file() -> None:
    """Two processes write one file, which two processes or one process read."""
    command = ["fit", "--config", "digits/kd", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    command += ["--teacher_cache.versions=1", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
    command += ["--trainer.enable_checkpointing=false"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=32"]
    output = []
    for number, settings in ((2, two), (2, two), (1, ["--trainer.devices=1"])):
        done, *others = warm.ranks(number, warm.module, "lkd", *command, *settings)
        assert [process.code for process in (done, *others)] == [0] * number, done.stderr[-2000:]
        output.append(re.findall(r"Teacher cache: ([\d,]+) forward passes computed, ([\d,]+) avoided", done.stdout))
    total = 1150
    batches = total // 2 // 32 * 64, total // 64 * 64  # images in an epoch
    (first,), (second,), (third,) = output
    assert second == (f"{2 * SAMPLE}", f"{2 * batches[0]:,}")
    assert third == (f"{SAMPLE}", f"{2 * batches[1]:,}")
    assert first == (f"{total:,}", f"{batches[0]:,}")


def test_resume_with_a_cache(tiny, trainer, tmp_path: Path) -> None:
    def fit(epochs: int, ckpt: Path | None = None) -> tuple[DistillModule, L.Trainer]:
        module = DistillModule(tiny(seed=1), tiny(seed=2))
        run = trainer(max_epochs=epochs, callbacks=[TeacherCache(versions=2)], limit_val_batches=0)
        run.fit(module, images(), ckpt_path=ckpt)
        return module, run

    whole, _ = fit(5)
    _, stopped = fit(3)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = fit(5, tmp_path / "stopped.ckpt")
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (DistillModule, {"criterion": AT(["layer1"], ["layer1"])}, "AT reads the teacher layers layer1"),
        (DistillModule, {"criterion": TfKD()}, "the loss does not use a teacher"),
        (PastTeacherModule, {}, "the teacher of PastTeacherModule changes"),
        (NoisyStudentModule, {}, "NoisyStudentModule overrides teacher_outputs"),
    ],
)
def test_unsupported_teachers(tiny, trainer, kind, settings: dict[str, Any], words: str) -> None:
    teacher = () if kind is PastTeacherModule else (tiny(seed=2),)
    module = kind(tiny(seed=1), *teacher, **settings)
    with pytest.raises(ValueError, match=words):
        trainer(callbacks=[TeacherCache(versions=2)]).fit(module, images())


class Noise(DistillModule):
    """Changes the images after they were loaded, as random augmentation on a GPU does."""

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        return batch._replace(input=batch.input + torch.randn_like(batch.input))


class NoisyUnpack(DistillModule):
    def unpack(self, batch):
        rows = super().unpack(batch)
        return rows._replace(input=rows.input + torch.randn_like(rows.input))


class NoisyData(SyntheticDataModule):
    def on_before_batch_transfer(self, batch, dataloader_idx: int):
        return batch._replace(input=batch.input + torch.randn_like(batch.input))


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        (Noise, SyntheticDataModule, "on_after_batch_transfer may change the images"),
        (NoisyUnpack, SyntheticDataModule, "NoisyUnpack overrides unpack"),
        (DistillModule, NoisyData, "on_before_batch_transfer may change the images"),
    ],
)
def test_batches_that_are_changed_after_loading(distill, trainer, kind, source, words: str) -> None:
    """Otherwise, later epochs would read the logits of differently changed images."""
    data = source(num_classes=4, input_shape=(3, 8, 8), train_size=64, val_size=16, batch_size=16)
    with pytest.raises(ValueError, match=words):
        trainer(callbacks=[TeacherCache(versions=2)]).fit(distill(kind), data)


def test_only_data_modules_of_lkd_are_supported(distill, trainer) -> None:
    data = images()
    data.setup("fit")
    with pytest.raises(ValueError, match="only lkd's data modules can repeat augmented images"):
        trainer(callbacks=[TeacherCache(versions=2)]).fit(distill(), data.train_dataloader())
    with pytest.raises(ValueError, match="overfit_batches"):
        trainer(callbacks=[TeacherCache(versions=2)], overfit_batches=2).fit(distill(), images())


@pytest.mark.parametrize("argument", ["versions", "top_k"])
def test_invalid_arguments(argument: str) -> None:
    with pytest.raises(ValueError, match=f"teacher_cache.{argument} must be at least 1, or null to disable it, got 0"):
        TeacherCache(**{argument: 0})


def test_without_posix_fallocate(run, monkeypatch) -> None:
    monkeypatch.delattr("os.posix_fallocate")
    assert run(epochs=1)[2] == NUM_TRAIN
    assert run(epochs=1)[2] == SAMPLE


def test_folder_that_cannot_be_written(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot cache .*; set teacher_cache.folder to a writable folder"):
        module, _, computed = run(folder=str(tmp_path / "file"))
    assert computed == 3 * NUM_TRAIN
    assert module.teacher_cache is None


def test_disabled_cache(run) -> None:
    _, record, computed = run(epochs=2, versions=None)
    assert computed == 2 * NUM_TRAIN
    assert not files()
    changed = [not torch.equal(record.logits[0, i], record.logits[1, i]) for e, i in record.logits if e == 0]
    assert sum(changed) > 0.9 * NUM_TRAIN
