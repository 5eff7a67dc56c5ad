"""Limits for the content of untrusted files, and safe printing of their names. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_DEPTH = 100
Node = list["Node | None"]
"""A container of containers; `None` stands for an object that contains nothing."""


class UntrustedError(ValueError):
    """Raised if an untrusted file is rejected. The message is a clause with the reason."""


def shown(name: object, longest: int = 120) -> str:
    """Format a name from a file for a message: short, on one line, and without terminal control characters."""
    text = str(name) if isinstance(name, str | bytes | Path) else type(name).__name__
    text = text if len(text) <= longest else f"{text[: longest - 40]}...{text[-30:]}"
    return text if text.isprintable() else ascii(text)


def said(error: BaseException) -> str:
    """Format the message of an error about a file, as in `shown`."""
    return shown(" ".join(str(error).split()), 300)


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the name of its class if there is none.

    Args:
        error: The error.
    """
    return str(error).strip().split("\n")[0] or type(error).__name__


def weigh(made: Sequence[Node], limit: int) -> None:
    """Reject containers that contain themselves, are nested too deeply, or are too large with shared parts expanded.

    The traversal is not recursive, because the file would control the recursion depth.

    Args:
        made: All containers.
        limit: Maximum expanded size of a container.

    Raises:
        UntrustedError: If a container is rejected.
    """
    known: dict[int, tuple[int, int]] = {}  # size and depth
    begun: set[int] = set()
    for root in made:
        path = [root]
        while path:
            node = path[-1]
            waiting = [part for part in node if part is not None and id(part) not in known]
            if id(node) in known:
                path.pop()
            elif any(id(part) in begun for part in waiting):
                raise UntrustedError("an object in it contains itself")
            elif waiting:
                begun.add(id(node))
                path += waiting
            else:
                parts = [(1, 0) if part is None else known[id(part)] for part in node]
                size, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
                if size > limit or depth > _DEPTH:
                    raise UntrustedError("its objects reference each other too often or are nested too deeply")
                known[id(node)] = size, depth
