"""The benchmarks run and report correct counts; the measured values are not tested."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import accuracy, endurance, growth, little, pacing, speed, warm
from lkd.models import resnet20, resnet56


@pytest.fixture(autouse=True)
def _warm(monkeypatch) -> None:
    monkeypatch.setattr(pacing, "START_METHOD", warm.CONTEXT.get_start_method())


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Write a folder with images of the size of CIFAR-10, eight per class and split, and return its path."""
    generator = np.random.default_rng(0)
    for number in range(80):
        for split in ("train", "test"):
            path = tmp_path / "images" / split / str(number % 10) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return str(tmp_path / "images")


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    torch.manual_seed(0)
    torch.save(resnet56(num_classes=10, shortcut="A").state_dict(), tmp_path / "teacher.th")
    return str(tmp_path / "teacher.th")


def test_rows_alternate_their_steps(tmp_path: Path, images: str, teacher: str) -> None:
    arrays = speed.decoded(images, str(tmp_path))
    assert np.load(arrays).shape == (80, 3, 32, 32)
    Path("mine.py").write_text("def make(images, targets, teacher, student, size):\n    return lambda: len(images)\n")
    every = {name: row for name, *row in speed.rows(images, teacher, arrays)}
    settings = every["lkd fit, 32-true"][1]["settings"] + [
        "--data.init_args.batch_size=16",
        "--data.init_args.val_size=20",
    ]
    wanted = [
        ("bare", "bare_lean", {**every["optimized loop, bf16-mixed"][1], "size": 16}, 1),
        ("lkd", "lkd_fit", {"settings": settings}, 1),
        ("mine", "own", {"adapter": "mine.py:make", "images": arrays, "teacher": teacher}, 1),
    ]
    said = []
    found = speed.measured(wanted, rounds=2, steps=2, say=said.append)
    assert [len(row.speeds) for row in found] == [2, 2, 2]
    assert all(row.speed > 0 and row.peak > 1e8 and row.start_up > 0 for row in found)
    first = list(speed.table(found))[2]
    assert first.startswith("| bare | 1.00 | 1.00 to 1.00 |")
    assert said[-2:] == ["round 1 of 2", "round 2 of 2"]


def test_error_of_a_failed_loop() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)broken: .*FileNotFoundError"):
        pacing.Row("broken", "benchmarks.loops:bare_eager", {"images": "none.npy", "teacher": "none.th", "workers": 0})


def test_growth(tmp_path: Path) -> None:
    setting = growth.Setting(batch_size=16, teacher="resnet8", classes=10, images=64)
    line = growth.line(setting, growth.measured(setting, rounds=1, steps=1, folder=str(tmp_path)))
    assert line.startswith("| batch 16, resnet8, 10 classes, 64 images | ")
    assert len(line.split("|")) == 10


def test_long_run(tmp_path: Path) -> None:
    assert " after 2 epochs: " in growth.long_run(str(tmp_path), 2, 4)


def test_accuracy(images: str, teacher: str) -> None:
    (plain, *_, kept) = ([*way, "--data.init_args.val_size=20"] for way in accuracy.WAYS.values())
    found = {name: [accuracy.accuracy(way, 0, images, teacher, 40, 6)] for name, way in (("a", plain), ("b", kept))}
    assert all(0 <= value <= 100 for (value,) in found.values())
    assert len(list(accuracy.table(found))) == 4


def test_little(tmp_path: Path, images: str, monkeypatch, capsys) -> None:
    """All rows are run once, with the given number of steps; repeating the command resumes and writes the table."""
    torch.manual_seed(0)
    torch.save(resnet20(num_classes=10, shortcut="A").state_dict(), "resnet20.th")
    small = ["--seeds=1", "--pool=80", "--epochs=2", "--made=20", "--made_steps=1"]
    monkeypatch.setattr(little, "SHARES", {"all": 1.0, "half": 0.5})
    command = ["little", images, "resnet20.th", *small, "--folder=kept", "--out=little.md"]
    monkeypatch.setattr("sys.argv", [*command, "--only=half"])
    little.main()
    assert len(Path("kept/runs.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr("sys.argv", command)
    little.main()
    lines = Path("kept/runs.jsonl").read_text()
    runs = [json.loads(line) for line in lines.splitlines()]
    assert len(runs) == 8
    assert {run["steps"] for run in runs} == {2}
    table = Path("little.md").read_text()
    assert [line.count("|") for line in table.splitlines()[:-2]] == [6] * 7
    capsys.readouterr()
    little.main()
    assert Path("kept/runs.jsonl").read_text() == lines
    assert Path("little.md").read_text() == table == capsys.readouterr().out


def test_gains_of_little_are_paired_by_seed() -> None:
    row = little.Row("few", {}, 80, {}, 8, 0.1)
    runs = [("few", True, 0, 40.0), ("few", True, 1, 44.0), ("few", False, 0, 43.0), ("few", False, 1, 50.0)]
    runs += [("few", False, 2, 60.0)]
    results = [dict(zip(("row", "alone", "seed", "accuracy"), run, strict=True)) for run in runs]
    assert list(little.table([row], results))[2] == "| few | 42.00 ± 2.83 | 51.00 ± 8.54 | +4.50 | 3 |"


def test_crops_of_photographs(tmp_path: Path) -> None:
    folder = Path(little.parts_of_photographs(6, tmp_path / "parts"))
    parts = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    assert {part.shape for part in parts} == {(32, 32, 3)}
    assert len({part.tobytes() for part in parts}) == 6


def test_endurance(tmp_path: Path) -> None:
    _, kept, _, fits, _ = endurance.variants(epochs=2, worker_epochs=2, cycles=2)
    seen = endurance.watched(kept, str(tmp_path))
    file = tmp_path / "fits.jsonl"
    endurance.fits(["--config=digits/kd", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"], fits.fits, str(file))
    again = [endurance.Look(*json.loads(line)) for line in file.read_text().splitlines()]
    for variant, looks in ((kept, seen), (fits, again)):
        assert [one.at for one in looks] == [1, 2]
        assert all(one.peak >= one.resident >= one.own > 1e8 and one.files > 2 and one.objects > 1e5 for one in looks)
        lines = list(endurance.table(variant, looks))
        unit = "fit" if variant is fits else "epoch"
        grown = re.fullmatch(rf"Peak memory from {unit} 1 to 2: ([+-]\d+\.\d\d)%\.", lines[-2])
        assert grown
        assert float(grown[1]) == pytest.approx(100 * (looks[1].peak / looks[0].peak - 1), abs=0.006)
    assert again[1].modules <= again[0].modules  # the networks are freed after fit


def test_host_time_of_a_step(tmp_path: Path) -> None:
    done = warm.Forked(warm.module, "benchmarks.host", "--steps", "50", "--out", str(tmp_path / "host.md")).wait()
    assert done.code == 0, done.stderr
    _, _, first, alone, _, shares, *_ = (tmp_path / "host.md").read_text().split("\n\n")
    assert float(re.match(r"Host time per step: ([\d.]+) ms \(", first)[1]) > 0
    assert float(re.match(r"Lightning alone: ([\d.]+) ms \(", alone)[1]) > 0
    assert "lightning" in shares
