"""How a run goes, told while it goes: a bar on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fednorm.federated.workbench import Workbench


class RoundProgress:
    """Shows the rounds of one run after another; use it as a context manager.

    Args:
        console: Where to show them.
        label: Leads every line, e.g. the strategy's name; the run's own if empty.
    """

    def __init__(self, console: Console, label: str = "") -> None:
        self._console = console
        self._label = label
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
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

    def begin(self, bench: Workbench, first_round: int) -> None:
        """Start a run's bar at its first round."""
        config = bench.config
        self._total = config.rounds.num_rounds
        self._name = self._label or f"{config.strategy.name} + {config.norm.name}"
        if first_round > 1:
            self._console.print(f"{self._name}: going on from round {first_round - 1}")
        if self._console.is_terminal:
            self._task = self._bar.add_task(self._name, total=self._total, completed=first_round - 1, state="")

    def round(self, line: Mapping[str, Any]) -> None:
        """Show one finished round."""
        state = "loss not finite" if line["train_loss"] is None else f"loss {line['train_loss']:.3f}"
        if "mean" in line:
            state += f", mean accuracy {100 * line['mean']:.1f} %, worst {100 * line['worst']:.1f} %"
        if line["rejected"]:
            state += f", {len(line['rejected'])} updates rejected"
        if self._task is not None:
            self._bar.update(self._task, completed=line["round"], state=state)
        else:
            self._console.print(f"{self._name}: round {line['round']}/{self._total}: {state} ({line['seconds']:.1f} s)")
