"""Fuzz `read_checkpoint`, which checks the file of `--ckpt_path` before Lightning reads it."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from lkd.checkpoints.find import read_checkpoint
from tests.fuzz import pickles
from tests.fuzz.mutate import mutate
from tests.fuzz.weights import _STRANGE, _network, _saved

REFUSALS = (ValueError, FileNotFoundError)
MEMORY = 2**28


class Fuzz:
    """Create and read checkpoints."""

    def __init__(self) -> None:
        self.state = {f"model.{name}": tensor.clone() for name, tensor in _network().state_dict().items()}
        self.content = {
            "state_dict": self.state,
            "pytorch-lightning_version": "2.6.6",
            "epoch": 3,
            "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]}],
            "callbacks": {"BestCheckpoint": {"best_model_path": "best.ckpt", "monitor": "val/acc"}},
            "hyper_parameters": {"_class_path": "lkd.DistillModule"},
        }
        self.files = [_saved(self.content, zipped) for zipped in (True, False)]

    def make(self, rng: random.Random, folder: Path) -> Path:
        """Write one malicious file."""
        path, way = folder / "last.ckpt", rng.random()
        if way < 0.25:
            content = mutate(rng, rng.choice(self.files))
        elif way < 0.55:
            content = pickles.rewritten(rng, self.files[0], lambda rng, data: mutate(rng, data))
        elif way < 0.7:
            content = pickles.wrapped(rng, pickles.program(rng))
        elif way < 0.8:
            content = pickles.wrapped(rng, pickles.attack(rng))
        else:
            content = _saved(self._strange(rng), rng.random() < 0.7)
        path.write_bytes(content)
        return path

    def _strange(self, rng: random.Random) -> object:
        content = dict(self.content)
        if rng.random() < 0.5:
            name = rng.choice(list(self.state))
            content["state_dict"] = {**self.state, name: rng.choice(_STRANGE)(self.state[name])}
        else:
            content[rng.choice(list(content))] = rng.choice(
                [None, 3, [], "text", {1: 2}, torch.zeros(1).expand(10**12)]
            )
        return content

    def read(self, path: Path) -> str:
        """Read the checkpoint; its weights must not contain NaN."""
        content = read_checkpoint(path, whole=True)
        if any(
            (t != t).any()
            for t in content["state_dict"].values()
            if type(t) is torch.Tensor and t.layout == torch.strided
        ):
            raise SystemError("weights that are NaN were let in")
        return "accepted"
