"""`lkd export` of networks that return maps: images of other sizes, and tasks other than classification."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lkd import ClassificationModule
from lkd.__main__ import main
from lkd.export import export
from lkd.export.card import CARD
from lkd.export.files import Network
from lkd.export.measure import Checked
from lkd.loading import load_run
from lkd.models import UNet
from lkd.tasks import Classification, Detection, SemanticSegmentation
from lkd.types import IGNORE_INDEX

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    smaller = ("--data.init_args.train_size=64", "--data.init_args.test_size=24", "--data.init_args.val_size=8")
    assert main(["fit", "--config=shapes/kd", *SHORT, *smaller, f"--trainer.default_root_dir={folder}"]) == 0
    return str(next(folder.rglob("best.ckpt")).parents[1])


@pytest.fixture(scope="module")
def done(run):
    return export(run, int8=True)


def test_files_equal_the_checkpoint_at_other_sizes(run, done) -> None:
    module = load_run(run).module
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    program = torch.export.load(done.folder / "model.pt2").module()
    dims = [value.shape for value in (*session.get_inputs(), *session.get_outputs())]
    assert dims == [["batch", 3, "height", "width"], ["batch", 5, "height", "width"]]
    for shape in ((1, 3, 32, 32), (3, 3, 37, 45), (2, 3, 68, 32)):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = module(image)
            torch.testing.assert_close(program(image), expected, rtol=0, atol=1e-4)
        got = session.run(["logits"], {"image": image.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=1e-4)


def test_mean_iou_of_each_file(done) -> None:
    *float32, int8 = done.files
    assert len(float32) == 3
    for one in float32:
        assert one.difference <= 1e-4
        assert (one.images, one.labelled) == (24, 22_430)  # without the ignored pixels
        assert one.expected_score == pytest.approx(done.metrics["test/miou"])
        assert one.score == pytest.approx(one.expected_score, abs=1e-6)
        assert one.agreement == 1
    assert int8.difference > 1e-4
    assert 0.5 < int8.agreement < 1


def test_code_of_the_card_pads_images_of_any_size(run, done, tmp_path, monkeypatch) -> None:
    card = (done.folder / CARD).read_text()
    for words in (
        "A network for image segmentation with 5 classes and 13,589 parameters",
        "pipeline_tag: image-segmentation",
        "type: mean_iou",
        "maximum logit difference | same prediction | mean IoU |",
        "accept images whose height and width are at least 32 pixels; other",
    ):
        assert words in card
    pixels = np.random.default_rng(0).integers(0, 256, (18, 41, 3), np.uint8)
    for file in done.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    padded = torch.zeros(1, 3, 32, 41)
    padded[..., :18, :41] = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = load_run(run).module((padded - 0.5) / 0.25).argmax(1)[0, :18]
    prepare, *uses = re.findall(r"```python\n(.*?)```", card, re.S)
    for code in uses[:3]:
        names: dict[str, Any] = {"print": lambda *_: None}
        exec(prepare + code, names)
        assert np.array_equal(names["classes"], expected.numpy())
    assert len(uses) == 4


class Positions(nn.Module):
    """A network with one weight per pixel, and a map of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.rand(3, 8, 8))
        self.head = nn.Conv2d(3, 2, 2, stride=2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(image + self.at)}


class Strided(nn.Module):
    """A network for multiples of 4 pixels, like those of segmentation_models_pytorch."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 4, stride=4), nn.ConvTranspose2d(4, 2, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] % 4 or image.shape[-2] % 4:
            raise RuntimeError("not a multiple of 4")
        return self.up(self.down(image))


class TracedForOneSize(nn.Conv2d):
    """A network for images of any size that `torch.export` can only trace for one size."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * int(image.shape[-1])


@pytest.mark.parametrize(
    ("network", "step"),
    [
        (Positions(), None),
        (nn.Conv2d(3, 2, 1), 1),
        (UNet([4, 4, 4], 2), 1),
        (Strided(), 4),
        (TracedForOneSize(3, 2, 1), None),
    ],
)
def test_accepted_sizes(network: nn.Module, step: int | None) -> None:
    module = ClassificationModule(network, task=SemanticSegmentation(2)).eval()
    found = Network(module, torch.zeros(1, 3, 8, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert found.size_step == step
    message = "the exported files accept only images of 8x8 pixels, because torch.export cannot trace TracedForOneSize"
    assert any(message in str(one.message) for one in caught) is isinstance(network, TracedForOneSize)
    with torch.no_grad():
        for size in [(8, 8)] if step is None else [(8, 8), (8 + step, 8 + 3 * step)]:
            image = torch.rand(3, 3, *size)
            assert torch.equal(found.program.module()(image), found(image))


def test_weights_alone_require_no_program() -> None:
    found = Network(
        ClassificationModule(TracedForOneSize(3, 2, 1), task=SemanticSegmentation(2)), torch.zeros(1, 3, 8, 8), False
    )
    assert found.size_step == 1
    assert set(found.weights) == {"weight", "bias"}


def test_task_without_classes(tmp_path) -> None:
    class Estimate(Classification):
        has_classes = False

        def choice(self, logits: Tensor, target: Tensor) -> None:
            return None

    checked = Checked("model.onnx", 1, Estimate())
    checked.update(torch.eye(2), torch.eye(2), torch.tensor([0, IGNORE_INDEX]))
    assert (checked.labelled, checked.score) == (1, 1)
    assert np.isnan(checked.agreement)
    network = Network(ClassificationModule(nn.Conv2d(3, 1, 1), task=SemanticSegmentation(2)), torch.zeros(1, 3, 8, 8))
    network.task = Estimate()
    assert network.num_outputs is None


def test_detection_is_rejected(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("LKD_DEBUG", raising=False)
    sizes = ("--data.init_args.train_size=20", "--data.init_args.test_size=4", "--data.init_args.val_size=4")
    root = f"--trainer.default_root_dir={tmp_path}"
    assert main(["fit", "--config=detection/student", *SHORT, *sizes, "--data.init_args.batch_size=4", root]) == 0
    assert main(["export", str(next(tmp_path.rglob("best.ckpt"))), "--output", "out"]) == 2
    message = "lkd export does not support the task Detection; `lkd test` evaluates it, and the checkpoint contains the"
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
    assert not Detection.exports
