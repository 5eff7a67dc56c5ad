"""Two nodes, simulated by two launchers on one machine, train and resume one run."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

CONFIGS = Path(__file__).parent.parent / "configs"
FIT = ["-m", "lkd", "fit", "--config=digits/kd", "--config=cluster/ddp", "--config=loggers/csv"]
FIT += ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=4"]
FIT += ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]


def test_two_nodes_train_one_run() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [
        subprocess.Popen(
            [*launch, f"--node_rank={rank}", *FIT],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "student (best)" in said[0]
    assert "student (best)" not in said[1]
    (state,) = (torch.load(path, weights_only=True) for path in Path("runs").rglob("last.ckpt"))
    assert state["global_step"] == 4
    (curves,) = Path("runs").rglob("metrics.csv")
    rows = list(csv.DictReader(curves.read_text().splitlines()))
    assert [row["val/acc"] for row in rows if row["val/acc"]]


def test_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(CONFIGS / "cluster" / "slurm.sh")], check=True)
