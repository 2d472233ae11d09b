"""What a terminal shows of results: the answer in a sentence, one table of what was asked, and how to see the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from fednorm.cli.console import out
from fednorm.report import grid_table, stream_table
from fednorm.report._common import Result
from fednorm.report.adaptation_table import adaptation_table, has_adaptation
from fednorm.report.comparison import Comparison, comparison_table, comparisons, kind_of, paper_table, scored_on
from fednorm.report.table import Table, accuracy_table, curve_table, evaluation_table
from fednorm.report.verdict import verdict


@dataclass(frozen=True)
class Depth:
    """How much a terminal shows.

    Attributes:
        details: All tables, each whole, where not the one that answers.
        notes: All that must be known of the numbers, where not a line.
    """

    details: bool = False
    notes: bool = False


@dataclass(frozen=True)
class Answer:
    """What there is to show of results that may stand side by side.

    Attributes:
        verdict: The answer in a sentence.
        tables: All tables, in the order of a document.
        asked: Those that answer what was asked: one, and whatever was asked for besides.
    """

    verdict: str
    tables: tuple[Table, ...]
    asked: tuple[Table, ...]


def answers(
    results: Sequence[Result], *, curve: bool = False, compared: Sequence[Comparison] | None = None, **options: Any
) -> Iterator[Answer]:
    """Yield an answer for each kind of run, data set or stream, and choice of what is scored.

    Args:
        results: Results of finished runs.
        curve: Whether it was asked how accuracy went by round or by experience.
        compared: The results' comparisons, where they were made already.
        options: ``studies``, ``baseline`` and ``interval`` of :func:`fednorm.report.comparison.comparisons`.
    """
    compared = comparisons(results, **options) if compared is None else compared
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault(scored_on(result), []).append(result)
    for group, comparison in zip(groups.values(), compared, strict=True):
        own, asked = TABLES[kind_of(group[0])](group, curve)
        papers = [table] if (table := paper_table(comparison)) is not None else []
        several = [comparison_table(comparison)] if len(group) > 1 else []
        tables = (*several, *papers, *own)
        yield Answer(verdict(comparison), tables, (*(several or asked[:1]), *asked[1:]))


def _federated(group: Sequence[Result], curve: bool) -> tuple[list[Table], list[Table]]:
    """Return all tables, and those that were asked for: the accuracies, a curve, an evaluation matrix of one run."""
    scores = accuracy_table(group)
    curves = [curve_table(group)] if curve else []
    matrix = [evaluation_table(group)] if any(set(result["evaluation"]) - {"own"} for result in group) else []
    adapted = _adaptation(group)
    # Of one run the matrix was asked for (evaluate.kinds); of many it has a row for each kind and run.
    return [scores, *curves, *matrix, *adapted], [scores, *curves, *(matrix if len(group) == 1 else []), *adapted]


def _stream(group: Sequence[Result], curve: bool) -> tuple[list[Table], list[Table]]:
    """Return all tables, and those that were asked for: the scores, or plasticity; a curve."""
    scores = stream_table.stream_table(group)
    if group[0]["data"]["memorization"]:
        plasticity = stream_table.plasticity_table(group)
        return [scores, plasticity], [plasticity]
    curves = [stream_table.average_table(group)] if curve else []
    rest = [stream_table.matrix_table(group[0])] if len(group) == 1 else []
    if len(group) == 1 and group[0]["final"].get("drift") is not None:
        rest.append(stream_table.drift_table(group))
    adapted = _adaptation(group)
    return [scores, *curves, *rest, *adapted], [scores, *curves, *adapted]


def _adaptation(group: Sequence[Result]) -> list[Table]:
    """Return the table of test-time adaptation, where any result was scored under it."""
    return [adaptation_table(group)] if any(map(has_adaptation, group)) else []


def _grid(group: Sequence[Result], curve: bool) -> tuple[list[Table], list[Table]]:
    """Return all tables, and those that were asked for: the scores; how accuracy went, experience by experience."""
    scores = grid_table.grid_table(group)
    rest = [grid_table.tensor_table(result) for result in group[:1]]
    drawn = grid_table.between_table(group)
    rest = [drawn, *rest] if drawn else rest
    return [scores, *rest], [scores, *(rest if curve else [])]


TABLES: Mapping[str, Callable[[Sequence[Result], bool], tuple[list[Table], list[Table]]]] = {
    "federated": _federated,
    "continual": _stream,
    "federated_continual": _grid,
}
"""What makes the tables of results of a kind."""


def say(all_answers: Sequence[Answer], depth: Depth, more: Sequence[Table] = ()) -> None:
    """Print answers, a verdict before its tables, and in a last line how to see what was left out.

    Args:
        all_answers: The answers.
        depth: How much of them.
        more: Further tables, for who asks for details.
    """
    console = out()
    whole = depth.details or not console.is_terminal  # what no terminal cuts, no column is left out of
    for number, answer in enumerate(all_answers):
        if number:
            console.print()
        console.print(f"[bold]{escape(answer.verdict)}[/]")
        for table in answer.tables if depth.details else answer.asked:
            console.print()
            console.print(table.rich(whole=whole, notes=depth.notes))
    for table in more if depth.details else ():
        console.print()
        console.print(table.rich(whole=True, notes=depth.notes))
    if all_answers and (line := _rest(all_answers, depth, len(more))):
        console.print()
        console.print(line, style="dim")


def _rest(all_answers: Sequence[Answer], depth: Depth, more: int) -> str:
    count = more + sum(len(answer.tables) - len(answer.asked) for answer in all_answers)
    ways = []
    if count and not depth.details:
        ways.append(f"--details: {count} more table{'s'[: count != 1]}")
    if not depth.notes:
        ways.append("--notes: what the numbers are")
    return "; ".join(ways)


def say_one(result: Mapping[str, Any], depth: Depth) -> None:
    """Print the answer of one run."""
    say(list(answers([result])), depth)
