"""Run every criterion in several processes (gloo), and in one process with all their images.

`python -m tests.losses.processes FOLDER` writes FOLDER/found.json, a mapping from each case to the results. The
environment variable `LKD_PROCESSES` sets the number of processes (2 by default; 4 is possible, too).
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
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # not synchronized, as usual with DDP


def table() -> dict[str, FeatureCase]:
    """Return all cases; logit cases are converted to cases without features."""
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
    """The criterion with a student that has one weight per output value, as the module that DDP wraps."""

    def __init__(self, criterion: DistillLoss, student: Outputs) -> None:
        super().__init__()
        self.criterion = criterion
        self.weights = nn.ParameterList(torch.ones_like(tensor[:1]) for tensor in tensors(student))
        self._ddp_params_and_buffers_to_ignore = buffers_same_everywhere(self)  # as in DistillModule

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        weights = iter(self.weights)
        loss = value(self.criterion, changed(student, lambda tensor: tensor * next(weights)), teacher, batch)
        return loss + 0 * torch.stack([tensor.sum() for tensor in self._training()]).sum()  # DDP waits for all

    def _training(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def gradient(self) -> Tensor:
        """Return the gradients of all trainable parameters as one vector."""
        return torch.cat([parameter.grad.flatten() for parameter in self._training()])


def _data(case: FeatureCase, labels: str) -> tuple[Outputs, Outputs, Batch]:
    """Return the data of all processes.

    With labels="few", the first images are unlabelled, so the number of labels differs between processes.
    """
    batch = case.batch()
    if labels == "few":
        first = (batch.index < 3).nonzero().flatten()
        batch = batch._replace(target=batch.target.index_fill(0, first, IGNORE_INDEX))
    student, teacher = (changed(outputs, Tensor.double) for outputs in case.outputs())
    return student, teacher, batch


def _share(data: tuple[Outputs, Outputs, Batch], rank: int) -> tuple[Outputs, Outputs, Batch]:
    """Return one process's images, in all views."""
    batch = data[2]
    rows = torch.arange(len(batch.target)).view(batch.views, PROCESSES, -1)[:, rank].flatten()
    student, teacher = (changed(outputs, lambda tensor: tensor[rows]) for outputs in data[:2])
    return student, teacher, batch._replace(target=batch.target[rows], index=batch.index[rows])


def _gradient_error(
    model: DistributedDataParallel, alone: _Student, case: FeatureCase, labels: str, rank: int
) -> float:
    """Return the maximum difference from the gradient of one process, relative to that gradient's largest entry."""
    data = _data(case, labels)
    for network, images in ((model, _share(data, rank)), (alone, data)):
        network.eval().zero_grad()
        network(*images).backward()
    expected, found = alone.gradient(), model.module.gradient()
    return float((found - expected).abs().max() / expected.abs().max())


def check(name: str, case: FeatureCase, rank: int) -> dict[str, Any]:
    """Run one step in all processes.

    Args:
        name: Name of the case.
        case: The case.
        rank: Rank of this process.

    Returns:
        Under `all` and `few`, the relative error of the gradient against one process, with adapters in eval mode, with
        all labels and with few labels. Under `equal`, whether parameters and memories are finite and equal in all
        processes after a training step. Under `memories`, whether `case.memories` equal those of one process.
    """
    data = _data(case, "all")
    # Initialize the adapters differently in each process, as without a seed.
    model = DistributedDataParallel(_Student(case.criterion(seed=rank).double(), data[0]))
    alone = _Student(case.criterion().double(), data[0])
    found: dict[str, Any] = {labels: _gradient_error(model, alone, case, labels, rank) for labels in ("all", "few")}
    model.train().zero_grad()
    model(*_share(data, rank)).backward()
    with patch.object(dist, "is_initialized", return_value=False):  # a single process has none to gather from
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
    """Run all cases in one process; progress on stderr shows which criterion fails."""
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
