"""``fednorm report``: tables from records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fednorm.cli import err, out, print_json
from fednorm.errors import RecordError
from fednorm.report import stream_table
from fednorm.report.table import Table, accuracy_table, curve_table, evaluation_table
from fednorm.study.record import read_result
from fednorm.study.select import best_by_method, rules

KEPT = (
    *("kind", "hash", "config", "norm", "strategy", "learner", "scenario", "parameters", "plan", "data", "final"),
    *("evaluation", "untrained_accuracy", "accuracy_matrix", "seconds"),
)
"""What a summary keeps of a result."""

KEPT_OF_ROUNDS = ("round", "train_loss", "mean", "bytes_down", "bytes_up")

KEPT_OF_EXPERIENCES = ("experience", "title", "online_accuracy", "train_accuracy")


def run_report(
    paths: Sequence[Path],
    *,
    markdown: bool,
    select: bool,
    summary: Path | None,
    as_json: bool,
    curve: bool = False,
) -> None:
    """Print the tables of all results found, one set for each data set or stream and choice of what is scored."""
    found = [result for path in paths for result in read_results(path)]
    results = list({result["hash"]: result for result in found}.values())  # a run that was named twice counts once
    results.sort(key=_order)
    if not results:
        raise RecordError(f"There is no finished run (result.json) in {', '.join(map(str, paths))}.")
    if select:
        results = best_by_method(results)
        err().print(" ".join(rules(results)), markup=False, soft_wrap=True)
    if summary:
        _write(summary, results)
    if as_json:
        return print_json({"results": results})
    for table in tables(results, curve=curve):
        show(table, markdown=markdown)
    return None


def tables(results: Sequence[Mapping[str, Any]], *, curve: bool = False) -> Iterator[Table]:
    """Yield the tables of results: one set for each kind of run, data set or stream, and choice of what is scored.

    Args:
        results: Results of finished runs.
        curve: Whether to add how accuracy went by round or by experience.
    """
    for scored in dict.fromkeys(map(_scored, results)):
        group = [result for result in results if _scored(result) == scored]
        yield from _stream_tables(group, curve) if _kind(group[0]) == "continual" else _federated_tables(group, curve)


def _federated_tables(results: Sequence[Mapping[str, Any]], curve: bool) -> Iterator[Table]:
    yield accuracy_table(results)
    if curve:
        yield curve_table(results)
    if any(set(result["evaluation"]) - {"own"} for result in results):
        yield evaluation_table(results)


def _stream_tables(results: Sequence[Mapping[str, Any]], curve: bool) -> Iterator[Table]:
    yield stream_table.stream_table(results)
    if results[0]["data"]["memorization"]:
        yield stream_table.plasticity_table(results)
        return
    if curve:
        yield stream_table.average_table(results)
    if len(results) == 1:
        yield stream_table.matrix_table(results[0])
        if results[0]["final"].get("drift") is not None:
            yield stream_table.drift_table(results)


def _kind(result: Mapping[str, Any]) -> str:
    return str(result["config"].get("kind", "federated"))


def _order(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return where a result stands: federated first; by method, then by its settings, then by seed."""
    config = result["config"]
    continual = _kind(result) == "continual"
    sections = ("learner" if continual else "strategy", "norm")
    methods = (json.dumps(config[section], sort_keys=True) for section in sections)
    train = config["train"]
    return continual, *methods, train["learning_rate"], train["agc"], config["seed"], _scored(result)


def _scored(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return on what a result was scored; accuracies on different images never stand in one table."""
    return _kind(result), result["data"]["title"], result["config"]["evaluate"]["split"]


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of a record, of every record below a folder, or of a file of summaries.

    Raises:
        RecordError: The path does not exist, or a file in it is damaged.
    """
    if not path.exists():
        raise RecordError(f"There is no {path}. Give a record's folder, a folder of records, or a summary file.")
    files = [path] if path.is_file() else sorted(path.rglob("result.json"))
    for file in files:
        document = read_result(file)
        yield from document.get("results", [document])


def summarized(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without what is large; its tables are the same.

    Of a federated one rounds keep their means, clients are counted. Of a continual one experiences keep their scores
    (their accuracies are the rows of the matrix), the first and the last their diagnostics too. The matrix of a
    memorization stream, empty but for its diagonal, is left out.
    """
    small = {key: result[key] for key in KEPT if key in result}
    small["config"] = {**result["config"], "data": {**result["config"]["data"], "dir": ""}}
    if _kind(result) == "federated":
        small["rounds"] = [_only(line, KEPT_OF_ROUNDS) for line in result["rounds"]]
        return small
    small["data"] = _only(result["data"], ("title", "notes", "memorization", "digest"))
    if result["data"]["memorization"]:
        small["accuracy_matrix"] = []
    last = len(result["experiences"]) - 1
    small["experiences"] = [
        _only(line, (*KEPT_OF_EXPERIENCES, *(["diagnostics"] if number in (0, last) else [])))
        for number, line in enumerate(result["experiences"])
    ]
    return small


def _only(line: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key in keys}


def _write(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"results": [summarized(result) for result in results]}) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecordError(f"Cannot write {path}: {error.strerror}.") from error
    err().print(f"summaries: {path}")


def show(table: Table, *, markdown: bool) -> None:
    """Print a table for a person, or in Markdown."""
    if markdown:
        out().print(table.markdown(), markup=False, emoji=False, soft_wrap=True)
    else:
        out().print(table.rich())
