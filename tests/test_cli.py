"""Output and files of the command line."""

from __future__ import annotations

import csv
import gc
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lkd
from benchmarks import warm
from lkd.__main__ import main
from lkd.cli.arguments import prepare
from lkd.cli.config_files import configs_folder, find_config
from lkd.cli.lightning_cli import LkdCLI

SHORT = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
PREDICTED = Path("runs/predict/version_0/predictions.csv")
RESUMED = {"last.ckpt", "previous.ckpt"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a short run on the digits."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "configs/digits/kd.yaml", *SHORT]) == 0
    return folder / "runs/digits/kd/version_0"


def _scalars(folder: Path, name: str):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars(name)


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_does_not_import_torch(option: str) -> None:
    code = f"import sys; from lkd.__main__ import main; main([{option!r}]); sys.exit('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert lkd.__version__ in answer.stdout


@pytest.mark.parametrize("is_enabled", [True, False])
def test_imports_restore_the_garbage_collector(is_enabled: bool, monkeypatch) -> None:
    """Only a process that runs `lkd` disables the collector and freezes objects; a caller of `main` is not affected."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr("sys.argv", ["lkd", "layers"])
    (gc.enable if is_enabled else gc.disable)()
    try:
        assert main(["layers"]) == 2
        assert (frozen, gc.isenabled()) == ([], is_enabled)
        assert main() == 2
        assert (frozen, gc.isenabled()) == ([False], is_enabled)
    finally:
        gc.enable()


def test_files_of_a_run(run: Path) -> None:
    assert (run / "checkpoints/best.ckpt").is_file()
    assert (run / "checkpoints/last.ckpt").is_file()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "lkd.DistillModule"
    assert config["seed_everything"] == 0


def test_tensorboard_metrics(run: Path) -> None:
    events = EventAccumulator(str(run))
    events.Reload()
    curves = {"loss", "hard", "kd", "acc", "images_per_s"}
    assert {f"train/{name}" for name in curves} <= set(events.Tags()["scalars"])
    assert {"val/acc", "val/loss", "val/teacher_acc", "val/agreement", "lr-SGD"} <= set(events.Tags()["scalars"])
    assert {"final/best_acc", "final/last_acc", "final/teacher_acc"} <= set(events.Tags()["scalars"])
    assert "hp_metric" not in events.Tags()["scalars"]
    assert {"config/text_summary", "networks/text_summary", "custom_scalars__config__"} <= set(events.Tags()["tensors"])
    loss, hard, kd = (events.Scalars(f"train/{name}") for name in ("loss", "hard", "kd"))
    assert len(loss) == 2
    for total, *terms in zip(loss, hard, kd, strict=True):
        assert total.value == pytest.approx(sum(term.value for term in terms), rel=1e-5)
    assert [point.step for point in loss] == [point.step for point in events.Scalars("val/acc")]


def test_final_table(tmp_path, capfd) -> None:
    assert main(["fit", "--config", "digits/kd", *SHORT]) == 0
    shown = capfd.readouterr().out
    assert "Teacher accuracy on the validation images: 99.65%" in shown
    for part in ("teacher", "student (best)", "student (last)", "gap to teacher", " pp ", "5,142", "77,754"):
        assert part in shown
    (best,), (gap,) = (
        re.findall(r"student \(best\)\D+([\d.]+)%", shown),
        re.findall(r"gap to teacher[^+-]+(\S+) pp", shown),
    )
    assert float(gap) == pytest.approx(float(best) - 99.65, abs=0.011)
    assert "Checkpoint:  runs/digits/kd/version_0/checkpoints/best.ckpt" in shown
    assert "lkd test --ckpt_path runs/digits/kd/version_0/checkpoints/best.ckpt" in shown
    assert "tensorboard --host localhost --logdir runs/digits/kd" in shown


def test_partial_accuracy_is_labelled(capfd) -> None:
    limits = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=0.6"]
    assert main(["fit", "--config", "digits/kd", *SHORT, *limits]) == 0
    shown = capfd.readouterr().out
    assert "Teacher accuracy on 128 of 288 validation images: " in shown
    assert "accuracy on 128 of 288 validation images" in shown.replace("Teacher accuracy", "")
    best = "runs/digits/kd/version_0/checkpoints/best.ckpt"
    for command, images in (("validate", "128 of 288 validation images"), ("test", "192 of 359 test images")):
        assert main([command, "--ckpt_path", best, *limits[1:]]) == 0
        assert f"evaluated on {images}" in capfd.readouterr().out


def test_flops_equal_a_manual_count() -> None:
    from lkd.callbacks.monitor import network_size
    from lkd.models import CIFARResNet

    network = CIFARResNet(8, (4, 4, 8, 16), 10, in_channels=1)
    stages = [(4, 4, 64), (4, 8, 16), (8, 16, 4)]
    macs = 64 * 9 * 4 + 16 * 10
    for before, after, pixels in stages:
        macs += pixels * 9 * after * (before + after) + (pixels * before * after if before != after else 0)
    size = network_size("student", network, torch.zeros(1, 1, 8, 8))
    assert size.flops == 2 * macs
    assert size.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert network.training


def test_checkpoint_is_sufficient_for_test(run: Path, capsys) -> None:
    assert main(["test", "--ckpt_path", str(run / "checkpoints/best.ckpt")]) == 0
    shown = capsys.readouterr().out
    assert "test/acc" in shown
    assert "test/teacher_acc" in shown
    assert not Path("lightning_logs").exists()


def test_student_is_evaluated_without_its_teacher(capsys, recwarn) -> None:
    torch.save(lkd.models.resnet14(num_classes=10, in_channels=1).state_dict(), "teacher.pth")
    teacher = ["--model.init_args.teacher=lkd.models.resnet14", "--model.init_args.teacher.init_args.in_channels=1"]
    weights = "--model.init_args.teacher_ckpt=teacher.pth"
    assert main(["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=1", *teacher, weights]) == 0
    Path("teacher.pth").unlink()
    capsys.readouterr()
    assert main(["test", "--ckpt_path", "runs/digits/kd/version_0/checkpoints/best.ckpt"]) == 0
    shown = capsys.readouterr().out
    assert "test/acc" in shown
    assert "teacher" not in shown
    assert [str(warning.message) for warning in recwarn if "without its teacher" in str(warning.message)]


def test_predictions(run: Path, capsys) -> None:
    assert main(["predict", "--ckpt_path", str(run / "checkpoints/best.ckpt")]) == 0
    assert f"Predictions for 359 images written to {PREDICTED}" in capsys.readouterr().out
    rows = list(csv.DictReader(PREDICTED.read_text().splitlines()))
    assert len({row["index"] for row in rows}) == len(rows) == 359
    module = L.LightningModule.load_from_checkpoint(run / "checkpoints/best.ckpt").eval()
    data = lkd.DigitsDataModule(batch_size=359)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    with torch.no_grad():
        probability, chosen = module(batch.input).softmax(1).max(1)
    assert [int(row["class"]) for row in rows] == chosen.tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(probability.tolist(), abs=2e-6)


def test_predictions_of_a_network_with_more_classes_than_the_data() -> None:
    torch.manual_seed(0)
    torch.save(lkd.models.resnet8(num_classes=90, in_channels=1).state_dict(), "more.pth")
    more = ["--model.init_args.model.init_args.num_classes=90", "--model.init_args.model_ckpt=more.pth"]
    assert main(["predict", "--config=digits/teacher", *more, "--trainer.accelerator=cpu"]) == 0
    rows = list(csv.DictReader(PREDICTED.read_text().splitlines()))
    assert {row["class_name"] for row in rows if int(row["class"]) > 9} == {""}


def test_resume_from_the_last_checkpoint(run: Path, capsys) -> None:
    last = str(run / "checkpoints/last.ckpt")
    assert main(["fit", "--ckpt_path", last, "--trainer.max_epochs=3", "--trainer.default_root_dir=more"]) == 0
    (more,) = Path("more").rglob("last.ckpt")
    old, new = (torch.load(path, weights_only=True) for path in (last, more))
    assert (old["epoch"], new["epoch"]) == (2, 3)
    assert new["global_step"] == old["global_step"] * 3 // 2


def test_newest_checkpoint_of_a_run(capsys) -> None:
    for _ in range(2):
        assert main(["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=1"]) == 0
    prepared = prepare(["fit", "--config", "digits/kd", "--ckpt_path", "last"]).args
    assert prepared[-1] == "--ckpt_path=runs/digits/kd/version_1/checkpoints/last.ckpt"
    assert main(["test", "--config", "digits/kd", "--ckpt_path", "best"]) == 0
    assert "test/acc" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_precisions(precision: str) -> None:
    assert (
        main(["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=1", f"--trainer.precision={precision}"])
        == 0
    )


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        ("--trainer.enable_checkpointing=false", set()),
        ("--trainer.fast_dev_run=true", set()),
        ("--checkpoint.save_top_k=-1", {"best-epoch=0.ckpt", "best-epoch=1.ckpt", *RESUMED}),
        ("--trainer.limit_val_batches=0", {"best.ckpt", *RESUMED}),
        ("--data.init_args.val_size=0", {"best.ckpt", *RESUMED}),
    ],
)
def test_checkpoints_of_a_run(setting: str, left: set[str]) -> None:
    assert main(["fit", "--config", "digits/kd", *SHORT, setting]) == 0
    assert {path.name for path in Path().rglob("*.ckpt")} == left


def test_two_runs_without_a_logger() -> None:
    for seed in (1, 2):
        settings = ["--trainer.max_epochs=1", "--trainer.logger=false", f"--seed_everything={seed}"]
        assert main(["fit", "--config", "digits/kd", *SHORT, *settings]) == 0
    runs = [Path(f"runs/digits/kd/version_{number}") for number in (0, 1)]
    assert [yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] for run in runs] == [1, 2]
    assert all((run / "checkpoints/best.ckpt").is_file() for run in runs)
    assert not Path("config.yaml").exists()
    assert main(["test", "--config", "digits/kd", "--ckpt_path", "best"]) == 0


def test_best_of_several_checkpoints(capfd) -> None:
    """The learning rate grows with each epoch, so the best of the saved checkpoints is not the newest."""
    schedule = "--model.init_args.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR"
    grows = [
        schedule,
        "--model.init_args.lr_scheduler.init_args.gamma=9",
        "--model.init_args.optimizer.init_args.lr=.02",
    ]
    fit = ["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=4", "--checkpoint.save_top_k=3"]
    slow = "--model.init_args.optimizer.init_args.lr=0.02"
    assert main([*fit, *grows, slow, "--trainer.gradient_clip_val=1"]) == 0
    folder = Path("runs/digits/kd/version_0")
    figures = [event.value for event in _scalars(folder, "val/acc")]
    best = figures.index(max(figures))
    assert best < 3
    shown = capfd.readouterr().out
    assert f"Checkpoint:  {folder}/checkpoints/best-epoch={best}.ckpt" in shown
    prepared = prepare(["test", "--config", "digits/kd", "--ckpt_path", "best"]).args
    assert prepared[-1] == f"--ckpt_path={folder}/checkpoints/best-epoch={best}.ckpt"


@pytest.mark.parametrize(("explicit", "mode"), [([], "min"), (["--checkpoint.mode=max"], "max")])
def test_lowest_loss_is_the_best(explicit: list[str], mode: str, capfd) -> None:
    settings = ["--checkpoint.monitor=val/loss", *explicit]
    assert main(["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=3", *settings]) == 0
    folder = Path("runs/digits/kd/version_0")
    states = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"].values()
    (kept,) = [float(state["best_model_score"]) for state in states if state.get("monitor") == "val/loss"]
    figures = [event.value for event in _scalars(folder, "val/loss")]
    assert kept == pytest.approx({"min": min, "max": max}[mode](figures))
    assert f"Checkpoint:  {folder}/checkpoints/best.ckpt" in capfd.readouterr().out


def test_last_checkpoint_contains_all_steps() -> None:
    settings = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"]
    assert main(["fit", "--config", "digits/kd", *SHORT, *settings]) == 0
    (last,) = Path("runs").rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 3


def test_teacher_is_the_best_checkpoint_of_the_newest_run() -> None:
    for _ in range(2):
        assert main(["fit", "--config", "digits/teacher", *SHORT, "--trainer.max_epochs=1"]) == 0
    fit = ["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=1"]
    assert main([*fit, "--model.init_args.teacher_ckpt=runs/digits/teacher"]) == 0
    config = yaml.safe_load(Path("runs/digits/kd/version_0/config.yaml").read_text())
    best = "runs/digits/teacher/version_1/checkpoints/best.ckpt"
    assert config["model"]["init_args"]["teacher_ckpt"] == best


def test_csv_logger_has_the_same_metrics() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.init_args.save_dir=csv"]
    assert main(["fit", "--config", "digits/kd", *SHORT, *logger]) == 0
    (metrics,) = Path("csv").rglob("metrics.csv")
    assert {"train/loss", "train/kd", "val/acc", "val/teacher_acc"} <= set(
        metrics.read_text().splitlines()[0].split(",")
    )


@pytest.mark.parametrize("how", ["option", "file"])
def test_another_class_uses_its_own_defaults(how: str) -> None:
    """SGD's learning rate, momentum and weight decay, from the config or the signature, are not passed to AdamW."""
    Path("own.yaml").write_text(
        "model:\n  class_path: lkd.DistillModule\n  init_args:\n    optimizer: {class_path: torch.optim.AdamW}\n"
    )
    given = ["--config", "own.yaml"] if how == "file" else ["--model.init_args.optimizer=torch.optim.AdamW"]
    assert main(["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=1", *given]) == 0
    (saved,) = Path("runs").rglob("config.yaml")
    optimizer = yaml.safe_load(saved.read_text())["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["lr"] == 0.001
    assert optimizer["init_args"]["weight_decay"] == 0.01


def test_exit_code_of_sigterm() -> None:
    command = ["fit", "--config", "digits/kd", *SHORT, "--trainer.max_epochs=1000"]
    process = warm.Forked(warm.module, "lkd", *command)
    while not list(Path("runs").rglob("last.ckpt")):
        time.sleep(0.2)
        assert process.is_alive
    process.send(signal.SIGTERM)
    done = process.wait(120)
    assert done.code == 143
    assert "resume with: lkd fit --ckpt_path runs/digits/kd/version_0/checkpoints/last.ckpt" in done.stdout


def test_class_of_the_run_is_restored(run: Path) -> None:
    module = L.LightningModule.load_from_checkpoint(run / "checkpoints/best.ckpt")
    assert type(module) is lkd.DistillModule
    assert module.criterion.temperature == 4.0
    with pytest.raises(Exception, match="model"):
        lkd.ClassificationModule.load_from_checkpoint(run / "checkpoints/best.ckpt")


OWN = """
    from torch import Tensor
    from lkd import Batch, DistillLoss, DistillModule, Outputs

    class Mine(DistillModule):
        def __init__(self, *args, stretch: float = 2.0, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.stretch = stretch

    class Gap(DistillLoss):
        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            return (student.logits - teacher.logits).abs().mean()
"""


def test_own_classes_in_the_current_folder(tmp_path) -> None:
    Path("own.py").write_text(textwrap.dedent(OWN))
    settings = ["--model=own.Mine", "--model.init_args.stretch=3", "--model.init_args.criterion=own.Gap"]
    command = [sys.executable, "-c", "import sys; from lkd.__main__ import main; sys.exit(main())"]
    done = subprocess.run([*command, "fit", "--config", "digits/kd", *settings, *SHORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
        import lightning as L, own
        module = L.LightningModule.load_from_checkpoint("runs/digits/kd/version_0/checkpoints/best.ckpt")
        print(type(module) is own.Mine, type(module.criterion) is own.Gap, module.stretch)
        print(type(own.DistillModule.load_from_checkpoint("runs/digits/kd/version_0/checkpoints/best.ckpt")).__name__)
    """
    Path("load.py").write_text(textwrap.dedent(code))
    shown = warm.Forked(warm.script, "load.py").wait()
    assert shown.stdout.split() == ["True", "True", "3.0", "Mine"], shown.stderr  # a base class loads the saved class


def test_names_of_runs() -> None:
    assert prepare(["fit", "--config", "configs/digits/kd.yaml"])[1] == "digits/kd"
    assert prepare(["fit", "--config=data/digits", "--config", "methods/kd"])[1] == "digits+kd"
    Path("mine.yaml").write_text("{}")
    assert prepare(["fit", "-c", "mine.yaml"]) == (["fit", "--config=mine.yaml"], "mine", False)
    configs = ["--config=pairs/digits", "--config=data/digits", "--config=methods/kd"]
    assert prepare(["fit", *configs]).name == "digits+kd"


@pytest.mark.parametrize(
    "setting",
    [
        ("criterion.init_args.teacher_pooled_layer", "null"),
        ("criterion.init_args", "{teacher_pooled_layer: null, pooled_weight: 2.0}"),
        ("criterion", "{class_path: lkd.losses.BackboneKD, init_args: {teacher_pooled_layer: null}}"),
    ],
)
@pytest.mark.parametrize("joint", ["=", " "])
def test_null_is_not_a_string(setting: tuple[str, str], joint: str) -> None:
    """This applies to an argument that accepts both, in a nested class."""
    name, value = setting
    args = ["fit", "--config", "pairs/digits", "--model=lkd.DistillModule"]
    given = f"--model.init_args.{name}{joint}{value}".split(" ", maxsplit=joint.count(" "))
    args += ["--model.init_args.criterion=lkd.losses.BackboneKD", *given]
    model = LkdCLI(*prepare(args), until="parsed", needs_data=False).config["fit"].model.init_args
    assert model.criterion.init_args.teacher_pooled_layer is None
    assert model.criterion.init_args.student_pooled_layer == "@pooled"
    assert model.teacher is not None


@pytest.mark.parametrize("root", ["runs", "elsewhere/runs"])
def test_name_of_a_saved_config(root: str) -> None:
    """The name contains the subfolders below the folder of all runs; outside of it, the name is that of the config."""
    folder = Path(root, "digits/kd/version_0")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 1")
    facts = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "optimizer_states": []}
    torch.save(facts, folder / "checkpoints/last.ckpt")
    args = ["fit", "--config", str(folder / "config.yaml"), "--ckpt_path", "last"]
    where = [] if root == "runs" else ["--trainer.default_root_dir", root]
    prepared, name, _ = prepare([*args, *where])
    assert name == "digits/kd"
    assert prepared[-1] == f"--ckpt_path={folder}/checkpoints/last.ckpt"
    assert prepare(["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir=other"])[1] == "kd"


def test_files_take_precedence_over_included_configs() -> None:
    Path("configs/digits").mkdir(parents=True)
    Path("configs/digits/kd.yaml").write_text("{}")
    assert find_config("configs/digits/kd.yaml") == Path("configs/digits/kd.yaml")
    assert find_config("configs/digits/student.yaml") == configs_folder() / "digits/student.yaml"


def test_folder_selects_its_best_checkpoint(capsys) -> None:
    assert main(["fit", "--config=digits/kd", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]) == 0
    for place in ("runs/digits/kd", "runs/digits/kd/version_0"):
        capsys.readouterr()
        assert main(["test", f"--ckpt_path={place}", "--trainer.accelerator=cpu"]) == 0
        assert "test/acc" in capsys.readouterr().out
    Path("nothing").mkdir()
    assert main(["test", "--ckpt_path=nothing"]) == 2
    assert "no run in nothing has a best.ckpt" in capsys.readouterr().err


def test_one_line_per_epoch_without_a_terminal(capfd) -> None:
    """A fit without a terminal shows no progress bar. The last lines report feature metrics and the CSV file."""
    Path("more.yaml").write_text(
        "trainer:\n  callbacks+: [{class_path: lkd.callbacks.KNN}]\n"
        "  logger: [{class_path: CSVLogger, init_args: {save_dir: csv}}]\n"
    )
    config = ["--config", "digits/kd", "--config", "more.yaml"]
    assert main(["fit", *config, *SHORT[:2], "--trainer.limit_train_batches=2"]) == 0
    shown = capfd.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    number = r"[\d.e+-]+"
    figures = rf"train/loss {number}, train/acc {number}, val/acc {number}"
    assert re.fullmatch(rf"epoch 1 of 2: {figures}, 0:00:\d\d, 0:00:\d\d left", lines[0])
    assert re.fullmatch(rf"epoch 2 of 2: {figures}, 0:00:\d\d", lines[1])
    assert len(lines) == 2
    (path,) = Path().rglob("metrics.csv")
    assert f"Metrics:     {path}" in shown
    accuracy = [row["val/knn_acc"] for row in csv.DictReader(path.open()) if row["val/knn_acc"]][-1]
    assert re.search(rf"student \(last\), val/knn_acc\W+{float(accuracy):.2%}", shown)


def test_best_checkpoint_requires_a_name(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run.parents[3])
    assert main(["test", "--ckpt_path", "best"]) == 2
    error = capsys.readouterr().err
    assert (
        "add --name NAME or the --config of the run, or give the path of a checkpoint; available: runs/digits/kd/"
        in error
    )
    assert main(["test", "--ckpt_path", "best", "--name", "digits/kd", "--trainer.limit_test_batches=1"]) == 0
