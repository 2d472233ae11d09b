"""What a page has a tab for: the comparisons of each study by themselves, and those of runs that are of no study."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fednorm.errors import UnknownNameError
from fednorm.report.comparison import Comparison, comparisons

if TYPE_CHECKING:
    from fednorm.records.results import Loaded

Study = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of a page with an address of its own.

    Attributes:
        id: Its address within the page: small letters, digits and dashes.
        name: What its tab is called.
        about: What its study says of itself; empty where it is of none.
        comparison: What it shows.
    """

    id: str
    name: str
    about: str
    comparison: Comparison


def sections(loaded: Loaded, *, baseline: str | None = None, interval: str = "t") -> list[Section]:
    """Return the sections of a page: by study, as methods of several studies share no settings that names could tell.

    Args:
        loaded: Results, and the studies that they are of; a run of several studies is in the sections of each.
        baseline: The method that others are compared with; each study's own if None.
        interval: How intervals are made.

    Raises:
        ConfigError: Results that cannot stand in one comparison, or an unknown baseline or interval.
    """
    parts = list(_parts(loaded))
    made: list[tuple[Study | None, Comparison]] = []
    unknown: list[UnknownNameError] = []
    for study, results in parts:
        studies = [study] if study is not None else []
        try:
            compared = comparisons(results, studies=studies, baseline=baseline, interval=interval)
        except UnknownNameError as error:
            unknown.append(error)
            compared = comparisons(results, studies=studies, interval=interval)
        made += [(study, comparison) for comparison in compared]
    if unknown and len(unknown) == len(parts):
        raise unknown[0]
    return _named(made)


def _parts(loaded: Loaded) -> list[tuple[Study | None, list[Any]]]:
    """Return each study with its results among those that are there, and last the results of no study."""
    parts: list[tuple[Study | None, list[Any]]] = []
    left = {result["hash"]: result for result in loaded.results}
    for study in loaded.studies:
        runs = {*study.get("runs", ()), *study.get("selection_runs", ())}
        own = [result for result in loaded.results if result["hash"] in runs]
        if own:
            parts.append((study, own))
        for result in own:
            left.pop(result["hash"], None)
    if left:
        parts.append((None, list(left.values())))
    return parts


def _named(made: Sequence[tuple[Study | None, Comparison]]) -> list[Section]:
    counts = Counter(id(study) for study, _ in made if study is not None)
    found: list[Section] = []
    ids: Counter[str] = Counter()
    for study, comparison in made:
        short = _short(comparison)
        alone = study is not None and counts[id(study)] == 1
        title = str(study.get("title") or study["study"]) if study is not None else ""
        name = title if alone else f"{title}: {short}" if title else short
        start = str(study["study"]) if study is not None and alone else name
        slug = re.sub(r"[^a-z0-9]+", "-", start.lower()).strip("-")[:40].strip("-") or "section"
        ids[slug] += 1
        address = slug if ids[slug] == 1 else f"{slug}-{ids[slug]}"
        found.append(Section(address, name, str(study.get("about") or "") if study is not None else "", comparison))
    return found


def _short(comparison: Comparison) -> str:
    """Return a comparison's title without what stands in brackets: ``Office-Caltech-10, validation images``."""
    return re.sub(r"\s*\([^()]*\)", "", comparison.title).strip() or comparison.title
