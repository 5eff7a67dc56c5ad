from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lkd import Batch, EarlyExitModule
from lkd.__main__ import main
from lkd.losses import BYOT
from lkd.models import ImageNetResNet, resnet18

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
SHORT += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    return Batch(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, -100]))


def _built(network, **settings) -> EarlyExitModule:
    torch.manual_seed(0)
    module = EarlyExitModule(network, **settings)
    module.build(torch.zeros(1, 3, 8, 8))
    return module


def test_loss_equals_the_paper(tiny, batch) -> None:
    criterion = BYOT(temperature=2.0, kd_weight=0.4, hint_weight=0.1)
    module = _built(tiny(), criterion=criterion, hard_weight=0.5, distill_weight=2.0).eval()
    logits, terms = module.losses(batch)
    outputs = module.student_extractor(batch.input)
    deepest, target = outputs.features["layer3"].mean((2, 3)), batch.target[:5]
    hard = soft = hint = 0.0
    for leave, layer in zip(criterion.exits, ("layer1", "layer2"), strict=True):
        feature = leave.bottleneck(outputs.features[layer]).mean((2, 3))
        answer = leave.fc(feature)
        hard += F.cross_entropy(answer[:5], target)
        p = (logits / 2).softmax(1)
        soft += (p * (p.log() - (answer / 2).log_softmax(1))).sum(1).mean()
        hint += (feature - deepest).square().sum(1).mean()
    torch.testing.assert_close(terms["hard"], 0.5 * F.cross_entropy(logits[:5], target))
    torch.testing.assert_close(terms["byot_hard"], 2 * 0.6 * hard)
    torch.testing.assert_close(terms["byot_kd"], 2 * 0.4 * soft)
    torch.testing.assert_close(terms["byot_hint"], 2 * 0.1 * hint)


def test_deepest_stage_gets_no_distillation_gradient(tiny, batch) -> None:
    module = _built(tiny())
    _, terms = module.losses(batch)
    sum(term for name, term in terms.items() if name != "hard").backward()
    reached = {name.split(".")[0] for name, weight in module.student.named_parameters() if weight.grad is not None}
    assert reached == {"conv1", "bn1", "layer1", "layer2"}
    assert all(parameter.grad is not None for parameter in module.criterion.parameters())


def test_exits_downsample_to_the_last_stage() -> None:
    """The network has four stages with maps of 8, 4, 2 and 1 pixels."""
    network = resnet18(num_classes=4)
    assert isinstance(network, ImageNetResNet)
    module = _built(network)
    exits = [list(leave.bottleneck.modules()) for leave in module.criterion.exits]
    strides = [[part.stride for part in parts if isinstance(part, nn.Conv2d)] for parts in exits]
    assert strides == [[(2, 2)] * 3, [(2, 2)] * 2, [(2, 2)]]


def test_exits_are_evaluated(tiny, data, trainer) -> None:
    module = _built(tiny())
    (found,) = trainer().validate(module, data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    module.eval()
    with torch.no_grad():
        exits = module.exit_logits(batch.input)
        right = [(logits.argmax(1) == batch.target).float().mean().item() for logits in exits]
    assert [found[f"val/{name}"] for name in ("acc_exit1", "acc_exit2", "acc")] == pytest.approx(right)
    assert "val/teacher_acc" not in found


def test_prediction_of_an_exit(tiny, data, trainer) -> None:
    module = _built(tiny(), exit=1)
    (found,) = trainer().validate(module, data, verbose=False)
    assert found["val/acc"] == found["val/acc_exit1"]
    batch = next(iter(data.val_dataloader()))
    (predicted,) = trainer().predict(module, data.val_dataloader())
    module.eval()
    torch.testing.assert_close(predicted, module.exit_logits(batch.input)[0])


@pytest.mark.parametrize("exit", [None, 2])
def test_one_forward_pass_evaluates_all_exits(tiny, data, trainer, exit) -> None:
    module, calls = _built(tiny(), exit=exit), []
    module.setup = lambda stage: None  # skips the blank image of `setup`
    module.student.register_forward_hook(lambda *_: calls.append(1))
    trainer().validate(module, data, verbose=False)
    assert len(calls) == len(data.val_dataloader())


def test_exits_are_restored(tiny, resume) -> None:
    saved = resume(lambda: EarlyExitModule(tiny()))
    assert "criterion.exits.1.fc.weight" in saved


def test_invalid_arguments(tiny, data, trainer) -> None:
    with pytest.raises(ValueError, match="exit must be between 1 and 2, or null for the final classifier, got 3"):
        EarlyExitModule(tiny(), exit=3)
    with pytest.raises(ValueError, match=r"kd_weight must be between 0 and 1, got 1\.5"):
        BYOT(kd_weight=1.5)
    with pytest.raises(ValueError, match="BYOT requires a layer before the deepest one, got only layer3"):
        trainer().fit(EarlyExitModule(tiny(), BYOT(["layer3"])), data)
    with pytest.raises(ValueError, match=r"BYOT reads feature maps \(B, C, H, W\)"):
        trainer().fit(EarlyExitModule(tiny(), BYOT(["layer1", "flatten"])), data)


def test_command_line() -> None:
    configs = ["--config", "data/digits", "--config", "pairs/digits", "--config", "methods/byot"]
    assert main(["fit", *configs, *SHORT]) == 0
    (best,) = Path("runs").rglob("best.ckpt")
    test = ["test", "--ckpt_path", str(best), "--trainer.accelerator=cpu"]
    assert main([*test, "--model.init_args.exit=1"]) == 0
