"""``fednorm report``: tables from records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fednorm.cli import err, out, print_json
from fednorm.errors import RecordError
from fednorm.report.table import Table, accuracy_table, curve_table, evaluation_table
from fednorm.study.record import read_result
from fednorm.study.select import best_by_method

KEPT = ("kind", "hash", "config", "norm", "strategy", "parameters", "plan", "data", "final", "evaluation", "seconds")


def run_report(
    paths: Sequence[Path],
    *,
    markdown: bool,
    select: bool,
    summary: Path | None,
    as_json: bool,
    curve: bool = False,
) -> None:
    """Print the tables of all results found, one set for each data set and choice of the images that are scored."""
    found = [result for path in paths for result in read_results(path)]
    results = list({result["hash"]: result for result in found}.values())  # a run that was named twice counts once
    results.sort(key=_order)
    if not results:
        raise RecordError(f"There is no finished run (result.json) in {', '.join(map(str, paths))}.")
    if select:
        results = best_by_method(results)
    if summary:
        _write(summary, results)
    if as_json:
        return print_json({"results": results})
    for scored in dict.fromkeys(map(_scored, results)):
        group = [result for result in results if _scored(result) == scored]
        show(accuracy_table(group), markdown=markdown)
        if curve:
            show(curve_table(group), markdown=markdown)
        if any(set(result["evaluation"]) - {"own"} for result in group):
            show(evaluation_table(group), markdown=markdown)
    return None


def _order(result: Mapping[str, Any]) -> tuple[str, str, float, float, int]:
    """Return where a result stands in a table: by method, then by its settings, then by seed."""
    config = result["config"]
    methods = [json.dumps(config[section], sort_keys=True) for section in ("strategy", "norm")]
    return methods[0], methods[1], config["train"]["learning_rate"], config["train"]["agc"], config["seed"]


def _scored(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return on what a result was scored; accuracies on different images never stand in one table."""
    return result["data"]["title"], result["config"]["evaluate"]["split"]


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
    """Return a result without what is large: rounds keep their means, clients are counted."""
    small = {key: result[key] for key in KEPT if key in result}
    small["rounds"] = [
        {key: value for key, value in line.items() if key in ("round", "train_loss", "mean", "bytes_down", "bytes_up")}
        for line in result["rounds"]
    ]
    small["config"] = {**result["config"], "data": {**result["config"]["data"], "dir": ""}}
    return small


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
        out().print(table.markdown(), markup=False, soft_wrap=True)
    else:
        out().print(table.rich())
