"""``fednorm recipes``: the studies that ship, what each does, and what it would cost on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednorm.cards import DATA
from fednorm.cli.console import err, out, print_json
from fednorm.cli.recipe_list import cells, list_of
from fednorm.config import RunConfig
from fednorm.errors import FedNormError
from fednorm.report._common import Table, flat
from fednorm.report.numbers import percent
from fednorm.report.study_progress import duration
from fednorm.study.cases import Study
from fednorm.study.estimate import estimate_seconds, seconds_at_once
from fednorm.study.recipes import find_study, recipe_names
from fednorm.study.runner import default_jobs
from fednorm.study.study import read_study

MOST_NAMED = 12
"""Methods of a study that are named when it is shown."""


@dataclass(frozen=True)
class Cost:
    """What a study would take from its first run to its last.

    Attributes:
        seconds: About how long, the search and then the runs; None if that is not known.
        basis: What the estimate rests on, a sentence each.
    """

    seconds: float | None
    basis: tuple[str, ...]


def run_recipes(
    name: str | None, data_dir: Path | None, *, reduce: float | None = None, with_cost: bool, as_json: bool
) -> None:
    """Print the studies that ship, each with its runs and the numbers of the paper it holds; or one of them, whole.

    Args:
        name: One study; all of them if None.
        data_dir: The folder of the real data, in which images are counted; published sizes are taken without it.
        reduce: A factor below 1 by which rounds, images and clients are fewer than each study's.
        with_cost: Whether to time some steps of each method, a second or two each, for the time a study takes.
        as_json: Whether to print one JSON document instead of a table.

    Raises:
        FedNormError: There is no such study.
    """
    jobs = default_jobs()
    overrides = {"data": {"dir": str(data_dir)}} if data_dir is not None else {}
    paths = [find_study(each) for each in (recipe_names() if name is None else [name])]
    rows = []
    with err().status("Reading …") as status:
        for number, path in enumerate(paths, start=1):
            study = read_study(path, overrides, reduce=reduce)
            if with_cost:
                status.update(f"Timing a few steps of each method: {study.name} ({number}/{len(paths)}) …")
            rows.append(_document(study, path, cost(study, jobs) if with_cost else None, jobs))
    if as_json:
        return print_json({"jobs": jobs, "recipes": rows})
    if name is not None:
        return _show(rows[0], study)
    return out().print((_table(rows, jobs) if with_cost else list_of(rows)).rich())


def _show(row: Mapping[str, Any], study: Study) -> None:
    """Print what a study does, what it needs, and what it is compared with."""
    console = out()
    searched = f", after {row['selection_runs']} to choose hyper-parameters by" if row["selection_runs"] else ""
    some, seconds = row["methods"][:MOST_NAMED], row["estimated_seconds"]
    more = f" and {len(row['methods']) - len(some)} more" if len(row["methods"]) > len(some) else ""
    told = [
        f"{row['name']}: {row['title']}",
        row["about"],
        f"Runs: {row['runs']}{searched}; {', '.join(some)}{more}; seeds {', '.join(map(str, row['seeds']))}.",
        *(f"Data: {card.name}, {card.summary}" for card in _data(study)),
        *([] if seconds is None else [f"Time: about {duration(seconds)}, {row['jobs']} at a time."]),
        *row["basis"],
        *([] if study.reduced is None else [_reduced(study)]),
    ]
    for paragraph in told:
        console.print(paragraph, markup=False)
    if study.paper:
        console.print(_paper_table(study).rich())
    less = "" if study.reduced is None else f" --reduce {study.reduced:g}"
    command = f"fednorm compare {Path(row['file']).stem}{less} --data-dir DIR"
    console.print(f"{command}     # {row['file']}", markup=False, soft_wrap=True)


def _reduced(study: Study) -> str:
    """Return what a reduced study has fewer of, and that it is another experiment."""
    keys: dict[str, dict[str, None]] = {}
    for departs in study.departures(study.first_choices()).values():
        for key, (own, original) in departs.items():
            keys.setdefault(key, {})[f"{own} ({original})"] = None
    told = "; ".join(f"{key} {', '.join(values)}" for key, values in keys.items())
    return f"Reduced to {study.reduced:g}, to look at it: not the study, whose numbers are in brackets. {told}."


def _data(study: Study) -> list[Any]:
    return [DATA[name] for name in dict.fromkeys(config.data.name for config in study.drafts())]


def _paper_table(study: Study) -> Table:
    rows = tuple(
        (" + ".join(_named(entry["match"])), str(entry["score"]), percent(entry["value"]), str(entry["source"]))
        for entry in study.paper
    )
    return Table("Papers' numbers (%)", ("method", "score", "value", "source"), rows)


def _named(match: Mapping[str, Any]) -> list[str]:
    """Return the settings by which a paper's number belongs to a run, as text."""
    return [str(value) if key.endswith("name") else f"{key} {value}" for key, value in flat(match).items()]


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


OUTLINE = ("name", "title", "runs", "selection_runs", "paper")
"""What of a study a list of them says."""


def outline(path: Path) -> dict[str, Any]:
    """Return what a list of the studies says of one."""
    document = _document(read_study(path), path, None, 1)
    return {key: document[key] for key in OUTLINE}


def _document(study: Study, path: Path, its_cost: Cost | None, jobs: int) -> dict[str, Any]:
    return {
        "name": study.name,
        "title": study.title,
        "about": study.about,
        "runs": len(study.cases),
        "selection_runs": len(study.search_configs),
        "jobs": jobs,
        "methods": list(dict.fromkeys(_method(config) for config in study.drafts())),
        "seeds": sorted({config.seed for config in study.drafts()}),
        "data": [card.name for card in _data(study)],
        "estimated_seconds": None if its_cost is None or its_cost.seconds is None else round(its_cost.seconds, 1),
        "basis": [] if its_cost is None else list(its_cost.basis),
        "paper": dict(Counter(_paper(entry) for entry in study.paper)),
        "file": str(path),
        "reduced": study.reduced,
    }


def _paper(entry: Mapping[str, Any]) -> str:
    """Return whose number one is: the source up to where it says the place."""
    return str(entry["source"]).split(";")[0].split(",")[0]


def _method(config: RunConfig) -> str:
    trained = config.strategy.name if config.kind == "federated" else config.learner.name
    return f"{trained} + {config.norm.name}"


def _table(rows: Sequence[Mapping[str, Any]], jobs: int) -> Table:
    """Return the table of the studies, in the order of their names."""
    head = ("name", "study", "runs", "estimated time", "paper's numbers beside ours")
    return Table("Studies that ship", head, tuple(cells(rows)), _notes(rows, jobs), texts=(head[1], head[4]))


def _notes(rows: Sequence[Mapping[str, Any]], jobs: int) -> tuple[str, ...]:
    return (
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
