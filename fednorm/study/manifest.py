"""``study.json``: of which study the records in a folder are, which runs are reported, and how they were chosen.

    {"format": 2, "digest": of all else, "study": name, "title": text, "about": text,
     "baseline": part of a configuration or null,
     "paper": [{"match": part of a configuration, "score": dotted key of "final", "value": share, "source": text}],
     "selection": null or {"rule": sentence, "split": "validation", "test" or "training" (memorization),
                           "configurations": how many each method chose from,
                           "chosen": [{"method": label, "keys": {dotted key: value}, "score": share, "run": hash}],
                           "diverged": {hash: reason}},   the configurations that broke down, and are not run again
     "runs": [hash, ...], "selection_runs": [hash, ...],
     "reduced": null, or the factor by which rounds, images and clients are fewer than the study's (--reduce),
     "departs": {hash: {dotted key: [the run's value, the study's]}}}    what was set for a call alone, or reduced

The same study, called again with other settings into the same folder, adds its runs to those that are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fednorm.config import RunConfig
from fednorm.errors import ConfigError, RecordError
from fednorm.records.files import is_there, locked, replacing
from fednorm.records.formats import FORMAT, Unfit, manifest
from fednorm.records.integrity import read_document, reason, sealed
from fednorm.records.leftovers import not_there, remove_empty
from fednorm.records.results import MANIFEST
from fednorm.study.cases import Choice, Study

Document = dict[str, Any]

LOCK = ".study.lock"
"""The file that a process holds while it writes the manifest."""


def update(
    folder: Path,
    study: Study,
    choices: Sequence[Choice],
    configs: Iterable[RunConfig],
    diverged: Mapping[str, str] | None = None,
) -> Document:
    """Write what is known of a study, beside what is there.

    Args:
        folder: The folder of records; made if it is not there.
        study: The study.
        choices: What its methods have chosen so far.
        configs: The runs that are reported, as far as they are known.
        diverged: Why runs of the search broke down by their own numbers, by hash.

    Returns:
        The manifest.

    Raises:
        ConfigError: The folder holds another study, or this one with hyper-parameters chosen on other images.
        RecordError: The manifest cannot be read or written.
    """
    with _writing(folder):
        before = read(folder)
        now = _document(study, choices, configs, diverged or {})
        united = _united(_without(before, study, choices), now, folder)
        with replacing(folder / MANIFEST) as part:
            part.write_text(json.dumps(sealed(united), indent=1) + "\n", encoding="utf-8")
    return united


@contextmanager
def taken_back_if_empty(folder: Path) -> Iterator[None]:
    """Remove the manifest that a block has written if no run was made: a study that is refused leaves nothing.

    Configurations that diverged count as made; the manifest alone tells of them.

    Args:
        folder: The folder of records.
    """
    missing, path = not_there(folder), folder / MANIFEST
    was_there = path.exists()
    try:
        yield
    finally:
        with suppress(OSError, RecordError):
            selection = ((read(folder) or {}).get("selection") or {}) if not was_there else {}
            if not was_there and not selection.get("diverged") and not any(one.is_dir() for one in folder.iterdir()):
                path.unlink(missing_ok=True)
                (folder / LOCK).unlink(missing_ok=True)
        remove_empty(missing)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the folder's manifest: the same study may be running in two terminals, with other seeds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, wait=True):
            yield
    except RecordError:
        raise
    except OSError as error:
        raise RecordError(
            f"Cannot write {folder / MANIFEST}: {error.strerror}. Choose another folder with --out."
        ) from error


def read(folder: Path) -> Document | None:
    """Return the manifest in a folder, None where there is none.

    Raises:
        RecordError: It is damaged or of a newer format.
    """
    path = folder / MANIFEST
    try:
        return manifest(read_document(path)) if is_there(path) else None
    except (OSError, Unfit) as error:
        raise RecordError(
            f"{path} does not tell which study this folder holds: {reason(error)}. Where it is damaged, remove it, and "
            "the same command writes it again, no run is lost; or choose another folder with --out."
        ) from error


def _document(
    study: Study, choices: Sequence[Choice], configs: Iterable[RunConfig], diverged: Mapping[str, str]
) -> Document:
    chosen = [
        {
            "method": choice.label,
            "keys": {".".join(path): value for path, value in choice.keys.items()},
            "score": choice.score,
            "run": choice.run,
        }
        for choice in choices
    ]
    selection = {
        "rule": study.rule,
        "split": study.split,
        "configurations": len(study.searches[0]) if study.searches else 0,
        "chosen": chosen,
        "diverged": dict(diverged),
    }
    return {
        "format": FORMAT,
        "study": study.name,
        "title": study.title,
        "about": study.about,
        "baseline": study.baseline,
        "paper": list(study.paper),
        "selection": selection if study.searches else None,
        "runs": [config.hash for config in configs],
        "selection_runs": [config.hash for config in study.search_configs],
        "reduced": study.reduced,
        "departs": study.departures(choices),
    }


def _without(before: Document | None, study: Study, choices: Sequence[Choice]) -> Document | None:
    """Return what an earlier call has written without what its methods would choose no more; no record is removed.

    A search that is widened, and chooses another way, would else have two rows in a table: the earlier choice's too.
    """
    if before is None or not before["selection"]:
        return before
    gone = study.superseded(choices)
    losers = [
        (choice.label, {".".join(path): value for path, value in candidate.keys.items()})
        for choice in choices
        for candidate in study.searches[choice.method]
        if candidate.keys != choice.keys
    ]
    stands = [one for one in before["selection"]["chosen"] if (one["method"], one["keys"]) not in losers]
    runs = [run for run in before["runs"] if run not in gone]
    return {**before, "runs": runs, "selection": {**before["selection"], "chosen": stands}}


def _united(before: Document | None, now: Document, folder: Path) -> Document:
    """Return the manifest with what an earlier call has written; what both say is said by the later one."""
    if before is None:
        return now
    if before["study"] != now["study"]:
        raise ConfigError(
            f"{folder} holds the study {before['study']!r}, and this is {now['study']!r}. Choose another folder with "
            "--out."
        )
    old, new = before["selection"], now["selection"]
    if old and new:
        if old["split"] != new["split"]:
            raise ConfigError(
                f"{folder} holds runs whose hyper-parameters were chosen on {old['split']} images, and these would be "
                f"chosen on {new['split']} images: one table must not mix them. Choose another folder with --out."
            )
        new["diverged"] = {**old.get("diverged", {}), **new["diverged"]}
        new["chosen"] = [*new["chosen"], *(one for one in old["chosen"] if not _is_among(one, new["chosen"]))]
    for key in ("runs", "selection_runs"):
        now[key] = list(dict.fromkeys([*before[key], *now[key]]))
    return {**now, "selection": new or old, "departs": {**before["departs"], **now["departs"]}}


def _is_among(choice: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> bool:
    return any(choice["method"] == other["method"] and choice["keys"] == other["keys"] for other in others)
