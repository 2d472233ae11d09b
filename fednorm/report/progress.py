"""How a run goes, told while it goes: a bar on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import Progress, Task, TaskID

from fednorm.report._common import known
from fednorm.report.bars import Line, clock
from fednorm.report.numbers import percent

if TYPE_CHECKING:
    from fednorm.federation.workbench import Workbench
    from fednorm.streams.workbench import ContinualWorkbench


def _left(task: Task) -> str:
    """Return a run's time left; empty before its first step, which says how long one takes."""
    seconds = task.time_remaining
    return "" if seconds is None or task.finished else f"{clock(seconds)} left"


class _Bars:
    """Bars of one run after another on a terminal; a context manager.

    Args:
        console: Where to show them.
        label: Leads every line, e.g. the method's name; the run's own if empty.
    """

    def __init__(self, console: Console, label: str = "") -> None:
        self._console = console
        self._label = label
        self._bar = Progress(
            Line(_left, counted=True),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._name = label

    def __enter__(self) -> Self:
        """Start showing."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing; what was shown stays."""
        if self._console.is_terminal:
            self._bar.stop()

    def _begin(self, name: str, total: int, done: int, going_on: str) -> None:
        self._name, self._total = self._label or name, total
        if done:
            self._say(going_on)
        if self._console.is_terminal:
            self._task = self._bar.add_task(self._name, total=total, completed=done, state="")

    def _say(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}", markup=False, soft_wrap=True)


class RoundProgress(_Bars):
    """Shows the rounds of one run after another; use it as a context manager.

    Args:
        console: Where to show them.
        label: Leads every line, e.g. the strategy's name; the run's own if empty.
    """

    def begin(self, bench: Workbench, first_round: int) -> None:
        """Start a run's bar at its first round."""
        config = bench.config
        done = first_round - 1
        name = f"{config.strategy.name} + {config.norm.name}"
        self._begin(name, bench.num_rounds, done, f"going on from round {done}")

    def round(self, line: Mapping[str, Any]) -> None:
        """Show one finished round."""
        state = "loss not finite" if line["train_loss"] is None else f"loss {line['train_loss']:.3f}"
        if "experience" in line:
            state += f", experience {line['experience'] + 1} ended"
        if "mean" in line:
            state += f", mean accuracy {percent(line['mean'])} %, worst {percent(line['worst'])} %"
        if missing := line.get("missing"):
            domains = f", nobody of {', '.join(missing['domains'])}" if missing["domains"] else ""
            state += f", {len(missing['clients'])} clients missing from the evaluation{domains}"
        if line["rejected"]:
            state += f", {len(line['rejected'])} updates rejected"
        if self._task is not None:
            self._bar.update(self._task, completed=line["round"], state=state)
        else:
            self._say(f"round {line['round']}/{self._total}: {state} ({line['seconds']:.1f} s)")


class StreamProgress(_Bars):
    """Shows the steps and the experiences of one continual run after another; use it as a context manager.

    On a terminal the bar counts steps, and each finished experience leaves a line above it; elsewhere there are those
    lines only.

    Args:
        console: Where to show them.
        label: Leads every line, e.g. the learner's name; the run's own if empty.
    """

    EVERY = 0.2
    """Seconds between two moves of the bar."""

    def __init__(self, console: Console, label: str = "") -> None:
        super().__init__(console, label)
        self._next = 0.0
        self._memorization = False

    def begin(self, bench: ContinualWorkbench, first_step: int, total_steps: int) -> None:
        """Start a run's bar.

        Args:
            bench: The run's workbench.
            first_step: The steps that were done before, 0 for a run that is new.
            total_steps: All steps of the stream.
        """
        config = bench.config
        self._next, self._memorization = 0.0, bench.stream.memorization
        going_on = f"going on from step {first_step} of {total_steps}"
        self._begin(f"{config.learner.name} + {config.norm.name}", total_steps, first_step, going_on)

    def step(self, steps_done: int) -> None:
        """Move the bar, a few times a second at most; call it after every step.

        Args:
            steps_done: All steps of the run so far.
        """
        if self._task is None:
            return
        now = time.monotonic()
        if now >= self._next or steps_done >= self._total:
            self._next = now + self.EVERY
            self._bar.update(self._task, completed=steps_done)

    def experience(self, line: Mapping[str, Any]) -> None:
        """Show one finished experience.

        Args:
            line: The experience's entry in the result.
        """
        number, count = line["experience"] + 1, len(line["accuracy"])
        shown = [self._standing(line)]
        if line["online_accuracy"] is not None:
            shown.append(f"online {percent(line['online_accuracy'])} %")
        if line["train_loss"] is None:
            shown.append("loss not finite")
        if self._task is not None:
            self._bar.update(self._task, state=f"experience {number}/{count}")
        self._say(f"experience {number}/{count}: {', '.join(shown)}, {line['seconds']:.0f} s")

    def _standing(self, line: Mapping[str, Any]) -> str:
        """Return how the run stands after an experience, by what was measured of it."""
        if self._memorization:
            return f"training accuracy {percent(line['train_accuracy'])} %"
        number, scores = line["experience"], line["accuracy"]
        seen = known(scores[: number + 1])
        if len(seen) == number + 1:
            return f"average accuracy {percent(fmean(seen))} %"
        return f"accuracy on it {percent(scores[number])} %"
