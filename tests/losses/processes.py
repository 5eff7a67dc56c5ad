"""Every criterion once in two processes (gloo), and once in one with all their images.

`python -m tests.losses.processes FOLDER` writes FOLDER/found.json: name of the case to what was found.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lkd import Batch, DistillLoss, Outputs
from lkd.losses.base import buffers_same_everywhere
from tests.losses import test_criteria
from tests.losses.cases import CASES
from tests.losses.cases.base import FeatureCase, changed, value

PROCESSES = 2
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
        for name, case in test_criteria.CASES.items()
    }
    return {**of_logits, **CASES}


class _Student(nn.Module):
    """A student of one parameter, and the criterion: what DDP sees of a training step."""

    def __init__(self, criterion: DistillLoss) -> None:
        super().__init__()
        self.criterion = criterion
        self.scale = nn.Parameter(torch.ones(1))
        self._ddp_params_and_buffers_to_ignore = buffers_same_everywhere(self)  # as DistillModule has it

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return value(self.criterion, changed(student, lambda tensor: tensor * self.scale), teacher, batch)


def _share(case: FeatureCase, rank: int) -> tuple[Outputs, Outputs, Batch]:
    """One process's images, in all views."""
    batch = case.batch()
    rows = torch.arange(len(batch.target)).view(case.views, PROCESSES, -1)[:, rank].flatten()
    student, teacher = (changed(outputs, lambda tensor: tensor[rows].double()) for outputs in case.answers())
    return student, teacher, batch._replace(target=batch.target[rows], index=batch.index[rows])


def _made(name: str, case: FeatureCase, rank: int = 0) -> DistillLoss:
    """The criterion; what it draws for its adapters is another process's own, as without a seed."""
    criterion = case.criterion(seed=rank) if name in CASES else case.make()
    return criterion.double().train(not case.batch_mean)


def check(name: str, case: FeatureCase, rank: int) -> dict[str, bool]:
    """One step in all processes.

    Args:
        name: The case's name.
        case: The case.
        rank: This process's number.

    Returns:
        Whether the processes have equal parameters and memories afterwards; whether the gradient, or memories, are
        those of one process, where that is promised.
    """
    model = DistributedDataParallel(_Student(_made(name, case, rank)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(*_share(case, rank)).backward()
    gradient = model.module.scale.grad.clone()
    optimizer.step()
    state = model.module.state_dict()
    kept = torch.cat(
        [tensor.double().flatten() for key, tensor in state.items() if key.rpartition(".")[2] not in STATISTICS]
    )
    both = [torch.empty_like(kept) for _ in range(PROCESSES)]
    dist.all_gather(both, kept)
    found = {"equal": bool(torch.equal(*both) and kept.isfinite().all())}
    alone = _Student(_made(name, case))
    if case.batch_mean or case.memories:
        student, teacher = (changed(outputs, Tensor.double) for outputs in case.answers())
        alone(student, teacher, case.batch()).backward()
    if case.memories:
        keys = [f"criterion.{name}" for name in case.memories]
        found["memories of one process"] = all(torch.allclose(state[key], alone.state_dict()[key]) for key in keys)
    if case.batch_mean:
        found["gradient of one process"] = bool(torch.allclose(gradient, alone.scale.grad, rtol=1e-6, atol=1e-12))
    return found


def work(rank: int, folder: str) -> None:
    """What one process does: all cases, one after the other; a criterion that fails is named."""
    os.environ |= {"MASTER_ADDR": "localhost"}
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
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=PROCESSES)
