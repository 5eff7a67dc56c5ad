"""Fuzz `lkd.models.load_weights`."""

from __future__ import annotations

import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lkd.models import CIFARResNet, load_weights
from tests.fuzz import pickles
from tests.fuzz.mutate import mutate

REFUSALS = (ValueError, FileNotFoundError)
MEMORY = 2**28
_DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "C64", "F4", "F8_E8M0", "X"]
_SIZES = [0, 1, -1, 2**31, 2**40, 2**63 - 1, 2**64, 1.5, "3", None]


def _network() -> CIFARResNet:
    torch.manual_seed(0)
    return CIFARResNet(8, (2, 2, 2, 2), 3)


class Fuzz:
    """Create and read weights files."""

    def __init__(self) -> None:
        self.network = _network()
        self.state = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        contents = (self.state, {"state_dict": {f"module.{n}": t for n, t in self.state.items()}, "accuracy": 0.9})
        self.files = [_saved(content, zipped) for content in contents for zipped in (True, False)]
        self.tensors = save(self.state)

    def make(self, rng: random.Random, folder: Path) -> Path:
        """Write one malicious file."""
        way = rng.random()
        path = folder / ("w.safetensors" if way < 0.3 else rng.choice(["w.pth", "w.ckpt", "w\n.pt", "-w.pt"]))
        if way < 0.03:
            content = self.tensors
        elif way < 0.15:
            content = _lying(rng, self.tensors)
        elif way < 0.3:
            content = mutate(rng, self.tensors)
        elif way < 0.45:
            content = mutate(rng, rng.choice(self.files))
        elif way < 0.65:
            content = pickles.rewritten(rng, self.files[rng.choice([0, 2])], lambda rng, data: mutate(rng, data))
        elif way < 0.8:
            content = pickles.wrapped(rng, pickles.program(rng))
        elif way < 0.9:
            content = pickles.wrapped(rng, pickles.attack(rng))
        else:
            content = _saved(self._strange(rng), rng.random() < 0.7)
        path.write_bytes(content)
        return path

    def read(self, path: Path) -> str:
        """Read the file; the network's tensors must remain finite, and unchanged if the file is rejected."""
        before = self._sum()
        try:
            load_weights(self.network, path)
        except BaseException:
            if self._sum() != before:
                raise SystemError("the network was changed, and the file refused") from None
            raise
        if not all(tensor.isfinite().all() for tensor in self.network.state_dict().values()):
            raise SystemError("the network has numbers that are not finite")
        return "accepted"

    def _sum(self) -> float:
        return sum(float(tensor.double().sum()) for tensor in self.network.state_dict().values())

    def _strange(self, rng: random.Random) -> object:
        """Return a state dict with one invalid tensor or name."""
        state: dict[Any, Any] = dict(self.state)
        name = rng.choice(list(state))
        own = state[name]
        state[name] = rng.choice(_STRANGE)(own)
        if rng.random() < 0.3:
            state[rng.choice(["x" * 10**6, "a\nb", "\x1b[2J", 7, (1, 2), "net." * 5000, "model.module." * 40])] = own
        return rng.choice([state, {"model": state}, {"state_dict": [state]}, {"net": state, "model": 3}])


def _sparse(own: torch.Tensor) -> object:
    return own.float().to_sparse()


_STRANGE = [
    lambda own: own.float() * float("nan"),
    lambda own: own.double() + 1e300,
    lambda own: torch.full_like(own.float(), float("-inf")),
    lambda own: own.to(torch.int8),
    lambda own: own > 0,
    lambda own: own.to(torch.complex64),
    lambda own: own.float().to(torch.float8_e4m3fn),
    lambda own: own.to("meta"),
    lambda own: torch.zeros(1).expand(10**12),
    lambda own: own.flatten()[:1].expand(*own.shape) if own.dim() else own,
    lambda own: torch.quantize_per_tensor(own.float(), 0.1, 0, torch.qint8),
    lambda own: None,
    lambda own: "text",
    lambda own: own.tolist(),
    lambda own: torch.nn.Parameter(own.float()),
    _sparse,
    lambda own: own,
]


def _saved(content: object, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _lying(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file with a wrong header."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(rng.randint(1, 2)):
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        what = rng.choice(["dtype", "shape", "data_offsets", "more", "name", "deep"])
        if what == "dtype":
            entry["dtype"] = rng.choice(_DTYPES)
        elif what in ("shape", "data_offsets"):
            entry[what] = [rng.choice(_SIZES) for _ in range(rng.randint(0, 4))]
        elif what == "more":
            header[rng.choice(["extra", "a\nb", "", "x" * 10**5])] = {
                "dtype": "F32",
                "shape": [2**40],
                "data_offsets": [0, 2**42],
            }
        elif what == "name":
            header[rng.choice(["module.x", "\x1b[2J"])] = dict(entry)
        else:
            header["__metadata__"] = rng.choice([{"a": 1}, None, [], {"format": "pt" * 10**5}])
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b'{"a":' * 10_000 + text
    stated = rng.choice([len(text)] * 8 + [2**63, 0, len(text) + 8, len(text) - 1])
    return struct.pack("<Q", stated) + text + body
