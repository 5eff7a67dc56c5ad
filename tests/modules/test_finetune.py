from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from lkd import FineTuneModule
from lkd.models import torchvision_model


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _changed(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    """Return the first parts of the names of the changed tensors."""
    after = module.state_dict()
    return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}),
        ({"frozen": ["conv1", "bn1", "@stage1"]}, {"layer2", "layer3", "fc"}),
        ({"backbone_lr_factor": 0.0}, {"fc"}),
    ],
)
def test_frozen_layers_do_not_change(settings, trained, tiny, data, trainer) -> None:
    """Frozen BatchNorms learn nothing, update no statistics and do not normalize with those of the batch."""
    module = FineTuneModule(tiny(), **settings)
    before = _state(module.model)
    trainer(max_epochs=1, num_sanity_val_steps=1).fit(module, data)
    assert _changed(before, module.model) == trained
    norms = {name.split(".")[0]: layer for name, layer in module.model.named_modules() if "bn" in name}
    assert {name for name, layer in norms.items() if layer.training} == trained & set(norms)
    assert {name for name, layer in module.eval().train().model.named_children() if layer.training} >= trained


def test_learning_rate_of_the_backbone(tiny) -> None:
    module = FineTuneModule(
        tiny(),
        frozen=["conv1"],
        backbone_lr_factor=0.05,
        optimizer=lambda groups: SGD(groups, lr=0.4),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 2),
    )
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups["head"]["params"]) == {module.model.fc.weight, module.model.fc.bias}
    backbone = {name for name, _ in module.model.named_parameters()} - {"conv1.weight", "fc.weight", "fc.bias"}
    assert [id(p) for p in groups["backbone"]["params"]] == [
        id(p) for name, p in module.model.named_parameters() if name in backbone
    ]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.02])
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.01])


def test_training_equals_a_plain_loop(tiny, data, trainer) -> None:
    module, network = FineTuneModule(tiny(seed=3), frozen=["conv1", "bn1"]), tiny(seed=3)
    trainer(max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0).fit(module, data)
    backbone = [p for name, p in network.named_parameters() if name.startswith("layer")]
    groups = [{"params": network.fc.parameters()}, {"params": backbone, "lr": 0.001}]
    optimizer = SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-4)
    data.trainer = None
    for batch in data.train_dataloader():
        network.train()
        network.bn1.eval()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.input), batch.target).backward()
        optimizer.step()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": ["layr1"]}, "cannot freeze 'layr1': no such layer; closest matches: layer1"),
        ({"frozen": ["@stem"], "model": torchvision_model("resnet18", 4)}, "cannot freeze 'layer1:input': no such"),
        ({"frozen": ["fc"], "backbone_lr_factor": 0.0}, "leaves no trainable parameters; do not freeze the head, fc"),
        ({"backbone_lr_factor": -1.0}, "backbone_lr_factor must be a finite number of at least 0, got -1.0"),
        ({"model": nn.Conv2d(3, 4, 1)}, "Conv2d has no linear layer to fine-tune; use ClassificationModule"),
    ],
)
def test_invalid_arguments(settings, message, tiny) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuneModule(**{"model": tiny(), **settings})


def test_schedule_that_ignores_the_factor_is_rejected(tiny) -> None:
    def cycle(max_lr):
        return FineTuneModule(tiny(), lr_scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr, total_steps=10))

    with pytest.raises(ValueError, match=r"same learning rate for head and backbone.* max_lr: \[0.1, 0.01\]"):
        cycle(0.1).configure_optimizers()
    assert cycle([0.1, 0.01]).configure_optimizers()


def test_checkpoint_provides_a_teacher(tiny, data, trainer, distill, tmp_path) -> None:
    module, engine = FineTuneModule(tiny(seed=4), optimizer=lambda groups: Adam(groups, lr=0.01)), trainer(max_epochs=1)
    engine.fit(module, data)
    engine.save_checkpoint(tmp_path / "teacher.ckpt")
    teacher = distill(teacher_ckpt=str(tmp_path / "teacher.ckpt")).teacher
    assert all(
        torch.equal(one, other) for one, other in zip(teacher.parameters(), module.model.parameters(), strict=True)
    )
