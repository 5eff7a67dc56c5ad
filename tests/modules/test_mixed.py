"""Modules with mixed images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lkd import ClassificationModule, MutualModule, NoisyStudentModule, SyntheticDataModule
from lkd.__main__ import main
from lkd.datamodules import CutMix, Mixup, RotatedViews, StrongView
from lkd.types import IGNORE_INDEX, Batch, Mixed

CLASSES = 4


def mixed_batch(samples: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(samples, 3, 8, 8, generator=generator)
    target, other = torch.randint(CLASSES, (2, samples), generator=generator)
    weight = 0.5 + torch.rand(samples, generator=generator) / 2
    return Batch(image, target, torch.arange(samples), mixed=Mixed(other, weight))


def soft_labels(target: Tensor, mixed: Mixed, smoothing: float = 0.0) -> Tensor:
    """Return the labels as probabilities; each image has two."""
    weight = mixed.weight.double()[:, None]
    hard = weight * F.one_hot(target, CLASSES) + (1 - weight) * F.one_hot(mixed.target, CLASSES)
    return (1 - smoothing) * hard + smoothing / CLASSES


def mixing(**settings) -> SyntheticDataModule:
    settings = {"batch_size": 16, "val_size": 16, "mix": Mixup(), **settings}
    return SyntheticDataModule(CLASSES, (3, 8, 8), train_size=64, test_size=24, **settings)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard_loss_is_cross_entropy_with_the_mixed_labels(tiny, smoothing: float) -> None:
    module, batch = ClassificationModule(tiny(), label_smoothing=smoothing), mixed_batch()
    logits = torch.randn(9, CLASSES, dtype=torch.float64, requires_grad=True)
    loss = module.hard_loss(logits, batch.target, batch.mixed)
    expected = F.cross_entropy(logits, soft_labels(batch.target, batch.mixed, smoothing))
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_missing_labels_are_ignored(tiny) -> None:
    module, (_, target, *_, mixed) = ClassificationModule(tiny()), mixed_batch(4)
    target[1], mixed.target[2] = IGNORE_INDEX, IGNORE_INDEX
    logits = torch.randn(4, CLASSES, dtype=torch.float64)
    each = [-logits[i].log_softmax(0) for i in range(4)]
    weight = mixed.weight.double()
    expected = weight[2] * each[2][target[2]]  # the partner is unlabelled
    for i in (0, 3):
        expected = expected + weight[i] * each[i][target[i]] + (1 - weight[i]) * each[i][mixed.target[i]]
    torch.testing.assert_close(module.hard_loss(logits, target, mixed), expected / 3, rtol=1e-7, atol=0)
    none = torch.full_like(target, IGNORE_INDEX)
    assert module.hard_loss(logits, none, mixed) == 0


def test_unmixed_images_have_the_usual_loss(tiny) -> None:
    module, (_, target, *_) = ClassificationModule(tiny()), mixed_batch()
    logits = torch.randn(9, CLASSES)
    logits[0, (target[0] + 1) % CLASSES] = -torch.inf  # the probability of another class does not affect this image
    torch.testing.assert_close(module.hard_loss(logits, target, Mixed.none(target)), module.hard_loss(logits, target))


def test_invalid_label_of_a_partner(tiny) -> None:
    target = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="the network has 4 classes, so labels must lie in"):
        ClassificationModule(tiny()).hard_loss(torch.randn(2, 4), target, Mixed(target + 3, torch.ones(2)))


def test_all_modules_use_both_labels(tiny, distill) -> None:
    batch = mixed_batch()
    expected = soft_labels(batch.target, batch.mixed).float()
    alone, student = ClassificationModule(tiny()), distill(hard_weight=0.3)
    students = MutualModule([tiny(seed=1), tiny(seed=2)])
    for module, names, weight in ((alone, ["hard"], 1.0), (student, ["hard"], 0.3), (students, ["hard", "hard_2"], 1)):
        logits, terms = module.losses(batch)
        torch.testing.assert_close(terms[names[0]], weight * F.cross_entropy(logits, expected))
        unmixed = module.losses(batch._replace(mixed=None))[1]
        assert all(not torch.isclose(terms[name], unmixed[name]) for name in names)


@pytest.mark.parametrize(("views", "workers"), [(None, 0), (RotatedViews(), 0), (None, 1)])
@pytest.mark.parametrize("mix", [Mixup(), CutMix(p=0.5)])
def test_training_with_mixed_images(mix, views, workers, tiny, trainer) -> None:
    settings = {"batch_size": 16, "mix": mix, "views": views, "num_workers": workers}
    engine = trainer(max_epochs=3)
    engine.fit(ClassificationModule(tiny()), SyntheticDataModule(CLASSES, (3, 8, 8), train_size=400, **settings))
    assert engine.callback_metrics["val/acc"] > 0.8


def test_views_mixed_with_different_partners_are_rejected(distill, trainer) -> None:
    with pytest.raises(ValueError, match="mixes each view with a different partner; remove its `mix`"):
        trainer().fit(distill(NoisyStudentModule), mixing(views=StrongView()))


@pytest.mark.parametrize("mix", ["Mixup", "CutMix"])
def test_from_yaml(mix: str) -> None:
    overlay = {"data": {"init_args": {"mix": {"class_path": f"lkd.datamodules.{mix}", "init_args": {"alpha": 0.2}}}}}
    Path("mix.yaml").write_text(yaml.safe_dump(overlay))
    short = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "digits/kd", "--config", "mix.yaml", *short]) == 0
    (config,) = Path("runs").rglob("config.yaml")
    kept = yaml.safe_load(config.read_text())["data"]["init_args"]["mix"]
    assert kept == {"class_path": f"lkd.datamodules.{mix}", "init_args": {"alpha": 0.2, "p": 1.0}}


def test_augmentation_from_yaml() -> None:
    augment = """
data:
  init_args:
    augment:
      - {class_path: lkd.datamodules.Cutout, init_args: {size: 3, fill: [77]}}
      - {class_path: lkd.datamodules.RandomErasing, init_args: {scale: [0.1, 0.2]}}
      - {class_path: lkd.datamodules.ColorJitter, init_args: {brightness: 0.4, contrast: [0.5, 1.5]}}
      - {class_path: lkd.datamodules.TrivialAugment}
"""
    Path("augment.yaml").write_text(augment)
    short = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "digits/kd", "--config", "augment.yaml", *short]) == 0
