"""Results as data frames (polars): a row a run, or tidy, a row a measured number.

import fednorm
runs = fednorm.load("runs/digits")            # this module's frame
runs.group_by("method").agg(polars.col("mean").mean())
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fednorm.report import table
from fednorm.report._common import Result, by_method, flat, name_of
from fednorm.report.adaptation_table import adaptations, has_adaptation
from fednorm.report.grouping import kind_of, scored_on

if TYPE_CHECKING:
    import polars

LEADING = ("run", "kind", "data", "split", "method", "seed")
"""The columns that say of which run a row is: its hash, federated or continual, the data's title, test or validation
images, the method as in the tables, the seed."""

TIDY = (*LEADING, "after", "step", "metric", "domain", "experience", "layer", "statistics", "value")
"""The columns of :func:`records`."""

Row = tuple[str, int | None, str, str | None, int | None, str | None, str | None, float]
"""What :data:`TIDY` has after the leading columns."""


def frame(results: Sequence[Result]) -> polars.DataFrame:
    """Return a row a run.

    Args:
        results: Results of finished runs, of any kinds and data.

    Returns:
        A frame with the columns :data:`LEADING`; every score of ``final`` under its own name, shares in [0, 1], a
        federated run's accuracies as ``accuracy.DOMAIN``; ``seconds`` of wall clock, ``parameters``, ``folder`` of the
        record; and the configuration as dotted columns (``train.learning_rate``), lists joined by commas. What a run
        does not have is null.
    """
    import polars

    labels = methods(results)
    rows = [{**_leading(result, labels), **_scores(result), **_settings(result["config"])} for result in results]
    names = list(dict.fromkeys([*LEADING, *_sorted(name for row in rows for name in row)]))
    return polars.DataFrame([_series(name, [row.get(name) for row in rows]) for name in names])


def records(results: Sequence[Result]) -> polars.DataFrame:
    """Return a row a measured number, tidy; what was not measured has no row.

    Args:
        results: Results of finished runs, of any kinds and data. Summaries have fewer numbers than records.

    Returns:
        A frame with the columns :data:`TIDY`. ``after`` is ``round``, ``experience`` or ``run``, and ``step`` the
        round's or experience's number from 1, null for the run as a whole. ``metric`` is the number's name in the
        record; ``accuracy`` has a ``domain`` or the ``experience`` that it was measured on, from 1; diagnostics have a
        ``layer``, and in a federation drift has a domain too. ``statistics`` tells under which normalization statistics
        a federated model was evaluated at the end. Accuracies are shares in [0, 1].
    """
    import polars

    labels = methods(results)
    columns: dict[str, list[Any]] = {name: [] for name in TIDY}
    for result in results:
        leading = tuple(_leading(result, labels)[name] for name in LEADING)
        for row in numbers(result):
            for name, value in zip(TIDY, (*leading, *row), strict=True):
                columns[name].append(value)
    whole = ("seed", "step", "experience")
    types = {name: polars.Int64 if name in whole else polars.String for name in TIDY[:-1]}
    if any(seed is not None and not -(2**63) <= seed < 2**63 for seed in columns["seed"]):
        types["seed"], columns["seed"] = polars.String, list(map(str, columns["seed"]))
    return polars.DataFrame(columns, schema={**types, "value": polars.Float64})


def numbers(result: Result) -> Iterator[Row]:
    """Yield the measured numbers of a run, each as :data:`TIDY` has it after the leading columns."""
    yield from (_of_stream if kind_of(result) == "continual" else _of_federation)(result)
    yield from of_result(result)


def of_result(result: Result) -> Iterator[Row]:
    """Yield the numbers of a run as a whole."""
    yield from _scalars(("run", None), result["final"], ("round",))
    yield from _of_central(("run", None), result["final"])
    yield from _scalars(("run", None), {key: result.get(key) for key in ("seconds", "parameters", "steps")}, ())


def of_line(line: Mapping[str, Any], what: str) -> Iterator[Row]:
    """Yield the numbers of a line of a record: of a ``round``, or an ``experience`` with its row of accuracies."""
    yield from _of_round(line) if what == "round" else _of_experience(line, line.get("accuracy") or [])


def methods(results: Sequence[Result]) -> dict[str, str]:
    """Return how the tables call each result's method, by the run's hash.

    Methods that share a name are told apart by what differs among the results on the same data and split.
    """
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(scored_on(result), []).append(result)
    return {
        str(result["hash"]): label
        for group in groups.values()
        for label, alike in by_method(group, name_of).items()
        for result in alike
    }


def _leading(result: Result, labels: Mapping[str, str]) -> dict[str, Any]:
    kind, data, split = scored_on(result)
    values = (result["hash"], kind, data, split, labels[result["hash"]], result["config"]["seed"])
    return dict(zip(LEADING, values, strict=True))


def _scores(result: Result) -> dict[str, Any]:
    final = {key: value for key, value in result["final"].items() if not isinstance(value, Mapping)}
    domains = {f"accuracy.{name}": value for name, value in result["final"].get("per_domain", {}).items()}
    domains |= {"central": central["accuracy"]} if (central := result["final"].get("central")) else {}
    told = {"seconds": result["seconds"], "parameters": result.get("parameters"), "folder": result.get("run")}
    return {**final, **domains, **told}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = flat(config).items()
    return {key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else value for key, value in keys}


def _sorted(names: Iterator[str]) -> list[str]:
    """Return the columns' names: scores first, as they come, then the configuration, section by section."""
    found = list(dict.fromkeys(names))
    scores = [name for name in found if "." not in name or name.startswith("accuracy.")]
    return [*scores, *(name for name in found if name not in scores)]


def _series(name: str, values: list[Any]) -> polars.Series:
    """Return a column; where methods have options of one name and different types, it is a column of text."""
    import polars

    types = {type(value) for value in values if value is not None}
    if types == {int, float}:
        values = [None if value is None else float(value) for value in values]
    elif len(types) > 1 or not types <= {bool, int, float, str} or _is_beyond_integers(values):
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return polars.Series(name, values) if types else polars.Series(name, values, dtype=polars.String)


def _is_beyond_integers(values: Sequence[Any]) -> bool:
    """Return whether an integer has no place in 64 bits; a seed may be of any size."""
    return any(type(value) is int and not -(2**63) <= value < 2**63 for value in values)


def _of_federation(result: Result) -> Iterator[Row]:
    for line in result["rounds"]:
        yield from _of_round(line)
    for statistics, scores in table.evaluations(result["evaluation"]).items():
        for domain, share in scores.get("per_domain", {}).items():
            yield "run", None, "accuracy", domain, None, None, statistics, float(share)
    yield from _of_adaptation(result)


def _of_stream(result: Result) -> Iterator[Row]:
    matrix = result["accuracy_matrix"]
    for line in result["experiences"]:
        yield from _of_experience(line, matrix[line["experience"]] if matrix else [])
    yield from _of_adaptation(result)


def _of_adaptation(result: Result) -> Iterator[Row]:
    """Yield the accuracies under test-time adaptation, each by how its network adapts, as by other statistics."""
    if not has_adaptation(result):
        return
    for how, scores in (("no adaptation", result["adaptation"]["without"]), *adaptations(result)):
        for domain, share in scores.get("per_domain", {}).items():
            yield "run", None, "accuracy", domain, None, None, how, float(share)
        for number, share in scores.get("per_experience", {}).items():
            yield "run", None, "accuracy", None, int(number), None, how, float(share)


def _of_round(line: Mapping[str, Any]) -> Iterator[Row]:
    at = ("round", line["round"])
    yield from _scalars(at, line, ("round", "per_domain", "diagnostics"))
    for domain, share in (line.get("per_domain") or {}).items():
        yield *at, "accuracy", domain, None, None, None, float(share)
    yield from _of_central(at, line)
    yield from _of_diagnostics(at, line.get("diagnostics") or {})


def _of_central(at: tuple[str, int | None], scored: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what the shared model scores on the server's own images."""
    yield from _scalars(at, {f"central_{key}": value for key, value in (scored.get("central") or {}).items()}, ())


def _of_experience(line: Mapping[str, Any], accuracies: Sequence[Any]) -> Iterator[Row]:
    at = ("experience", line["experience"] + 1)
    yield from _scalars(at, line, ("experience",))
    for what, shares in (("accuracy", accuracies), ("task_accuracy", line.get("task_accuracy") or [])):
        for number, share in enumerate(shares, start=1):
            if _is_number(share):
                yield *at, what, None, number, None, None, float(share)
    yield from _of_diagnostics(at, line.get("diagnostics") or {})


def _of_diagnostics(at: tuple[str, int | None], diagnostics: Mapping[str, Any]) -> Iterator[Row]:
    """Yield diagnostics: numbers of the whole model, numbers by layer, and numbers by domain and layer."""
    yield from _scalars(at, diagnostics, ())
    for what, inner in diagnostics.items():
        for key, value in inner.items() if isinstance(inner, Mapping) else ():
            by_layer = value if isinstance(value, Mapping) else {key: value}
            domain = key if isinstance(value, Mapping) else None
            for layer, number in by_layer.items():
                if _is_number(number):
                    yield *at, what, domain, None, layer, None, float(number)


def _scalars(at: tuple[str, int | None], values: Mapping[str, Any], but: Sequence[str]) -> Iterator[Row]:
    """Yield the numbers among values under their own names; of a list of clients, how many there are."""
    for key, value in values.items():
        number = len(value) if key in ("sampled", "rejected") and isinstance(value, list) else value
        if key not in but and _is_number(number):
            yield *at, key, None, None, None, None, float(number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
