"""Images in folders, one folder for each class."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from lkd.io.refused import shown
from lkd.io.tensor_cache import fingerprint
from lkd.types import IGNORE_INDEX

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What a file may be, whatever its name says: for some others Pillow starts a program, as Ghostscript for EPS."""


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files and their classes.

    The names are one array of bytes: of a list of strings, every worker would come to own a copy, as reading
    one writes its reference count.

    Args:
        folder: Where the files are.
        files: Their names inside of it.
        targets: Their classes.
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
        """An image whose pixels are not decoded yet; of several in one file, the first.

        Raises:
            OSError: If there is no file, or something that only looks like one: a FIFO would be waited for, for ever.
        """
        path = self.path(index)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            raise OSError(
                "it is empty" if stat.S_ISREG(found.st_mode) else "it is no file but a folder, FIFO or device"
            )
        return Image.open(path, formats=_FORMATS)

    def path(self, index: int) -> Path:
        """Path of an image."""
        return self.folder / os.fsdecode(self.files[index])

    def part(self, chosen: Tensor) -> ImageFiles:
        """Some of these files.

        Args:
            chosen: Which ones `(N,)`, bool.
        """
        part = copy(self)
        part.files, part.targets = self.files[chosen.numpy()], self.targets[chosen.numpy()]
        return part

    def fingerprint(self) -> str:
        """A name for these files: by their folder, names, sizes and times of change."""
        states = [_state(self.path(i)) for i in range(len(self))]
        return fingerprint(str(self.folder.resolve()), self.files.tobytes(), self.targets.tobytes(), states)

    def contents(self) -> str:
        """A name for these images that they keep when they are copied: by their names, classes and sizes."""
        states = [_state(self.path(i)) for i in range(len(self))]
        sizes = [None if state is None else state[0] for state in states]
        return fingerprint(self.files.tobytes(), self.targets.tobytes(), sizes)


class ImageBytes(Dataset[tuple[Image.Image, int]]):
    """Image files in memory, as those of a batch that has been read from an archive.

    Args:
        samples: Number of each image to its name, its bytes and its class.
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
        """An image whose pixels are not decoded yet."""
        return Image.open(io.BytesIO(self.samples[index][1]), formats=_FORMATS)

    def path(self, index: int) -> str:
        """Where an image comes from."""
        return self.samples[index][0]


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the classes in `folder/<class>/`, sorted; hidden folders are none.

    Raises:
        FileNotFoundError: If the folder is missing or has no class folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected one folder of images for each class in it")
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if dead := sorted(entry.name for entry in entries if entry.is_symlink() and not entry.exists()):
        raise FileNotFoundError(f"links in {folder} lead nowhere: {few(dead)}; mend or remove them")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise FileNotFoundError(f"{folder} has no class folders; expected {folder}/<class>/<image files>")
    return tuple(names)


def read_tree(folder: Path, class_names: Sequence[str]) -> ImageFiles:
    """Finds the images of `folder/<class>/`, at any depth, in sorted order.

    Links are followed, wherever they lead; a folder to which several lead is read once in each class. What has an
    image's name is taken for one until it is read.

    Args:
        folder: The folder.
        class_names: Names of the class folders, in the order of the classes.

    Raises:
        FileNotFoundError: If the folder or the images of a class are missing.
        ValueError: If the folder has other classes.
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
            f"no images in the class folders {few(empty)} of {folder}; "
            f"expected files that end in {', '.join(IMG_EXTENSIONS)}"
        )
    return ImageFiles(folder, files, targets)


def read_all(folder: Path) -> ImageFiles:
    """Finds all images of a folder, at any depth, in sorted order; none has a class. Links are followed.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If the folder is missing, or has no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {shown(folder)}; give one with images in it, at any depth")
    files = _images(folder, folder)
    if not files:
        raise FileNotFoundError(
            f"no images in {shown(folder)}, at any depth; expected files that end in {', '.join(IMG_EXTENSIONS)}"
        )
    return ImageFiles(folder, files, [IGNORE_INDEX] * len(files))


def _images(folder: Path, top: Path) -> list[str]:
    """Names of the images in `top`, at any depth, as seen from the folder."""
    return [
        f"{Path(parent).relative_to(folder)}/{file}"
        for parent, names in sorted(_folders(top))
        for file in sorted(names)
        if file.lower().endswith(IMG_EXTENSIONS)
    ]


def _folders(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder and the names of what is in it but folders; in the order of their names, so links are met in it."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(top, followlinks=True, onerror=_raise):
        found = os.stat(parent)  # noqa: PTH116  # as os.walk has it: a text
        if (found.st_dev, found.st_ino) in seen:  # by another link, or by one that leads back
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders.sort()
        yield parent, names


def _raise(error: OSError) -> None:
    """A folder that cannot be read would otherwise have no images, in silence."""
    raise error


def few(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def is_flat(root: Path) -> bool:
    """Whether a folder has the class folders in it, instead of folders of splits."""
    if not root.is_dir():
        return False
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return bool(names) and not any(name.lower() in _SPLITS for name in names)


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split in `root`, with `val` as the test set where there is no `test`.

    Returns:
        `root/train`, `root/test` or `root/val`; None if validation images are to be cut from the training
        images.
    """
    has_test = (root / "test").is_dir()
    if split == "val":
        return root / "val" if has_test and (root / "val").is_dir() else None
    return root / ("val" if split == "test" and not has_test and (root / "val").is_dir() else split)
