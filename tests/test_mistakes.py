"""Each error is reported in one sentence that states the remedy, with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lkd.__main__ import main
from lkd.models import resnet8, resnet14

SHORT = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def error_of(capsys, monkeypatch):
    """Return a function that runs lkd and returns its error message."""
    monkeypatch.delenv("LKD_DEBUG", raising=False)

    def run(*args: str) -> str:
        assert main([*args]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lkd: error: ")]
        assert "Traceback" not in line
        return line.removeprefix("lkd: error: ")

    return run


@pytest.fixture
def fit(error_of):
    """Return a function that runs `lkd fit` on the digits with some settings."""
    return lambda *settings: error_of("fit", "--config", "configs/digits/kd.yaml", *SHORT, *settings)


def _changed(*path: str, name: str, value: object = None) -> str:
    """Write a copy of the digits' config with one key renamed or one value changed, and return its name."""
    from lkd.cli.config_files import find_config

    config = yaml.safe_load(find_config("digits/kd").read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[name] = place.pop(path[-1]) if value is None else value
    Path("changed.yaml").write_text(yaml.safe_dump(config))
    return "changed.yaml"


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        (("trainer",), "trianer", "changed.yaml: lkd has no setting 'trianer'; did you mean 'trainer'?"),
        (
            ("trainer", "max_epochs"),
            "max_epoch",
            "lkd has no setting 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?",
        ),
        (
            ("model", "init_args", "student"),
            "studnet",
            "lkd.DistillModule has no setting 'studnet'; did you mean 'student'?",
        ),
        (
            ("model", "init_args", "criterion", "init_args", "temperature"),
            "temprature",
            "lkd.losses.KD has no setting 'temprature'; did you mean 'temperature'?",
        ),
        (
            ("model", "init_args", "student", "init_args", "depth"),
            "dept",
            "lkd.models.CIFARResNet has no setting 'dept'; did you mean 'depth'?",
        ),
        (
            ("model", "init_args", "optimizer", "init_args", "lr"),
            "lrr",
            "torch.optim.SGD has no setting 'lrr'; did you mean 'lr'?",
        ),
        (
            ("data", "init_args", "batch_size"),
            "batchsize",
            "lkd.DigitsDataModule has no setting 'batchsize'; did you mean 'batch_size'?",
        ),
        (("model", "init_args"), "init_arg", "changed.yaml has a key 'init_arg'; did you mean 'init_args'?"),
        (
            ("model", "class_path"),
            "classpath",
            "changed.yaml has a key 'classpath'; did you mean 'class_path'?",
        ),
    ],
)
def test_misspelt_key(error_of, path, name, message) -> None:
    assert message in error_of("fit", "--config", _changed(*path, name=name))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "--model.init_args.distil_weight=1",
            "lkd.DistillModule has no setting 'distil_weight'; did you mean 'distill_weight'?",
        ),
        (
            "--model.init_args.temprature=1",
            "DistillModule has no setting 'temprature'; use --model.init_args.criterion.init_args.temperature",
        ),
        ("--data.batchsize=1", "lkd.DigitsDataModule has no setting 'batchsize'; did you mean 'batch_size'?"),
        (
            "--trainer.max_eposch=1",
            "lkd has no setting 'trainer.max_eposch'; did you mean 'trainer.max_epochs'?",
        ),
        ("--trainer.max_epoch=1", "lkd has no setting 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        ("--confg=a.yaml", "lkd has no setting 'confg'; did you mean 'config'?"),
        ("--trainer.max_epochs=three", "trainer.max_epochs: expected an integer, got three"),
        (
            "--speed.compile=maybe",
            "speed.compile: expected one of auto, off, default, reduce-overhead, max-autotune, got",
        ),
        ("--data.init_args.val_size=few", "data.val_size: expected a number, got few"),
        ("--data.init_args.batch_size=many", "data.batch_size: expected an integer, got many"),
    ],
)
def test_misspelt_option(fit, setting, message) -> None:
    assert message in fit(setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.init_args.criterion=lkd.losses.KDD", "there is no 'KDD' in lkd.losses; did you mean 'KD'?"),
        (
            "--model.init_args.student=lkd.models.resnet9",
            "there is no 'resnet9' in lkd.models; did you mean 'resnet8'?",
        ),
        (
            "--data=lkd.DigitDataModule",
            "there is no 'DigitDataModule' in lkd; did you mean 'DigitsDataModule'?",
        ),
        ("--model=lkd.DistilModule", "there is no 'DistilModule' in lkd; did you mean 'DistillModule'?"),
        ("--model=lkdd.DistillModule", "there is no module 'lkdd'"),
        ("--model.init_args.optimizer=torch.optim.Addam", "there is no 'Addam' in torch.optim; did you mean 'Adam'?"),
        ("--model.init_args.lr_scheduler=torch.optim.lr_scheduler.StepLR", "StepLR requires values for step_size"),
        ("--model.init_args.criterion=DKDD", "there is no class 'DKDD'; did you mean 'lkd.losses.DKD'?"),
        ("--model=DistilModule", "there is no class 'DistilModule'; did you mean 'lkd.DistillModule'?"),
        ("--data=DigitDataModule", "there is no class 'DigitDataModule'; did you mean 'lkd.DigitsDataModule'?"),
        ("--trainer.callbacks=EarlyStoping", "did you mean 'lightning.pytorch.callbacks.EarlyStopping'?"),
        ("--trainer.logger=TensorBordLogger", "did you mean 'lightning.pytorch.loggers.TensorBoardLogger'?"),
        ("--model.init_args.lr_scheduler=CosineAnealingLR", "'torch.optim.lr_scheduler.CosineAnnealingLR'?"),
        ("--model.init_args.student=resnet9", "there is no class 'resnet9'; did you mean 'lkd.models.resnet8'?"),
        ("--model.init_args.criterion=math.pi", "model.criterion: Import path does not correspond to a subclass"),
    ],
)
def test_misspelt_class(fit, setting, message) -> None:
    assert message in fit(setting)


def test_unknown_command(error_of) -> None:
    assert error_of("fti") == "unknown command 'fti'; did you mean 'fit'?"


def test_missing_files(error_of, fit) -> None:
    assert "config 'digits/kdd.yaml' not found; similar configs provided by lkd: digits/kd.yaml" in error_of(
        "fit", "--config", "digits/kdd.yaml"
    )
    assert "checkpoint 'best.ckpt' does not exist" in fit("--ckpt_path=best.ckpt")
    assert "weights file not found: teacher.pth" in fit("--model.init_args.teacher_ckpt=teacher.pth")
    assert "lkd:digits_resnet8" in fit("--model.init_args.teacher_ckpt=lkd:digits")
    assert "no run in runs/digits/kd has a last.ckpt" in fit("--ckpt_path=last")
    assert "--config: expected one argument" in error_of("fit", "--config")
    Path("runs/shop/version_0/checkpoints").mkdir(parents=True)
    missing = "checkpoint 'runs/shp' does not exist; did you mean 'runs/shop'?"
    assert error_of("test", "--ckpt_path=runs/shp") == error_of("export", "runs/shp") == missing
    saved = "runs save their checkpoints in runs/<name>/version_<n>/checkpoints/"
    assert error_of("compare", "runs/none") == f"checkpoint 'runs/none' does not exist; {saved}"
    (Path("runs/shop/version_0/checkpoints") / "last.ckpt").touch()
    assert "does not exist; available: runs/shop/version_0/checkpoints/last.ckpt" in error_of("compare", "none")
    Path("lone.ckpt").touch()
    assert "give the config of its training run" in error_of("test", "--ckpt_path", "lone.ckpt")


def test_nothing_to_run(error_of) -> None:
    assert "lkd fit requires a config, for example 'lkd fit --config digits/kd'" in error_of("fit")
    assert "lkd test requires a checkpoint, for example 'lkd test --ckpt_path runs/" in error_of("test")
    assert "lkd.DistillModule requires values for student" in error_of(
        "fit", "--model=lkd.DistillModule", "--data=lkd.DigitsDataModule"
    )


def test_invalid_yaml(error_of) -> None:
    Path("bad.yaml").write_text("model: {a: [1\ntrainer:\n\t- x")
    assert "bad.yaml is not valid YAML" in error_of("fit", "--config", "bad.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "changed.yaml contains no settings; expected keys such as model"),
        ("- a\n- b", "changed.yaml contains no settings"),
        ("trainer: [1]", "changed.yaml: expected settings below 'trainer', got [1]"),
        ("model:", "changed.yaml: expected settings below 'model', got None"),
    ],
)
def test_invalid_structure_of_yaml(error_of, text, message) -> None:
    Path("changed.yaml").write_text(text)
    assert message in error_of("fit", "--config", "changed.yaml")


def test_views_of_a_method_before_the_data(error_of) -> None:
    message = error_of("fit", "--config", "methods/mlkd", "--config", "data/digits", "--config", "pairs/digits")
    assert message == "a config sets 'views' of the data before the data module is given; put --config data/NAME first"


CRITERIA = """
from lkd import DistillLoss
class Vector(DistillLoss):
    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).square().mean(1)
class Number(DistillLoss):
    def forward(self, student, teacher, batch):
        return {"gap": 1.0}
"""


def test_criterion_without_a_scalar(error_of, monkeypatch) -> None:
    Path("returns.py").write_text(CRITERIA)
    monkeypatch.syspath_prepend(Path.cwd())
    fit = ["fit", "--config", "digits/kd", *SHORT]
    message = error_of(*fit, "--model.init_args.criterion=returns.Vector")
    assert "the criterion vector must return a scalar tensor or a dict of them, got a tensor of shape (64,)" in message
    assert "got float" in error_of(*fit, "--model.init_args.criterion=returns.Number")


def test_misspelt_option_that_is_not_a_setting(fit) -> None:
    assert "did you mean 'resume'?" in fit("--resum")


def test_evaluation_without_a_checkpoint(error_of) -> None:
    message = error_of("test", "--config", "configs/digits/kd.yaml")
    assert "lkd test requires a checkpoint" in message
    assert "--ckpt_path" in message


def test_class_counts(fit) -> None:
    settings = ["--model.init_args.teacher_ckpt=null", "--model.init_args.teacher.init_args.num_classes=12"]
    assert "the student has 10 classes, but the teacher has 12" in fit(*settings)
    settings = [f"--model.init_args.{name}.init_args.num_classes=7" for name in ("student", "teacher")]
    assert "the data has 10 classes, but the student has only 7" in fit(
        "--model.init_args.teacher_ckpt=null", *settings
    )


def test_channels(fit) -> None:
    message = fit("--model.init_args.student.init_args.in_channels=3")
    assert "the student does not accept inputs of shape (1, 1, 8, 8)" in message
    assert "in_channels" in message


LABELS = """
import torch
from torch.utils.data import TensorDataset
import lkd

class Known(lkd.ImageDataModule):
    num_classes, input_shape, mean, std = 10, (1, 8, 8), (0.5,), (0.5,)
    def make_dataset(self, split):
        if split != "val":
            return TensorDataset(torch.zeros(60, 1, 8, 8, dtype=torch.uint8), torch.arange(60) % 12)

class Foreign(lkd.DigitsDataModule):
    def setup(self, stage):
        super().setup(stage)
        for dataset in self.datasets.values():
            dataset.target = dataset.target + 5
"""


@pytest.mark.parametrize("kind", ["Known", "Foreign"])
def test_label_out_of_range(error_of, kind, monkeypatch) -> None:
    Path(f"labels_{kind.lower()}.py").write_text(LABELS)
    monkeypatch.syspath_prepend(Path.cwd())
    config = ["--config", "pairs/digits", "--config", "methods/kd"]
    message = error_of("fit", *config, f"--data=labels_{kind.lower()}.{kind}", *SHORT)
    assert ("such as 10" if kind == "Known" else "a label is out of range") in message
    assert "0 to 9" in message or "0..9" in message


def test_unknown_layer(error_of) -> None:
    Path("hints.py").write_text(
        "from lkd import DistillLoss\n"
        "class Hint(DistillLoss):\n"
        "    def __init__(self, layer: str) -> None:\n"
        "        super().__init__([layer], [layer])\n"
        "    def forward(self, student, teacher, batch):\n"
        "        return (student.features - teacher.features).mean()\n"
    )
    criterion = [
        "--model.init_args.criterion=hints.Hint",
        "--model.init_args.criterion.init_args.layer=layr2",
    ]
    message = error_of("fit", "--config", "digits/kd", *criterion)
    assert "CIFARResNet has no layer 'layr2'; nearest names: layer2" in message


def _images(*names: str) -> str:
    for name in names:
        Path("tree", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(Path("tree", name))
    return "--data.init_args.root=tree"


def _folder(error_of, root: str, *settings: str) -> str:
    configs = ["--config", "data/folder", "--config", "pairs/resnet56_resnet20_10"]
    classes = [f"--model.init_args.{name}.init_args.num_classes=2" for name in ("student", "teacher")]
    small = [
        "--data.init_args.image_size=32",
        "--data.init_args.batch_size=4",
        "--data.init_args.num_workers=0",
    ]
    return error_of("fit", *configs, *classes, *small, root, *SHORT, *settings)


def test_image_folders(error_of) -> None:
    assert "nowhere" in _folder(error_of, "--data.init_args.root=nowhere")
    Path("tree/train").mkdir(parents=True)
    assert "tree/train" in _folder(error_of, "--data.init_args.root=tree")
    Path("tree/train/cat").mkdir()
    Path("tree/train/dog").mkdir()
    message = _folder(error_of, _images("test/cat/0.png", "test/dog/0.png"))
    assert "no images in these class folders of tree/train: cat, dog" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image(error_of, workers: int) -> None:
    root = _images(
        *(f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(8))
    )
    Path("tree/train/dog/5.png").write_bytes(b"no image")
    settings = [
        "--data.init_args.val_size=2",
        "--data.init_args.batch_size=2",
        f"--data.init_args.num_workers={workers}",
    ]
    message = _folder(error_of, root, *settings)
    assert "tree/train/dog/5.png cannot be read" in message


def test_missing_data(error_of, monkeypatch) -> None:
    def offline(*args: object, **rest: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    torch.save(resnet14(num_classes=10).state_dict(), "teacher.pth")
    configs = ["--config", "data/cifar10", "--config", "pairs/resnet56_resnet20_10"]
    message = error_of("fit", *configs, *SHORT)
    assert "cifar-10-python.tar.gz" in message
    assert "data" in message
    assert "configs/digits/kd.yaml needs no download" in message


def test_invalid_checkpoint(fit) -> None:
    Path("bytes.ckpt").write_bytes(b"no checkpoint")
    assert "bytes.ckpt is corrupt, or is not a checkpoint that PyTorch can read" in fit("--ckpt_path=bytes.ckpt")
    torch.save(resnet8(num_classes=10).state_dict(), "weights.pth")
    message = fit("--ckpt_path=weights.pth")
    assert (
        "weights.pth is not a complete checkpoint as saved by `lkd fit`; load weights alone with --model.init_args"
        in message
    )
    assert main(["fit", "--config", "configs/digits/kd.yaml", *SHORT, "--checkpoint.save_weights_only=true"]) == 0
    assert "best.ckpt is not a complete checkpoint" in fit("--ckpt_path=best")


def test_checkpoint_of_another_network(fit, error_of) -> None:
    assert main(["fit", "--config", "configs/digits/kd.yaml", *SHORT]) == 0
    other = "--model.init_args.student=lkd.models.resnet14"
    message = fit("--ckpt_path=last", other, "--model.init_args.student.init_args.in_channels=1")
    assert "the checkpoint does not match this DistillModule; missing: model.layer1.1.conv1.weight" in message
    assert "use the config of the run that saved it" in message
    assert "this checkpoint was saved by lkd.DistillModule, not by ClassificationModule" in error_of(
        "test", "--config", "digits/student", "--ckpt_path", "runs/digits/kd/version_0/checkpoints/best.ckpt"
    )


def test_weights_of_different_shapes(fit) -> None:
    torch.save(resnet8(num_classes=12, in_channels=1).state_dict(), "twelve.pth")
    message = fit("--model.init_args.teacher_ckpt=twelve.pth")
    assert "fc.weight is (12, 64) in the file and (10, 64) in the network" in message


def test_numbers_out_of_range(fit) -> None:
    assert "temperature must be greater than 0, got 0" in fit("--model.init_args.criterion.init_args.temperature=0")
    assert "hard_weight must be a finite number of at least 0, got -1" in fit("--model.init_args.hard_weight=-1")


def test_groups_of_layers_without_quotes(fit) -> None:
    at = "--model.init_args.criterion=lkd.losses.AT"
    message = fit(at, "--model.init_args.criterion.init_args.student_layers=[@pooled]")
    assert message.endswith("got [@pooled]; put names of layer groups in quotes, as in ['@stages']")


def test_batch_norm_of_a_single_image(fit) -> None:
    message = fit("--model.init_args.criterion=lkd.losses.PAD", "--data.init_args.batch_size=1")
    assert message.endswith("set batch_size to at least 2, or use larger images")


def test_missing_accelerator(fit, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    remedy = "remove --trainer.accelerator, or set it to auto or cpu"
    assert fit("--trainer.accelerator=gpu") == f"no gpu found on this machine; {remedy}"


def test_network_without_num_classes(error_of) -> None:
    Path("flowers/a").mkdir(parents=True)
    message = error_of("fit", "--config=data/folder", "--config=finetune/resnet18", "--data.init_args.root=flowers")
    setting = "--model.init_args.model.init_args.num_classes"
    assert message.endswith(f"lkd.models.torchvision_model requires a value for num_classes; set {setting}")


def test_schedule_without_epochs(fit) -> None:
    Path("schedule.yaml").write_text(
        "trainer: {callbacks: [{class_path: lkd.callbacks.Schedule, init_args: {attribute: hard_weight, epochs: 0}}]}"
    )
    assert fit("--config", "schedule.yaml") == "Schedule requires at least 1 epoch, got 0"


def test_non_finite_loss(fit) -> None:
    message = fit("--model.init_args.optimizer.init_args.lr=1e30")
    assert "the loss is not finite from step" in message
    assert "student logits not finite at that step" in message


def test_traceback_on_demand(monkeypatch) -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        main(["fit", "--config", "digits/kd", "--model.init_args.criterion.init_args.temperature=0", "--debug"])
    monkeypatch.setenv("LKD_DEBUG", "1")
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        main(["fit", "--config", "digits/kd", "--model.init_args.criterion.init_args.temperature=0"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("speed.chanels_last", "speed.channels_last"),
        ("teacher_cache.version", "teacher_cache.versions"),
        ("checkpoint.monitr", "checkpoint.monitor"),
        ("speeed.compile", "speed"),
    ],
)
def test_misspelt_settings_of_sections(fit, wrong: str, right: str) -> None:
    """The setting is misspelt on the command line or in a file."""
    section, setting = wrong.split(".")
    message = f"lkd has no setting {(wrong if '.' in right else section)!r}; did you mean {right!r}?"
    Path("wrong.yaml").write_text(yaml.safe_dump({section: {setting: "x"}}))
    assert message in fit(f"--{wrong}=x")
    assert message in fit("--config=wrong.yaml")


def test_teacher_weights_without_a_teacher(error_of) -> None:
    message = error_of("fit", "--config", "digits/student", "--model.init_args.teacher_ckpt=runs/teacher")
    assert message == (
        "lkd.ClassificationModule has no teacher and therefore no 'teacher_ckpt'; use --model lkd.DistillModule, with "
        "a student"
    )
