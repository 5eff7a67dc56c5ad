"""Random changes to the bytes of any file."""

from __future__ import annotations

import random
import struct

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Apply one to three changes."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(_WAYS)(rng, bytearray(content))
    return bytes(content)


def _place(rng: random.Random, content: bytearray) -> int:
    size = len(content)
    near = rng.choice([size, min(size, 64), min(size, 1024)])  # headers are at the start or at the end
    place = rng.randrange(near) if near else 0
    return size - 1 - place if rng.random() < 0.3 and size else place


def _flip(rng: random.Random, content: bytearray) -> bytearray:
    for _ in range(rng.choice([1, 1, 2, 8, 32]) if content else 0):
        content[_place(rng, content)] ^= 1 << rng.randrange(8)
    return content


def _truncate(rng: random.Random, content: bytearray) -> bytearray:
    return content[: _place(rng, content)]


def _cut_out(rng: random.Random, content: bytearray) -> bytearray:
    start = _place(rng, content)
    return content[:start] + content[start + rng.choice([1, 2, 4, 16, 100]) :]


def _repeat(rng: random.Random, content: bytearray) -> bytearray:
    start = _place(rng, content)
    part = content[start : start + rng.choice([1, 8, 64, 500])]
    return content[:start] + part * rng.choice([2, 3, 50]) + content[start:]


def _splice(rng: random.Random, content: bytearray) -> bytearray:
    here, there = _place(rng, content), _place(rng, content)
    length = rng.choice([1, 4, 16, 64])
    content[here : here + length] = content[there : there + length]
    return content


def _number(rng: random.Random, content: bytearray) -> bytearray:
    place, code = _place(rng, content), rng.choice(["<H", ">H", "<I", ">I", "<Q", ">Q", "B"])
    number = rng.choice(_NUMBERS) % (1 << 8 * struct.calcsize(code))
    content[place : place + struct.calcsize(code)] = struct.pack(code, number)
    return content


def _noise(rng: random.Random, content: bytearray) -> bytearray:
    place = _place(rng, content)
    content[place : place + 16] = rng.randbytes(16)
    return content


_WAYS = [_flip, _flip, _truncate, _cut_out, _repeat, _splice, _number, _number, _noise]
