"""Numbered output folders, so that a command never replaces earlier output."""

from __future__ import annotations

from pathlib import Path


def new_folder(parent: Path) -> Path:
    """Create and return a new folder, `version_N` with the first free number.

    Args:
        parent: Parent of the new folder; it is created if it does not exist.
    """
    number = 0
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
