"""Images in folders, one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from lkd.store import fingerprint


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
        with Image.open(self.path(index)) as image:
            image.load()
        return image, int(self.targets[index])

    def path(self, index: int) -> Path:
        """Path of an image."""
        return self.folder / os.fsdecode(self.files[index])

    def fingerprint(self) -> str:
        """A name for these files: by their folder, names, sizes and times of change."""
        stats = [self.path(i).stat() for i in range(len(self))]
        folder = str(self.folder.resolve())
        return fingerprint(
            folder, self.files.tobytes(), self.targets.tobytes(), [(s.st_size, s.st_mtime_ns) for s in stats]
        )

    def contents(self) -> str:
        """A name for these images that they keep when they are copied: by their names, classes and sizes."""
        sizes = [self.path(i).stat().st_size for i in range(len(self))]
        return fingerprint(self.files.tobytes(), self.targets.tobytes(), sizes)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the classes in `folder/<class>/`, sorted; hidden folders are none.

    Raises:
        FileNotFoundError: If the folder is missing or has no class folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected one folder of images for each class in it")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder} has no class folders; expected {folder}/<class>/<image files>")
    return tuple(names)


def read_tree(folder: Path, class_names: Sequence[str]) -> ImageFiles:
    """Finds the images of `folder/<class>/`, at any depth, in sorted order.

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
        images = [
            f"{Path(parent).relative_to(folder)}/{file}"
            for parent, _, names in sorted(os.walk(folder / name))
            for file in sorted(names)
            if file.lower().endswith(IMG_EXTENSIONS)
        ]
        empty += [] if images else [name]
        files += images
        targets += [target] * len(images)
    if empty:
        raise FileNotFoundError(
            f"no images in the class folders {few(empty)} of {folder}; "
            f"expected files that end in {', '.join(IMG_EXTENSIONS)}"
        )
    return ImageFiles(folder, files, targets)


def few(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


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
