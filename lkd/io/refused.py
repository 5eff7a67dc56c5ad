"""Limits for content that an untrusted file declares, and how its names are printed. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_DEPTH = 100
Node = list["Node | None"]
"""A container of containers; None: what holds nothing."""


class UntrustedError(ValueError):
    """A file that is not read, and why: the end of a sentence."""


def shown(name: object, longest: int = 120) -> str:
    """A name from a file, for a message: short, on one line, without what steers a terminal."""
    text = str(name) if isinstance(name, str | bytes | Path) else type(name).__name__
    text = text if len(text) <= longest else f"{text[: longest - 40]}...{text[-30:]}"
    return text if text.isprintable() else ascii(text)


def said(error: BaseException) -> str:
    """What an error says of a file, for a message: as `shown`."""
    return shown(" ".join(str(error).split()), 300)


def weigh(made: Sequence[Node], limit: int) -> None:
    """Refuse containers that hold themselves, are nested too deep, or hold too much if each is counted as often as met.

    Without recursion, whose depth the file would choose.

    Args:
        made: All containers.
        limit: How much one may hold.

    Raises:
        UntrustedError: If one is refused.
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
                raise UntrustedError("an object in it holds itself")
            elif waiting:
                begun.add(id(node))
                path += waiting
            else:
                parts = [(1, 0) if part is None else known[id(part)] for part in node]
                size, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
                if size > limit or depth > _DEPTH:
                    raise UntrustedError("its objects hold one another so often that they could not be handled")
                known[id(node)] = size, depth
