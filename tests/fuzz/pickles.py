"""Pickles that nobody's `pickle.dumps` writes, in the three layouts in which PyTorch meets them."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Sequence

import torch

_GLOBALS = [
    *("tests.fuzz.canary ring", "os system", "posix system", "builtins eval", "builtins exec", "builtins getattr"),
    *(
        "subprocess Popen",
        "torch load",
        "torch.hub load",
        "torch.serialization load",
        "runpy run_path",
        "os _wrap_close",
    ),
    *("builtins bytearray", "builtins set", "builtins complex", "_codecs encode", "collections Counter"),
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch Size"),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_meta_tensor_no_storage", "torch Tensor"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_nested_tensor"),
    *("torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter"),
    *("torch FloatStorage", "torch ByteStorage", "torch.storage UntypedStorage", "torch float32", "torch device"),
    *("torch.serialization _get_layout", "numpy dtype", "numpy.core.multiarray scalar", "argparse Namespace"),
]
_NUMBERS = [0, 1, 2, 4, -1, 255, 1000, 10**6, 2**31 - 1]
_TEXTS = ["", "storage", "0", "1", "cpu", "cuda", "state_dict", "fc.weight", "f8", "O", "V2000000000", "zlib", "idna"]


def program(rng: random.Random) -> bytes:
    """A stream of instructions, most of which find on the stack what they need."""
    out, depth, stored, marks = bytearray(b"\x80\x02"), 0, 0, []
    for _ in range(rng.randint(3, 60)):
        kind = rng.random()
        if kind < 0.3 or depth < 2:
            out += _push(rng)
            depth += 1
        elif kind < 0.45:
            name = rng.choice(_GLOBALS).split()
            out += b"c" + "\n".join(name).encode() + b"\n"
            depth += 1
        elif kind < 0.55:
            out += b"q" + bytes([stored % 256])
            stored += 1
        elif kind < 0.7 and stored:
            out += b"h" + bytes([rng.randrange(min(stored, 256))])
            depth += 1
        elif kind < 0.75:
            marks.append(depth)
            out += b"("
        elif kind < 0.8 and marks:
            depth = marks.pop() + 1
            out += b"t"
        else:
            code, change = rng.choice(
                [(b"R", -1), (b"b", -1), (b"\x81", -1), (b"a", -1), (b"\x86", -1), (b"\x85", 0), (b"Q", 0)]
            )
            out += code
            depth += change
    return bytes(out + b".")


def _push(rng: random.Random) -> bytes:
    text = rng.choice(_TEXTS).encode()
    return rng.choice(
        [
            b"J" + struct.pack("<i", rng.choice(_NUMBERS)),
            b"X" + struct.pack("<I", len(text)) + text,
            rng.choice([b"N", b"}", b"]", b")", b"\x88", b"\x89", b"\x8f"]),
            b"\x8a\x08" + struct.pack("<q", rng.choice([2**33, 2**40, 2**62])),
            b"G" + struct.pack(">d", rng.choice([float("nan"), 1e308, 0.0])),
        ]
    )


def call(name: str, *args: bytes) -> bytes:
    """A whole pickle that calls something with arguments, each the instructions that make it."""
    return b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(args) + b"tR."


def attack(rng: random.Random) -> bytes:
    """What would do harm if it were done."""
    levels = rng.choice([30, 100, 3000])
    number = b"\x8a\x08" + struct.pack("<q", rng.choice([2**33, 2**40, 2**50]))
    text = b"X\x05\x00\x00\x00touch"
    doubled = b"\x80\x02}(K\x00" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))
    return rng.choice(
        [
            call(rng.choice(_GLOBALS[:12]), text),
            call("builtins bytearray", number),
            call("torch Tensor", number),
            call("torch.storage UntypedStorage", number),
            call(
                "_codecs encode",
                b"X" + struct.pack("<I", 40_000) + b"\xc3\xa4" * 20_000,
                b"X\x08\x00\x00\x00punycode",
            ),
            doubled + b"K\x01u.",  # as a key: hashed
            doubled + b"K\x01sR.",
            b"\x80\x02]q\x00" + b"h\x00h\x00a" * levels + b".",  # holds itself
            b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
            b"\x80\x02N" + b"\x85" * rng.choice([50, 500, 30_000]) + b".",
            b"\x80\x02}N" + b"\x85" * 30_000 + b"K\x01s.",
            b"\x80\x02}(K\x00" + b"q\x00](h\x00h\x00e" * levels + b"u.",
            b"\x80\x02" + b"q\x00](h\x00h\x00e".join([b"]"] + [b""] * levels) + b")R.",  # printed in the error
            b"\x80\x02cnumpy\ndtype\n(X\x0b\x00\x00\x00V2000000000tR.",
        ]
    )


def wrapped(rng: random.Random, pickled: bytes, storages: Sequence[bytes] = (b"\0" * 64,)) -> bytes:
    """A pickle as PyTorch keeps it: in a zip archive, behind its magic number, or bare."""
    way = rng.random()
    if way < 0.1:
        return pickled
    if way < 0.35:
        head = (pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}))
        keys = pickle.dumps([str(i) for i in range(len(storages))], 2)
        body = b"".join(struct.pack("<q", len(storage) // 4) + storage for storage in storages)
        return b"".join(head) + pickled + keys + body
    return zipped(pickled, storages, zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED)


def zipped(pickled: bytes, storages: Sequence[bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The layout of today's `torch.save`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for number, storage in enumerate(storages):
            archive.writestr(f"archive/data/{number}", storage)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def rewritten(rng: random.Random, content: bytes, change: object) -> bytes:
    """A zip archive of which one file is changed and all checksums are right."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    chosen = rng.choice([name for name in source.namelist() if name.endswith(".pkl")] * 3 + source.namelist())
    with zipfile.ZipFile(target, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, change(rng, data) if name == chosen else data)  # type: ignore[operator]
        if rng.random() < 0.05:
            archive.comment = b"PK\x05\x06" + rng.randbytes(30)
    return target.getvalue()
