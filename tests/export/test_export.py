"""`lkd export`: each file reproduces the checkpoint's outputs, without lkd."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors import safe_open
from torch import nn

from lkd import ClassificationModule, DigitsDataModule, ImageFolderDataModule, __version__
from lkd.__main__ import main
from lkd.export import export
from lkd.export.card import CARD, _epochs
from lkd.export.files import WRITERS, Network
from lkd.export.images import batches, preprocessing, training_images
from lkd.export.images import test_loader as loader_of_some
from lkd.export.measure import Checked
from lkd.export.snippets import made, preparation, use
from lkd.loading import load_run
from lkd.models import torchvision_model
from lkd.tasks import Classification
from lkd.types import IGNORE_INDEX

QUICK = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false")
FILES = ("model.safetensors", "model.pt2", "model.onnx", "model.int8.onnx")
PAIR = ("--config=data/digits", "--config=pairs/digits")
WITHOUT_LKD = """
import json, re, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lkd":
            raise ImportError("lkd is not here")

sys.meta_path.insert(0, Refuse())
import numpy as np, onnxruntime, torch
from safetensors.torch import load_file

given = np.load(sys.argv[1])
image, logits = given["image"], given["logits"]
program = torch.export.load("model.pt2").module()
bare = torch.export.load("model.pt2").module()
for tensor in bare.state_dict().values():
    tensor.zero_()
bare.load_state_dict(load_file("model.safetensors"))
session = onnxruntime.InferenceSession("model.onnx")
programs = {
    "torch": lambda batch: program(torch.from_numpy(batch)).detach().numpy(),
    "safetensors": lambda batch: bare(torch.from_numpy(batch)).detach().numpy(),
    "onnx": lambda batch: session.run(["logits"], {"image": batch})[0],
}
differences = {
    f"{name}, {size}": max(float(abs(run(image[i : i + size]) - logits[i : i + size]).max())
                           for i in range(0, min(len(image), 64 * size), size))
    for name, run in programs.items() for size in (1, 100, len(image))
}
blocks = re.findall(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.S)
card = []
for block in blocks[1:]:
    names = {"print": lambda *_: None}
    exec(blocks[0] + block, names)
    card.append(float(abs(np.asarray(names["logits"]) - logits[:1]).max()))
print(json.dumps({"images": len(image), "differences": differences, "card": card, "lkd": "lkd" in sys.modules}))
"""


def fit(folder: Path, *args: str) -> str:
    """Train briefly and return the run's folder."""
    assert main(["fit", *args, *QUICK, f"--trainer.default_root_dir={folder}"]) == 0
    return str(next(folder.rglob("best.ckpt")).parents[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return fit(tmp_path_factory.mktemp("runs"), "--config=configs/digits/kd.yaml")


@pytest.fixture(scope="module")
def done(run):
    """Return the run's export in all formats."""
    return export(run, int8=True, license="apache-2.0")


@pytest.fixture
def error_of(capsys, monkeypatch):
    """Return a function that runs `lkd export` and returns its error message."""
    monkeypatch.delenv("LKD_DEBUG", raising=False)

    def ask(*args: str) -> str:
        assert main(["export", *args]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lkd: error: ")]
        return line.removeprefix("lkd: error: ")

    return ask


def digits(run: str):
    """Return all test images `(359, 1, 8, 8)`, and the checkpoint's logits."""
    trained = load_run(run)
    trained.data.setup("test")
    image = torch.cat([batch.input for batch in trained.data.test_dataloader()])
    with torch.no_grad():
        return image, trained.module(image)


def test_files_reproduce_the_checkpoint_without_lkd(run, done, tmp_path) -> None:
    image, logits = digits(run)
    np.savez(tmp_path / "given.npz", image=image.numpy(), logits=logits.numpy())
    pixels = (image[0, 0] * 0.3762 + 0.3057) * 255
    Image.fromarray(pixels.round().to(torch.uint8).numpy()).save(done.folder / "image.png")
    command = [sys.executable, "-I", "-c", WITHOUT_LKD, str(tmp_path / "given.npz")]
    ran = subprocess.run(command, cwd=done.folder, capture_output=True, text=True)
    (done.folder / "image.png").unlink()
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["images"] == 359
    assert not found["lkd"]
    assert len(found["differences"]) == 9
    assert max(found["differences"].values()) <= 1e-4, found["differences"]
    *float32, int8 = found["card"]
    assert len(float32) == 3
    assert max(float32) <= 1e-4
    assert 1e-4 < int8 < 1


def test_measurements(done) -> None:
    assert [one.file for one in done.files] == list(FILES)
    for one in done.files:
        assert one.images == one.labelled == 359
        assert one.size == (done.folder / one.file).stat().st_size
        assert one.expected_score == pytest.approx(done.metrics["test/acc"])
    *float32, int8 = done.files
    assert all(one.difference <= 1e-4 and one.agreement == 1 for one in float32)
    assert all(one.score == one.expected_score for one in float32)
    assert int8.difference > 1e-4
    assert int8.agreement > 0.9


def test_all_files_contain_the_preprocessing(done) -> None:
    import onnx

    text = (done.folder / "preprocessing.json").read_text()
    with safe_open(done.folder / "model.safetensors", "pt") as file:
        assert file.metadata()["preprocessing"] == text
    extra = {"preprocessing.json": ""}
    torch.export.load(done.folder / "model.pt2", extra_files=extra)
    assert extra["preprocessing.json"] == text
    for name in ("model.onnx", "model.int8.onnx"):
        properties = {entry.key: entry.value for entry in onnx.load(done.folder / name).metadata_props}
        assert properties["preprocessing"] == text
    facts = json.loads(text)
    assert facts["shape"] == [1, 8, 8]
    assert (facts["mean"], facts["std"], facts["value_range"]) == ([0.3057], [0.3762], [0, 1])
    assert facts["class_names"] == list("0123456789")
    assert (facts["license"], facts["lkd"]) == ("apache-2.0", __version__)


def test_batches_of_any_size(done) -> None:
    import onnx

    for name in ("model.onnx", "model.int8.onnx"):
        graph = onnx.load(done.folder / name).graph
        shapes = [
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)
        ]
        assert shapes == [["batch", 1, 8, 8], ["batch", 10]]


def test_int8_computes_with_8_bits(done) -> None:
    import onnx

    model = onnx.load(done.folder / "model.int8.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    made_by = {output: node for node in model.graph.node for output in node.output}
    assert convolutions
    for node in convolutions:
        weight = made_by[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert kinds[weight.input[0]] == onnx.TensorProto.INT8


def test_files_contain_no_paths_and_no_images(run, done) -> None:
    private = [str(Path(run).parents[1]), str(Path(__file__).parents[2]), "site-packages", "resnet.py"]
    for path in done.folder.iterdir():
        parts = [path.read_bytes()]
        if path.suffix == ".pt2":
            archive = zipfile.ZipFile(path)
            parts = [archive.read(name) for name in archive.namelist()]
        assert not [text for text in private for part in parts if text.encode() in part], path
    (example,), _ = torch.export.load(done.folder / "model.pt2").example_inputs
    assert example.untyped_storage().nbytes() == 2 * 8 * 8 * 4
    assert not example.any()


def test_card(done) -> None:
    _, front, text = (done.folder / CARD).read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["license"] == "apache-2.0"
    assert found["datasets"] == ["digits"]
    assert found["metrics"] == ["accuracy"]
    assert "knowledge-distillation" in found["tags"]
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(done.metrics["test/acc"], abs=1e-6)
    for words in (
        "10 classes and 5,142 parameters",
        "| teacher | `lkd.models.resnet8` `{num_classes: 10, in_channels: 1, shortcut: B}` |",
        "| teacher_ckpt | `lkd:digits_resnet8` |",
        "| criterion | `lkd.losses.KD` `{temperature: 4.0}` |",
        "| distill_weight | `0.9` |",
        f"| acc | {done.metrics['test/acc']:.4f} |",
        f"trained with lkd {__version__}",
        "mean `[0.3057]` and std `[0.3762]`",
    ):
        assert words in text


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_file_with_different_outputs_is_rejected(run, tmp_path, monkeypatch, error) -> None:
    file, write = WRITERS["torch"]

    def with_error(network, path, metadata):
        forward = write(network, path, metadata)
        return lambda image: forward(image) + error

    monkeypatch.setitem(WRITERS, "torch", (file, with_error))
    with pytest.raises(ValueError, match=r"model.pt2 does not reproduce the checkpoint: on 359 .*nothing was exp"):
        export(run, tmp_path / "out" / "here", ["safetensors", "torch"])
    assert not list((tmp_path / "out").iterdir())


def test_failed_export_keeps_the_previous_one(run, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    export(run, out, ["safetensors"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    file, write = WRITERS["safetensors"]
    monkeypatch.setitem(
        WRITERS, "safetensors", (file, lambda *given: (write(*given), lambda image: image.flatten(1))[1])
    )
    with pytest.raises(ValueError, match=r"logits differ by up to inf"):
        export(run, out, ["safetensors"], overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("size", [1, 2])
def test_batches_of_one_and_of_several_images_are_compared(run, monkeypatch, size) -> None:
    file, write = WRITERS["safetensors"]

    def for_one_size(*given):
        forward = write(*given)
        return lambda image: forward(image) + ((len(image) == 1) == (size == 1))

    monkeypatch.setitem(WRITERS, "safetensors", (file, for_one_size))
    with pytest.raises(ValueError, match=r"logits differ by up to 1,"):
        export(run, "out", ["safetensors"], images=10, settings=["--data.init_args.batch_size=1"])


def test_selected_formats(run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lkd.export.files.find_spec", lambda name: None)  # these formats do not require ONNX
    assert main(["export", run, "--format", "safetensors,torch", "--output", "out", "--images", "300"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {*FILES[:2], "preprocessing.json", CARD}
    shown = capsys.readouterr().out
    assert "Compared on 300 test images" in shown
    assert "model.pt2" in shown


def test_existing_exports_are_not_overwritten(run, error_of) -> None:
    small = (run, "--format", "safetensors", "--output", "out")
    assert main(["export", *small]) == 0
    before = Path("out/model.safetensors").stat().st_mtime_ns
    assert error_of(*small) == "out already contains an export; use another --output, or --overwrite to replace it"
    assert Path("out/model.safetensors").stat().st_mtime_ns == before
    assert main(["export", *small, "--overwrite"]) == 0
    assert Path("out/model.safetensors").stat().st_mtime_ns > before
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    message = error_of(run, "--format", "safetensors", "--output", "mine", "--overwrite")
    assert message == "mine exists but is not an export of lkd; use a new folder as --output"
    assert {path.name for path in Path().iterdir()} >= {"mine", "out"}
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_other_files_are_not_deleted(run, error_of) -> None:
    small = (run, "--format", "safetensors", "--output", "out")
    assert main(["export", *small]) == 0
    Path("out/NOTES.md").write_text("mine")
    assert "out contains 'NOTES.md', which is not part of an export" in error_of(*small, "--overwrite")
    assert Path("out/NOTES.md").read_text() == "mine"


def test_hooks_of_the_data_module_are_applied(distill) -> None:
    class Shifted(L.LightningDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

    (batch,) = batches([[torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)]], Shifted(), distill())
    assert batch.input.tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "lkd export requires a checkpoint or the folder of a run as its first argument; see 'lkd export --help'"),
        (["nowhere"], "checkpoint 'nowhere' does not exist"),
        (
            ["RUN", "--format", "onx"],
            "--format must be safetensors, torch, onnx, or several of them separated by commas, got 'onx'",
        ),
        (["RUN", "--format", "torch", "onnx"], "separate several formats by commas; unexpected argument 'onnx'"),
        (["RUN", "--int8", "--format", "torch"], "--int8 is only available for ONNX; add onnx to --format"),
        (["RUN", "--images", "0"], "--images must be at least 1, got 0"),
        (["RUN", "--output", "out", "--licence", "mit"], "no option --licence; did you mean --license?"),
        (["RUN", "--output", "out", "--nothing=1"], "lkd has no setting 'nothing'"),
    ],
)
def test_invalid_arguments(run, error_of, args, words) -> None:
    assert words in error_of(*(arg.replace("RUN", run) for arg in args))


def test_missing_extra(run, error_of, monkeypatch) -> None:
    monkeypatch.setattr("lkd.export.files.find_spec", lambda name: None if name == "onnxscript" else name)
    assert error_of(run, "--output", "out") == (
        "--format onnx requires onnxscript, which is not installed; run pip install 'lightning-kd[onnx]', or use "
        "--format safetensors,torch"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("method", "settings", "own_names"),
    [
        ("simkd", (), False),  # the output of the teacher's classifier
        ("byot", ("--model.init_args.exit=1",), False),  # the output of an exit
        ("byot", (), True),  # the output of the network, although the module has exits
        ("ema_teacher", (), True),
    ],
)
def test_modules_with_other_outputs(tmp_path, method, settings, own_names) -> None:
    run = fit(tmp_path / "runs", *PAIR, f"--config=methods/{method}", *settings)
    done = export(run, "out", ["safetensors"] if own_names else ["safetensors", "torch", "onnx"])
    assert max(one.difference for one in done.files) <= 1e-4
    with safe_open("out/model.safetensors", "pt") as file:
        names = set(file.keys())
    checkpoint = set(load_run(run).checkpoint["state_dict"])
    own = {name.removeprefix("model.") for name in checkpoint if name.startswith("model.")}
    assert names == own if own_names else names < checkpoint
    assert not [name for name in names if name.startswith(("metrics", "teacher"))]


NETS = """
from torch import Tensor, nn

class Tied(nn.Module):
    '''Returns a dict; two of its layers have one weight.'''

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        hidden = self.second(self.first(image.flatten(1)).relu()).relu()
        return {"logits": self.head(hidden), "hidden": hidden}

class Choosy(Tied):
    '''Its way depends on what it sees.'''

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return super().forward(image if image.sum() > 0 else -image)
"""


def fit_own(folder: Path, network: str) -> str:
    Path("own_nets.py").write_text(NETS)
    module = ("--model=lkd.ClassificationModule", f"--model.init_args.model=own_nets.{network}")
    return fit(folder, "--config=data/digits", *module)


def test_network_with_dict_output_and_tied_weights(tmp_path) -> None:
    done = export(fit_own(tmp_path, "Tied"), "out")
    assert max(one.difference for one in done.files) <= 1e-4
    assert "own_nets.Tied()" in Path("out", CARD).read_text()
    program = torch.export.load("out/model.pt2")
    with safe_open("out/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(program.module().state_dict())


def test_network_that_cannot_be_traced(tmp_path, error_of) -> None:
    run = fit_own(tmp_path, "Choosy")
    message = error_of(run, "--format", "torch", "--output", "out")
    assert message.startswith("torch.export cannot trace Choosy for batches of any size (Could not guard")
    assert message.endswith("use --format safetensors to export only its weights")
    assert not Path("out").exists()
    assert main(["export", run, "--format", "safetensors", "--output", "out"]) == 0


@pytest.fixture
def folder(tmp_path) -> ImageFolderDataModule:
    """Return a data module with images of different shapes."""
    sizes = [(40, 30), (30, 47), (16, 16), (20, 20), (91, 17), (12, 10), (33, 64), (25, 25)]
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, (width, height) in enumerate(sizes):
            path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return ImageFolderDataModule(str(tmp_path / "images"), image_size=16, num_workers=0, val_size=0)


def test_code_of_the_card_preprocesses_like_the_data_module(folder, tmp_path) -> None:
    folder.setup("test")
    (batch,) = folder.test_dataloader()
    network = Network(ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(768, 2))), batch.input)
    facts = preprocessing(folder, network)
    (tmp_path / "preprocessing.json").write_text(json.dumps(facts))
    (code,) = re.findall(r"```python\n(.*?)```", preparation(facts), re.S)
    paths = sorted((tmp_path / "images" / "test").glob("*/*.png"))
    assert len(paths) == len(batch.input) == 8
    for path, expected in zip(paths, batch.input, strict=True):
        (tmp_path / "image.png").write_bytes(path.read_bytes())
        names: dict[str, np.ndarray] = {}
        exec(code, names)
        torch.testing.assert_close(torch.from_numpy(names["batch"])[0], expected, rtol=0, atol=1e-6)


def _executed(card: str) -> Iterator[dict[str, Any]]:
    """Run the card's code for each file in the export's folder, and yield its variables and printed values."""
    prepare, *uses = re.findall(r"```python\n(.*?)```", card, re.S)
    for code in uses:
        names: dict[str, Any] = {"printed": []}
        exec(f"def print(what): printed.append(what)\n{prepare}{code}", names)
        yield names


@pytest.mark.parametrize("chosen", [2, 9])
def test_network_with_more_outputs_than_classes(tmp_path, monkeypatch, recwarn, chosen: int) -> None:
    rng, animals = np.random.default_rng(0), ["ant", "bee", "cat", "dog"]
    for split, number, animal in product(("train", "test"), range(4), animals):
        path = tmp_path / "animals" / split / animal / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    network = "--model.init_args.model=lkd.models.resnet8", "--model.init_args.model.num_classes=10"
    images = f"--data.init_args.root={tmp_path / 'animals'}", "--data.init_args.image_size=8"
    sizes = "--data.init_args.batch_size=4", "--data.init_args.val_size=4", "--data.init_args.num_workers=0"
    kinds = "--model=lkd.ClassificationModule", "--data=lkd.ImageFolderDataModule"
    run = fit(tmp_path / "runs", *kinds, *network, *images, *sizes)
    message = "the model has 10 outputs, but the data has only 4 classes; set num_classes to 4"
    assert len([one for one in recwarn if message in str(one.message)]) == 1

    best = Path(run, "checkpoints/best.ckpt")
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["state_dict"]["model.fc.bias"][chosen] = 100.0
    torch.save(checkpoint, best)
    done = export(run, "out", ["safetensors", "torch", "onnx"])
    facts = json.loads((done.folder / "preprocessing.json").read_text())
    assert facts["class_names"] == [*animals, *"456789"]
    assert (facts["num_outputs"], facts["num_classes"]) == (10, 4)
    card = (done.folder / CARD).read_text()
    assert "A network for image classification with 4 classes and " in card
    assert "The network has 10 outputs, but the data of this run has 4 classes: the outputs from 4 on had no" in card
    monkeypatch.chdir(done.folder)
    Path("image.png").write_bytes((tmp_path / "animals/test/bee/0.png").read_bytes())
    found = list(_executed(card))
    assert [names["printed"] for names in found] == [[facts["class_names"][chosen]]] * 3
    if chosen == 9:  # `lkd predict` adds the names that exist
        assert main(["predict", "--ckpt_path", str(best), *images, "--trainer.enable_progress_bar=false"]) == 0
        rows = list(csv.DictReader(Path("runs/predict/version_0/predictions.csv").read_text().splitlines()))
        assert [(row["class"], row["class_name"]) for row in rows] == [("9", "")] * 16


def test_code_of_the_card_without_preprocessing(done, monkeypatch) -> None:
    monkeypatch.chdir(done.folder)
    facts = json.loads(Path("preprocessing.json").read_text())
    facts = {name: fact for name, fact in facts.items() if name not in ("mean", "std", "mode")}
    for file in ("model.pt2", "model.onnx"):
        batch = "```python\nimport numpy\nbatch = numpy.zeros((1, 1, 8, 8), numpy.float32)\n```"
        (names,) = _executed(batch + use(file, FILES, facts, None))
        assert names["printed"][0] in facts["class_names"]


def test_calibration_uses_training_images_without_augmentation(folder, distill) -> None:
    images = torch.cat(list(training_images(folder, distill())))
    train = folder.datasets["train"]
    assert train.augment  # not applied here
    again = torch.cat(list(training_images(folder, distill())))
    assert torch.equal(images, again)
    squares = [i for i, number in enumerate(train.index.tolist()) if train.source[number][0].size == (16, 16)]
    for i in squares:
        pixels = torch.from_numpy(np.array(train.source[train.index[i]][0])).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (folder.mean, folder.std))
        torch.testing.assert_close(images[i], (pixels - mean) / std)
    assert len(squares) == 1
    assert len(images) == 8


def test_calibration_uses_all_classes(tmp_path, distill) -> None:
    """The images are sorted by class, and their number is not a multiple of 512."""
    for split, number in (("train", 75), ("test", 1)):
        for one, position in product(range(8), range(number)):
            path = tmp_path / "images" / split / f"class{one}" / f"{position}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 30 * one, np.uint8)).save(path)
    data = ImageFolderDataModule(str(tmp_path / "images"), image_size=4, num_workers=0, val_size=0)
    images = torch.cat(list(training_images(data, distill())))
    assert len(images) == 512
    counts = images[:, 0, 0, 0].unique(return_counts=True)[1]
    assert len(counts) == 8
    assert 62 <= counts.min() <= counts.max() <= 66


@pytest.mark.parametrize("transforms", [False, True])
def test_code_that_creates_a_network_with_auxiliary_heads(transforms: bool) -> None:
    """lkd removes these heads. With pretrained weights, the network normalizes its input again."""
    settings = {"name": "googlenet", "num_classes": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about torchvision's initialization
        network = torchvision_model(**settings).eval()
    network.transform_input = transforms
    weights = {"weights": "DEFAULT"} if transforms else {}
    found = made({"class_path": "lkd.models.torchvision_model", "init_args": {**settings, **weights}})
    created = eval(found.call, {"torchvision": torchvision}).eval()
    created.load_state_dict(network.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(created(image), network(image))
    small = {**settings, **weights, "small_images": True}
    assert ("weights='DEFAULT'" in made({"class_path": "lkd.models.torchvision_model", "init_args": small}).call) == (
        transforms
    )


def test_epochs_of_a_checkpoint(run) -> None:
    folder = Path(run) / "checkpoints"
    best, last = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert best["global_step"] == last["global_step"]  # one epoch
    assert _epochs(best) == _epochs(last) == 1
    del best["loops"]  # as in a checkpoint that contains only weights
    assert _epochs(best) == 1


def test_metrics_of_a_file_use_its_own_outputs() -> None:
    checked = Checked("model.onnx", 1, Classification())
    got, expected = torch.eye(4), torch.eye(4)[[0, 1, 3, 3]]
    checked.update(got, expected, torch.tensor([0, 2, 2, IGNORE_INDEX]))
    assert (checked.images, checked.labelled, checked.agreement, checked.difference) == (4, 3, 3 / 4, 1)
    assert (checked.score, checked.expected_score) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_subset_of_test_images_is_evenly_spaced() -> None:
    data = DigitsDataModule(num_workers=0)
    data.prepare_data()
    data.setup("test")
    assert list(loader_of_some(data, 3).dataset.indices) == [0, 179, 358]  # type: ignore[attr-defined]
    assert loader_of_some(data, 359).dataset is data.datasets["test"]
