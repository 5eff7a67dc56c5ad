"""Table of a comparison, for the terminal, Markdown and the HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

_SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Grid:
    """Table with a title and a note.

    Attributes:
        title: Title of the table.
        head: Names of the columns.
        rows: Cells of each row.
        note: Explanation of the columns.
        place: Where the table is shown: in the terminal and on the page, only on the page, or collapsed on the page.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    place: Literal["terminal", "page", "folded"] = "terminal"

    def markdown(self) -> Iterator[str]:
        """Yield the lines of the table in Markdown."""
        yield f"## {self.title}"
        yield ""
        for row in (self.head, ["---"] * len(self.head), *self.rows):
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        yield ""
        yield self.note
        yield ""

    def rich(self, width: int = 80) -> Iterator[Table | Text]:
        """Yield the table for a terminal, split into several tables if it is too wide, followed by its note.

        Args:
            width: Number of columns of the terminal.
        """
        first, *rest = (self._needed(number) for number in range(len(self.head)))
        first = min(first, max(8, width // 2))
        parts: list[list[int]] = [[]]
        free = width - first - 4  # a column has two spaces and a border in addition to its text
        for number, needed in enumerate(rest, start=1):
            if parts[-1] and needed + 3 > free:
                parts.append([])
                free = width - first - 4
            parts[-1].append(number)
            free -= needed + 3
        for part in parts:
            table = Table(title=escape(self.title) if part is parts[0] else None, title_justify="left")
            table.add_column(escape(self.head[0]), overflow="fold", width=first)
            for number in part:
                table.add_column(escape(self.head[number]), justify="right", width=self._needed(number))
            for row in self.rows:
                cells = (escape(row[number].replace(" ", _SPACE)) for number in part)
                table.add_row(escape(row[0]), *cells)
            yield table
        yield Text(f"{self.note}\n", style="dim")

    def _needed(self, number: int) -> int:
        """Return the width that a column needs without line breaks in its cells; its name may wrap between words."""
        words = self.head[number].split(" ")
        return max(map(len, [*words, *(row[number] for row in self.rows)]))
