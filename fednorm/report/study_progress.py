"""How a study goes, told while it goes: bars of the running runs and of the whole, plain lines where no terminal is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import Task, TaskID

from fednorm.records.result import result_of
from fednorm.report.bars import Line
from fednorm.report.numbers import percent
from fednorm.study.runner import Failure, Progress

TITLES: Mapping[str, str] = {"search": "search for hyper-parameters", "runs": "study"}
"""What a number of runs is for, in words."""


def headline(result: Mapping[str, Any]) -> str:
    """Return the accuracy that a run is told by: over domains, over experiences, or on the training images."""
    return _percent(result_of(result).shown)


def duration(seconds: float) -> str:
    """Return a length of time in words: ``34 s``, ``12 min``, ``3 h 20 min``, ``2 d 5 h``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{percent(share)} %"


@dataclass
class Going:
    """A run that is going.

    Attributes:
        since: When it began, or went on, in seconds.
        first: Its progress then; None until it has told any.
        last: Its latest progress.
        at: When it told that.
    """

    since: float
    first: Progress | None = None
    last: Progress | None = None
    at: float = 0.0

    def tell(self, progress: Progress, now: float) -> None:
        """Take down how far it is; the time before its first word is not its steps'."""
        if self.first is None:
            self.first, self.since = progress, now
        self.last, self.at = progress, now

    @property
    def pace(self) -> float | None:
        """Return the seconds of a round or step; None before the first has been made."""
        if self.first is None or self.last is None or self.last.done <= self.first.done:
            return None
        return (self.at - self.since) / (self.last.done - self.first.done)

    def whole(self) -> float | None:
        """Return about how many seconds the run takes from its beginning to its end."""
        return None if self.pace is None or self.last is None else self.pace * self.last.total

    def left(self, now: float, usual: float | None) -> float | None:
        """Return about how many seconds it still takes.

        Args:
            now: The time.
            usual: What a run of this study takes, for one that has no pace yet; None if that is not known.
        """
        if self.pace is not None and self.last is not None:
            return max(self.pace * (self.last.total - self.last.done) - (now - self.at), 0.0)
        return None if usual is None else max(usual - (now - self.since), 0.0)


def seconds_left(now: float, going: list[Going], taken: list[float], waiting: int, jobs: int) -> float | None:
    """Return about how many seconds a study still takes; None while nothing is known.

    Runs that wait take what the finished and the going ones take in the mean; the work is shared among ``jobs``.

    Args:
        now: The time.
        going: The runs that are going.
        taken: Seconds that each finished run took.
        waiting: Runs that are not begun.
        jobs: Runs at a time.
    """
    known = [*taken, *(whole for run in going if (whole := run.whole()) is not None)]
    usual = mean(known) if known else None
    lefts = [run.left(now, usual) for run in going]
    if usual is None or None in lefts:
        return None if going or waiting else 0.0
    sure = [left for left in lefts if left is not None]
    return max([(sum(sure) + waiting * usual) / max(jobs, 1), *sure, usual if waiting else 0.0])


def _left(task: Task) -> str:
    """Return what is left until the moment in a row's field ``ends``."""
    ends = task.fields["ends"]
    return "" if ends is None else f"{duration(max(ends - time.monotonic(), 0.0))} left"


class StudyProgress:
    """Shows how a study goes; the watcher of :func:`fednorm.study.runner.execute`.

    Args:
        console: Where to show it.
        every: Seconds between two lines on runs that are going, where there is no terminal.
    """

    def __init__(self, console: Console, *, every: float = 60.0) -> None:
        self._console, self._every = console, every
        self._bars = Bars(
            Line(_left, counted=False),
            console=console,
            expand=True,
        )
        self._begin("", {}, 1)

    def _begin(self, title: str, runs: Mapping[str, str], jobs: int) -> None:
        self._title, self._names, self._jobs = TITLES.get(title, title), dict(runs), jobs
        self._going: dict[str, Going] = {}
        self._rows: dict[str, TaskID] = {}
        self._taken: list[float] = []
        self._closed = self._before = 0
        self._announced = False
        self._next_line = time.monotonic() + self._every
        self._whole: TaskID | None = None

    def begin(self, title: str, runs: Mapping[str, str], jobs: int) -> None:
        """Start showing a number of runs."""
        self._begin(title, runs, jobs)
        if self._console.is_terminal:
            self._whole = self._bars.add_task(self._title, total=len(runs), state="", ends=None)
            self._bars.start()

    def started(self, run: str) -> None:
        """Show a row for a run."""
        self._announce()
        self._going[run] = Going(time.monotonic())
        if self._whole is not None:
            self._rows[run] = self._bars.add_task(f"  {self._names[run]}", total=None, state="starting", ends=None)
        self._show()

    def progress(self, run: str, progress: Progress) -> None:
        """Move a run's row; where there is no terminal, say now and then how all stand."""
        now = time.monotonic()
        self._going[run].tell(progress, now)
        if self._whole is not None:
            self._bars.update(self._rows[run], total=progress.total, completed=progress.done, state=_standing(progress))
        elif now >= self._next_line:
            self._next_line = now + self._every
            self._say_all(now)
        self._show()

    def ended(self, run: str, result: Mapping[str, Any], *, before: bool) -> None:
        """Take a run's row away and leave a line in its place; a run of an earlier call is only counted."""
        self._close(run)
        if (seconds := result.get("seconds")) is not None:
            self._taken.append(float(seconds))
        if before:
            self._before += 1
        else:
            took = "" if seconds is None else f" ({duration(float(seconds))})"
            self._say(f"{self._count()} {self._names[run]}: {headline(result)}{took}")
        self._show()

    def failed(self, failure: Failure) -> None:
        """Take a run's row away and say why it failed."""
        self._close(failure.hash)
        what = "diverged" if failure.diverged else "failed"
        self._say(f"{self._count()} {failure.label}: {what}: {failure.reason}")
        self._show()

    def end(self) -> None:
        """Stop showing; the lines stay."""
        if self._names and not self._announced and self._closed == len(self._names) == self._before:
            self._say(f"{self._title}: all {self._before} runs had finished before; their records are read back")
        for row in [*self._rows.values(), *([] if self._whole is None else [self._whole])]:
            self._bars.remove_task(row)
        self._rows, self._whole = {}, None
        if self._console.is_terminal:
            self._bars.stop()

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            had = f", {self._before} of them finished before" if self._before else ""
            self._say(f"{self._title}: {len(self._names)} runs{had}; {self._jobs} at a time")

    def _close(self, run: str) -> None:
        self._closed += 1
        self._going.pop(run, None)
        if (row := self._rows.pop(run, None)) is not None:
            self._bars.remove_task(row)

    def _count(self) -> str:
        return f"[{self._closed}/{len(self._names)}]"

    def _left(self, now: float) -> float | None:
        going = list(self._going.values())
        waiting = len(self._names) - self._closed - len(going)
        return seconds_left(now, going, self._taken, waiting, self._jobs)

    def _show(self) -> None:
        """Bring the row of the whole and the time left of all up to date."""
        if self._whole is None:
            return
        now = time.monotonic()
        parts = [run.last.done / max(run.last.total, 1) for run in self._going.values() if run.last is not None]
        state, left = f"{self._closed}/{len(self._names)} runs", self._left(now)
        ends = None if left is None else now + left
        self._bars.update(self._whole, completed=self._closed + sum(parts), state=state, ends=ends)
        for run, row in self._rows.items():
            own = self._going[run].left(now, None)
            self._bars.update(row, ends=None if own is None else now + own)

    def _say_all(self, now: float) -> None:
        """Say in a line how the runs that are going stand."""
        told = "; ".join(
            f"{self._names[run]} at {_standing(going.last)}"
            for run, going in self._going.items()
            if going.last is not None
        )
        left = self._left(now)
        about = "" if left is None else f"; about {duration(left)} left"
        self._say(f"{self._closed}/{len(self._names)} runs{about}: {told}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _standing(progress: Progress) -> str:
    accuracy = "" if progress.accuracy is None else f", accuracy {_percent(progress.accuracy)}"
    return f"{progress.unit} {progress.done}/{progress.total}{accuracy}"
