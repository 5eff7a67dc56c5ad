"""`lkd layers` lists the layers of a network that a criterion can read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lkd.__main__ import main
from lkd.features.layers import resolve_layers
from lkd.models import resnet8, torchvision_model

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width: int, activation: str = "relu") -> None:
        super().__init__(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
"""


@pytest.fixture
def listed(capsys):
    """Return a function that runs `lkd layers` and returns its tables, by heading: shape and groups of each layer."""

    def run(*args: str) -> dict[str, dict[str, tuple[str, str]]]:
        assert main(["layers", *args]) == 0
        tables: dict[str, dict[str, tuple[str, str]]] = {}
        heading = ""
        for line in capsys.readouterr().out.splitlines():
            if row := re.match(r"  (\S+) +(\(.*?\)) *(.*)$", line):
                tables[heading][row[1]] = (row[2], row[3])
            elif ", for one image" in line:
                heading = line
                tables[heading] = {}
        return tables

    return run


@pytest.fixture
def error_of(capsys, monkeypatch):
    """Return a function that runs `lkd layers` and returns its error message."""
    monkeypatch.delenv("LKD_DEBUG", raising=False)

    def run(*args: str) -> str:
        assert main(["layers", *args]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lkd: error: ")]
        return line.removeprefix("lkd: error: ")

    return run


def test_network(listed) -> None:
    ((heading, table),) = listed("lkd.models.resnet8", "--num_classes", "10").items()
    assert heading == "lkd.models.resnet8, 78,042 parameters, for one image (1, 3, 32, 32)"
    assert table["layer2"] == ("(1, 32, 16, 16)", "@stage2")
    assert table["layer3"] == ("(1, 64, 8, 8)", "@stage3, @last_stage")
    assert table["layer1.0.conv1"] == ("(1, 16, 32, 32)", "")


@pytest.mark.parametrize(
    ("network", "args"),
    [
        (lambda: resnet8(num_classes=10), ["lkd.models.resnet8", "--num_classes=10"]),
        (
            lambda: torchvision_model("resnet18", num_classes=10),
            ["lkd.models.torchvision_model", "--name", "resnet18", "--num_classes", "10", "--input_size", "64"],
        ),
    ],
)
def test_groups_of_criteria(listed, network, args: list[str]) -> None:
    (table,) = listed(*args).values()
    shown = {group: layer for layer, (_, groups) in table.items() for group in groups.split(", ") if group}
    assert {"@stem", "@stage1", "@last_stage", "@preact2", "@norm1", "@map", "@pooled", "@head"} <= set(shown)
    for group, layer in shown.items():
        assert resolve_layers(network(), [group]) == (layer,)


def test_networks_of_a_run(listed) -> None:
    tables = listed("--config", "configs/digits/kd.yaml", "--model.init_args.student.init_args.num_filters=[2,4,8,16]")
    student, teacher = tables
    assert student.startswith("student: lkd.models.CIFARResNet, ")
    assert teacher == "teacher: lkd.models.resnet8, 77,754 parameters, for one image (1, 1, 8, 8)"
    assert tables[student]["layer1"] == ("(1, 4, 8, 8)", "@stage1")
    assert not Path("runs").exists()


def test_run_without_data(listed) -> None:
    student, _ = listed("--config", "pairs/digits")
    assert student.endswith("for one image (1, 1, 32, 32)")


def test_students_of_mutual_learning(listed) -> None:
    first, second = listed("--config", "digits/mutual")
    assert first.startswith("student 1: lkd.models.CIFARResNet, ")
    assert second.startswith("student 2: lkd.models.resnet8, ")


def test_single_network(listed) -> None:
    (heading,) = listed("--config", "digits/teacher")
    assert heading.startswith("model: lkd.models.resnet8, ")


def test_criterion_without_its_layers(listed, monkeypatch) -> None:
    """The layers are listed even if the criterion cannot be built, which is when the list is needed."""
    monkeypatch.syspath_prepend(Path.cwd())
    Path("own_net.py").write_text(NET)
    settings = ["criterion=lkd.losses.AT", "student=own_net.Net", "student.init_args.width=3"]
    args = ["--config", "digits/kd", *(f"--model.init_args.{setting}" for setting in settings)]
    assert main(["fit", *args, "--trainer.accelerator=cpu"]) == 2
    table = next(iter(listed(*args).values()))
    assert {layer: groups for layer, (_, groups) in table.items()} == {
        "0": "",
        "1": "",
        "2": "",
        "3": "",
        "4:input": "@pooled",
        "4": "@head",
    }


def test_network_in_the_current_folder() -> None:
    """The console script does not have the current folder on its path."""
    Path("own_net.py").write_text(NET)
    code = (
        "import sys; sys.path = [p for p in sys.path if p]; from lkd.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "layers", "own_net.Net", "--width", "5", "--activation", "a--b"]
    shown = subprocess.run([*command, "--input_size", "12", "9"], capture_output=True, text=True, check=True).stdout
    assert "own_net.Net, 62 parameters, for one image (1, 1, 12, 9)" in shown
    assert re.search(r"^  0 +\(1, 5, 10, 7\)$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "lkd layers requires the class_path of a network, or --config FILE"),
        (["resnet8"], "'resnet8' is not a class_path; give the full import path, as in lkd.models.resnet20"),
        (["lkd.models.resnet9"], "there is no 'resnet9' in lkd.models; did you mean 'resnet8'?"),
        (["lkd.models.resnet8"], "lkd.models.resnet8 requires values for num_classes"),
        (["lkd.models.resnet8", "--num_clases=3"], "has no setting 'num_clases'; did you mean 'num_classes'?"),
        (["lkd.models.resnet8", "--num_classes=ten"], "settings.num_classes: expected an integer, got ten"),
        (["lkd.models.resnet8", "--num_classes=3", "--input_size", "x"], "channels, height and width (3 64 48), got x"),
        (["lkd.models.resnet8", "--num_classes=3", "--input_size", "0"], "--input_size must be one size (224)"),
        (
            ["lkd.models.resnet8", "--num_classes=3", "--input_size", "1", "8", "8"],
            "CIFARResNet does not accept an image of shape (1, 1, 8, 8): Given groups=1",
        ),
        (
            ["torch.nn.Linear", "--in_features=3", "--out_features=2"],
            "the number of input channels of Linear is unknown, because it has no convolution; provide an example",
        ),
        (["--config", "digits/kdd"], "config 'digits/kdd' not found"),
        (["--config", "digits/kd", "--model.init_args.studnet=3"], "has no setting 'studnet'; did you mean 'student'?"),
        (
            ["--config=digits/kd", "--config=methods/crd", "--model.init_args.criterion.init_args.student_layers=fc"],
            "lkd.losses.CRD has no setting 'student_layers'; did you mean 'student_layer'?",
        ),
    ],
)
def test_invalid_arguments(error_of, args: list[str], message: str) -> None:
    assert message in error_of(*args)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from lkd.__main__ import main; main(['layers', '--help']); sys.exit('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: lkd layers CLASS_PATH" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("debug", [False, True])
def test_interrupt_outside_training(debug: bool, monkeypatch, capsys) -> None:
    """Ctrl-C while lkd imports its libraries, for example."""

    def interrupted(**_: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lkd.__main__._imported", interrupted)
    if debug:
        with pytest.raises(KeyboardInterrupt):
            main(["fit", "--config=digits/kd", "--debug"])
    else:
        assert main(["fit", "--config=digits/kd"]) == 130
        assert capsys.readouterr().err == "lkd: interrupted\n"


def test_closed_output() -> None:
    """The output is closed early, as in `lkd layers ... | head`."""
    command = [sys.executable, "-m", "lkd", "layers", "lkd.models.resnet56", "--num_classes=10"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
