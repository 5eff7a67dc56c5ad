"""Every criterion once in several processes (gloo), and once in one with all their images.

`python -m tests.losses.processes FOLDER` writes FOLDER/found.json: name of the case to what was found. There are two
processes, or as many as `LKD_PROCESSES` says: 2, 4.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.warm import ranks
from lkd import Batch, DistillLoss, Outputs
from lkd.losses.base import buffers_same_everywhere
from lkd.types import IGNORE_INDEX
from tests.losses.cases import FeatureCase, changed, tensors, value
from tests.losses.collected import FEATURE_CASES, LOGIT_CASES

PROCESSES = int(os.environ.get("LKD_PROCESSES", "2"))
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # each process's own, as everywhere with DDP


def table() -> dict[str, FeatureCase]:
    """All cases; those of logits as cases without features."""
    of_logits = {
        name: FeatureCase(
            case.make,
            student=dict.fromkeys(case.make().student_layers, (3,)),
            batch_mean=case.batch_mean,
            reads_target=case.reads_target,
        )
        for name, case in LOGIT_CASES.items()
    }
    return {**of_logits, **FEATURE_CASES}


class _Student(nn.Module):
    """A student with a weight for each number that it says of an image, and the criterion: what DDP sees of a step."""

    def __init__(self, criterion: DistillLoss, student: Outputs) -> None:
        super().__init__()
        self.criterion = criterion
        self.weights = nn.ParameterList(torch.ones_like(tensor[:1]) for tensor in tensors(student))
        self._ddp_params_and_buffers_to_ignore = buffers_same_everywhere(self)  # as DistillModule has it

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        weights = iter(self.weights)
        loss = value(self.criterion, changed(student, lambda tensor: tensor * next(weights)), teacher, batch)
        return loss + 0 * torch.stack([tensor.sum() for tensor in self._training()]).sum()  # DDP waits for all

    def _training(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def gradient(self) -> Tensor:
        """Of all that trains, in one row."""
        return torch.cat([parameter.grad.flatten() for parameter in self._training()])


def _data(case: FeatureCase, labels: str) -> tuple[Outputs, Outputs, Batch]:
    """All images; with few labels, the first ones have none, so that processes have different numbers of them."""
    batch = case.batch()
    if labels == "few":
        first = (batch.index < 3).nonzero().flatten()
        batch = batch._replace(target=batch.target.index_fill(0, first, IGNORE_INDEX))
    student, teacher = (changed(outputs, Tensor.double) for outputs in case.answers())
    return student, teacher, batch


def _share(data: tuple[Outputs, Outputs, Batch], rank: int) -> tuple[Outputs, Outputs, Batch]:
    """One process's images, in all views."""
    batch = data[2]
    rows = torch.arange(len(batch.target)).view(batch.views, PROCESSES, -1)[:, rank].flatten()
    student, teacher = (changed(outputs, lambda tensor: tensor[rows]) for outputs in data[:2])
    return student, teacher, batch._replace(target=batch.target[rows], index=batch.index[rows])


def _difference(model: DistributedDataParallel, alone: _Student, case: FeatureCase, labels: str, rank: int) -> float:
    """By how much the processes' gradient differs from that of one process, relative to its largest number."""
    data = _data(case, labels)
    for network, images in ((model, _share(data, rank)), (alone, data)):
        network.eval().zero_grad()
        network(*images).backward()
    expected, found = alone.gradient(), model.module.gradient()
    return float((found - expected).abs().max() / expected.abs().max())


def check(name: str, case: FeatureCase, rank: int) -> dict[str, Any]:
    """One step in all processes.

    Args:
        name: The case's name.
        case: The case.
        rank: This process's number.

    Returns:
        By how much the gradient differs from that of one process, adapters in eval mode, with all labels and with few;
        whether after a step in training the processes have equal parameters and memories, and whether those memories
        that are to be are those of one process.
    """
    data = _data(case, "all")
    # What each process draws for its adapters is its own, as without a seed.
    model = DistributedDataParallel(_Student(case.criterion(seed=rank).double(), data[0]))
    alone = _Student(case.criterion().double(), data[0])
    found: dict[str, Any] = {labels: _difference(model, alone, case, labels, rank) for labels in ("all", "few")}
    model.train().zero_grad()
    model(*_share(data, rank)).backward()
    with patch.object(dist, "is_initialized", return_value=False):  # one process has no others to gather from
        alone.train().zero_grad()
        alone(*data).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    state = model.module.state_dict()
    kept = torch.cat(
        [tensor.double().flatten() for key, tensor in state.items() if key.rpartition(".")[2] not in STATISTICS]
    )
    everywhere = [torch.empty_like(kept) for _ in range(PROCESSES)]
    dist.all_gather(everywhere, kept)
    found["equal"] = bool(all(torch.equal(kept, other) for other in everywhere) and kept.isfinite().all())
    keys = [f"criterion.{memory}" for memory in case.memories]
    found["memories"] = all(torch.allclose(state[key], alone.state_dict()[key]) for key in keys)
    return found


def work(folder: str) -> None:
    """What one process does: all cases, one after the other; a criterion that fails is named."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    found = {}
    for name, case in table().items():
        print(f"{rank}: {name}", file=sys.stderr, flush=True)
        found[name] = check(name, case, rank)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    failed = [done.stderr for done in ranks(PROCESSES, work, sys.argv[1]) if done.code]
    sys.exit("\n".join(failed) or None)
