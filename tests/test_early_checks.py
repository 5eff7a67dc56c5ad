"""Errors and help that do not require torch, and take less than a second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lkd
from lkd.__main__ import main
from lkd.cli.arguments import prepare
from lkd.cli.config_files import KEYS, run_name
from lkd.cli.early_checks import OPTIONS
from lkd.cli.lightning_cli import LkdCLI

QUICK = """
import sys
from lkd.__main__ import main
code = main({args!r})
heavy = [name for name in ("torch", "lightning", "numpy") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""


@pytest.fixture
def quick():
    """Return a function that runs lkd and returns exit code and output; it fails if lkd has imported torch."""

    def run(*args: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", QUICK.format(args=args)], capture_output=True, text=True)
        assert "imported" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("fit", "lkd fit requires a config, for example 'lkd fit --config digits/kd'"),
        ("fit digits/kd", "configs are passed with --config: lkd fit --config digits/kd"),
        ("fit --config digits/kd teacher.pth", "lkd fit: unexpected argument 'teacher.pth'"),
        ("fit -config digits/kd", "lkd fit has no option '-config'; did you mean '--config'?"),
        (
            "fit --config methods/kd",
            "no networks and no data; add --config pairs/NAME --config data/NAME (pairs/ contains ",
        ),
        (
            "fit --config methods/kd --config pairs/digits",
            "no data; add --config data/NAME (data/ contains cifar10,",
        ),
        ("fit --config data/digits", "the configs specify no networks; add --config pairs/NAME"),
        ("fit --config digits/kd --optimizer.lr 0.1", "use --model.init_args.optimizer.init_args.lr"),
        ("fit --config digits/kd --max_epochs 3", "lkd has no setting 'max_epochs'; use --trainer.max_epochs"),
        ("fit --config digits/kd --batch_size=3", "use --data.init_args.batch_size"),
        ("fit --config digits/kd --temprature 3", "; use --model.init_args.criterion.init_args.temperature"),
        ("fit --config digits/kd --optimiser.lr 0.1", "use --model.init_args.optimizer.init_args.lr"),
        ("fit --config digits/kd --seed 3", "lkd has no setting 'seed'; use --seed_everything"),
        ("fit --config digits/kd --lr=3", "use --model.init_args.optimizer.init_args.lr"),
        ("fit --config digits/kdd", "config 'digits/kdd' not found; similar configs provided by lkd: digits/kd.yaml"),
        ("fit --config nowhere", "config 'nowhere' not found; lkd provides configs in camvid, cifar10, "),
        ("fit --config bad.yaml", "bad.yaml is not valid YAML: while parsing a flow sequence at line 1, column 12"),
        ("fit --config beside.yaml", "has 'p' next to 'class_path: AT'; move it below 'init_args'"),
        ("fit --config key.yaml", "key.yaml: lkd has no setting 'trianer'; did you mean 'trainer'?"),
    ],
)
def test_errors(quick, args: str, says: str) -> None:
    Path("bad.yaml").write_text("model: {a: [1\ntrainer:\n\t- x")
    Path("beside.yaml").write_text("model: {init_args: {criterion: {class_path: AT, p: 2}}}")
    Path("key.yaml").write_text("trianer: {max_epochs: 3}")
    code, text = quick(*args.split())
    assert code == 2
    assert says in text


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_length_of_the_help(quick, command: str) -> None:
    code, text = quick(command, "--help")
    assert code == 0
    lines = text.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 84
    if command != "fit":
        assert f"lkd {command} --ckpt_path FILE" in text
        return
    for module in lkd._HOMES["lkd.modules"]:
        assert module in text or not module.endswith("Module")
    for part in ("CIFAR10", "DKD", "ReviewKD", "--model.init_args.teacher_ckpt", "lkd fit --model.help CLASS"):
        assert part in text


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--model.help", {name for name in lkd._HOMES["lkd.modules"] if name.endswith("Module")}),
        ("--data.help", {"CIFAR10DataModule", "ImageFolderDataModule", "DigitsDataModule"}),
        ("--criterion.help", set(lkd.losses.__all__) - {"CompositeLoss", "DistillLoss", "named_terms"}),
        ("--model.init_args.student.help", {"resnet20", "wrn_40_2", "timm_model"}),
    ],
)
def test_classes_are_listed(quick, option: str, names: set[str]) -> None:
    code, text = quick("fit", option)
    assert code == 0
    assert names <= {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert all(len(line.split()) > 1 for line in text.splitlines() if line.startswith("  "))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--optimizer.help"], "  SGD         Implements stochastic gradient descent"),
        (["--model.init_args.lr_scheduler.help"], "  CosineDecay "),
        (["--optimizer.help", "SGD"], "  momentum: float = 0\n      momentum factor"),
        (["--lr_scheduler.help", "CosineDecay"], "lkd.schedules.CosineDecay\n"),
        (["--lr_scheduler.help", "StepLR"], "torch.optim.lr_scheduler.StepLR\n"),
        (["--trainer.help"], "  max_epochs: "),
        (["--teacher_cache.help"], "lkd.callbacks.TeacherCache\n"),
        (["--help", "all"], "--trainer.max_epochs"),
    ],
)
def test_help_of_settings(capsys, args: list[str], part: str) -> None:
    assert _code(["fit", *args]) == 0
    assert part in capsys.readouterr().out


def _code(args: list[str]) -> int:
    try:
        return main(args)
    except SystemExit as stopped:  # raised by the help of the parser
        return int(stopped.code or 0)


def test_help_of_a_class(capsys) -> None:
    assert main(["fit", "--model.help", "lkd.PastTeacherModule"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("lkd.PastTeacherModule\n")
    for line in ("  student: nn.Module (required)", "  distill_weight: float = ", "  ema_decay: float | None = "):
        assert line in text
    assert len(text.splitlines()) < 80
    assert main(["fit", "--criterion.help", "DKD"]) == 0
    assert "  alpha: float = 1.0\n      Weight of" in capsys.readouterr().out
    assert main(["fit", "--model.help", "lkd.DistilModule"]) == 2
    assert "there is no 'DistilModule' in lkd; did you mean 'DistillModule'?" in capsys.readouterr().err


def test_known_keys_are_those_of_the_parser() -> None:
    found = set()
    weights = ["--model.init_args.student_ckpt", "x.ckpt"]
    for command in ("fit", "validate", "test", "predict"):
        cli = LkdCLI(*prepare([command, "--config", "digits/kd", *weights]), until="parsed")
        actions = cli._parser(command)._actions
        found |= {action.dest.partition(".")[0] for action in actions} - {"==SUPPRESS=="}
    assert found - {*OPTIONS} == {*KEYS} - {"config"}


def test_public_names() -> None:
    code = "import lkd; lkd.losses.KD(); lkd.functional.kd_loss; lkd.callbacks.Speed(); lkd.export.export; "
    code += "lkd.compare.compare; print(*dir(lkd))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert {"DistillModule", "losses", "functional", "callbacks", *lkd.__all__} <= names
    assert not {"Any", "TYPE_CHECKING", "import_module"} & names


@pytest.mark.parametrize(
    "settings",
    [
        ["--model.init_args.student.init_args.in_channels=3"],  # fails when the model is built
        ["--model.init_args.criterion=fails.InStep"],
    ],
)
def test_failed_start_creates_no_run(settings: list[str], monkeypatch, capsys) -> None:
    Path("fails.py").write_text(
        "from lkd import DistillLoss\n"
        "class InStep(DistillLoss):\n"
        "    def forward(self, student, teacher, batch):\n"
        "        raise ValueError('in a step')\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    assert main(["fit", "--config", "digits/kd", "--trainer.accelerator=cpu", *settings]) == 2
    assert not Path("runs").exists()


def test_checkpoint_of_a_folder_is_printed(capsys) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "digits/teacher", *short]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", "digits/kd", "--model.init_args.teacher_ckpt=runs/digits/teacher", *short]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "teacher: runs/digits/teacher/version_0/checkpoints/best.ckpt, val/acc 0." in out
    saved = yaml.safe_load(Path("runs/digits/kd/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["teacher_ckpt"] == "runs/digits/teacher/version_0/checkpoints/best.ckpt"


def test_last_name_is_used() -> None:
    for name in ("a", "b", "c"):
        Path(f"{name}.yaml").write_text("seed_everything: 0" if name == "c" else f"name: runs_of/{name}")
    assert run_name([Path(f"{name}.yaml") for name in "abc"], Path("runs")) == "runs_of/b"
