from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from lkd import Batch, DistillLoss, DistillModule, MutualModule, Outputs, Probe
from lkd.__main__ import main
from lkd.losses import AT, KD, FitNet, WeightedSum
from lkd.models import CIFARResNet, load_weights

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
SHORT += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def _batch() -> Batch:
    torch.manual_seed(0)
    return Batch(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]))


def _students(tiny, count: int = 3) -> list[nn.Module]:
    return [tiny(seed) for seed in range(count)]


def _wide() -> nn.Module:
    torch.manual_seed(7)
    return CIFARResNet(8, (4, 8, 8, 8), 4)


def test_each_student_has_its_losses(tiny) -> None:
    """Each student's loss consists of the cross-entropy and the mean divergence from its peers."""
    students, batch = _students(tiny), _batch()
    module = MutualModule(students, distill_weight=0.7, hard_weight=0.2).eval()
    logits, terms = module.losses(batch)
    logits_of = [student(batch.input) for student in students]
    torch.testing.assert_close(logits, logits_of[0])
    for number, own in enumerate(logits_of):
        suffix = f"_{number + 1}" if number else ""
        peers = [peer.softmax(1) for other, peer in enumerate(logits_of) if other != number]
        soft = [(p * (p.log() - own.log_softmax(1))).sum(1).mean() for p in peers]
        torch.testing.assert_close(terms[f"kd{suffix}"], 0.7 * torch.stack(soft).mean())
        torch.testing.assert_close(terms[f"hard{suffix}"], 0.2 * F.cross_entropy(own, batch.target))
    assert len(terms) == 6


def test_peers_get_no_gradient(tiny) -> None:
    students = _students(tiny)
    _, terms = MutualModule(students).losses(_batch())
    terms["kd_2"].backward()
    reached = [any(parameter.grad is not None for parameter in student.parameters()) for student in students]
    assert reached == [False, True, False]


class Crossed(DistillLoss):
    """A criterion that reads other layers of the student than of the peer, and no logits."""

    reads_logits = False

    def __init__(self) -> None:
        super().__init__(["layer1"], ["layer2"])

    def build(self, student: Probe, teacher: Probe) -> None:
        (ours,), (theirs,) = student.outputs.features.values(), teacher.outputs.features.values()
        self.adapter = nn.Conv2d(ours.shape[1], theirs.shape[1], 1, stride=2)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        (ours,), (theirs,) = student.features.values(), teacher.features.values()
        return F.mse_loss(self.adapter(ours), theirs)


@pytest.mark.parametrize("criterion", [FitNet, Crossed], ids=["FitNet", "Crossed"])
def test_each_ordered_pair_has_an_adapter(criterion, tiny, data, trainer) -> None:
    module = MutualModule([tiny(0), _wide()], criterion())
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    shapes = [next(part.parameters()).shape[:2] for part in module.criterion.parts]
    assert shapes == [(8, 4), (4, 8)]
    trained = {id(parameter) for group in engine.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.parameters()}
    sum(module.losses(_batch())[1].values()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_several_criteria_are_logged_for_each_student(tiny, data, trainer) -> None:
    both = WeightedSum({"soft": KD(), "at": AT()}, weights={"at": 10.0})
    engine = trainer(max_epochs=1)
    engine.fit(MutualModule([tiny(0), _wide()], both), data)
    names = {"loss", "acc", "hard", "soft", "at", "hard_2", "soft_2", "at_2"}
    assert {name.removeprefix("train/") for name in engine.callback_metrics if name.startswith("train/")} == names
    measured = {name for name in engine.callback_metrics if name.startswith("val/")}
    terms = {"val/soft", "val/at", "val/distill", "val/soft_2", "val/at_2", "val/distill_2"}
    assert measured == {"val/loss", "val/acc", "val/acc_2", *terms}


def test_each_student_has_an_accuracy(tiny, data, trainer) -> None:
    students = _students(tiny)
    module = MutualModule(students)
    (found,) = trainer().validate(module, data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    module.eval()
    with torch.no_grad():
        right = [(student(batch.input).argmax(1) == batch.target).float().mean().item() for student in students]
    assert [found[name] for name in ("val/acc", "val/acc_2", "val/acc_3")] == pytest.approx(right)


def test_distillation_reduces_the_distance_between_students(tiny, data, trainer) -> None:
    """The criterion, not only the labels, increases agreement."""
    distances = []
    for weight in (0.0, 20.0):
        students = _students(tiny, 2)
        sgd = {"optimizer": lambda parameters: SGD(parameters, lr=0.02)}
        trainer(max_epochs=3).fit(MutualModule(students, distill_weight=weight, **sgd), data)
        batch = next(iter(data.val_dataloader()))
        with torch.no_grad():
            first, second = (student.eval()(batch.input).softmax(1) for student in students)
        distances.append((first - second).abs().mean())
    assert distances[1] < 0.5 * distances[0]


def test_all_students_are_restored(tiny, resume) -> None:
    saved = resume(lambda: MutualModule([tiny(0), _wide()], FitNet()))
    assert {name.split(".")[0] for name in saved} == {"model", "student_2", "criterion"}


def test_first_student_of_a_checkpoint_teaches(tiny, data, trainer, tmp_path) -> None:
    module = MutualModule([tiny(0), tiny(1)])
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    engine.save_checkpoint(tmp_path / "mutual.ckpt")
    later = DistillModule(tiny(5), tiny(6), teacher_ckpt=str(tmp_path / "mutual.ckpt"))
    assert all(torch.equal(*pair) for pair in zip(later.teacher.parameters(), module.model.parameters(), strict=True))
    assert "students" not in torch.load(tmp_path / "mutual.ckpt", weights_only=True)["hyper_parameters"]


def test_invalid_arguments(tiny, data, trainer) -> None:
    with pytest.raises(ValueError, match="at least two students, got 1"):
        MutualModule([tiny()])
    with pytest.raises(ValueError, match="the students have 4, 5 classes, but the criterion compares their logits"):
        trainer().fit(MutualModule([tiny(), tiny(num_classes=5)]), data)
    trainer(max_epochs=1).fit(MutualModule([tiny(), tiny(num_classes=5)], distill_weight=0.0), data)
    with pytest.raises(TypeError, match="Mutual requires a criterion"):
        MutualModule(_students(tiny), nn.MSELoss())
    with pytest.raises(ValueError, match="distill_weight must be a finite number of at least 0"):
        MutualModule(_students(tiny), distill_weight=-1.0)


def test_failing_student_is_named(tiny, data, trainer) -> None:
    broken = tiny(1)
    nn.init.constant_(broken.fc.bias, torch.nan)
    with pytest.raises(ValueError, match=r"terms: kd, hard_2, kd_2; student_2 logits not finite"):
        trainer(num_sanity_val_steps=0).fit(MutualModule([tiny(), broken]), data)


def test_command_line() -> None:
    assert main(["fit", "--config", "digits/mutual", *SHORT]) == 0
    (best,) = Path("runs").rglob("best.ckpt")
    assert main(["test", "--ckpt_path", str(best), "--trainer.accelerator=cpu"]) == 0
    again = L.LightningModule.load_from_checkpoint(best)
    assert isinstance(again, MutualModule)
    saved = torch.load(best, weights_only=True)["state_dict"]
    assert torch.equal(again.get_submodule("student_2").fc.weight, saved["student_2.fc.weight"])
    student = CIFARResNet(8, (4, 4, 8, 16), 10, 1)
    assert torch.equal(load_weights(student, best).fc.weight, saved["model.fc.weight"])


def test_plain_data(tiny, trainer) -> None:
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, target), batch_size=4)
    trainer(max_epochs=1).fit(MutualModule(_students(tiny, 2)), loader)
    with pytest.raises(ValueError, match=r"Mutual builds its adapters.*input_shape"):
        trainer(max_epochs=1).fit(MutualModule(_students(tiny, 2), FitNet()), loader)


def test_accuracies_are_assigned_to_their_students(tiny) -> None:
    students = _students(tiny)
    for number, student in enumerate(students):
        student.fc.bias.data[number] += 1000  # always predicts the class `number`
    module = MutualModule(students).eval()
    metrics = module.stage_metrics("val")
    module.update_metrics(metrics, _batch()._replace(target=torch.tensor([0, 1, 1, 2, 2, 2])))
    assert [int(metrics[name].correct) for name in ("acc", "acc_2", "acc_3")] == [1, 2, 3]
