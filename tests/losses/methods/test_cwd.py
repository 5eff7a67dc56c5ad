"""CWD: channel-wise distillation."""

from __future__ import annotations

from lkd.losses import CWD
from tests.losses import parity
from tests.losses.cases import LAYERS, SegmentationCase
from tests.losses.parity import Hyper, Values

CASES = {
    "CWD": SegmentationCase(CWD, zero_at_equality=True, batch_mean=True),
    "CWD-features": SegmentationCase(
        lambda: CWD(*LAYERS, temperature=1.0),
        student={"a": (4, 4, 6), "b": (6, 4, 4)},
        teacher={"c": (4, 4, 6), "d": (7, 8, 4)},
        batch_mean=True,
    ),
    "CWD-sizes": SegmentationCase(CWD, teacher_logits=(6, 4), zero_at_equality=True, batch_mean=True),
}


def _cwd(inputs: Values, hyper: Hyper) -> Values:
    """CIRKD divides by the number of the student's channels, and has no adapter for logits."""
    if hyper["tap"] == "logits":
        logits = {f"{network}_logits": inputs[network] for network in ("student", "teacher")}
        loss = parity.terms(parity.built(CWD(temperature=hyper["temperature"]), logits), logits)["loss"]
    else:
        weights = {f"aligners.0.{name.removeprefix('params.conv.')}": inputs[name] for name in inputs if "." in name}
        loss = parity.layer_terms(CWD(["student"], ["teacher"], hyper["temperature"]), inputs, **weights)["loss"]
    channels = [inputs[network].shape[1] for network in ("teacher", "student")]
    return {"loss": loss, "loss.mmrazor": loss, "loss.cirkd": loss * channels[0] / channels[1]}


PARITY = {"cwd": _cwd}


def test_reads_logits_only_without_layers() -> None:
    assert CWD().reads_logits
    assert not CWD(["a"], ["a"]).reads_logits
