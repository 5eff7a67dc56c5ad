"""`lkd compare`: from checkpoints to tables, report and TensorBoard."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from sklearn.metrics import accuracy_score, log_loss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lkd import Batch, DigitsDataModule, EarlyExitModule, SyntheticDataModule
from lkd.__main__ import main
from lkd.compare import Candidate, compare, write
from lkd.compare.command import _warn_of_other_teachers
from lkd.compare.groups import methods_of
from lkd.compare.predictions import statistics_of
from lkd.compare.tables import tables
from lkd.loading import ModuleLogits, load_run, network_of
from lkd.models import load_weights, resnet8
from lkd.types import Normalization

QUICK = ["--seconds=0.02", "--batch_sizes=[1,4]", "--accelerator=cpu"]
FIT = ["--trainer.max_epochs=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the folder of two runs on the digits, one with a teacher and one without."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for config in ("digits/kd", "digits/student"):
            assert main(["fit", "--config", config, *FIT]) == 0
    return folder / "runs"


@pytest.fixture
def error_of(capsys, monkeypatch):
    """Return a function that runs `lkd compare` and returns its error message."""
    monkeypatch.delenv("LKD_DEBUG", raising=False)

    def run(*args: str) -> str:
        assert main(["compare", *QUICK, *args]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lkd: error: ")]
        return line.removeprefix("lkd: error: ")

    return run


class _Page(HTMLParser):
    """Collects the tags and addresses of a page, and checks that all tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_comparison_of_runs(runs, capsys) -> None:
    assert main(["compare", str(runs / "digits" / "kd"), f"alone={runs / 'digits' / 'student'}", *QUICK]) == 0
    shown = capsys.readouterr().out
    folder = Path("runs/compare/version_0")
    assert f"Report:      {folder}/comparison.html" in shown
    found = json.loads((folder / "comparison.json").read_text())
    assert list(found["networks"]) == ["teacher", "kd", "alone"]
    assert found["teacher"] == "teacher"
    teacher = _digits(load_weights(resnet8(num_classes=10, in_channels=1), "lkd:digits_resnet8"))
    kd, alone = (_digits(network_of(load_run(str(runs / "digits" / name)).module)) for name in ("kd", "student"))
    for name, (probabilities, target) in {"teacher": teacher, "kd": kd, "alone": alone}.items():
        metrics = found["networks"][name]["metrics"]
        accuracy = accuracy_score(target, probabilities.argmax(1))
        assert metrics["top1"]["value"] == pytest.approx(accuracy)
        assert metrics["nll"] == pytest.approx(log_loss(target, probabilities), abs=1e-5)
        assert f"{100 * accuracy:.2f}" in shown
    agreement = (kd[0].argmax(1) == teacher[0].argmax(1)).mean()
    assert found["networks"]["kd"]["metrics"]["agreement"]["value"] == pytest.approx(agreement)
    assert [time["batch_size"] for time in found["networks"]["kd"]["cost"]["times"]] == [1, 4]
    assert {(pair["first"], pair["second"]) for pair in found["differences"]} == {
        ("teacher", "kd"),
        ("teacher", "alone"),
        ("kd", "alone"),
    }


def _digits(network: nn.Module):
    """Compute a network's probabilities on the test images, and their classes, independently of lkd."""
    data = DigitsDataModule()
    data.setup("test")
    batches = list(data.test_dataloader())
    with torch.no_grad():
        logits = torch.cat([network.eval()(batch.input) for batch in batches])
    return logits.double().softmax(1).numpy(), torch.cat([batch.target for batch in batches]).numpy()


def test_page_is_self_contained_and_escapes_names(runs, capsys) -> None:
    named = f"<b>&kd={runs / 'digits' / 'kd'}"
    assert main(["compare", named, *QUICK, "--output=here"]) == 0
    text = Path("here/version_0/comparison.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.open
    assert page.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert "b" not in page.seen
    assert "&lt;b&gt;&amp;kd" in text
    assert page.seen.count("svg") == 4
    assert page.seen.count("table") == 4
    assert not re.search(r"@import|url\((?!#)", text)


def test_tensorboard_contains_the_same_figures(runs) -> None:
    assert main(["compare", str(runs / "digits" / "kd"), *QUICK]) == 0
    folder = Path("runs/compare/version_0")
    found = json.loads((folder / "comparison.json").read_text())["networks"]["kd"]["metrics"]
    curves = EventAccumulator(str(folder / "kd")).Reload()
    for tag, figure in {"acc": found["top1"]["value"], "nll": found["nll"], "kl": found["kl"]}.items():
        (point,) = curves.Scalars(f"compare/{tag}")
        assert point.value == pytest.approx(figure, rel=1e-6)
    own = EventAccumulator(str(folder)).Reload().Tags()
    assert {"compare/Reliability", "compare/Accuracy against cost", "compare/disagreements of kd"} <= set(own["images"])
    assert "compare/Accuracy and calibration/text_summary" in own["tensors"]


def test_networks_with_their_own_normalization(tmp_path) -> None:
    network = "class_path: lkd.models.load_weights, init_args: {path: 'lkd:digits_resnet8', network: "
    network += "{class_path: lkd.models.resnet8, init_args: {num_classes: 10, in_channels: 1}}}"
    Path("others.yaml").write_text(
        f"networks:\n  as_trained: {{{network}}}\n  shifted: {{{network}}}\n"
        "normalization: {as_trained: {mean: [0.3], std: [0.35]}}\n"
        "data: {class_path: lkd.DigitsDataModule, init_args: {mean: [0.5], std: [0.2]}}\n"
    )
    assert main(["compare", "--config", "others.yaml", "--split=val", *QUICK]) == 0
    found = json.loads(Path("runs/compare/version_0/comparison.json").read_text())
    assert "lkd.models.resnet8, lkd:digits_resnet8" in found["facts"]["network shifted"]
    assert found["teacher"] is None
    data = DigitsDataModule(mean=(0.3,), std=(0.35,))
    data.setup("validate")
    network = load_weights(resnet8(num_classes=10, in_channels=1), "lkd:digits_resnet8").eval()
    with torch.no_grad():
        right = [(network(batch.input).argmax(1) == batch.target).float() for batch in data.val_dataloader()]
    accuracy = float(torch.cat(right).mean())
    assert found["networks"]["as_trained"]["metrics"]["top1"]["value"] == pytest.approx(accuracy)
    assert found["networks"]["shifted"]["metrics"]["nll"] != found["networks"]["as_trained"]["metrics"]["nll"]


def test_disagreements_are_the_images_that_differ_the_most(tiny, data, tmp_path) -> None:
    networks = {name: tiny(seed) for name, seed in (("teacher", 1), ("student", 2))}
    found = compare([Candidate(*each) for each in networks.items()], data, "teacher", seconds=0.01, accelerator="cpu")
    disagreements, (teacher, student) = found.predictions.disagreements["student"], found.predictions.logits.values()
    divergence = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    differs = teacher.argmax(1) != student.argmax(1)
    wanted = divergence.masked_fill(~differs, -1).topk(min(12, int(differs.sum())))
    assert disagreements.position.tolist() == wanted.indices.tolist()
    assert disagreements.divergence.tolist() == pytest.approx(wanted.values.tolist(), rel=1e-5)
    images = torch.cat([batch.input for batch in data.test_dataloader()])
    assert torch.equal(disagreements.image, images[disagreements.position])
    write(found, tmp_path)
    assert (tmp_path / "comparison.md").read_text().startswith("# teacher, student\n")


def test_networks_are_not_modified(tiny, data) -> None:
    network = tiny().train()
    network.layer1.eval()
    next(network.parameters()).requires_grad_(False)
    before = [module.training for module in network.modules()]
    trains = [parameter.requires_grad for parameter in network.parameters()]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    compare([Candidate("a", network)], data, seconds=0.01, accelerator="cpu")
    assert [module.training for module in network.modules()] == before
    assert [parameter.requires_grad for parameter in network.parameters()] == trains
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_cost_excludes_unused_exits(tiny) -> None:
    student = tiny()
    assert network_of(EarlyExitModule(student)) is student
    assert isinstance(network_of(EarlyExitModule(student, exit=1)), ModuleLogits)


def test_dict_inputs_cannot_be_renormalized(tiny, data) -> None:
    class Dict(nn.Module):
        def forward(self, input):
            return input["image"].flatten(1)[:, :4]

    def unpack(batch) -> Batch:
        return Batch({"image": batch.input}, batch.target)

    own = Candidate("a", Dict(), Normalization((0.1,) * 3, (1.0,) * 3), unpack=unpack)
    with pytest.raises(ValueError, match="its input is not a tensor"):
        compare([own], data, seconds=0.01, accelerator="cpu")
    plain = Candidate("a", Dict(), Normalization(data.mean, data.std), unpack=unpack)
    assert compare([plain], data, seconds=0.01, accelerator="cpu").metrics["a"].top1.total == 24


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.25), ([0.5], np.array([0.25])), ((0.5,), torch.tensor([0.25]))])
def test_types_of_mean_and_std(mean, std) -> None:
    class Data:
        pass

    data = Data()
    data.mean, data.std = mean, std
    assert statistics_of(data) == Normalization((0.5,), (0.25,))
    data.std = None
    assert statistics_of(data) is None


def test_many_classes(tmp_path) -> None:
    data = SyntheticDataModule(num_classes=40, input_shape=(1, 4, 4), train_size=80, test_size=80, batch_size=20)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 40))
    found = compare([Candidate("a", network), Candidate("b", network)], data, "a", seconds=0.01, accelerator="cpu")
    write(found, tmp_path)
    text = (tmp_path / "comparison.html").read_text()
    assert "The 30 classes on which the networks differ the most" in text
    assert found.metrics["b"].agreement.value == 1
    assert found.metrics["b"].kl == pytest.approx(0, abs=1e-9)


def test_invalid_networks(tiny, data) -> None:
    for candidates, teacher, message in (
        ([], None, "must have unique names, got none"),
        ([Candidate("a", tiny()), Candidate("a", tiny())], None, "must have unique names, got a, a"),
        ([Candidate("a", tiny())], "b", "must be one of the networks a, got 'b'"),
        ([Candidate("a", tiny(num_classes=3))], None, "a returns logits of shape"),
        ([Candidate("a", tiny()), Candidate("b", tiny(num_classes=5))], None, "compare networks with the same classes"),
        ([Candidate("a", tiny(in_channels=1))], None, "a does not accept the input of this data"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(candidates, data, teacher, seconds=0.01, accelerator="cpu")


def test_normalization_requires_that_of_the_data(tiny, data) -> None:
    own = Candidate("a", tiny(), Normalization((0.0,) * 3, (1.0,) * 3))
    data.mean = None
    with pytest.raises(ValueError, match="does not provide mean and std"):
        compare([own], _without_statistics(data), seconds=0.01, accelerator="cpu")


def _without_statistics(data):
    import lightning as L

    class Plain(L.LightningDataModule):
        def test_dataloader(self):
            return torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)] * 4, batch_size=2)

    return Plain()


def test_unusual_names(tiny, data, tmp_path) -> None:
    names = ["a[/]", r"$\frac$", "..", "a/b", "a_b", "x" * 300]
    found = compare([Candidate(name, tiny()) for name in names], data, seconds=0.01, accelerator="cpu")
    write(found, tmp_path)
    console = Console(record=True, width=400)
    for table in tables(found):
        console.print(*table.rich(400))
    assert "a[/]" in console.export_text()
    assert r"$\frac$" in (tmp_path / "comparison.html").read_text()
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == len(names)


def test_non_finite_logits(tiny, data) -> None:
    broken = tiny()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the logits of broken are not finite"):
        compare([Candidate("broken", broken)], data, seconds=0.01, accelerator="cpu")


def test_checkpoint_with_an_equals_sign(runs, tmp_path) -> None:
    run = shutil.copytree(runs / "digits" / "kd" / "version_0", tmp_path / "run")
    best = (run / "checkpoints" / "best.ckpt").rename(run / "checkpoints" / "epoch=1-step=40.ckpt")
    assert main(["compare", str(best), "--teacher=teacher", *QUICK]) == 0
    found = json.loads(Path("runs/compare/version_0/comparison.json").read_text())
    assert list(found["networks"]) == ["teacher", "run"]


def test_other_validation_images_are_reported(runs) -> None:
    own = ["--data=lkd.DigitsDataModule", "--data.split_seed=5", "--split=val"]
    with pytest.warns(UserWarning, match="kd was trained with split_seed 0, but is evaluated with 5"):
        main(["compare", str(runs / "digits" / "kd"), *own, *QUICK])


def test_output_that_cannot_be_written(error_of, runs) -> None:
    Path("afile").write_text("")
    assert "afile" in error_of(str(runs / "digits" / "kd"), "--output=afile/x")


def _another(run: Path, place: Path, seed: int, **settings: object) -> Path:
    """Copy a run with slightly different weights, as if it had another seed."""
    shutil.copytree(run, place)
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump({**config, "seed_everything": seed, **settings}))
    path = place / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.manual_seed(seed)
    for tensor in checkpoint["state_dict"].values():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor += 0.1 * tensor.std() * torch.randn(tensor.shape)
    torch.save(checkpoint, path)
    return path


def test_runs_that_differ_only_by_seed_form_one_method(runs, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    kd, alone = runs / "digits" / "kd" / "version_0", runs / "digits" / "student" / "version_0"
    places = [kd, alone]
    for number, run in ((1, kd), (2, kd), (1, alone)):
        places.append(tmp_path / run.parent.name / f"version_{number}")
        _another(run, places[-1], number, ckpt_path="elsewhere")
    assert main(["compare", *map(str, places), *QUICK]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = json.loads(Path("runs/compare/version_0/comparison.json").read_text())
    members = {name: group["members"] for name, group in found["groups"].items()}
    assert members == {
        "kd": ["kd/version_0", "kd/version_1", "kd/version_2"],
        "student": ["student/version_0", "student/version_1"],
    }
    values = [found["networks"][name]["metrics"]["top1"]["value"] for name in members["kd"]]
    assert f"│ kd │ 3 │ {100 * np.mean(values):.2f} │ {100 * np.std(values, ddof=1):.2f} │" in shown
    assert "kd/version_1" not in shown
    assert "kd - student" in shown
    page = Path("runs/compare/version_0/comparison.html").read_text()
    assert page.count("<details>") == 3
    assert "All 15 pairs of trained networks" in page
    assert "compares two trained networks on these images, not two methods" in page
    trained = load_run(str(kd))
    with pytest.warns(UserWarning, match="again has the same settings and seed as kd, so it does not count"):
        assert methods_of({"kd": trained, "again": trained}) == {}


def test_runs_with_different_teachers(tiny) -> None:
    found = {name: Candidate("teacher", tiny(seed)) for name, seed in {"kd": 0, "same": 0, "other": 1}.items()}
    with pytest.warns(UserWarning, match="another teacher") as raised:
        _warn_of_other_teachers(found)
    assert [str(warning.message) for warning in raised] == [
        "other was trained with another teacher than kd, but both are compared with the teacher of kd; name another "
        "network with --teacher"
    ]


def test_class_names_come_from_training(runs, tmp_path, recwarn) -> None:
    synthetic = {"class_path": "lkd.SyntheticDataModule", "init_args": {"num_classes": 10, "input_shape": [1, 8, 8]}}
    kd = runs / "digits" / "kd" / "version_0"
    same, other = (_another(kd, tmp_path / name, 1, data=synthetic) for name in ("same", "other"))
    checkpoint = torch.load(other, weights_only=True)
    checkpoint["lkd"]["class_names"] = tuple("abcdefghij")
    torch.save(checkpoint, other)
    assert main(["compare", str(same), str(other), "--data=lkd.DigitsDataModule", *QUICK]) == 0
    (message,) = [str(warning.message) for warning in recwarn if "class" in str(warning.message)]
    assert message == (
        "other was trained with the classes a, b, c, d, e and 5 more, but is evaluated with 0, 1, 2, 3, 4 and 5 more"
    )


def test_invalid_arguments(error_of, runs) -> None:
    assert "requires runs, or networks in a --config" in error_of()
    assert "checkpoint 'runs/digits/nothing' does not exist" in error_of("runs/digits/nothing")
    kd = str(runs / "digits" / "kd")
    assert "each run must have a unique name" in error_of(kd, kd)
    assert "write NAME=PLACE" in error_of(f"={kd}")
    assert "must be one of the networks kd, got 'other'" in error_of(kd, "--teacher=other")
    assert "batch_sizes and seconds must be positive" in error_of(kd, "--batch_sizes=[0]")
    assert "lkd compare has no setting 'teachr'; did you mean 'teacher'?" in error_of(kd, "--teachr=x")
    assert "lkd compare has no setting 'model'; available: " in error_of(kd, "--config", "digits/kd")
    assert "config 'nothing.yaml' not found" in error_of("--config", "nothing.yaml")
    assert "no images in its val split" in error_of(
        kd, "--split=val", "--data=lkd.DigitsDataModule", "--data.val_size=0"
    )
    named = ["--networks.a.class_path=lkd.models.resnet8", "--networks.a.init_args.num_classes=10"]
    assert "'num_classes' is set for a network without class_path" in error_of(kd, *named)
    assert "normalization applies only to the networks of the config" in error_of(
        kd, "--normalization.x={mean: [0.], std: [1.]}"
    )


def test_other_data_is_reported(runs, capsys) -> None:
    with pytest.warns(UserWarning, match="kd was trained on DigitsDataModule, but is evaluated on SyntheticDataModule"):
        main(
            [
                "compare",
                str(runs / "digits" / "kd"),
                "--data=lkd.SyntheticDataModule",
                *QUICK[1:],
                "--data.init_args.num_classes=10",
                "--data.init_args.input_shape=[1,8,8]",
                "--seconds=0.01",
            ]
        )
