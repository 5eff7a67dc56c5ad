"""Predictions for validation images in TensorBoard."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lkd import ClassificationModule, DistillModule, SyntheticDetectionDataModule, SyntheticSegmentationDataModule
from lkd.callbacks import PredictionImages
from lkd.callbacks.prediction_images import _part
from lkd.callbacks.sheet import sheet
from lkd.losses import KD, PerPixel
from lkd.models import UNet, fcos
from lkd.tasks import Classification, Detection, SemanticSegmentation, Task
from lkd.tasks.visualization import UNLABELLED, Visualization, class_color
from lkd.types import IGNORE_INDEX, Batch


def test_visualization_of_masks() -> None:
    target = torch.tensor([[[0, 2], [IGNORE_INDEX, 1]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 2], [2, 2]]]), 3).permute(0, 3, 1, 2).float()
    (label,) = SemanticSegmentation(3).visualize(target, ["sky", "road"])
    (found,) = SemanticSegmentation(3).visualize(target, ["sky", "road"], logits)
    assert label.image[:, 1, 0].tolist() == list(UNLABELLED)
    assert label.image[:, 0, 1].tolist() == found.image[:, 1, 1].tolist() == list(class_color(2)) == [0, 128, 0]
    assert label.legend == {"sky": (0, 0, 0), "road": (128, 0, 0), "2": (0, 128, 0), "no label": UNLABELLED}
    assert found.text == "67% correct"


def test_visualization_of_classes() -> None:
    target, logits = torch.tensor([1, IGNORE_INDEX]), torch.tensor([[0.0, 9.0], [1.0, 1.0]]).log_softmax(1)
    assert [cell.text for cell in Classification().visualize(target, ["cat", "dog"])] == ["dog", "no label"]
    assert [cell.text for cell in Classification().visualize(target, ["cat"], logits)] == [
        "100% 1\n0% cat",
        "50% cat\n50% 1",
    ]


def test_sheet_shows_the_images() -> None:
    red = torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 255
    drawn = sheet([{"image": Visualization("no. 1", red), "label": Visualization("a long text " * 9)}])
    is_red = (drawn == torch.tensor([255, 0, 0]).view(3, 1, 1)).all(0)
    assert is_red.sum() == 140 * 140
    assert (drawn[:, :, -3:] == 255).all()  # the text is truncated to its column


def _fit(trainer, folder, callbacks):
    torch.manual_seed(0)
    networks = [UNet((2, 3), num_classes=5) for _ in range(2)]
    module = DistillModule(*networks, PerPixel(KD(1.0)), task=SemanticSegmentation(5))
    data = SyntheticSegmentationDataModule(16, train_size=40, test_size=8, val_size=0.4, batch_size=8)
    logger = TensorBoardLogger(folder, version=0)
    trainer(max_epochs=3, logger=logger, callbacks=callbacks, num_sanity_val_steps=-1).fit(module, data)
    return module, EventAccumulator(str(folder / "lightning_logs" / "version_0")).Reload()


def test_images_do_not_affect_training(trainer, tmp_path) -> None:
    plain, _ = _fit(trainer, tmp_path / "without", [])
    module, events = _fit(trainer, tmp_path / "with", [PredictionImages(num_images=3, every_n_epochs=2)])
    assert [image.step for image in events.Images("predictions")] == [6, 9]
    for ours, theirs in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_rows_of_a_batch() -> None:
    images, boxes = (
        [torch.full((3, 4, 5), one) for one in range(3)],
        [{"boxes": torch.zeros(one, 4)} for one in range(3)],
    )
    rows = Batch(images, boxes, torch.arange(3)).rows([2, 0])
    assert [int(image[0, 0, 0]) for image in rows.input] == [2, 0]
    assert [len(one["boxes"]) for one in rows.target] == [2, 0]
    assert rows.index.tolist() == [2, 0]
    pair = {"left": torch.arange(6).view(3, 2), "right": torch.arange(3)}
    rows = Batch(pair, torch.tensor([4, 5, 6])).rows([1])
    assert (rows.input["left"].tolist(), rows.input["right"].tolist(), rows.target.tolist()) == ([[2, 3]], [1], [5])


def test_small_batches_are_not_repeated() -> None:
    batch = Batch(torch.zeros(4, 1), torch.arange(4))
    assert [_part(batch, count).target.tolist() for count in (8, 4, 2)] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2]]
    pair = {"left": torch.zeros(3, 2), "right": torch.zeros(3)}
    assert Batch(None, pair).size == 3
    assert Batch(None, [pair] * 4).size == 4


class ShownDetection(Detection):
    """Detection that shows the number of boxes."""

    def visualize(self, target, class_names, logits=None):
        return [Visualization(f"{len(one['boxes'])} boxes") for one in target]


def test_images_of_detection(trainer, tmp_path) -> None:
    module = ClassificationModule(fcos(5, (4, 8), 32, num_convs=1), task=ShownDetection())
    data = SyntheticDetectionDataModule((32, 48), train_size=16, val_size=8, batch_size=8)
    logger = TensorBoardLogger(tmp_path, version=0)
    trainer(max_epochs=1, logger=logger, callbacks=[PredictionImages(num_images=3)]).fit(module, data)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload()
    assert len(events.Images("predictions")) == 1


def test_invalid_settings() -> None:
    class Silent(Classification):
        visualize = Task.visualize

    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        PredictionImages(num_images=0)
    with pytest.raises(ValueError, match="cannot show predictions of Silent; override its method `visualize`"):
        PredictionImages().setup(None, SimpleNamespace(task=Silent()), "fit")
