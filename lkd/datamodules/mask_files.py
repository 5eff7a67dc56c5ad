"""Image files with mask files: functions that find pairs and read masks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lkd.datamodules.files import ImageFiles, few, read_all
from lkd.io.refused import shown
from lkd.io.tensor_cache import fingerprint

IGNORED = 255
"""Label of pixels without a class in masks."""

_SINGLE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


class MaskError(ValueError):
    """Exception for a mask file with invalid content."""


class MaskedFiles(ImageFiles):
    """Image files, each with a mask file.

    Args:
        folder: Folder of the files.
        files: Names of the images relative to the folder.
        masks: Names of the masks relative to the folder, one for each image.
        num_classes: Number of classes.
        label_map: Class of each label in the mask files; labels that are mapped to 255 are ignored. Labels that are not
            mapped are class indices.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        masks: Sequence[str],
        num_classes: int,
        label_map: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(folder, files, [0] * len(files))
        self.masks = ImageFiles(folder, masks, [0] * len(masks))
        self.num_classes = num_classes
        self.table = np.arange(IGNORED + 1, dtype=np.uint8)
        for label, target in (label_map or {}).items():
            self.table[label] = target

    def fingerprint(self) -> str:
        """Return a hash of the images and masks; see `ImageFiles.fingerprint`."""
        return fingerprint(super().fingerprint(), self.masks.fingerprint(), self.table.tobytes(), self.num_classes)

    def contents(self) -> str:
        """Return a hash of the images and masks; see `ImageFiles.contents`."""
        return fingerprint(super().contents(), self.masks.contents(), self.table.tobytes())

    def mask(self, index: int, size: tuple[int, int]) -> Image.Image:
        """Read a mask.

        Args:
            index: Position of the mask.
            size: Height and width of its image.

        Returns:
            Image of mode P whose pixels are `255 - class`. Image transforms scale it with nearest-neighbor
            interpolation, and the zeros with which they fill are ignored.

        Raises:
            MaskError: If the mask has several channels, another size, or labels without a class.
        """
        with self.masks.open(index) as image:
            if image.mode not in _SINGLE_CHANNEL:
                raise MaskError(f"its mode is {image.mode}, but the pixels of a mask must be the numbers of classes")
            if (image.height, image.width) != size:
                got, expected = f"{image.width}x{image.height}", f"{size[1]}x{size[0]}"
                raise MaskError(f"its size is {got} pixels, but the size of its image is {expected}")
            label = np.asarray(image).astype(np.int64)
        if label.min() < 0 or label.max() > IGNORED:
            raise MaskError(f"it contains the label {label.min() if label.min() < 0 else label.max()}")
        target = self.table[label]
        wrong = label[(target >= self.num_classes) & (target != IGNORED)]
        if wrong.size:
            raise MaskError(
                f"it contains the label {wrong[0]}, but there are {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}; map the label to a class or to {IGNORED} (ignored) with label_map"
            )
        return Image.frombytes("P", (size[1], size[0]), (IGNORED - target).tobytes())


def paired(folder: Path, images: Path, masks: Path, suffix: tuple[str, str] = ("", "")) -> tuple[list[str], list[str]]:
    """Find the mask of each image: the file with the same name, except for the extension, in another folder.

    Args:
        folder: Folder to which the returned names are relative.
        images: Folder of the images, at any depth.
        masks: Folder of the masks, with the same subfolders.
        suffix: Endings, before the extension, of the names of images and of masks; other files are skipped.

    Returns:
        Names of the images and of their masks, in sorted order.

    Raises:
        FileNotFoundError: If a folder is missing, or an image has no mask.
        ValueError: If the names of two files of a folder differ only in their extension.
    """
    found = [_by_stem(part, end) for part, end in zip((images, masks), suffix, strict=True)]
    if missing := sorted(found[0].keys() - found[1].keys()):
        raise FileNotFoundError(
            f"{len(missing)} of {len(found[0])} images in {shown(images)} have no mask in {shown(masks)}: "
            f"{few(missing)}; add the masks (of the same name, for example a.png for a.jpg) or remove the images"
        )
    stems = sorted(found[0])
    return tuple(  # type: ignore[return-value]
        [(part / names[stem]).relative_to(folder).as_posix() for stem in stems]
        for part, names in zip((images, masks), found, strict=True)
    )


def listed(file: Path, root: Path) -> tuple[list[str], list[str]]:
    """Read a list of images and masks: one pair of file names per line, separated by a space or a tab.

    Args:
        file: The list.
        root: Folder to which the file names are relative.

    Returns:
        Names of the images and of their masks.

    Raises:
        ValueError: If a line does not consist of two names, or the list is empty.
        FileNotFoundError: If a file is missing.
    """
    if not file.is_file():
        raise FileNotFoundError(f"list {shown(file)} not found; create it: one image and its mask per line")
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    pairs = [line.split("\t") if "\t" in line else line.split() for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            line = " ".join(pair)
            raise ValueError(f"line {number} of {shown(file)} must name an image and its mask, got {line!r}")
    if not pairs:
        raise ValueError(f"{shown(file)} lists no images")
    if missing := [name for pair in pairs for name in pair if not (root / name).is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} files listed in {shown(file)} are not in {shown(root)}: {few(missing)}; correct the list"
        )
    images, masks = zip(*pairs, strict=True)
    return list(images), list(masks)


def _names(folder: Path, end: str) -> list[str]:
    files = read_all(folder)
    names = [Path(os.fsdecode(name)).as_posix() for name in files.files]
    return [name for name in names if name.rpartition(".")[0].endswith(end)]


def _by_stem(folder: Path, end: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _names(folder, end):
        other = found.setdefault(name.rpartition(".")[0].removesuffix(end), name)
        if other != name:
            raise ValueError(
                f"{shown(other)} and {shown(name)} in {shown(folder)} differ only in their extension, so images and "
                "masks cannot be paired by their names; remove or rename one of them"
            )
    return found
