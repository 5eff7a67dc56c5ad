"""Streamed shards: evaluation reads each image once in all workers and processes; orders depend on seed and epoch."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import warm
from lkd import DistillModule, WebDatasetDataModule
from lkd.__main__ import main
from lkd.datamodules import ClassPartner, CutMix, ImageError, RandomHorizontalFlip, RandomResizedCrop, RotatedViews
from lkd.datamodules.shards import find_shards
from lkd.losses import CRD
from lkd.types import IGNORE_INDEX

PLAIN = {"num_classes": 4, "image_size": 8, "batch_size": 4, "num_workers": 0, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def _png(level: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def _tar(path: str, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    Path(path).parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _shards(folder: str, sizes: tuple[int, ...]) -> str:
    """Write shards in which image i has the gray level i and the class i modulo 4."""
    from webdataset import ShardWriter

    Path(folder).mkdir()
    level = 0
    for number, size in enumerate(sizes):
        with ShardWriter(f"{folder}/%04d.tar", start_shard=number, verbose=0) as writer:
            for _ in range(size):
                sample = {"__key__": f"{level:05}", "png": _png(level), "cls": level % 4, "json": {"level": level}}
                writer.write(sample)
                level += 1
    return folder


def _module(train: str, processes: int = 1, rank: int = 0, epoch: int = 0, **settings) -> WebDatasetDataModule:
    data = WebDatasetDataModule(train, **{**PLAIN, "train_size": 20, "test": train, "augment": [], **settings})
    data.trainer = SimpleNamespace(world_size=processes, global_rank=rank, current_epoch=epoch)
    data.setup("fit")
    data.setup("test")
    return data


def _levels(batches) -> list[int]:
    return [round(255 * float(x[0, 0, 0])) for b in batches for x, t in zip(b.input, b.target, strict=True) if t >= 0]


@pytest.mark.parametrize("workers", [0, 2, 9])
def test_evaluation_reads_each_image_once(workers: int) -> None:
    train, sizes, seen = _shards("a", (7, 1, 5)), [], []
    for rank in range(2):
        batches = list(_module(train, 2, rank, num_workers=workers).test_dataloader())
        seen += _levels(batches)
        sizes.append([len(batch.target) for batch in batches])
    assert sorted(seen) == list(range(13))
    assert sizes[0] == sizes[1]  # otherwise, one process would wait for the other


def test_prediction_has_indices_and_keeps_the_order() -> None:
    data = _module(_shards("a", (7, 1, 5)), num_workers=3)
    batches = list(data.predict_dataloader())
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(13)) == _levels(batches)
    assert torch.cat([batch.target for batch in batches]).tolist() == [i % 4 for i in range(13)]
    assert all(batch.index is None for batch in data.test_dataloader())
    unpadded = [list(_module("a", 2, rank).predict_dataloader()) for rank in (0, 1)]
    assert [sum(len(batch.target) for batch in batches) for batches in unpadded] == [7, 6]


def test_training_order_depends_on_seed_and_epoch() -> None:
    _shards("a", (5, 5, 5, 5))

    def order(**settings) -> list[int]:
        return _levels(_module("a", **settings).train_dataloader())

    first = order(seed=1)
    assert sorted(first) == list(range(20))
    assert first == order(seed=1) != order(seed=1, epoch=1)
    assert first != order(seed=2)
    assert order(seed=1, num_workers=2) == order(seed=1, num_workers=2)
    assert sorted(order(seed=1, num_workers=2, batch_size=5)) == list(range(20))  # two shards each


def test_processes_train_on_disjoint_images_in_equally_many_batches() -> None:
    _shards("a", (8, 2, 3))  # uneven: a process with fewer images starts over
    batches = [list(_module("a", 2, rank, train_size=27).train_dataloader()) for rank in (0, 1)]
    assert [len(part) for part in batches] == [3, 3] == [len(_module("a", 2, 0, train_size=27).train_dataloader())] * 2
    assert all(len(batch.target) == 4 and batch.index is None for part in batches for batch in part)
    assert not set(_levels(batches[0])) & set(_levels(batches[1]))
    with pytest.raises(ValueError, match="each of 4 processes needs its own training shard, got 3"):
        _module("a", 4).train_dataloader()
    with pytest.raises(ValueError, match="train_size 20 is less than one full batch of 16 in each of 2 processes"):
        _module("a", 2, batch_size=16).train_dataloader()


def test_augmentation_depends_only_on_seed_epoch_and_image() -> None:
    rng = np.random.default_rng(0)
    members = []
    for number in range(6):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "JPEG")
        members += [(f"{number}.jpg", file.getvalue()), (f"{number}.cls", b"%d" % (number % 4))]
    for number in range(2):
        _tar(f"a/{number}.tar", members[6 * number : 6 * number + 6])
    augment = [RandomResizedCrop(), RandomHorizontalFlip()]

    def images(batch_size: int, workers: int, epoch: int = 0) -> set[bytes]:
        data = _module("a", epoch=epoch, batch_size=batch_size, num_workers=workers, train_size=6, augment=augment)
        return {image.numpy().tobytes() for batch in data.train_dataloader() for image in batch.input}

    assert len(images(6, 0)) == 6
    assert images(6, 0) == images(3, 2)
    assert not images(6, 0) & images(6, 0, epoch=1)


def test_views_and_mixing() -> None:
    _shards("a", (5, 5))
    (batch, *_) = _module("a", views=RotatedViews(), mix=CutMix()).train_dataloader()
    assert batch.views == 4
    assert len(batch.input) == len(batch.target) == len(batch.mixed.target) == 16
    assert set(batch.mixed.target[:4].tolist()) <= set(batch.target[:4].tolist())  # partners are images of the batch
    with pytest.raises(ValueError, match="ClassPartner requires random access to images"):
        _module("a", views=ClassPartner())


def test_pickle_in_a_shard_is_not_loaded() -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (Path("bomb"),))

    code = pickle.dumps(Bomb())
    names = ("0.pyd", "0.pkl", "0.pickle", "0.pth", "0.npy", "__meta__.pyd")
    _tar("a/0.tar", [("0.png", _png(3)), ("0.cls", b" 3\n"), *((name, code) for name in names)])
    assert _levels(_module("a").test_dataloader()) == [3]
    _tar("a/0.tar", [("0.png", _png(3)), ("0.cls", code)])
    with pytest.raises(ImageError, match=r"0.tar: 0 has the class .* expected a number"):
        list(_module("a").test_dataloader())
    assert not Path("bomb").exists()


GOOD = [("0.png", _png(0)), ("0.cls", b"0")]


def _sparse() -> None:
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**42)}
    content = f"1\n{2**42}\n0\n".encode().ljust(512, b"\0")
    info.size = len(content)
    with tarfile.open("a/0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(content))
        label = tarfile.TarInfo("0.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"0"))


def _cut(length: int) -> None:
    Path(_tar("a/0.tar", GOOD)).write_bytes(Path("a/0.tar").read_bytes()[:length])


def _damaged() -> None:
    content = bytearray(Path(_tar("a/0.tar", GOOD)).read_bytes())
    content[1024 : 1024 + 100] = b"x" * 100  # the header of the second member
    Path("a/0.tar").write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _cut(700), "0.tar cannot be read .*; replace it with a complete"),
        (lambda: _cut(2048), "0.tar cannot be read .*; replace it with a complete"),  # at the end of a member
        (_damaged, "0.tar cannot be read .*bad checksum at byte 1,024"),
        (lambda: _tar("a/0.tar", GOOD, "w:gz"), "replace it with a complete, uncompressed tar file"),
        (lambda: Path("a/0.tar").write_bytes(b""), "0.tar cannot be read"),
        (lambda: _tar("a/0.tar", []), "0.tar has no samples"),
        (_sparse, "0.tar: 0 has 0 images"),
        (lambda: _tar("a/0.tar", GOOD[:1]), "0.tar: 0 has no class; expected a number in a .cls member"),
        (lambda: _tar("a/0.tar", GOOD[1:]), "0.tar: 0 has 0 images"),
        (lambda: _tar("a/0.tar", [*GOOD, ("0.jpg", b"")]), "0.tar: 0 has 2 images"),
        (lambda: _tar("a/0.tar", [*GOOD, GOOD[0]]), "duplicate file name"),
        (
            lambda: _tar("a/0.tar", [GOOD[0], ("0.cls", b"4")]),
            "has the class 4, which is not one of the 4 classes 0 to 3",
        ),
        (lambda: _tar("a/0.tar", [("0.png", b"none"), GOOD[1]]), "image a/0.tar: 0 cannot be read"),
    ],
)
def test_invalid_shards(make, message: str) -> None:
    Path("a").mkdir()
    make()
    with pytest.raises(ImageError, match=message) as caught:
        list(_module("a").test_dataloader())
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=message):
        list(_module("a").train_dataloader())


def test_error_of_a_worker() -> None:
    _tar("a/0.tar", GOOD[:1])
    with pytest.raises(ImageError, match=r"^sample a/0.tar: 0 has no class; .*after it$"):
        list(_module("a", num_workers=1).test_dataloader())


def test_unlabelled_images() -> None:
    _tar("a/0.tar", [GOOD[0], ("0.cls", str(IGNORE_INDEX).encode())])
    (batch,) = _module("a").test_dataloader()
    assert batch.target.tolist() == [IGNORE_INDEX]


def test_patterns() -> None:
    _shards("a", (1, 1, 1))
    three = tuple(f"a/000{number}.tar" for number in range(3))
    assert find_shards("a") == find_shards("a/*.tar") == find_shards("a/{0000..0002}.tar") == three
    assert find_shards("a/0002.tar::a/000[01].tar") == (three[2], *three[:2])
    assert find_shards("https://host/{0..1}.tar") == ("https://host/0.tar", "https://host/1.tar")
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards not found: a/0003.tar, b.tar"):
        find_shards("a/{0001..0003}.tar::b.tar")
    for nothing in ("a/x*.tar", "."):
        with pytest.raises(FileNotFoundError, match="no shards match"):
            find_shards(nothing)
    with pytest.raises(ValueError, match="shards must be files, or URLs that begin with http"):
        find_shards("pipe:touch bomb")
    with pytest.raises(ValueError, match="invalid pattern of shards"):
        find_shards("a/${NOTHING}.tar")


def test_missing_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(
        ValueError, match=r"requires webdataset, which is not installed; run pip install 'lightning-kd\[webdataset\]'"
    ):
        _module("a")


def test_invalid_settings() -> None:
    for name in ("num_classes", "train_size", "batch_size", "shuffle_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            WebDatasetDataModule("a", **{**PLAIN, "train_size": 1, name: 0})
    data = WebDatasetDataModule(_shards("a", (1,)), **PLAIN, train_size=1)
    with pytest.raises(ValueError, match="has no test images; specify their shards as `test`"):
        data.setup("test")


def test_indices_and_teacher_cache_are_not_supported(tiny, trainer) -> None:
    from lkd.callbacks import TeacherCache

    _shards("a", (8, 8))
    module = DistillModule(tiny(seed=1), tiny(seed=2), CRD(num_samples=16, num_negatives=2, feat_dim=4))
    data = WebDatasetDataModule("a", **PLAIN, train_size=16)
    with pytest.raises(ValueError, match="criterion CRD requires sample indices, but the batches have none"):
        trainer(max_epochs=1).fit(module, data)
    module = DistillModule(tiny(seed=1), tiny(seed=2))
    with pytest.raises(ValueError, match="except WebDatasetDataModule, a stream"):
        trainer(max_epochs=1, callbacks=[TeacherCache(versions=1)]).fit(module, data)


CONFIG = {
    "model": {
        "class_path": "lkd.DistillModule",
        "init_args": {
            "student": {"class_path": "lkd.models.resnet8", "init_args": {"num_classes": 4}},
            "teacher": {"class_path": "lkd.models.resnet8", "init_args": {"num_classes": 4}},
        },
    },
    "data": {
        "class_path": "lkd.WebDatasetDataModule",
        "init_args": {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in PLAIN.items()},
            "train": "a/{0000..0003}.tar",
            "val": "b",
            "test": "b/*.tar",
            "train_size": 32,
            "num_workers": 1,
        },
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
}


def test_run_from_yaml(capsys) -> None:
    _shards("a", (8, 8, 8, 8))
    _shards("b", (5, 2))
    Path("shards.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["fit", "--config", "shards.yaml"]) == 0
    (best,) = Path("runs").rglob("best.ckpt")
    assert main(["test", "--ckpt_path", str(best)]) == 0
    assert main(["predict", "--ckpt_path", str(best)]) == 0
    assert main(["fit", "--config", "shards.yaml", "--resume", "--trainer.max_epochs=3"]) == 0
    (file,) = (path for path in Path().rglob("*.csv") if "predict" in str(path))
    assert [line.split(",")[0] for line in file.read_text().split()[1:]] == [str(number) for number in range(7)]
    assert "webdataset" not in capsys.readouterr().err.lower()


def test_two_processes_evaluate_each_image_once() -> None:
    _shards("a", (8, 8, 8, 8))
    _shards("b", (5, 2))
    Path("count.py").write_text(
        "import lightning as L\n"
        "class Count(L.Callback):\n"
        "    def on_validation_epoch_end(self, trainer, module):\n"
        "        metric = module.stage_metrics('val')['acc']\n"
        "        counted = metric.total\n"
        "        total = int(trainer.strategy.reduce(counted.float().sum(), reduce_op='sum'))\n"
        "        print(f'process {trainer.global_rank}: {total} images, {trainer.global_step} steps', flush=True)\n"
    )
    Path("shards.yaml").write_text(yaml.safe_dump(CONFIG))
    command = ["fit", "--config", "shards.yaml", "--trainer.max_epochs=1"]
    settings = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks+=count.Count"]
    for rank, done in enumerate(warm.ranks(2, warm.module, "lkd", *command, *settings)):
        assert done.code == 0, done.stderr[-2000:]
        assert f"process {rank}: 7 images, 4 steps" in done.stdout
