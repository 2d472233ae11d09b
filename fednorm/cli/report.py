"""``fednorm report``: tables from records, and what they are exported to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fednorm.cli.answer import Depth, answers, say
from fednorm.cli.console import err, fail, out, print_json
from fednorm.errors import ConfigError
from fednorm.records.results import Loaded, load
from fednorm.report._common import Result
from fednorm.report.comparison import Comparison, comparisons
from fednorm.report.export import export as write_export
from fednorm.report.export import require_suffix, write_summary
from fednorm.report.table import Table
from fednorm.report.text import printable
from fednorm.study.select import best_by_method, rules
from fednorm.study.statistics import METHODS as INTERVALS

STYLES = ("table", "markdown", "latex")
"""How tables can be printed."""

FIGURE_FORMATS = ("pdf", "svg", "png")


def run_report(  # noqa: PLR0913 - one parameter an option
    paths: Sequence[Path],
    *,
    style: str = "table",
    select: bool = False,
    curve: bool = False,
    summary: Path | None = None,
    page: Path | None = None,
    export: Sequence[Path] = (),
    tensorboard: Path | None = None,
    figures: Path | None = None,
    figure_format: str = "pdf",
    baseline: str | None = None,
    interval: str = "t",
    depth: Depth | None = None,
    as_json: bool = False,
) -> None:
    """Print the tables of all results found, and write what else is asked for; where to is told on standard error.

    Args:
        paths: Records, folders of records, summaries.
        style: How tables are printed: ``table``, ``markdown`` or ``latex``.
        select: Whether to show the best configuration of each method only, chosen on validation images.
        curve: Whether to add how accuracy went by round or by experience.
        summary: A file for the results' small summaries.
        page: A file for the page.
        export: Files for the raw numbers, ``.csv`` or ``.parquet``.
        tensorboard: A folder for TensorBoard, with one of event files a run.
        figures: A folder for figures.
        figure_format: ``pdf``, ``svg`` or ``png``.
        baseline: The method that others are compared with; the study's own if None.
        interval: How intervals over seeds are made: ``t`` or ``bootstrap``.
        depth: How much a terminal shows; Markdown and LaTeX have all of it.
        as_json: Whether to print one JSON document instead of tables.

    Raises:
        FedNormError: An option has a value that it cannot have, there is no finished run, or a file cannot be written.
        SystemExit: With code 1 where something that was found had to be left out, after all else was done.
    """
    _check(style, interval, export, figure_format)
    loaded = load(paths, select=select)
    if select:
        loaded = _selected(loaded)
    compared = comparisons(loaded.results, studies=loaded.studies, baseline=baseline, interval=interval)
    if as_json:
        print_json(_document(loaded, compared))
    else:
        _print(loaded.results, compared, curve, style, depth)
    if summary:
        write_summary(summary, loaded.results, loaded.studies)
        _wrote("summaries", summary)
    for file in export:
        write_export(file, loaded.results)
        _wrote("records", file)
    if tensorboard:
        from fednorm.report.tensorboard import write_events

        _wrote("TensorBoard", tensorboard, f"{write_events(tensorboard, loaded.results)} runs")
    if figures:
        from fednorm.report.figures import write_figures

        for file, shows in write_figures(figures, compared, figure_format=figure_format):
            _wrote("figure", file, shows)
    if page:
        from fednorm.report.page import write_page

        write_page(page, loaded, baseline=baseline, interval=interval)
        _wrote("page", page)
    _end(loaded.problems)


def tables(
    results: Sequence[Result],
    *,
    curve: bool = False,
    compared: Sequence[Comparison] | None = None,
    **options: Any,
) -> Iterator[Table]:
    """Yield the tables of results: one set for each kind of run, data set or stream, and choice of what is scored.

    Where there are several methods or seeds, their comparison comes first, and after it the papers' numbers.

    Args:
        results: Results of finished runs.
        curve: Whether to add how accuracy went by round or by experience.
        compared: The results' comparisons, where they were made already.
        options: ``studies``, ``baseline`` and ``interval`` of :func:`fednorm.report.comparison.comparisons`.
    """
    for answer in answers(results, curve=curve, compared=compared, **options):
        yield from answer.tables


def _print(
    results: Sequence[Result], compared: Sequence[Comparison], curve: bool, style: str, depth: Depth | None
) -> None:
    if style == "table":
        return say(list(answers(results, curve=curve, compared=compared)), depth or Depth())
    for table in tables(results, curve=curve, compared=compared):
        show(table, style=style)
    return None


def show(table: Table, *, style: str = "table") -> None:
    """Print a table for a person, in Markdown or in LaTeX."""
    if style == "table":
        out().print(table.rich())
    else:
        text = table.markdown() if style == "markdown" else table.latex()
        out().print(text, markup=False, emoji=False, soft_wrap=True)


def _check(style: str, interval: str, export: Sequence[Path], figure_format: str) -> None:
    """Refuse, before any work is done, what an option cannot be."""
    for option, value, known in (
        ("style", style, STYLES),
        ("interval", interval, INTERVALS),
        ("figure format", figure_format, FIGURE_FORMATS),
    ):
        if value not in known:
            raise ConfigError(f"The {option} is one of {', '.join(known)}; got {value!r}.")
    for file in export:
        require_suffix(file)


def _selected(loaded: Loaded) -> Loaded:
    """Return the best configuration of each method, of studies with a search among those searched; say the rule."""
    searched = {run for study in loaded.studies for run in study["selection_runs"]}
    among = [result for result in loaded.results if result["hash"] in searched] or loaded.results
    best = best_by_method(among)
    err().print(" ".join(rules(best)), markup=False, soft_wrap=True)
    return replace(loaded, results=best)


def _document(loaded: Loaded, compared: Sequence[Comparison]) -> dict[str, Any]:
    """Return what ``--json`` prints: all that was read, and how methods compare, runs named by their hashes."""
    told = []
    for comparison in compared:
        plain = asdict(replace(comparison, scores=(), methods=()))
        methods = [
            {**asdict(replace(method, results=())), "results": [r["hash"] for r in method.results]}
            for method in comparison.methods
        ]
        told.append({**plain, "scores": [asdict(score) for score in comparison.scores], "methods": methods})
    return {"results": loaded.results, "studies": loaded.studies, "problems": loaded.problems, "comparisons": told}


def _wrote(what: str, where: Path, shows: str = "") -> None:
    err().print(f"{what}: {where}{f' ({shows})' if shows else ''}", markup=False, soft_wrap=True)


def _end(problems: Sequence[str]) -> None:
    """Name what was left out, and leave with exit code 1 where something was."""
    for problem in problems[:-1]:
        err().print(printable(problem), markup=False, soft_wrap=True)
    if problems:
        fail(problems[-1], code=1)
