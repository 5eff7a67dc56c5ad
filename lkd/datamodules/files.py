"""Image files, in one folder per class."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import TypeGuard

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from lkd.io.refused import shown
from lkd.io.tensor_cache import fingerprint
from lkd.types import IGNORE_INDEX

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Accepted formats, regardless of file name. For some others, Pillow starts a program, such as Ghostscript for EPS."""


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files and their classes.

    The file names are stored in one array of bytes. With a list of strings, every worker would end up with a copy, as
    reading an element changes its reference count.

    Args:
        folder: Folder of the files.
        files: File names relative to the folder.
        targets: Classes of the files.
    """

    def __init__(self, folder: Path, files: Sequence[str], targets: Sequence[int]) -> None:
        self.folder = folder
        self.files = np.array([os.fsencode(name) for name in files], dtype=np.bytes_)
        self.targets = np.array(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.open(index) as image:
            image.load()
        return image, int(self.targets[index])

    def open(self, index: int) -> Image.Image:
        """Open an image without decoding its pixels; if the file contains several images, the first one.

        Raises:
            OSError: If the file is missing, empty or not a regular file (reading from a FIFO would block forever).
        """
        path = self.path(index)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            raise OSError(
                "it is empty" if stat.S_ISREG(found.st_mode) else "it is not a file but a folder, FIFO or device"
            )
        return Image.open(path, formats=_FORMATS)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / os.fsdecode(self.files[index])

    def name(self, index: int) -> str:
        """Return the file name of an image, relative to the folder."""
        return Path(os.fsdecode(self.files[index])).as_posix()

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image.

        Raises:
            OSError: If the file cannot be opened.
        """
        with self.open(index) as image:
            return image.height, image.width

    def sizes(self) -> dict[int, tuple[int, int]]:
        """Return the height and width of each image, by position. Files that cannot be opened are skipped."""
        found = {}
        for index in range(len(self)):
            with suppress(OSError):  # reported when the image is read
                found[index] = self.size(index)
        return found

    def largest(self) -> tuple[int, int]:
        """Return the largest height and the largest width of the images; see `sizes`."""
        heights, widths = zip((1, 1), *self.sizes().values(), strict=True)
        return max(heights), max(widths)

    def part(self, chosen: Tensor) -> ImageFiles:
        """Return a subset of the files.

        Args:
            chosen: Which files to include `(N,)`, bool.
        """
        part = copy(self)
        part.files, part.targets = self.files[chosen.numpy()], self.targets[chosen.numpy()]
        return part

    def fingerprint(self) -> str:
        """Return a hash of these files: their folder, names, classes, sizes and modification times."""
        states = [_state(self.path(i)) for i in range(len(self))]
        return fingerprint(str(self.folder.resolve()), self.files.tobytes(), self.targets.tobytes(), states)

    def contents(self) -> str:
        """Return a hash of the names, classes and sizes of these files. It does not change when they are copied."""
        states = [_state(self.path(i)) for i in range(len(self))]
        sizes = [None if state is None else state[0] for state in states]
        return fingerprint(self.files.tobytes(), self.targets.tobytes(), sizes)


def is_plain(source: object) -> TypeGuard[ImageFiles]:
    """Return whether a source returns the pixels of its files; a subclass that overrides reading may return others."""
    reading = ("__getitem__", "open", "path")
    return all(getattr(type(source), name, None) is getattr(ImageFiles, name) for name in reading)


class ImageBytes(Dataset[tuple[Image.Image, int]]):
    """Encoded image files in memory, such as those of a batch read from an archive.

    Args:
        samples: Mapping from the number of each image to its name, its bytes and its class.
    """

    def __init__(self, samples: Mapping[int, tuple[str, bytes, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.open(index) as image:
            image.load()
        return image, self.samples[index][2]

    def open(self, index: int) -> Image.Image:
        """Open an image without decoding its pixels."""
        return Image.open(io.BytesIO(self.samples[index][1]), formats=_FORMATS)

    def path(self, index: int) -> str:
        """Return the origin of an image."""
        return self.samples[index][0]


def _state(path: Path) -> tuple[int, int] | None:
    """Return the size and modification time of a file; `None` if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the sorted class names of `folder/<class>/`. Hidden folders are ignored.

    Raises:
        FileNotFoundError: If the folder is missing or has no class folders, or a symbolic link in it is broken.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} not found; expected a folder with one folder of images per class")
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if dead := sorted(entry.name for entry in entries if entry.is_symlink() and not entry.exists()):
        raise FileNotFoundError(f"broken symbolic links in {folder}: {few(dead)}; fix or remove them")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise FileNotFoundError(f"{folder} has no class folders; expected {folder}/<class>/<image files>")
    return tuple(names)


def read_tree(folder: Path, class_names: Sequence[str]) -> ImageFiles:
    """Find the images in `folder/<class>/`, at any depth, in sorted order.

    Symbolic links are followed; a folder to which several links lead is read once per class. Files are identified by
    their extension and not opened.

    Args:
        folder: Folder that contains the class folders.
        class_names: Names of the class folders, in class order.

    Raises:
        FileNotFoundError: If the folder is missing or a class has no images.
        ValueError: If the folder has different classes.
    """
    found = set(class_folders(folder))
    if found != set(class_names):
        missing, unknown = sorted(set(class_names) - found), sorted(found - set(class_names))
        raise ValueError(
            f"{folder} must have the same class folders as the training images; missing: {few(missing)}; "
            f"unknown: {few(unknown)}"
        )
    files: list[str] = []
    targets: list[int] = []
    empty = []
    for target, name in enumerate(class_names):
        images = _images(folder, folder / name)
        empty += [] if images else [name]
        files += images
        targets += [target] * len(images)
    if empty:
        raise FileNotFoundError(
            f"no images in these class folders of {folder}: {few(empty)}; "
            f"expected files with the extensions {', '.join(IMG_EXTENSIONS)}"
        )
    return ImageFiles(folder, files, targets)


def read_all(folder: Path) -> ImageFiles:
    """Find all images of a folder, at any depth, in sorted order and without classes. Symbolic links are followed.

    Args:
        folder: Folder of the images.

    Raises:
        FileNotFoundError: If the folder is missing or contains no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {shown(folder)} not found; expected a folder that contains images")
    files = _images(folder, folder)
    if not files:
        raise FileNotFoundError(
            f"no images in {shown(folder)} at any depth; expected files with the extensions {', '.join(IMG_EXTENSIONS)}"
        )
    return ImageFiles(folder, files, [IGNORE_INDEX] * len(files))


def _images(folder: Path, top: Path) -> list[str]:
    """Return the names of the images in `top`, at any depth, relative to `folder`."""
    return [
        f"{Path(parent).relative_to(folder)}/{file}"
        for parent, names in sorted(_folders(top))
        for file in sorted(names)
        if file.lower().endswith(IMG_EXTENSIONS)
    ]


def _folders(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder and its file names. Folders are visited in sorted order, independent of the file system."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(top, followlinks=True, onerror=_raise):
        found = os.stat(parent)  # noqa: PTH116  # os.walk yields strings
        if (found.st_dev, found.st_ino) in seen:  # through another link, or through a cycle
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders.sort()
        yield parent, names


def _raise(error: OSError) -> None:
    """Raise an error: otherwise a folder that cannot be read would be treated as empty."""
    raise error


def few(names: Sequence[str]) -> str:
    """Return the first five of some names, for a message."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def is_flat(root: Path) -> bool:
    """Return whether a folder contains class folders instead of folders of splits."""
    if not root.is_dir():
        return False
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return bool(names) and not any(name.lower() in _SPLITS for name in names)


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split in `root`; without `test`, `val` is the test set.

    Returns:
        `root/train`, `root/test` or `root/val`; `None` if validation images are split from the training images.
    """
    name = split_name({entry for entry in ("val", "test") if (root / entry).is_dir()}, split)
    return None if name is None else root / name


def split_name(found: Container[str], split: str) -> str | None:
    """Return the name of a split; without `test`, `val` is the test set.

    Args:
        found: Names of the existing splits.
        split: "train", "val" or "test".

    Returns:
        The name; `None` if validation images are split from the training images.
    """
    if split == "val":
        return "val" if "test" in found and "val" in found else None
    return "val" if split == "test" and "test" not in found and "val" in found else split
