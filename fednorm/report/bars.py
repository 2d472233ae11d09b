"""One line of a progress display, for any width: what gives way first is what says least, and never the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

BAR = 16
"""Characters of a bar, where there is room for one."""

NAME = 16
"""Characters that a name has at least, before words on how it goes have any."""


def clock(seconds: float) -> str:
    """Return a length of time as a clock has it: ``1:20``, ``2:05:00``."""
    hours, rest = divmod(max(round(seconds), 0), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Line(ProgressColumn):
    """A whole line: name, bar, count, how it goes, the time left; the only column of its display.

    Args:
        left: Returns the time left of a task, in words; empty where it is not known.
        counted: Whether the steps done and all steps are told.
    """

    max_refresh = 0.5

    def __init__(self, left: Callable[[Task], str], *, counted: bool) -> None:
        super().__init__(table_column=Column(ratio=1, no_wrap=True))
        self._left, self._counted = left, counted

    def render(self, task: Task) -> _Drawn:
        """Return the line, which fits itself to the width that it is given."""
        count = f"{task.completed:.0f}/{task.total:.0f}" if self._counted and task.total is not None else ""
        return _Drawn(task, count, str(task.fields["state"]), self._left(task))


class _Drawn:
    def __init__(self, task: Task, count: str, state: str, left: str) -> None:
        self._task, self._count, self._state, self._left = task, count, state, left

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        name, state, bar = Text(self._task.description), Text(self._state), 0
        kept = [Text(part) for part in (self._count, self._left) if part]
        room = width - sum(part.cell_len + 1 for part in kept)
        if room >= BAR + 1 + NAME:
            bar = BAR
            room -= BAR + 1
        room_for_state = min(state.cell_len, max(room - 1 - min(name.cell_len, max(NAME, room // 2)), 0))
        name.truncate(max(room - (room_for_state + 1 if room_for_state else 0), 1), overflow="ellipsis")
        state.truncate(room_for_state, overflow="ellipsis") if room_for_state > 1 else state.truncate(0)
        yield from self._parts(console, options, name, state, bar, width)

    def _parts(
        self, console: Console, options: ConsoleOptions, name: Text, state: Text, bar: int, width: int
    ) -> Iterator[Segment]:
        line = Text()
        before = [name.plain]
        after = [part for part in (self._count, state.plain) if part]
        used = len(" ".join(before)) + (bar + 1 if bar else 0) + sum(len(part) + 1 for part in after)
        gap = max(width - used - len(self._left), 1) if self._left else 0
        line.append(name.plain)
        yield from console.render_lines(line, options.update_width(max(name.cell_len, 1)), pad=False)[0]
        if bar:
            yield Segment(" ")
            drawn = ProgressBar(
                total=None if self._task.total is None else max(self._task.total, 1),
                completed=self._task.completed,
                width=bar,
                pulse=not self._task.started,
            )
            yield from console.render_lines(drawn, options.update_width(bar), pad=True)[0]
        rest = Text("".join(f" {part}" for part in after) + " " * gap).append(self._left, style="progress.remaining")
        yield from console.render_lines(rest, options.update_width(max(rest.cell_len, 1)), pad=False)[0]
        yield Segment.line()
