"""Numbered folders of outputs, so that a command never replaces the output of an earlier one."""

from __future__ import annotations

from pathlib import Path


def new_folder(parent: Path) -> Path:
    """Create and return a new folder, `version_N` with the first free number.

    Args:
        parent: Folder in which it is created; it is created as well if it does not exist.
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
