from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import NoisyStudentModule, Normalization, SyntheticDataModule
from lkd import functional as KF
from lkd.datamodules import RotatedViews, StrongView
from lkd.losses import KD, MLKD
from lkd.types import IGNORE_INDEX


class RecordInputs(nn.Module):
    """A network that records its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return self.network(image)


def images(**settings) -> SyntheticDataModule:
    settings = {"views": StrongView(), "batch_size": 16, "val_size": 16, **settings}
    return SyntheticDataModule(4, (3, 8, 8), train_size=64, test_size=24, **settings)


def first_batch(data: SyntheticDataModule):
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_teacher_gets_the_weak_view_and_student_the_strong_one(tiny) -> None:
    student, teacher = RecordInputs(tiny(seed=1)), RecordInputs(tiny(seed=2))
    module = NoisyStudentModule(student, teacher, KD(1.0), distill_weight=2.0, hard_weight=0.5)
    batch = first_batch(images(label_size=12))
    weak, strong = batch.input.chunk(2)
    assert not torch.equal(weak, strong)
    logits, terms = module.losses(module.unpack(batch))
    (theirs,), (ours,) = teacher.seen, student.seen
    assert torch.equal(theirs, weak)
    assert torch.equal(ours, strong)
    target = batch.target[:16]
    assert 0 < (target != IGNORE_INDEX).sum() < 16
    with torch.no_grad():
        torch.testing.assert_close(terms["kd"], 2 * KF.kd_loss(logits, teacher.network(weak), 1.0))
        torch.testing.assert_close(terms["hard"], 0.5 * F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX))


def test_fit_and_evaluation_on_single_views(distill, trainer) -> None:
    module, data = distill(NoisyStudentModule), images(label_size=12)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = trainer(max_epochs=2)
    run.fit(module, data)
    assert any(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert {"train/hard", "train/kd", "val/teacher_acc", "val/agreement"} <= set(run.callback_metrics)
    (measured,) = run.test(module, data, verbose=False)
    assert 0 <= measured["test/agreement"] <= 1


def test_teacher_normalization(tiny) -> None:
    teacher = RecordInputs(tiny(seed=2))
    module = NoisyStudentModule(
        tiny(seed=1), teacher, teacher_normalization=Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    )
    module._kept_facts = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    module.setup("fit")
    batch = first_batch(images())
    teacher.seen.clear()
    module.losses(module.unpack(batch))
    pixels = batch.input[:16] * 0.25 + 0.5
    mean, std = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1), torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)
    torch.testing.assert_close(teacher.seen[0], (pixels - mean) / std)


@pytest.mark.parametrize(("views", "number"), [(None, 1), (RotatedViews(), 4)])
def test_other_numbers_of_views_are_rejected(distill, trainer, views, number: int) -> None:
    with pytest.raises(ValueError, match=rf"weak and a strong one, .* batches have {number}; set `views`"):
        trainer().fit(distill(NoisyStudentModule), images(views=views))


def test_criteria_that_compare_views_are_rejected(distill, trainer) -> None:
    with pytest.raises(ValueError, match="criterion MLKD requires 2 views of each image"):
        trainer().fit(distill(NoisyStudentModule, criterion=MLKD()), images())
