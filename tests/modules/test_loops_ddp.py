"""Other training loops in two processes (gloo): all processes end equal, and DOT matches one process."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from benchmarks import warm

SCRIPT = """
    import hashlib, json, sys
    import lightning as L
    import torch
    from torch import nn
    from lkd import DOT, DistillModule, DOTModule, EarlyExitModule, MutualModule, PastTeacherModule
    from lkd import SyntheticDataModule
    from lkd.losses import AT, FitNet
    from lkd.models import CIFARResNet

    def resnet(seed, width):
        torch.manual_seed(seed)
        return CIFARResNet(8, (4, width, width, width), 4)

    def flat(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4))

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def decay(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)

    def dot(parameters):
        return DOT(parameters, lr=0.05, momentum=0.9, delta=0.075, weight_decay=1e-3)

    def digest(state):
        sums = hashlib.sha256()
        for tensor in state.values():
            sums.update(tensor.detach().numpy().tobytes())
        return sums.hexdigest()

    MODULES = {
        "mutual": lambda: MutualModule([resnet(0, 4), resnet(1, 8)], FitNet(), optimizer=sgd),
        "past": lambda: PastTeacherModule(resnet(0, 4), optimizer=sgd),
        "average": lambda: PastTeacherModule(resnet(0, 4), ema_decay=0.9, optimizer=sgd),
        "exits": lambda: EarlyExitModule(resnet(0, 4), optimizer=sgd),
        "dot": lambda: DOTModule(flat(0), flat(1), distill_weight=0.5, hard_weight=0.5, optimizer=dot),
        "features": lambda: DistillModule(resnet(0, 4), resnet(1, 4), AT(), hard_weight=0.0, optimizer=decay),
        "mutual features": lambda: MutualModule([resnet(0, 4), resnet(1, 8)], AT(), hard_weight=0.0, optimizer=decay),
        "mutual labels": lambda: MutualModule(
            [resnet(0, 4), resnet(1, 8)], FitNet(), distill_weight=0.0, optimizer=decay
        ),
    }
    SILENT = {"features": "fc.weight", "mutual features": "fc.weight", "mutual labels": "0.0.weight"}
    devices, names = int(sys.argv[1]), sys.argv[2:]
    found = {}
    for name in names:
        module = MODULES[name]()
        data = SyntheticDataModule(
            num_classes=4, input_shape=(3, 8, 8), train_size=80, test_size=24, val_size=16, batch_size=16 // devices
        )
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=2 if name == "dot" else 1, num_sanity_val_steps=0,
        )
        torch.manual_seed(trainer.global_rank)  # whatever a process draws by itself is not to matter
        trainer.fit(module, data)
        state = {key: tensor for key, tensor in module.state_dict().items() if not key.startswith("metrics")}
        found[name] = {"digest": digest(state), "keys": sorted({key.split(".")[0] for key in state})}
        if name in SILENT:
            silent = [tensor.tolist() for key, tensor in state.items() if key.endswith(SILENT[name])]
            found[name]["silent"] = silent
        if name == "dot":
            kept = trainer.optimizers[0].state.values()
            found[name]["weights"] = [tensor.tolist() for tensor in state.values()]
            found[name]["momenta"] = [state["distill_momentum"].tolist() for state in kept]
    with open(f"{devices}_{trainer.global_rank}.json", "w") as file:
        json.dump(found, file)
"""
SILENT = ("features", "mutual features", "mutual labels")  # one weight is 0: some parameters get no gradient
NAMES = ("mutual", "past", "average", "exits", "dot", *SILENT)


def _run(folder: Path, devices: int, names: tuple[str, ...]) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for done in warm.ranks(devices, warm.script, "train.py", str(devices), *names):
            assert done.code == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{devices}_{rank}.json").read_text()) for rank in range(devices)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> tuple[dict, dict, dict]:
    """Return the results of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    return (*_run(folder, 1, ("dot", *SILENT)), *_run(folder, 2, NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_processes_end_equal(name: str, processes) -> None:
    _, first, second = processes
    assert first[name]["digest"] == second[name]["digest"]


def test_teacher_is_saved(processes) -> None:
    assert processes[1]["average"]["keys"] == ["model", "teacher"]


def test_dot_averages_the_distillation_gradient(processes) -> None:
    """The gradient is averaged over processes and accumulated batches; with two processes, each batch is halved."""
    alone, first, _ = processes
    for key in ("weights", "momenta"):
        flat = [_flatten(found["dot"][key]) for found in (alone, first)]
        assert flat[1] == pytest.approx(flat[0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", SILENT)
def test_parameters_without_gradient_decay_equally(name: str, processes) -> None:
    alone, first, _ = (found[name]["silent"] for found in processes)
    assert alone
    assert _flatten(first) == pytest.approx(_flatten(alone), rel=1e-5)


def _flatten(values) -> list[float]:
    return [number for value in values for number in _flatten(value)] if isinstance(values, list) else [values]
