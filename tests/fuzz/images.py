"""Fuzz folders of images with `ImageFolderDataModule`, for both policies, in memory or read in each epoch."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile

from lkd.datamodules import ImageFolderDataModule
from tests.fuzz.mutate import mutate

REFUSALS = (ValueError, OSError)  # ImageError is a ValueError
MEMORY = 2**31  # Pillow accepts 179 million pixels; four bytes each, and a copy
_MODES = ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "I", "I;16", "F", "YCbCr", "LAB", "PA"]
_FORMATS = ["JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "EPS", "ICO", "PDF", "TGA"]
_NAMES = [
    b"a.jpg",
    b"-a.png",
    b"a\nb.jpg",
    b"\xff\xfe.jpg",
    b"\x1b[2J.png",
    b"a b.JPEG",
    b"%s{}.tif",
    b"*.webp",
    b"\xe2\x80\xae.gif.jpg",
]


class Fuzz:
    """Create and read a folder with one class of valid images and one of others."""

    def __init__(self) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
        picture = Image.fromarray(noise)
        self.good = _encoded(picture, "PNG")
        self.files = [file for mode in _MODES for kind in _FORMATS if (file := _encoded(picture, kind, mode))]
        frames = [picture, picture.rotate(90), picture.rotate(180)]
        for kind in ("GIF", "PNG", "WEBP", "TIFF"):
            file = io.BytesIO()
            picture.save(file, kind, save_all=True, append_images=frames)
            self.files.append(file.getvalue())
        self.policy, self.limit = "fail", 0

    def make(self, rng: random.Random, folder: Path) -> Path:
        """Write one folder."""
        shutil.rmtree(folder / "pictures", ignore_errors=True)
        self.policy, self.limit = rng.choice(["fail", "skip"]), rng.choice([0, 2**30])
        for split, name in (("train", "good"), ("train", "odd"), ("test", "good"), ("test", "odd")):
            (folder / "pictures" / split / name).mkdir(parents=True)
            (folder / "pictures" / split / name / "0.png").write_bytes(self.good)
        for split in ("train", "test"):
            odd = folder / "pictures" / split / "odd"
            for _ in range(rng.choice([1, 1, 3])):
                path = Path(os.fsdecode(os.fsencode(odd) + b"/" + rng.choice(_NAMES)))
                if not os.path.lexists(path):
                    (self._entry if rng.random() < 0.15 else self._file)(rng, path)
        return folder / "pictures"

    def _file(self, rng: random.Random, path: Path) -> None:
        way = rng.random()
        if way < 0.15:
            content = rng.choice(self.files)
        elif way < 0.9:
            content = mutate(rng, rng.choice(self.files))
        elif way < 0.93:
            content = b""
        else:
            content = _bomb(rng)
        path.write_bytes(content)

    def _entry(self, rng: random.Random, path: Path) -> None:
        ways: list[Callable[[], object]] = [
            lambda: os.mkfifo(path),
            lambda: path.mkdir(),
            lambda: path.symlink_to(
                rng.choice(["/dev/zero", "/dev/random", "/proc/self/mem", "/etc/passwd", "nowhere", path.name])
            ),
            lambda: path.symlink_to(path.parent / "0.png"),
            lambda: (path.parent / "loop").symlink_to(rng.choice(["..", ".", "../../.."])),
            lambda: (path.parent / "far").symlink_to("nowhere"),
        ]
        try:
            rng.choice(ways)()
        except FileExistsError:
            path.write_bytes(b"")

    def read(self, path: Path) -> str:
        """Read all images with the chosen policy."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            data = ImageFolderDataModule(
                str(path), 8, num_workers=0, batch_size=4, val_size=0, resident_limit=self.limit, unreadable=self.policy
            )
            data.setup("test")
            images = sum(len(batch.target) for batch in data.test_dataloader())
            data.setup("fit")
            for batch in data.train_dataloader():
                if not torch.isfinite(batch.input).all():
                    raise SystemError("an image has pixels that are not finite")
        left_out = len(data.datasets["test"].target) - images
        if left_out and not any("are skipped" in str(warning.message) for warning in said):
            raise SystemError(f"{left_out} images were skipped silently")
        return "accepted (some images skipped)" if left_out else "accepted"


def _encoded(image: Image.Image, kind: str, mode: str = "RGB") -> bytes:
    """Encode an image in a format and mode; return no bytes if they are not supported."""
    file = io.BytesIO()
    try:
        image.convert("L" if mode in ("LA", "PA", "I", "F", "I;16") else "RGB").convert(mode).save(file, kind)
    except (OSError, KeyError, ValueError):
        return b""
    return file.getvalue()


def _bomb(rng: random.Random) -> bytes:
    """Return a small file whose header declares a large image; some of the images are indeed large."""
    width, height = rng.choice(
        [(2**31 - 1, 2**31 - 1), (60_000, 60_000), (10**6, 1), (1, 10**6), (0, 5), (12_000, 12_000), (65_535, 2)]
    )
    if width == 12_000 and rng.random() < 0.8:  # this size takes seconds
        width = 600
    if rng.random() < 0.3:
        return f"P{rng.choice('56')} {width} {height} {rng.choice([255, 65535, 10**9, 0])}\n".encode() + bytes(100)
    if rng.random() < 0.2:
        return (
            b"BM"
            + struct.pack("<IHHIIiiHHIIiiII", 200, 0, 0, 54, 40, width % 2**31, -height, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(99)
        )
    rows = (
        zlib.compress(bytes((width // 8 + 2) * min(height, 12_000)))
        if width * height < 2e8
        else zlib.compress(bytes(10))
    )
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


ImageFile.LOAD_TRUNCATED_IMAGES = False
