"""`python -m benchmarks.results`: a small plan is interrupted, moved, shared and merged, and its table is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from benchmarks.results import best_student, bundle
from benchmarks.results.__main__ import main
from benchmarks.results.plan import STUDENT, TEACHER, Cell, cells, read_plan, rows
from benchmarks.results.store import Store, steps
from benchmarks.results.table import interval, summary, write
from benchmarks.warm import CONTEXT
from lkd import ClassificationModule, DigitsDataModule
from lkd.cli.config_files import configs_folder

PLAN = {
    "label": "digits",
    "data": "data/digits",
    "recipes": {"short": "trainer/warmup_cosine"},
    "pairs": {"digits": None},
    "methods": {"kd": {"config": {"teacher_cache": {"versions": 2}}}},
    "seeds": [0],
    "config": {
        "model": {"init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}},
        "trainer": {"max_epochs": 6, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0},
    },
}


def _command(args: Sequence[str], log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", 1, closefd=False)
    torch.set_num_threads(1)
    sys.exit(main(args))


def started(plan: Path, store: Path, *args: str) -> multiprocessing.Process:
    """Start the command in a separate process."""
    process = CONTEXT.Process(target=_command, args=([str(plan), str(store), *args], plan.parent / "log.txt"))
    process.start()
    return process


def finished(*processes: multiprocessing.Process) -> list[int | None]:
    """Return the exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "nothing has happened in 300 s"
        time.sleep(0.01)


def figures(store: Path) -> dict[str, object]:
    """Return all results except for their durations."""
    return {record["id"]: {**record, "seconds": None} for record in Store(store).results()}


def lives(store: Path, method: str) -> int:
    """Return how often a cell was started or resumed."""
    (record,) = store.glob(f"runs/*-{method}-*/version_0/run.yaml")
    return len(yaml.safe_load(record.read_text()))


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("results") / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LKD_CACHE", str(path.parent / "cache"))
        yield path


@pytest.fixture(scope="module")
def whole(plan) -> Path:
    """Return a store that was filled without interruption."""
    store = plan.parent / "whole"
    assert finished(started(plan, store)) == [0]
    return store


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_interruptions_and_moves_do_not_change_the_results(plan, whole, tmp_path, capsys) -> None:
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    process = started(plan, begun)
    until(lambda: list(begun.glob("runs/*-teacher-*/version_0/checkpoints/last.ckpt")))
    process.kill()
    assert finished(process) == [-signal.SIGKILL]
    (teacher,) = (begun / "runs").iterdir()
    until(lambda: _is_free(begun, teacher.name))  # the training process stops by itself

    assert main([str(plan), str(begun), "--bundle", f"{tmp_path}/parts", "--part-size", "100K"]) == 0
    parts = sorted(tmp_path.glob("parts.*"))
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) == 100 * 2**10
    hidden = parts[1].rename(tmp_path / "hidden")
    assert main([str(plan), str(moved), "--merge", f"{tmp_path}/parts"]) == 2
    assert f"differ from those of one bundle in {parts[1].name}" in capsys.readouterr().err
    hidden.rename(parts[1])
    assert main([str(plan), str(moved), "--merge", f"{tmp_path}/parts"]) == 0
    assert f"{teacher.name}: continues after {steps(teacher)} steps" in capsys.readouterr().out

    process = started(plan, moved)
    until(lambda: list(moved.glob("runs/*-student_alone-*/version_0/checkpoints/last.ckpt")))
    process.terminate()
    assert finished(process) == [128 + signal.SIGTERM]
    assert finished(started(plan, moved, "--minutes=0.01")) == [0]
    assert len(figures(moved)) == 1

    assert finished(started(plan, moved), started(plan, moved)) == [0, 0]
    assert figures(moved) == figures(whole)
    assert lives(moved, "teacher") == lives(moved, "student_alone") == 2
    assert lives(moved, "kd") == 1
    log = (plan.parent / "log.txt").read_text()
    assert log.count(" of 3 cells are finished") == 4


def _is_free(store: Path, cell: str) -> bool:
    with Store(store).claimed(cell) as is_free:
        return is_free


def test_finished_store_trains_nothing(plan, whole) -> None:
    before = (plan.parent / "log.txt").read_text()
    assert finished(started(plan, whole)) == [0]
    assert (plan.parent / "log.txt").read_text() == before + "3 of 3 cells are finished\n"
    (row,) = [line for line in (whole / "table.md").read_text().splitlines() if line.startswith("| kd |")]
    (kd,) = [record for record in Store(whole).results() if record["method"] == "kd"]
    assert row.startswith(f"| kd | 1 | {kd['best']['test']:.2f} | {kd['last']['test']:.2f} | ")
    assert not list(whole.rglob("*.ckpt"))


def _without(store: Path, method: str) -> None:
    """Remove the cell of a method."""
    (result,) = store.glob(f"results/*-{method}-*.json")
    result.unlink()
    (store / "weights" / f"{result.stem}.safetensors").unlink()


def test_stores_are_merged(plan, whole, copy, tmp_path, capsys) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    _without(copy, "kd")
    _without(other, "student_alone")
    assert main([str(plan), str(copy), "--merge", str(other)]) == 0
    assert capsys.readouterr().out.endswith(": imported\n")
    assert figures(copy) == figures(whole)
    assert {path.name for path in (copy / "weights").iterdir()} == {path.name for path in (whole / "weights").iterdir()}

    _without(copy, "kd")
    (path,) = copy.glob("results/*-teacher-*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "best": {**record["best"], "weights": "others", "test": 1.0}}))
    assert main([str(plan), str(copy), "--merge", str(other)]) == 0
    said = capsys.readouterr().out
    assert "not changed, although the results in the other store differ" in said
    assert "skipped, because its teacher's weights differ" in said
    assert len(figures(copy)) == 2


def test_complete_configs_of_another_task(tmp_path) -> None:
    """A segmentation plan reports the mean IoU, and its students learn from the teacher that the plan trained."""
    short = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
    configs = {TEACHER: "shapes/teacher", STUDENT: "shapes/student", "kd": "shapes/kd"}
    trainer = {"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0, **short}
    content = {"label": "shapes", "seeds": [0], "complete": {"unet": configs}, "config": {"trainer": trainer}}
    plan, store = tmp_path / "plan.yaml", tmp_path / "store"
    plan.write_text(yaml.safe_dump(content))
    assert finished(started(plan, store)) == [0]
    found = {record["method"]: record for record in Store(store).results()}
    assert {record["best"]["metric"] for record in found.values()} == {"mean IoU"}
    assert found["kd"]["teacher"] == {"id": found[TEACHER]["id"], "weights": found[TEACHER]["best"]["weights"]}
    table = (store / "table.md").read_text()
    assert "The metric is the mean IoU." in table
    assert "Published" not in table
    assert f"| kd | 1 | {found['kd']['best']['test']:.2f} |" in table
    classes = found["kd"]["best"]["classes"]
    assert sum(classes.values()) / len(classes) == pytest.approx(found["kd"]["best"]["test"], abs=1e-4)
    assert "| class | teacher | student alone | kd |" in table
    assert all(f"| {name} |" in table and f" {value:.1f} |" in table for name, value in classes.items())


def test_missing_cells_are_empty(plan, copy, tmp_path) -> None:
    _without(copy, "kd")
    assert main([str(plan), str(copy), "--table", str(tmp_path)]) == 0
    assert "| kd |  |  |  |  |  |  |" in (tmp_path / "table.md").read_text()
    teacher, alone, kd = json.loads((tmp_path / "table.json").read_text())
    assert (kd["n"], kd["planned"], kd["best"], kd["difference"]) == (0, 1, None, None)
    assert alone["difference"] == teacher["difference"] == None  # noqa: E711
    assert (tmp_path / "table.svg").stat().st_size > 1000


def test_students_of_a_replaced_teacher_are_missing(plan, copy, tmp_path, capsys) -> None:
    (teacher,) = [record for record in Store(copy).results() if record["method"] == TEACHER]
    Store(copy).save("results", teacher["id"], teacher | {"best": teacher["best"] | {"weights": "others"}})
    counts = {row["method"]: row["n"] for row in summary(rows(read_plan(str(plan))), Store(copy))}
    assert counts == {TEACHER: 1, STUDENT: 1, "kd": 0}
    Store(copy).weights(teacher["id"]).unlink()
    assert main([str(plan), str(copy)]) == 2
    assert "is missing or changed, although this teacher is finished" in capsys.readouterr().err
    assert main([str(plan), str(tmp_path / "misspelt"), "--table", str(tmp_path)]) == 2
    assert "is not a store; check the path" in capsys.readouterr().err


def test_damaged_bundles_are_rejected(plan, copy, tmp_path, capsys) -> None:
    assert main([str(plan), str(copy), "--bundle", f"{tmp_path}/parts"]) == 0
    (part,) = tmp_path.glob("parts.*")
    whole = part.read_bytes()
    capsys.readouterr()
    for content in (whole[: len(whole) // 2], whole[:1024], b"", whole.replace(b'"seed": 0', b'"seed": 1')):
        part.write_bytes(content)
        assert main([str(plan), str(tmp_path / "moved"), "--merge", f"{tmp_path}/parts"]) == 2
        assert "is damaged, or its parts belong to different bundles" in capsys.readouterr().err
        assert not Store(tmp_path / "moved").results()
    assert main([str(plan), str(tmp_path / "moved"), "--bundle", f"{tmp_path}/parts"]) == 2
    assert "contains nothing to bundle" in capsys.readouterr().err
    assert part.exists()


def test_plans_with_values_of_wrong_types(tmp_path) -> None:
    path = tmp_path / "plan.yaml"
    for change, message in (
        ({"seeds": [0, 0]}, "must differ, got [0, 0]"),
        ({"seeds": []}, "must be a list of integers"),
        ({"seeds": 3}, "got 3"),
        ({"recipes": ["short"]}, "recipes in"),
        ({"recipes": {"short": None}}, "must be the name of a config, got None"),
        ({"pairs": {"digits": 5}}, "pairs.digits in"),
        ({"config": []}, "config in"),
        ({"methods": {"kd": {"config": 5}}}, "methods.kd.config in"),
        ({"pairs": {}}, "must contain data, recipes and pairs"),
    ):
        path.write_text(yaml.safe_dump({**PLAN, **change}))
        with pytest.raises(ValueError, match=re.escape(message)):
            read_plan(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="it is empty or not a mapping"):
        read_plan(str(path))


@pytest.mark.parametrize(
    ("name", "page"), [("two_cores", "cifar100"), ("camvid", "camvid"), ("camvid_weighted", "camvid")]
)
def test_published_tables_are_those_of_the_published_results(name, page, tmp_path) -> None:
    folder = Path(bundle.__file__).parent
    store = Store(folder / "stores" / name)
    write(rows(read_plan(name), store.tuned()), store, tmp_path)
    assert (tmp_path / "table.json").read_text() == (folder / "tables" / f"{name}.json").read_text()
    shown = (folder.parent / f"{page}.md").read_text().splitlines()
    table = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) > 4
    assert set(table) <= set(shown)


def test_differences_are_paired_with_t_intervals() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx([2.0, 2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert interval([1.5]) == {"n": 1, "mean": 1.5, "low": None, "high": None}
    assert interval([2.0, 2.0]) == {"n": 2, "mean": 2.0, "low": 2.0, "high": 2.0}


def test_best_student_has_the_reported_accuracy(whole) -> None:
    network = best_student(whole, "digits", "kd")
    (kd,) = [record for record in Store(whole).results() if record["method"] == "kd"]
    engine = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (tested,) = engine.test(ClassificationModule(network), DigitsDataModule(val_size=0.2), verbose=False)
    assert 100 * tested["test/acc"] == pytest.approx(kd["best"]["test"], abs=0.6)  # float16
    with pytest.raises(ValueError, match="no finished cell of digits with dkd"):
        best_student(whole, "digits", "dkd")


def test_tuned_settings_are_a_row(plan, copy) -> None:
    assert finished(started(plan, copy, "--tune=kd", "--trials=1")) == [0]
    (settings,) = Store(copy).tuned().values()
    (weight,) = settings.values()
    assert 0.09 < weight < 9
    *_, kd, tuned = rows(read_plan(str(plan)), Store(copy).tuned())
    assert (kd.method, tuned.method) == ("kd", "kd, tuned")
    assert tuned.cells[0].configs[-3]["model"]["init_args"] == {"distill_weight": weight}
    assert summary([*rows(read_plan(str(plan))), tuned], Store(copy))[-1]["n"] == 0


def test_ids_depend_on_all_inputs_of_a_cell() -> None:
    cell = Cell("a_b", "short", STUDENT, 0, "digits", {}, ({"seed_everything": 0}, {"trainer": {"a": 1, "b": 2}}))
    assert cell.id == "a_b-short-student_alone-0-97f5e726"  # another id would cause all stores to be trained again
    assert replace(cell, configs=({"seed_everything": 0}, {"trainer": {"b": 2, "a": 1}})).id == cell.id
    changes = [{"label": "others"}, {"configs": ({"seed_everything": 1},)}, {"teacher": "other"}]
    assert len({cell.id, *(replace(cell, **change).id for change in changes)}) == 4
    assert "/" not in replace(cell, method="segmentation/kd").id  # it is the name of a file


def test_plans_train_the_published_settings_in_order() -> None:
    table = rows(read_plan("literature"))
    trained = cells(table)
    names = [cell.method for cell in trained]
    assert names == sorted(names, key=lambda name: {TEACHER: 0, STUDENT: 1}.get(name, 2))
    assert names.count(TEACHER) == 3  # two students share one teacher
    seeds = [cell.seed for cell in trained if cell.method not in (TEACHER, STUDENT)]
    assert seeds == sorted(seeds)
    by_name = {(row.pair, row.method): row for row in table}
    dkd, short = by_name["resnet56_resnet20_100", "dkd"], rows(read_plan("short"))[3]
    assert (dkd.published, short.method) == (71.97, "dkd")
    assert {"model": {"init_args": {"criterion": {"init_args": {"beta": 2.0}}}}} in dkd.cells[0].configs
    assert _warmup(dkd.cells[0]) == 20
    assert _warmup(short.cells[0]) == 5
    slow = {"model": {"init_args": {"optimizer": {"init_args": {"lr": 0.01}}}}}
    assert slow in by_name["resnet32x4_shufflev2_100", STUDENT].cells[0].configs
    assert slow not in by_name["resnet32x4_shufflev2_100", TEACHER].cells[0].configs


def _warmup(cell: Cell) -> int:
    (callbacks,) = [found for config in cell.configs if (found := config.get("trainer", {}).get("callbacks+"))]
    return callbacks[0]["init_args"]["epochs"]


def test_teacher_configs_are_the_pairs_teachers() -> None:
    trained = {cell.pair: cell.configs[1] for cell in cells(rows(read_plan("literature"))) if cell.method == TEACHER}
    files = {path.stem.removesuffix("_100"): path for path in (configs_folder() / "teachers").glob("*.yaml")}
    assert trained == {name: yaml.safe_load(path.read_text()) for name, path in files.items()}


def test_invalid_plans(tmp_path, capsys) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump({**PLAN, "seed": 1}))
    assert main(["plan.yaml", "store"]) == 2
    assert "plan.yaml is not a plan with the keys label, seeds, data" in capsys.readouterr().err
    Path("plan.yaml").write_text(yaml.safe_dump({"label": "", "seeds": [0], "complete": {"unet": {TEACHER: ""}}}))
    assert main(["plan.yaml", "store"]) == 2
    assert "unet has no config for 'student alone'" in capsys.readouterr().err
    assert main(["nothing", "store"]) == 2
    assert (
        "no plan 'nothing'; expected a YAML file or one of camvid, camvid_weighted, detection, literature"
        in capsys.readouterr().err
    )
    for change, message in (
        ({"trainer": {"max_epochs": 1, "max_step": 1}}, "lkd has no setting 'trainer.max_step'"),
        ({"teacher_caches": {"versions": 1}, "trainer": {"max_epochs": 1}}, "no setting 'teacher_caches'"),
        ({}, "neither the recipe nor the plan's config sets trainer.max_epochs"),
    ):
        Path("plan.yaml").write_text(yaml.safe_dump({**PLAN, "config": change}))
        assert main(["plan.yaml", "store"]) == 2
        assert message in capsys.readouterr().err
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN))
    Path("folder").mkdir()
    assert main(["plan.yaml", "store", "--merge", "folder"]) == 2
    assert "folder is not a store" in capsys.readouterr().err
    assert list(Path("store").iterdir()) == []
    with pytest.raises(ValueError, match="such as 15M"):
        bundle.size("15 megabytes")
