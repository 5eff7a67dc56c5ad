"""Numbered output folders, so that a command never replaces earlier output."""

from __future__ import annotations

from pathlib import Path


def new_folder(parent: Path) -> Path:
    """Create and return a new folder, `version_N` with the first free number.

    Args:
        parent: Parent of the new folder; it is created if it does not exist.

    Raises:
        OSError: If the folder cannot be created.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return _first_free(parent)
    except OSError as error:
        raise OSError(f"cannot create a folder in {parent} ({error.strerror}); use another --output") from error


def _first_free(parent: Path) -> Path:
    """Create the folder; other processes may create folders at the same time."""
    number = 0
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
