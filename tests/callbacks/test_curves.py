"""The metric that selects the best checkpoint, the final table, and metrics that do not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lkd import DigitsDataModule, DistillModule
from lkd.__main__ import main
from lkd.callbacks import KNN, BestCheckpoint, ImagesPerSecond, LinearProbe, MonitorCheck
from lkd.losses import AT, CRD, KD, BackboneKD, WeightedSum
from lkd.models import CIFARResNet, load_weights, resnet8

FIT = [
    *("fit", "--config", "digits/kd", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--trainer.limit_train_batches=4", "--data.init_args.batch_size=32"),
]
FEATURES = [*FIT, "--config", "methods/backbone_kd", "--trainer.callbacks+=lkd.callbacks.KNN"]
PROBE = ["--trainer.callbacks+=lkd.callbacks.LinearProbe", "--trainer.callbacks.max_iter=5"]
STOPPING = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"


def _points(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {name: [point.value for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _best(folder: Path) -> dict[str, Any]:
    states = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"].values()
    (best,) = [state for state in states if state.get("monitor")]
    return best


def test_feature_distillation_without_labels(capfd, monkeypatch) -> None:
    """The lowest distillation loss is the best, also after resuming; the untrained classifier has no accuracy."""
    assert main([*FEATURES, *PROBE, "--trainer.max_epochs=2"]) == 0
    shown = capfd.readouterr().out
    (folder,) = Path("runs").rglob("version_0")
    points, best = _points(folder), _best(folder)
    assert best["monitor"] == "val/backbonekd"
    assert float(best["best_model_score"]) == pytest.approx(min(points["val/backbonekd"]))
    terms = [points[f"val/backbonekd_{name}"] for name in ("pooled", "patches")]
    assert points["val/backbonekd"] == pytest.approx([sum(pair) for pair in zip(*terms, strict=True)], rel=1e-5)
    features = {f"{stage}/{name}_acc" for stage in ("val", "final") for name in ("knn", "probe")}
    assert {name for name in points if name.endswith("acc")} == {"val/teacher_acc", *features}
    assert f"student (last), val/knn_acc   │ {points['final/knn_acc'][0]:.2%}" in shown
    assert not {"val/acc", "val/loss", "val/agreement", "train/acc"} & set(points)
    assert "the best checkpoint is the one with the lowest val/backbonekd" in shown
    assert "distillation loss (val/backbonekd)" in shown
    assert "gap to teacher" not in shown
    assert f"{points['final/last_backbonekd'][0]:.4g}" in shown

    last = str(folder / "checkpoints/last.ckpt")
    assert main([*FEATURES, *PROBE, "--trainer.max_epochs=3", "--ckpt_path", last]) == 0
    assert float(_best(folder)["best_model_score"]) == pytest.approx(min(_points(folder)["val/backbonekd"]))
    capfd.readouterr()
    assert main(["test", "--ckpt_path", str(folder / "checkpoints/best.ckpt"), "--trainer.accelerator=cpu"]) == 0
    shown = capfd.readouterr().out
    assert "test/backbonekd" in shown
    assert "test/acc" not in shown


@pytest.mark.parametrize(
    ("criterion", "requested", "monitor", "mode"),
    [
        (KD(), "val/acc", "val/acc", "max"),
        (KD(), "val/kd", "val/kd", "min"),
        (KD(), "val/agreement", "val/agreement", "max"),
        (KD(), "train/hard", "train/hard", "min"),
        (AT(), "val/acc", "val/at", "min"),
        (AT(), "val/knn_acc", "val/knn_acc", "max"),
        (WeightedSum({"one": AT(), "two": AT()}), "val/acc", "val/distill", "min"),
        (WeightedSum({"one": AT(), "two": AT()}), "val/two", "val/two", "min"),
        (CRD(), "val/acc", None, "max"),
    ],
    ids=str,
)
def test_default_monitor(distill, data, trainer, criterion, requested, monitor, mode) -> None:
    """With a hard_weight of 0, AT and CRD do not train the classifier."""
    best, module = BestCheckpoint(requested), distill(criterion=criterion, hard_weight=0.0)
    module.trainer = trainer()
    module.trainer.datamodule = data
    data.setup("fit")
    for _ in range(2):
        best.settle(module)
        assert (best.monitor, best.mode) == (monitor, mode)
        assert best.kth_value == {"min": torch.inf, "max": -torch.inf}[mode]


MISSPELT = {
    "best": ["--checkpoint.monitor=val/accc"],
    "several": ["--checkpoint.monitor=val/accc", "--checkpoint.save_top_k=3"],
    "model checkpoint": [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/accc",
    ],
    "early stopping": [STOPPING, "--trainer.callbacks.monitor=val/accc"],
    "plateau": [
        "--model.init_args.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
        "--model.init_args.lr_scheduler.init_args.monitor=val/accc",
    ],
}


@pytest.mark.parametrize("name", MISSPELT)
def test_unknown_monitor(name: str, capfd, monkeypatch) -> None:
    """The error is raised before the first step."""
    epochs: list[int] = []
    monkeypatch.setattr(ImagesPerSecond, "on_train_epoch_start", lambda *_: epochs.append(1))
    assert main([*FIT, *MISSPELT[name]]) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len([line for line in errors if "error" in line]) == 1
    assert "cannot monitor 'val/accc': no such metric" in errors[-1]
    assert "did you mean 'val/acc'" in errors[-1]
    assert "val/agreement, val/kd, val/loss" in errors[-1]
    assert not epochs
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize("curve", ["val/accc", "train/los"])
def test_unknown_monitor_without_a_sanity_check(curve: str, capfd) -> None:
    stopping = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        f"--trainer.callbacks.monitor={curve}",
    ]
    assert main([*FIT, *stopping, "--trainer.num_sanity_val_steps=0"]) == 2
    errors = capfd.readouterr().err
    assert f"cannot monitor '{curve}': no such metric" in errors
    assert "did you mean" in errors
    assert "Traceback" not in errors


def test_monitored_accuracy_of_untrained_logits(capfd) -> None:
    stopping = [STOPPING, "--trainer.callbacks.monitor=val/acc"]
    assert main([*FIT, "--config", "methods/backbone_kd", *stopping]) == 2
    errors = capfd.readouterr().err
    assert (
        "EarlyStopping cannot monitor 'val/acc': it is not logged, because the loss does not train the logits" in errors
    )
    assert "val/backbonekd" in errors


class LogsLater(Callback):
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.log("val/mine", float(trainer.current_epoch))


def test_monitor_that_a_callback_logs_later(distill, data, trainer) -> None:
    callbacks = [MonitorCheck(), LogsLater(), EarlyStopping("val/mine"), KNN(), EarlyStopping("val/knn_acc")]
    trainer(max_epochs=1, num_sanity_val_steps=-1, callbacks=callbacks).fit(distill(), data)
    wrong = [MonitorCheck(), LogsLater(), EarlyStopping("val/mines", check_on_train_epoch_end=False)]
    with pytest.raises(ValueError, match=r"EarlyStopping cannot monitor 'val/mines': .*did you mean 'val/mine'"):
        trainer(max_epochs=1, num_sanity_val_steps=-1, callbacks=wrong).fit(distill(), data)


def test_features_improve(trainer) -> None:
    """Both classifiers improve with the teacher's features alone, and their evaluation does not change training."""
    states, curves = [], {}
    for callbacks in ([], [KNN(), LinearProbe(max_iter=20, every_n_epochs=2)]):
        L.seed_everything(0, verbose=False)
        student = CIFARResNet(8, (4, 4, 8, 16), 10, in_channels=1)
        teacher = load_weights(resnet8(num_classes=10, in_channels=1), "lkd:digits_resnet8")
        module = DistillModule(student, teacher, BackboneKD(), distill_weight=1.0, hard_weight=0.0)
        data = DigitsDataModule(batch_size=16, val_size=0.2)
        (curves,) = trainer(callbacks=callbacks).validate(module, data, verbose=False)
        L.seed_everything(0, verbose=False)
        engine = trainer(callbacks=callbacks, max_epochs=3)
        engine.fit(module, data)
        states.append(module.state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    for name in ("val/knn_acc", "val/probe_acc"):
        print(name, curves[name], float(engine.callback_metrics[name]))
        assert engine.callback_metrics[name] > curves[name] + 0.05


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 6}], ids=str)
def test_features_are_evaluated_in_the_last_epoch(distill, data, trainer, length) -> None:
    engine = trainer(callbacks=[KNN(every_n_epochs=10)], **length)
    engine.fit(distill(), data)
    assert "val/knn_acc" in engine.callback_metrics


def test_neighbours_and_probe_equal_scikit_learn(distill, data, trainer) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    torch.manual_seed(0)
    target = torch.arange(200) % 4
    bank = torch.randn(200, 6) + torch.eye(4, 6)[target]
    features = torch.randn(50, 6) + torch.eye(4, 6)[torch.arange(50) % 4]
    unit, other = (torch.nn.functional.normalize(part, dim=1).double().numpy() for part in (bank, features))
    own = KNeighborsClassifier(7, metric="cosine", weights=lambda apart: torch.tensor(-apart / 0.1).exp().numpy())
    wanted = own.fit(unit, target.numpy()).predict(other)
    found = KNN(k=7, temperature=0.1).classify(bank, target, features, 4)
    assert found.tolist() == wanted.tolist()

    mean, std = bank.mean(0), bank.std(0, correction=0)
    theirs = LogisticRegression(C=1 / (200 * 0.01), max_iter=500, tol=1e-8)
    theirs.fit(((bank - mean) / std).numpy(), target.numpy())
    with torch.inference_mode():
        found = LinearProbe(weight_decay=0.01).classify(bank, target, features, 4)
    assert found.tolist() == theirs.predict(((features - mean) / std).numpy()).tolist()


def test_features_that_cannot_be_evaluated(distill, data, trainer) -> None:
    def fit(callback: Callback, data: Any) -> None:
        trainer(callbacks=[callback]).fit(distill(), data)

    with pytest.raises(ValueError, match="has no layer 'nothing'"):
        fit(KNN(layer="nothing"), data)
    with pytest.raises(ValueError, match="'@stages' must return features"):
        fit(LinearProbe(layer="@stages"), data)
    with pytest.raises(TypeError, match="KNN requires the training images without augmentation; add a method"):
        fit(KNN(), L.LightningDataModule())
    for wrong in ({"k": 0}, {"temperature": 0.0}, {"every_n_epochs": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            KNN(**wrong)


def test_plain_training_images() -> None:
    """The images have no augmentation and a fixed order, and training is not affected."""
    data = DigitsDataModule(batch_size=64, val_size=0.2, label_size=0.5)
    data.setup("fit")
    epoch = [batch.input for batch in data.train_dataloader()]
    plain = list(data.plain_train_dataloader())
    index, target = (torch.cat([getattr(batch, name) for batch in plain]) for name in ("index", "target"))
    assert torch.equal(index, data.train_index)
    assert torch.equal(target, data.datasets["train"].target[index])
    image = data.datasets["train"].source.tensors[0][index[:1]]
    mean, std = torch.tensor(data.mean).view(-1, 1, 1), torch.tensor(data.std).view(-1, 1, 1)
    torch.testing.assert_close(plain[0].input[:1], (image / 255 - mean) / std)
    again = [batch.input for batch in data.train_dataloader()]
    assert all(torch.equal(*pair) for pair in zip(epoch, again, strict=True))
