"""Tables on a terminal of any width: numbers stay whole, and columns that do not fit are left out and named.

A reader of a narrow terminal gets the columns that matter most; ``--details`` shows the others in further parts, one
under the other. Names and text break between words, numbers never.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from fednorm.report._common import Table

GAP = 2
"""Characters between two columns."""

FEWEST = 12
"""Characters that a column of names has at least, where its names have as many."""


class Fitted:
    """A table as a terminal shows it.

    Args:
        table: The table.
        whole: Whether columns that do not fit come in further parts; where not, they are left out and named.
        notes: Whether the notes are shown in full; where not, the table's caption and warnings are.
    """

    def __init__(self, table: Table, *, whole: bool, notes: bool) -> None:
        self.table, self._whole, self._notes = table, whole, notes
        columns = [tuple(row[i] for row in table.rows) for i in range(len(table.columns))]
        self._cells = columns
        self._least = [self._least_of(i) for i in range(len(columns))]
        self._most = [max(map(cell_len, (head, *cells))) for head, cells in zip(table.columns, columns, strict=True)]

    def _least_of(self, column: int) -> int:
        """Return the characters that a column needs: numbers stay whole; names, texts and heads break at spaces."""
        head, cells = self.table.columns[column].split(), self._cells[column]
        if column == 0 or self.table.columns[column] in self.table.texts:
            cells = tuple(word for cell in cells for word in cell.split())
        longest = max(map(cell_len, (*head, *cells)), default=1)
        whole = max(map(cell_len, (self.table.columns[column], *self._cells[column])))
        return longest if column else max(longest, min(FEWEST, whole))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the title, the parts of the table, what was left out, and what must be known of the numbers."""
        width = options.max_width
        yield Text(self.table.title, style="table.title")
        if self._whole:
            for number, columns in enumerate(self._in_parts(width)):
                yield from ([Text()] if number else [])
                yield self._part(columns, width)
        else:
            columns = self._fitting(width)
            yield self._part(columns, width)
            if gone := [head for i, head in enumerate(self.table.columns[1:], start=1) if i not in columns]:
                said = f"Left out at {width} columns: {', '.join(gone)}; --details shows all."
                yield Text(said, style="table.caption")
        yield from (Text(line, style="table.caption") for line in self._beneath())

    def _beneath(self) -> Iterator[str]:
        if self._notes or self.table.caption is None:
            yield from self.table.notes
            return
        yield from ([self.table.caption] if self.table.caption else [])
        yield from self.table.warnings

    def _fitting(self, width: int) -> list[int]:
        """Return the columns that fit beside the names, in the table's order: those that matter most first."""
        heads = self.table.columns
        wanted = sorted(range(1, len(heads)), key=lambda i: _place(heads[i], self.table.first))
        room = width - min(self._least[0], width // 2)
        fitting: list[int] = []
        for column in wanted:
            if not fitting or self._least[column] + GAP <= room:
                fitting.append(column)
                room -= self._least[column] + GAP
        return sorted(fitting)

    def _in_parts(self, width: int) -> Iterator[list[int]]:
        """Yield the columns of each part, one or more of them, as many as there is room for."""
        names = self._least[0] if self._total(range(1, len(self.table.columns))) > width else self._most[0]
        room = width - min(max(names, min(self._most[0], width // 3)), max(width // 2, FEWEST))
        part: list[int] = []
        left = room
        for column in range(1, len(self.table.columns)):
            if part and self._least[column] + GAP > left:
                yield part
                part, left = [], room
            part.append(column)
            left -= self._least[column] + GAP
        yield part

    def _total(self, columns: Sequence[int]) -> int:
        return self._most[0] + sum(self._least[column] + GAP for column in columns)

    def _part(self, columns: Sequence[int], width: int) -> RichTable:
        widths = self._widths((0, *columns), width)
        part = RichTable(
            box=SIMPLE_HEAD,  # without lines and margins, ten columns fit a terminal of 80 characters
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column, own in widths.items():
            head = self.table.columns[column]
            left = column == 0 or head in self.table.texts
            part.add_column(Text(head), width=own, overflow="fold", justify="left" if left else "right")
        for row in self.table.rows:
            part.add_row(*(Text(row[column]) for column in widths))
        return part

    def _widths(self, columns: Sequence[int], width: int) -> dict[int, int]:
        """Return the characters of each column: what numbers need, and what is left for names and texts, in turn."""
        own = {column: self._least[column] for column in columns}
        left = width - sum(own.values()) - GAP * (len(columns) - 1)
        if left < 0:  # no terminal has room for it; names give way before numbers
            own[0] = max(own[0] + left, 1)
        words = [column for column in columns if column == 0 or self.table.columns[column] in self.table.texts]
        for column in (*words, *(column for column in columns if column not in words)):  # last, heads in one line
            more = max(min(self._most[column] - own[column], left), 0)
            own[column] += more
            left -= more
        return own


def _place(head: str, first: Sequence[str]) -> int:
    return first.index(head) if head in first else len(first)
