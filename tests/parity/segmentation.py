"""Criteria of dense prediction: maps of logits or features, and masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import functional as KF
from lkd.losses import CIRKD, CWD, DSD, IFVD, SKDS, CIRKDChannel, DistillLoss, MasKD
from lkd.types import IGNORE_INDEX
from tests.parity.tools import Hyper, Values, built, terms


def _as_features(inputs: Values) -> Values:
    """The fixture's maps as features of one layer."""
    return {**inputs, "student_features.0": inputs["student"], "teacher_features.0": inputs["teacher"]}


def _terms(criterion: DistillLoss, inputs: Values, **parameters: Tensor) -> Values:
    """The terms of a criterion of one layer, which is built here."""
    features = _as_features(inputs)
    return terms(built(criterion, features), features, **parameters)


def _cwd(inputs: Values, hyper: Hyper) -> Values:
    """CIRKD divides by the student's channels, and has no adapter for logits."""
    if hyper["tap"] == "logits":
        logits = {f"{network}_logits": inputs[network] for network in ("student", "teacher")}
        loss = terms(built(CWD(temperature=hyper["temperature"]), logits), logits)["loss"]
    else:
        weights = {f"aligners.0.{name.removeprefix('params.conv.')}": inputs[name] for name in inputs if "." in name}
        loss = _terms(CWD(["student"], ["teacher"], hyper["temperature"]), inputs, **weights)["loss"]
    channels = [inputs[network].shape[1] for network in ("teacher", "student")]
    return {"loss": loss, "loss.mmrazor": loss, "loss.cirkd": loss * channels[0] / channels[1]}


def _skds(inputs: Values, hyper: Hyper) -> Values:
    """`loss` has lkd's gradient only if the norms take part in it; CIRKD pools windows of 2x2 pixels."""
    loss = _terms(SKDS(["student"], ["teacher"], hyper["pool_scale"]), inputs)["loss"]
    pooled = (F.max_pool2d(inputs[network], 2, ceil_mode=True) for network in ("student", "teacher"))
    name = "loss" if hyper["norm_gradient"] else "loss.full_gradient"
    return {name: loss, "loss.cirkd": KF.skds_loss(*pooled)}


def _target(inputs: Values, num_classes: int) -> Tensor:
    """The masks as lkd's tasks have them: other labels than classes are to be ignored."""
    target = inputs["target"]
    return target.masked_fill((target < 0) | (target >= num_classes), IGNORE_INDEX)


def _ifvd(inputs: Values, hyper: Hyper) -> Values:
    """The criterion takes the number of classes from the logits, which the fixture does not have."""
    classes = int(hyper["classes"])
    logits = inputs["student"].new_zeros(1, classes, 1, 1)
    given = {**inputs, "student_logits": logits, "target": _target(inputs, classes)}
    loss = _terms(IFVD(["student"], ["teacher"]), given)["loss"]
    return dict.fromkeys(("loss", "loss.cirkd", "loss.cwd_repo"), loss)


def _head(inputs: Values) -> Values:
    """The parameters of the projection head."""
    names = [name for name in inputs if name.startswith("params.project_head.")]
    return {name.replace("params.project_head", "projection_head"): inputs[name] for name in names}


def _cirkd_minibatch(inputs: Values, hyper: Hyper) -> Values:
    criterion = CIRKD("student", "teacher", 1.0, 0.0, 0.0, hyper["temperature"])
    return dict.fromkeys(("loss", "loss.dist_kd"), _terms(criterion, inputs)["loss"])


class _GivenCIRKD(CIRKD):
    """With the rows and pixels drawn as in the fixture; the authors store any of the image's pixels for a class."""

    given: Values

    def draw_rows(self, memory: Tensor, count: int) -> Tensor:
        return self.given["pixel_index" if memory is self.pixel_memory else "region_index"]

    def draw_pixels(self, masks: Tensor) -> Tensor:
        index = torch.zeros(*masks.shape[:2], self.pixels_per_image, dtype=torch.int64)
        for name, drawn in self.given.items():
            if name.startswith("enqueue_index."):
                image, number = map(int, name.split(".")[1:])
                index[image, number, : len(drawn)] = drawn
        return index


def _cirkd_memory(inputs: Values, hyper: Hyper) -> Values:
    """Also what the authors store, as if these were the pixels that lkd draws."""
    queues = {name: inputs[f"{name}_queue"] for name in ("pixel", "region")}
    sizes = tuple(queue.shape[1] for queue in queues.values())
    stored = min(int(hyper["pixel_update_freq"]), sizes[0])
    criterion = _GivenCIRKD(
        *("student", "teacher", 0.0, 1.0, 1.0, hyper["temperature"], hyper["kd_temperature"]),
        memory_size=sizes,
        pixels_per_image=stored,
    )
    criterion.given = inputs
    classes = int(hyper["classes"])
    logits = inputs["student"].new_zeros(1, classes, 1, 1)
    given = {**_as_features(inputs), "student_logits": logits, "target": _target(inputs, classes)}
    built(criterion, given)
    for name, queue in queues.items():
        getattr(criterion, f"{name}_memory").copy_(queue)
        getattr(criterion, f"{name}_pointer").copy_(inputs[f"{name}_pointer"])
    values = terms(criterion, given, **_head(inputs))
    for name in queues:
        values |= {f"{name}_queue": getattr(criterion, f"{name}_memory")}
        values |= {f"{name}_pointer": getattr(criterion, f"{name}_pointer")}
    return values


class _GivenChannel(CIRKDChannel):
    """With the channels and rows drawn as in the fixture."""

    given: Values

    def draw_rows(self) -> Tensor:
        return self.given["channel_index"]

    def draw_channels(self, num_channels: int) -> Tensor:
        return self.given["enqueue_index"]


def _cirkd_channel(inputs: Values, hyper: Hyper) -> Values:
    queue = inputs["channel_queue"]
    settings = {"temperature": hyper["temperature"], "kd_temperature": hyper["kd_temperature"]}
    criterion = _GivenChannel(
        *("student", "teacher", 1.0, 1.0, 1.0),
        **settings,
        memory_size=len(queue),
        channels_per_step=len(inputs["enqueue_index"]),
    )
    criterion.given = inputs
    features = _as_features(inputs)
    built(criterion, features).memory[0] = queue
    criterion.pointer.copy_(inputs["channel_pointer"])
    parts = terms(criterion, features, **_head(inputs))
    queues = {"channel_queue": criterion.memory[0], "channel_pointer": criterion.pointer}
    return {"loss": parts["batch"], "memory": parts["memory"], "mse": parts["mse"], **queues}


def _dsd(inputs: Values, hyper: Hyper) -> Values:
    """The last map is the logits."""
    last = str(max(int(name.split(".")[1]) for name in inputs))
    given = {}
    for name, value in inputs.items():
        network, number = name.split(".")
        given[f"{network}_logits" if number == last else f"{network}_features.{number}"] = value
    names = ([f"{network}.{number}" for number in range(int(last))] for network in ("student", "teacher"))
    weights = hyper["pixel_weight"], hyper["category_weight"]
    found = terms(built(DSD(*names, *weights), given), given)
    return {"loss": found["loss"], "pixel": found["pixel"] / weights[0], "category": found["category"] / weights[1]}


def _maskd(inputs: Values, hyper: Hyper) -> Values:
    """In the fixture, the loss has a gradient for the tokens, too; the detection code's constants are other ones."""
    student, teacher, tokens = (inputs[name] for name in ("student", "teacher", "params.mask_token"))
    logits = {"student_logits": student, "teacher_logits": teacher}
    criterion = built(MasKD(num_tokens=len(tokens)), logits)
    found = terms(criterion, logits, **{"tokens.0": tokens})
    masks = KF.maskd_masks(teacher, tokens)
    loss = KF.maskd_loss(student, teacher, masks)
    torch.testing.assert_close(found["map"], loss, rtol=1e-12, atol=0)
    (own,) = torch.autograd.grad(found["map"], student, retain_graph=True)
    assert torch.equal(own, torch.autograd.grad(loss, student, retain_graph=True)[0])
    return {
        "loss": loss,
        "loss.detection": 2 * KF.maskd_loss(student, teacher, masks, eps=0.0),
        "diversity": found["diversity"],
    }


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {
    "cwd": _cwd,
    "skds": _skds,
    "ifvd": _ifvd,
    "cirkd_minibatch": _cirkd_minibatch,
    "cirkd_memory": _cirkd_memory,
    "cirkdv2_channel": _cirkd_channel,
    "dsd": _dsd,
    "maskd": _maskd,
}
