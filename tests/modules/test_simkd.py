"""SimKDModule: all loops use the teacher's classifier, also after loading a checkpoint."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from lkd import Batch, SimKDModule, SyntheticDataModule
from lkd.__main__ import main
from lkd.losses import KD, SimKD, WeightedSum


@pytest.fixture
def module(distill) -> SimKDModule:
    return distill(SimKDModule, criterion=SimKD(), distill_weight=1.0, hard_weight=0.0)


def _expected_logits(module: SimKDModule, image: Tensor) -> Tensor:
    """Return the logits of the student's layers up to the map, the projector, and the teacher's own classifier."""
    return module.teacher.fc(module.criterion.projector(_map(module.student, image)).mean((2, 3)))


def test_all_loops_use_the_teachers_classifier(module, data, trainer) -> None:
    trainer().fit(module, data)
    module.eval()
    image = torch.randn(5, 3, 8, 8)
    expected = _expected_logits(module, image)
    torch.testing.assert_close(module(image), expected)
    torch.testing.assert_close(module.predict_step(Batch(image, torch.zeros(5)), 0), expected)
    logits, terms = module.losses(Batch(image, torch.zeros(5, dtype=torch.int64)))
    torch.testing.assert_close(logits, expected)
    assert set(terms) == {"simkd"}

    batches = trainer().predict(module, data)
    images = torch.cat([batch.input for batch in data.test_dataloader()])
    torch.testing.assert_close(torch.cat(batches), _expected_logits(module, images))
    (measured,) = trainer().test(module, data)
    target = torch.cat([batch.target for batch in data.test_dataloader()])
    acc = (_expected_logits(module, images).argmax(1) == target).float().mean()
    assert measured["test/acc"] == pytest.approx(acc.item())


class _Record(L.Callback):
    """Records copies of the networks at the start of training, and its batches."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.networks = deepcopy((pl_module.student, pl_module.criterion.projector, pl_module.teacher))
        self.batches: list[Batch] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch)


def _map(network: nn.Module, image: Tensor) -> Tensor:
    """Return the input of a network's pooling layer."""
    features: list[Tensor] = []
    hook = network.avgpool.register_forward_pre_hook(lambda layer, args: features.append(args[0]))
    network(image)
    hook.remove()
    return features[0]


def test_module_equals_a_plain_loop(distill, data, trainer) -> None:
    """Training with Lightning in float64 equals the authors' loop; the weights of labels and KL divergence are 0."""
    keep, settings = _Record(), {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    module = distill(
        SimKDModule,
        criterion=SimKD(factor=2),
        distill_weight=1.0,
        hard_weight=0.0,
        optimizer=lambda parameters: SGD(parameters, **settings),
    )
    trainer(max_epochs=2, precision="64-true", callbacks=[keep], num_sanity_val_steps=0).fit(module, data)
    student, projector, teacher = keep.networks
    student.train(), projector.train(), teacher.eval()
    own = [parameter for name, parameter in student.named_parameters() if not name.startswith("fc.")]
    optimizer = SGD([*own, *projector.parameters()], **settings)
    assert len(keep.batches) == 6
    for batch in keep.batches:
        with torch.no_grad():
            wanted = _map(teacher, batch.input)
        found = _map(student, batch.input)
        size = min(found.shape[2], wanted.shape[2])
        found, wanted = (F.adaptive_avg_pool2d(feature, size) for feature in (found, wanted))
        optimizer.zero_grad()
        F.mse_loss(projector(found), wanted).backward()
        optimizer.step()
    for ours, theirs in ((module.student, student), (module.criterion.projector, projector)):
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_trainable_parameters(module, data, trainer) -> None:
    """Only the classifiers are frozen, because DDP rejects trainable parameters without a gradient."""
    before = {}
    trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    for name, parameter in module.named_parameters():
        before[name] = parameter.detach().clone()
    trainer(max_steps=2, limit_val_batches=0).fit(module, data)
    frozen = {"model.fc.weight", "model.fc.bias", "criterion.head.weight", "criterion.head.bias"}
    for name, parameter in module.named_parameters():
        if name.startswith("teacher."):
            continue
        assert parameter.requires_grad == (name not in frozen), name
        assert torch.equal(parameter, before[name]) == (name in frozen), name
    assert torch.equal(module.criterion.head.weight, module.teacher.fc.weight)
    assert module.criterion.head.weight is not module.teacher.fc.weight


def test_checkpoint_contains_the_classifier(module, data, tiny, trainer, tmp_path) -> None:
    """The classifier comes from the checkpoint even if the new module has another teacher."""
    fitting = trainer(max_epochs=1)
    fitting.fit(module, data)
    fitting.save_checkpoint(tmp_path / "simkd.ckpt")
    networks = {"student": tiny(seed=3), "teacher": tiny(seed=4), "criterion": SimKD()}
    again = SimKDModule.load_from_checkpoint(tmp_path / "simkd.ckpt", **networks)
    image = torch.randn(5, 3, 8, 8)
    assert torch.equal(again.eval()(image), module.eval()(image))
    assert not torch.equal(again.teacher.fc.weight, module.teacher.fc.weight)


def test_from_the_command_line() -> None:
    configs = ["--config", "data/digits", "--config", "pairs/digits", "--config", "methods/simkd"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *configs, *short, "--trainer.accelerator=cpu"]) == 0
    (path,) = Path("runs").rglob("best.ckpt")
    module = L.LightningModule.load_from_checkpoint(path, map_location="cpu")
    assert isinstance(module, SimKDModule)
    image = torch.rand(4, 1, 8, 8)
    expected = _expected_logits(module.eval(), image)
    torch.testing.assert_close(module(image), expected)
    assert main(["predict", "--ckpt_path", str(path), "--trainer.accelerator=cpu"]) == 0


def test_combination_with_other_criteria(distill, data, trainer) -> None:
    """All criteria of a sum get the logits of the reused classifier."""
    both = WeightedSum({"simkd": SimKD(), "kd": KD()})
    module = distill(SimKDModule, criterion=both, distill_weight=1.0, hard_weight=1.0)
    trainer(max_epochs=1).fit(module, data)
    image = torch.randn(5, 3, 8, 8)
    _, terms = module.eval().losses(Batch(image, torch.zeros(5, dtype=torch.int64)))
    teacher = module.teacher(image)
    expected = KD()(module.student_outputs(Batch(image, torch.zeros(5))), module.teacher_extractor(image), None)
    torch.testing.assert_close(terms["kd"], expected)
    assert set(terms) == {"hard", "simkd", "kd"}
    assert teacher.shape == module(image).shape


def test_invalid_arguments(distill, tiny, data, trainer) -> None:
    with pytest.raises(ValueError, match=r"SimKDModule requires the criterion lkd\.losses\.SimKD, got KD; change"):
        trainer().fit(distill(SimKDModule), data)
    module = distill(SimKDModule, criterion=SimKD(), teacher=tiny(num_classes=3))
    with pytest.raises(ValueError, match=r"the data has 4 classes, but the teacher's classifier, .* only 3; use"):
        trainer().fit(module, data)


def test_maps_of_different_sizes(distill, trainer) -> None:
    """A larger map of the student is averaged to the teacher's size, even if the teacher is not run."""
    criterion = SimKD(student_layer="layer2", teacher_layer="@map")
    module = distill(SimKDModule, criterion=criterion, distill_weight=1.0, hard_weight=0.0)
    data = SyntheticDataModule(num_classes=4, input_shape=(3, 8, 8), train_size=32, val_size=8, batch_size=16)
    trainer(max_epochs=1).fit(module, data)
    image = torch.randn(2, 3, 8, 8)
    outputs = module.eval().student_outputs(Batch(image, torch.zeros(2)))
    projected = outputs.features["layer2:projected"]
    assert projected.shape == module.teacher_extractor(image).features[criterion.teacher_layers[0]].shape
    assert outputs.features["layer2"].shape[2] == 2 * projected.shape[2]
