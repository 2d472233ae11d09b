"""``fednorm recipes``: the studies that ship, with what they would cost on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednorm.cli.console import err, out, print_json
from fednorm.errors import FedNormError
from fednorm.report._common import UNKNOWN, Table
from fednorm.report.study_progress import duration
from fednorm.study.cases import Study
from fednorm.study.estimate import estimate_seconds, seconds_at_once
from fednorm.study.recipes import find_study, recipe_names
from fednorm.study.runner import default_jobs
from fednorm.study.study import read_study


@dataclass(frozen=True)
class Cost:
    """What a study would take from its first run to its last.

    Attributes:
        seconds: About how long, the search and then the runs; None if that is not known.
        basis: What the estimate rests on, a sentence each.
    """

    seconds: float | None
    basis: tuple[str, ...]


def run_recipes(data_dir: Path | None, *, as_json: bool) -> None:
    """Print the studies that ship, each with its runs, its estimated time and the numbers of the paper it holds.

    Some steps of each method are timed, which takes a second or two a method.

    Args:
        data_dir: The folder of the real data, in which images are counted; published sizes are taken without it.
        as_json: Whether to print one JSON document instead of a table.
    """
    jobs = default_jobs()
    overrides = {"data": {"dir": str(data_dir)}} if data_dir is not None else {}
    rows = []
    with err().status("Timing a few steps of each method …") as status:
        for number, name in enumerate(names := recipe_names(), start=1):
            status.update(f"Timing a few steps of each method: {name} ({number}/{len(names)}) …")
            path = find_study(name)
            study = read_study(path, overrides)
            rows.append(_document(study, path, cost(study, jobs), jobs))
    if as_json:
        return print_json({"jobs": jobs, "recipes": rows})
    return out().print(_table(rows, jobs).rich())


def cost(study: Study, jobs: int) -> Cost:
    """Return what a study would take on this machine, nothing of it being done yet.

    Args:
        study: The study.
        jobs: Runs at a time.
    """
    try:
        searched, reported = ([estimate_seconds(c) for c in part] for part in (study.search_configs, study.drafts()))
    except FedNormError as error:
        return Cost(None, (f"Not known: {error}",))
    seconds = sum(seconds_at_once((e.seconds for e in part), jobs) for part in (searched, reported))
    return Cost(seconds, tuple(dict.fromkeys(estimate.basis for estimate in (*searched, *reported))))


def _document(study: Study, path: Path, its_cost: Cost, jobs: int) -> dict[str, Any]:
    return {
        "name": study.name,
        "title": study.title,
        "about": study.about,
        "runs": len(study.cases),
        "selection_runs": len(study.search_configs),
        "jobs": jobs,
        "estimated_seconds": None if its_cost.seconds is None else round(its_cost.seconds, 1),
        "basis": list(its_cost.basis),
        "paper": dict(Counter(_paper(entry) for entry in study.paper)),
        "file": str(path),
    }


def _paper(entry: Mapping[str, Any]) -> str:
    """Return whose number one is: the source up to where it says the place."""
    return str(entry["source"]).split(";")[0].split(",")[0]


def _table(rows: Sequence[Mapping[str, Any]], jobs: int) -> Table:
    """Return the table of the studies, in the order of their names."""
    cells = []
    for row in rows:
        searched, seconds = row["selection_runs"], row["estimated_seconds"]
        cells.append(
            (
                row["name"],
                row["title"],
                f"{row['runs']} + {searched}" if searched else str(row["runs"]),
                UNKNOWN if seconds is None else duration(seconds),
                "; ".join(f"{count} of {source}" for source, count in row["paper"].items()) or "none",
            )
        )
    notes = (
        "Runs: those reported + those of a search for hyper-parameters.",
        f"Time: on this machine with nothing else to do, {jobs} run{'s'[: jobs > 1]} at a time ('--jobs'). "
        "'fednorm compare NAME --dry-run' lists a study's runs, 'fednorm compare NAME' makes them.",
        *(
            f"{row['name']}: {sentence}"
            for row in rows
            for sentence in row["basis"]
            if row["estimated_seconds"] is None
        ),
        *dict.fromkeys(s for row in rows for s in row["basis"] if row["estimated_seconds"] is not None),
    )
    head = ("name", "study", "runs", "estimated time", "paper's numbers beside ours")
    return Table("Studies that ship", head, tuple(cells), notes)
