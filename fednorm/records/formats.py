"""What records, summaries and manifests of studies must hold to be read, and older ones brought to today's form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from fednorm.cards import SCENARIOS
from fednorm.config import Kind, RunConfig, merge
from fednorm.errors import FedNormError

FORMAT = 2
"""Of records, summaries and manifests of studies.

A file of a record is read if it is of this very format (:mod:`fednorm.records.integrity`); summaries are kept for
longer, and those of any format up to this one are read, or of none, as the first had it.
"""

Number = (int, float)
Type = type | tuple[type, ...]

_BOTH: Mapping[str, Type] = {
    "hash": str,
    "seconds": Number,
    "data.title": str,
    "data.notes": list,
    "final.selection": str,
}
_FEDERATED: Mapping[str, Type] = {
    **_BOTH,
    "rounds": list,
    "evaluation": dict,
    "final.per_domain": dict,
    "final.mean": Number,
    "final.worst": Number,
    "final.round": int,
}
NEEDED: Mapping[str, Mapping[str, Type]] = {
    "federated": _FEDERATED,
    "federated_continual": {
        **_FEDERATED,
        "learner.name": str,
        "accuracy_tensor": list,
        "final.average_accuracy": (*Number, type(None)),  # where no client answered after the last experience
    },
    "continual": {
        **_BOTH,
        "learner.name": str,
        "experiences": list,
        "accuracy_matrix": list,
        "data.memorization": bool,
    },
}
"""Keys without which no table can be made of a result, and their types, by kind."""

_OF_ADAPTATION: Mapping[str, Type] = {"of": str, "without": dict, "methods": list}
_OF_METHOD: Mapping[str, Type] = {"batch_size": int, "order": str, "reset": str}

_OF_A_ROUND: tuple[str, Mapping[str, Type]] = "rounds", {"round": int, "bytes_down": Number, "bytes_up": Number}
_OF_A_LINE: Mapping[str, tuple[str, Mapping[str, Type]]] = {
    "federated": _OF_A_ROUND,
    "federated_continual": _OF_A_ROUND,
    "continual": ("experiences", {"experience": int, "title": str}),
}
"""Of each kind the list that grows while a run goes, and what each of its lines needs."""

_OF_A_STUDY: Mapping[str, Type] = {"study": str, "title": str, "runs": list, "selection_runs": list, "paper": list}
_OF_A_PAPER: Mapping[str, Type] = {"match": dict, "score": str, "value": Number, "source": str}
_OF_A_SELECTION: Mapping[str, Type] = {"rule": str, "split": str, "configurations": int, "chosen": list}


_WORDS = frozenset({"title", "selection", "sampled", "rejected", "clients", "missing", "events"})
"""Keys of what was measured that hold no numbers."""

_CONTAINERS: Mapping[str, Type] = {
    "per_domain": dict,
    "validation": dict,
    "best_round": dict,
    "central": dict,
    "diagnostics": dict,
    "between": dict,
    "accuracy": list,
    "own_accuracy": list,
    "inferred": list,
    "task_accuracy": list,
    "anytime": list,
    "statistics_drift": list,
    "unheard": list,
}
"""Keys of what was measured that hold many numbers."""


class Unfit(Exception):
    """Why a document cannot be read; becomes a sentence that names its file."""


def finite(value: Any) -> Any:
    """Return a document with None for every number that is infinite or none: it is valid JSON whatever was measured."""
    kind = type(value)
    if kind is str or kind is int:
        return value
    if kind is float or isinstance(value, float):
        return value if math.isfinite(value) else None
    if kind is dict or isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def require_format(document: Mapping[str, Any]) -> None:
    """Refuse what a newer fednorm wrote, and what none did.

    Raises:
        Unfit: It is of a newer format, or of one that does not exist.
    """
    found = document.get("format", FORMAT)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise Unfit(f"it is of format {shortened(found)}, which no fednorm has written. It is damaged.")
    if found > FORMAT:
        raise Unfit(f"it is of format {found}, and this fednorm reads up to {FORMAT}. Install a newer fednorm.")


def manifest(document: Any) -> dict[str, Any]:
    """Return a study's manifest (:mod:`fednorm.study.manifest`), checked; what is missing is empty.

    Raises:
        Unfit: It is of a newer format, or no manifest.
    """
    if not isinstance(document, dict):
        raise Unfit(f"a study's manifest is a table of keys, not {shortened(document)}.")
    require_format(document)
    empty: dict[str, Any] = {"title": "", "about": "", "baseline": None, "paper": [], "selection": None}
    found = {**empty, "selection_runs": [], "reduced": None, "departs": {}, **document}
    _require(found, _OF_A_STUDY, "the study's manifest")
    for key in ("baseline", "selection"):
        if found[key] is not None and not isinstance(found[key], dict):
            raise Unfit(f"the study's manifest should have a table or null as '{key}'; it has {shortened(found[key])}.")
    if not isinstance(found["departs"], dict) or not all(isinstance(keys, dict) for keys in found["departs"].values()):
        raise Unfit("'departs' of a study's manifest has a table of keys for each run.")
    if not all(isinstance(run, str) for run in (*found["runs"], *found["selection_runs"])):
        raise Unfit("the runs and selection_runs of a study's manifest are hashes, text each.")
    for number in found["paper"]:
        _require(number, _OF_A_PAPER, "a paper's number in the study's manifest")
    if found["selection"] is not None:
        _require(found["selection"], _OF_A_SELECTION, "the selection in the study's manifest")
    return found


def migrated(document: Any) -> dict[str, Any]:
    """Return a result in today's form, checked.

    Older versions did not write every key. What follows from others is filled in: settings that did not exist have
    their defaults, means come from their parts.

    Args:
        document: The result as it was written.

    Raises:
        Unfit: It is of a newer format, or no table can be made of it.
    """
    if not isinstance(document, dict) or not isinstance(document.get("config"), dict):
        raise Unfit("it is not a result of a run, which has its configuration under 'config'.")
    require_format(document)
    if not _is_writable(document):
        _require_writable(document)
    kind = document.get("kind") or document["config"].get("kind") or "federated"
    if kind not in NEEDED:
        raise Unfit(f"its kind is {kind!r}, and this fednorm reads {' and '.join(NEEDED)} runs.")
    defaults = RunConfig.default_values(cast(Kind, kind))
    _require_like(document["config"], defaults, "config")
    config = {**merge(defaults, document["config"]), "kind": kind}
    result = {"kind": kind, **document, "config": config}
    for key in ("data", "final"):
        if not isinstance(result.get(key), dict):
            raise Unfit(f"it has no '{key}', which holds {'what was scored' if key == 'data' else 'the scores'}.")
    result["data"] = {"title": config["data"]["name"], "notes": [], **result["data"]}
    _require_data(result["data"])
    _require_numbers(result["final"], "its 'final'")
    _require_lines(result, kind)
    fill = _filled_stream if kind == "continual" else _filled_federation
    result = fill(result)
    _require(result, NEEDED[kind], "it")
    if not re.fullmatch(r"[\w-]{1,64}", result["hash"]):
        raise Unfit(f"its hash is letters and digits; it is {shortened(result['hash'])}.")
    return result


DEEPEST = 12
"""Tables within tables that a result has at most; today's have seven."""


def _is_writable(document: Mapping[str, Any]) -> bool:
    """Return whether :func:`_require_writable` would surely not raise: the same rules, without names of places."""
    level: list[Any] = [document]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif not _is_plain(value):
                return False
        if not inner:
            return True
        level = inner
    return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) is not int or abs(value) < 2**63


def _require_writable(value: Any, place: str = "it", depth: int = 0) -> None:
    """Raise unless tables, exports and pages can hold a value: one result must not keep all others from being shown.

    Args:
        value: The value.
        place: What it is called in the error.
        depth: Tables and lists around it.
    """
    if depth > DEEPEST:
        raise Unfit(f"{place} has more than {DEEPEST} tables within each other.")
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            _require_writable(key, f"a key of {place}", depth + 1)
            _require_writable(inner, f"{place}.{shortened(key)}" if depth else str(key)[:60], depth + 1)
    elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise Unfit(f"{place} holds half a character (a lone surrogate), which no file can hold: {ascii(value)[:60]}.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Unfit(f"{place} is {value}; a number that was not measured is null.")
    elif type(value) is int and abs(value) >= 2**63 and place != "config.'seed'":
        raise Unfit(f"{place} is an integer of {len(str(value))} digits; whole numbers have 64 bits.")


def _filled_federation(result: dict[str, Any]) -> dict[str, Any]:
    final, last = result["final"], result["rounds"][-1]
    scores = final.get("per_domain")
    _require_scores(scores)
    result["final"] = {
        "mean": sum(scores.values()) / len(scores),
        "worst": min(scores.values()),
        "round": last["round"],
        "selection": f"last round, {result['config']['evaluate']['split']} images",
        **final,
    }
    own = {key: result["final"][key] for key in ("per_domain", "mean", "worst")}
    filled = {"evaluation": {"own": own}, "seconds": _seconds(result["rounds"]), **result}
    _require_evaluation(filled["evaluation"])
    _require_adaptation(filled, "per_domain")
    return filled


def _filled_stream(result: dict[str, Any]) -> dict[str, Any]:
    config, lines = result["config"], result["experiences"]
    split = config["evaluate"]["split"]
    if "memorization" not in result["data"]:
        result["data"]["memorization"] = _memorizes(config["scenario"]["name"])
    result["final"] = {"selection": f"after the last experience, {split} images", **result["final"]}
    filled = {"learner": config["learner"], "seconds": _seconds(lines), **result}
    filled.setdefault("accuracy_matrix", [line.get("accuracy") for line in lines])
    _require_matrix(filled)
    _require_adaptation(filled, "per_experience")
    return filled


def _memorizes(scenario: str) -> bool:
    """Return whether a scenario is about memorization, as its card has it; one that is not here is not known to be."""
    try:
        return SCENARIOS[scenario].memorization
    except FedNormError:
        return False


def _seconds(lines: Iterable[Mapping[str, Any]]) -> float | None:
    times = [line["seconds"] for line in lines if _is(line.get("seconds"), Number)]
    return float(sum(times)) if times else None


def _require(document: Mapping[str, Any], needed: Mapping[str, Type], what: str) -> None:
    """Raise unless a document has every dotted key, with a value of its type."""
    for key, type_ in needed.items():
        value: Any = document
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise Unfit(f"{what} has no '{key}'.{_OLDER}")
            value = value[name]
        if not _is(value, type_):
            raise Unfit(f"{what} should have a {_name(type_)} as '{key}'; it has {shortened(value)}.")


_OLDER = " An older version of fednorm, or another program, wrote it: run it again with the same configuration."


def _require_like(values: Mapping[str, Any], defaults: Mapping[str, Any], place: str) -> None:
    """Raise unless each setting that has a default is of the default's type."""
    for key, default in defaults.items():
        value = values.get(key, default)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            _require_like(value, default, f"{place}.{key}")
        elif not _is(value, Number if type(default) in Number else type(default)):
            raise Unfit(f"{place}.{key} should be a {_name(type(default))}; it is {shortened(value)}.")


def _require_lines(result: Mapping[str, Any], kind: str) -> None:
    name, needed = _OF_A_LINE[kind]
    lines = result.get(name)
    if not isinstance(lines, list) or not lines or not all(isinstance(line, dict) for line in lines):
        raise Unfit(f"it has no '{name}', a table of keys for each of its {name}.{_OLDER}")
    for line in lines:
        _require(line, needed, f"one of its {name}")
        _require_numbers(line, f"one of its {name}")


def _require_numbers(values: Mapping[str, Any], where: str) -> None:
    """Raise unless what was measured is numbers, and null where it was not; some of it in tables and lists."""
    for key, value in values.items():
        type_ = _CONTAINERS.get(key)
        if key in _WORDS or value is None or _is(value, type_ or Number):
            continue
        raise Unfit(f"{where} should have a {_name(type_ or Number)} as '{key}'; it has {shortened(value)}.")
    for key in ("per_domain", "diagnostics"):
        inner = values.get(key) or {}
        for name, value in inner.items():
            if isinstance(value, dict) and key == "diagnostics":
                _require_numbers({"diagnostics": value}, f"{where}, {name},")
            elif value is not None and not _is(value, Number):
                raise Unfit(f"{where} should have numbers in '{key}'; one is {shortened(value)}.")


def _require_data(data: Mapping[str, Any]) -> None:
    if not isinstance(data["notes"], list) or not all(isinstance(note, str) for note in data["notes"]):
        raise Unfit(f"data.notes should be a list of sentences; it is {shortened(data['notes'])}.")
    for key in ("clients", "experiences"):
        lines = data.get(key, [])
        if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
            raise Unfit(f"data.{key} should be a list of tables; it is {shortened(lines)}.")


def _require_scores(scores: Any) -> None:
    if not isinstance(scores, dict) or not scores or not all(_is(value, Number) for value in scores.values()):
        raise Unfit(f"final.per_domain should be a table of numbers, one a domain; it is {shortened(scores)}.")


def _require_evaluation(evaluation: Any) -> None:
    for scores in evaluation.values() if isinstance(evaluation, dict) else [None]:
        inner = list(scores["under"].values()) if isinstance(scores, dict) and "under" in scores else [scores]
        for each in inner:
            if not isinstance(each, dict) or not ("not_applicable" in each or each.keys() >= {"per_domain", "mean"}):
                raise Unfit(f"evaluation should be tables with per_domain and mean; one is {shortened(each)}.")
            if "per_domain" in each:
                _require_scores(each["per_domain"])
                _require(each, {"mean": Number}, "an evaluation")


def _require_adaptation(result: Mapping[str, Any], key: str) -> None:
    """Raise unless the scores under test-time adaptation are as many as the configuration names, and are scores."""
    if "adaptation" not in result:
        return
    _require(result["adaptation"] if isinstance(result["adaptation"], dict) else {}, _OF_ADAPTATION, "its adaptation")
    tables, methods = result["config"]["evaluate"].get("adaptation"), result["adaptation"]["methods"]
    if not isinstance(tables, list) or len(tables) != len(methods):
        raise Unfit("its adaptation has not a row for each table of config.evaluate.adaptation.")
    for row in [result["adaptation"]["without"], *methods]:
        if (
            not isinstance(row, dict)
            or not isinstance(row.get(key), dict)
            or not _is(row.get("mean"), (*Number, type(None)))
        ):
            raise Unfit(f"adaptation should be tables with {key} and mean; one is {shortened(row)}.")
        if not all(_is(value, Number) for value in row[key].values()):
            raise Unfit(f"adaptation should have numbers in {key}; one has {shortened(row[key])}.")
    for row, table in zip(methods, tables, strict=True):
        _require(row, _OF_METHOD, "a method of its adaptation")
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise Unfit(f"config.evaluate.adaptation should be tables with a name; one is {shortened(table)}.")


def _require_matrix(result: Mapping[str, Any]) -> None:
    """Raise unless the accuracy matrix has a row for each experience; a summary of memorization has none."""
    matrix, lines = result["accuracy_matrix"], result["experiences"]
    if matrix == [] and result["data"]["memorization"]:
        return
    width = max(line["experience"] for line in lines) + 1
    rows_fit = isinstance(matrix, list) and all(isinstance(row, list) for row in matrix)
    if not rows_fit or len(matrix) < width or len({len(row) for row in matrix}) != 1 or len(matrix[0]) < width:
        raise Unfit(f"accuracy_matrix should have a row and a column for each of {width} experiences.")
    if not all(value is None or _is(value, Number) for row in matrix for value in row):
        raise Unfit("accuracy_matrix should hold numbers, and null for what was not measured.")


def _is(value: Any, type_: Type) -> bool:
    """Return whether a value is of a type; truth values are no numbers."""
    if isinstance(value, bool):
        return type_ is bool
    return isinstance(value, type_)


def _name(type_: Type) -> str:
    names: Mapping[Any, str] = {str: "text", bool: "truth value", dict: "table", list: "list", int: "whole number"}
    return names.get(type_, "number")


def shortened(value: Any) -> str:
    """Return a value as it stands in an error: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
