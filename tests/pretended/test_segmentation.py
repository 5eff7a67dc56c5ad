"""A network that returns a dict and has an auxiliary head trains with class weights and a graph as on the CPU."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.pretended.device import NAME
from tests.pretended.runs import differences, fit, trained

NETWORK = "{class_path: tests.tasks.test_segmentation.AuxNet, init_args: {width: %d, num_classes: 5}}"


def test_auxiliary_head(pretended, capfd) -> None:
    settings = [f"--model.init_args.{name}={NETWORK % width}" for name, width in (("student", 4), ("teacher", 8))]
    settings += [f"--data.init_args.{size}" for size in ("batch_size=4", "train_size=40", "size=16")]
    settings = ["--config=shapes/cwd", *settings, "--model.init_args.teacher_ckpt=null"]
    settings += ["--model.init_args.task.init_args.class_weights=[0.5,1,1,2,2]"]
    settings += ["--trainer.callbacks+=lkd.callbacks.PredictionImages", "--trainer.callbacks.num_images=3"]
    expected = fit("cpu", "cpu", *settings)
    capfd.readouterr()
    graph = fit("gpu", NAME, *settings)
    assert "whole step as a CUDA graph" in capfd.readouterr().out
    assert not differences(trained(expected), trained(graph))
    ours, theirs = (EventAccumulator(str(next(Path(run).rglob("version_0")))).Reload() for run in ("cpu", "gpu"))
    assert [one.encoded_image_string for one in ours.Images("predictions")] == [
        one.encoded_image_string for one in theirs.Images("predictions")
    ]
