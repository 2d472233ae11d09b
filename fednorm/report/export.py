"""Results written for later: every measured number as one tidy file, CSV or Parquet; small summaries as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from fednorm.errors import ConfigError
from fednorm.records.results import FORMAT
from fednorm.report._common import Result
from fednorm.report.files import write_whole
from fednorm.report.grouping import kind_of
from fednorm.report.text import in_csv

SUFFIXES = (".csv", ".parquet")
"""What an export's name ends in."""

KEPT = (
    *("kind", "hash", "config", "norm", "strategy", "learner", "scenario", "parameters", "plan", "data", "final"),
    *("own_norm", "evaluation", "adaptation", "untrained_accuracy", "accuracy_matrix", "seconds"),
    *("grid", "accuracy_tensor", "own_accuracy_tensor", "inferred_tensor"),
)
"""What a summary keeps of a result."""

KEPT_OF_ROUNDS = (
    *("round", "train_loss", "mean", "bytes_down", "bytes_up"),
    *("experience", "average_accuracy", "spatial_forgetting"),
)

KEPT_OF_EXPERIENCES = ("experience", "title", "online_accuracy", "train_accuracy")


def require_suffix(path: Path) -> None:
    """Check, before any work is done, that a file's name says what to write.

    Raises:
        ConfigError: It ends in something else.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"An export's name ends in {' or '.join(SUFFIXES)}; got {path}.")


def export(path: Path, results: Sequence[Result]) -> None:
    """Write the raw records, a row a measured number (:func:`fednorm.report.frame.records`).

    In a CSV a text that a spreadsheet would take for a formula has an apostrophe before it.

    Args:
        path: The file; ``.csv`` or ``.parquet`` says which.
        results: Results of finished runs.

    Raises:
        ConfigError: The name ends in something else.
        RecordError: The file cannot be written.
    """
    import polars

    from fednorm.report.frame import records

    require_suffix(path)
    rows, buffer = records(results), BytesIO()
    if path.suffix.lower() == ".csv":
        texts = [name for name, type_ in rows.schema.items() if type_ == polars.String]
        rows.with_columns(polars.col(texts).map_elements(in_csv, return_dtype=polars.String)).write_csv(buffer)
    else:
        rows.write_parquet(buffer)
    write_whole(path, buffer.getvalue())


def write_summary(path: Path, results: Sequence[Result], studies: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write results as small as their tables allow (:func:`summarized`), and the studies that they are of.

    Args:
        path: The file.
        results: Results of finished runs.
        studies: Manifests of studies.

    Raises:
        RecordError: The file cannot be written.
    """
    document = {"format": FORMAT, "results": [summarized(result) for result in results], "studies": list(studies)}
    write_whole(path, json.dumps(document, allow_nan=False) + "\n")


def summarized(result: Result) -> dict[str, Any]:
    """Return a result without what is large; its tables are the same.

    Of a federated one rounds keep their means, clients are counted, and the plan keeps its sums. Of a continual one
    experiences keep their scores (their accuracies are the rows of the matrix). Of either the first and the last
    diagnostics stay. The matrix of a memorization stream, empty but for its diagonal, is left out.
    """
    small = {key: result[key] for key in KEPT if key in result}
    small["config"] = {**result["config"], "data": {**result["config"]["data"], "dir": ""}}
    if kind_of(result) != "continual":
        small["rounds"] = _lines(result["rounds"], KEPT_OF_ROUNDS)
        if "plan" in small:
            small["plan"] = {key: value for key, value in result["plan"].items() if key != "tensors"}
        return small
    small["data"] = _only(result["data"], ("title", "notes", "memorization", "digest"))
    if result["data"]["memorization"]:
        small["accuracy_matrix"] = []
    small["experiences"] = _lines(result["experiences"], KEPT_OF_EXPERIENCES)
    return small


def _lines(lines: Sequence[Mapping[str, Any]], kept: Sequence[str]) -> list[dict[str, Any]]:
    """Return lines of rounds or experiences with the keys to keep, the first and the last with diagnostics too."""
    diagnosed = [number for number, line in enumerate(lines) if "diagnostics" in line]
    ends = {*diagnosed[:1], *diagnosed[-1:]}
    return [_only(line, (*kept, *(["diagnostics"] if number in ends else []))) for number, line in enumerate(lines)]


def _only(line: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key in keys}
