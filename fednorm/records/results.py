"""Results of finished runs, read back from disk: records, folders of records, summaries; and the studies they are of.

A damaged file never hides the others: it is left out and named, and so is a record of another version of fednorm. A
summary of an older one is brought to today's form where nothing has to be guessed
(:func:`fednorm.records.formats.migrated`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fednorm.records.files as files
from fednorm.errors import RecordError
from fednorm.records.formats import FORMAT, Unfit, manifest, migrated, require_format, shortened
from fednorm.records.integrity import read_document, read_result, reason, require_run
from fednorm.records.result import Result, result_of

__all__ = ["FORMAT", "MANIFEST", "Loaded", "load", "order"]

RESULT = "result.json"
"""The file in a run's folder that its tables are made from."""

MANIFEST = "study.json"
"""The file in a folder of records that tells of which study they are."""


@dataclass(frozen=True)
class Loaded:
    """What was found on disk.

    Attributes:
        results: Results of finished runs, each run once: federated ones first, by method, settings and seed. Those of
            a record have ``run``, the record's folder.
        problems: What was left out and why, a sentence each.
        studies: The manifests of the studies that the results are of.
    """

    results: list[Result]
    problems: list[str]
    studies: list[dict[str, Any]]


def load(paths: Sequence[Path], *, select: bool = False) -> Loaded:
    """Read results from records, folders of records and summaries.

    Args:
        paths: Record folders, ``result.json`` files, folders with records anywhere below, or summaries that
            ``fednorm report --summary`` wrote.
        select: Whether results that a study only chose hyper-parameters by are kept.

    Returns:
        The results, what could not be read, and the studies.

    Raises:
        RecordError: A path does not exist, or there is no finished run in any.
    """
    found: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    studies: dict[str, dict[str, Any]] = {}
    for file in _files(paths):
        try:
            results, manifests = _read(file, problems)
        except Unfit as reason:
            problems.append(f"{file} was left out: {reason}")
            continue
        studies |= {json.dumps(manifest, sort_keys=True): manifest for manifest in manifests}
        for result in results:
            _add(found, result, file, problems)
    kept = list(found.values()) if select else _reported(found.values(), studies.values())
    if not kept:
        raise RecordError(_nothing(paths, bool(found), problems))
    return Loaded(sorted(map(result_of, kept), key=order), list(dict.fromkeys(problems)), list(studies.values()))


def order(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return where a result stands among others: federated first; by method, then by its settings, then by seed."""
    config = result["config"]
    methods = (json.dumps(config[section], sort_keys=True) for section in (result_of(result).actor, "norm"))
    train = config["train"]
    told = (train["learning_rate"], train["agc"], config["seed"], result["data"]["title"], config["evaluate"]["split"])
    return config["kind"] == "continual", *methods, *told, result["hash"]


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to read, each once."""
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise RecordError(f"There is no {path}. Give a record's folder, a folder of records, or a summary file.")
        files = [path] if path.is_file() else [*sorted(path.rglob(MANIFEST)), *sorted(path.rglob(RESULT))]
        yield from (file for file in files if file.resolve() not in seen)
        seen.update(file.resolve() for file in files)


def _read(file: Path, problems: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the results and the manifests of a file; problems of single results of a summary are added."""
    if file.name == MANIFEST:
        return [], [manifest(read_document(file))]
    if file.name == RESULT:
        try:
            result, _ = read_result(file)
            _require_beside(file.parent, result["hash"])
        except Unfit as error:
            raise Unfit(
                f"{str(error).rstrip('.')}. Where {RESULT} is damaged, remove it, and its run can be made again."
            ) from error
        return [{**result, "run": str(file.parent)}], []
    try:
        document = json.loads(files.read(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unfit(f"it cannot be read ({reason(error)}).") from error
    if not isinstance(document, dict):
        raise Unfit(f"it holds no table of keys but {shortened(document)}.")
    require_format(document)
    if "results" not in document:  # one result, as --json prints it, or a copy of a record's
        return [read_result(file)[0] if "digest" in document else migrated(document)], []
    return _of_summary(document, file, problems)


def _require_beside(folder: Path, run: str) -> None:
    """Refuse a result that lies in the folder of another run; the folder's ``run.json`` tells of which it is."""
    path = folder / "run.json"
    try:
        about = json.loads(files.read(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # a result tells all that a table needs
    if isinstance(about, dict) and isinstance(about.get("hash"), str):
        require_run(run, about["hash"])


def _of_summary(
    document: Mapping[str, Any], file: Path, problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    entries, manifests = document["results"], document.get("studies", [])
    if not isinstance(entries, list) or not isinstance(manifests, list):
        raise Unfit("the results and studies of a summary are lists. Write it again with 'fednorm report --summary'.")
    results: list[dict[str, Any]] = []
    studies: list[dict[str, Any]] = []
    for number, (entry, read, into) in enumerate(
        [*((entry, migrated, results) for entry in entries), *((entry, manifest, studies) for entry in manifests)]
    ):
        try:
            into.append(read(entry))
        except Unfit as reason:
            what = f"result {number + 1}" if into is results else f"study {number + 1 - len(entries)}"
            problems.append(f"{what} of {file} was left out: {reason}")
    return results, studies


def _add(found: dict[str, dict[str, Any]], result: dict[str, Any], file: Path, problems: list[str]) -> None:
    """Add a result; of two of one run the record counts, not its summary, and they must say the same."""
    known = found.get(result["hash"])
    if known is not None:
        both = known["final"].keys() & result["final"].keys()
        if any(known["final"][key] != result["final"][key] for key in both):
            problems.append(
                f"{file} says other numbers of run {result['hash']} than another file named here, and was left out. "
                "Name one of the two."
            )
            return
        if "run" in known or "run" not in result:
            return
    found[result["hash"]] = result


def _reported(results: Iterable[dict[str, Any]], studies: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the results without those that studies only chose by."""
    chosen_by: set[str] = set()
    reported: set[str] = set()
    for study in studies:
        chosen_by |= set(study["selection_runs"])
        reported |= set(study["runs"])
    return [result for result in results if result["hash"] not in chosen_by - reported]


def _nothing(paths: Sequence[Path], searched_only: bool, problems: Sequence[str]) -> str:
    where = ", ".join(map(str, paths)) or "no folder at all"
    if searched_only:
        return (
            f"There is no finished run in {where} but those of a study's search. Let the study finish, or give "
            "--select to see the search."
        )
    begun = sum(1 for path in paths if path.is_dir() for _ in path.rglob("run.json"))
    also = [f"{begun} {'run has' if begun == 1 else 'runs have'} begun there."] if begun else []
    return " ".join([f"There is no finished run (result.json) in {where}.", *also, *problems])
