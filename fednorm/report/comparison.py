"""Comparisons: methods side by side on one set of data, with intervals, differences to a baseline, and ranks.

Made from results, never typed. All scores are as the records have them, shares in [0, 1]; tables show per cent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fednorm.errors import unknown_name
from fednorm.records.result import Result as TypedResult
from fednorm.records.result import result_of
from fednorm.report import captions, grid_table, numbers, stream_table
from fednorm.report._common import UNKNOWN, Result, Table, by_method, flat, incomplete, name_of, percent, settings
from fednorm.report.baselines import Nearest, baselines_of
from fednorm.report.grouping import (
    covers,
    data_settings,
    kind_of,
    matches,
    require_one_run_a_seed,
    require_same_data,
    resolved,
    score_of,
    scored_on,
    unique,
)
from fednorm.report.numbers import signed
from fednorm.study.statistics import LEVEL, METHODS, RESAMPLES, Difference, Interval, mean_ranks, paired_difference
from fednorm.study.statistics import interval as interval_of

__all__ = [
    "Comparison",
    "Method",
    "Paper",
    "Score",
    "comparison_table",
    "comparisons",
    "kind_of",
    "matches",
    "name_of",
    "paper_table",
    "score_of",
    "scored_on",
    "signed",
]

Study = Mapping[str, Any]
Groups = Mapping[str, Sequence[Result]]
Settings = dict[str, Any]

BASELINE = "baseline"
"""The cell of the baseline's difference to itself."""

FEW = 10
"""Seeds below which a caption warns of the bootstrap."""


@dataclass(frozen=True)
class Score:
    """What methods are compared by.

    Attributes:
        key: Its dotted key within a result's ``final``, e.g. ``mean``, ``per_domain.mnist``, ``average_accuracy``.
        label: What a column calls it.
        percent: Whether it is a share, shown in per cent.
        better: 1 where higher is better, -1 where lower is, 0 where neither: it tells, and does not judge.
    """

    key: str
    label: str
    percent: bool
    better: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What no mean of it lies outside of: an accuracy 0 and 1, a difference of accuracies -1 and 1."""
        if not self.percent:
            return None
        return (0.0, 1.0) if self.better > 0 else (-1.0, 1.0)


@dataclass(frozen=True)
class Paper:
    """A number that a paper reports for a method.

    Attributes:
        score: The key of the score it reports.
        value: The number, in the score's unit.
        std: Its standard deviation as the paper gives it; None where it gives none.
        source: Where it stands, e.g. ``FedBN, table 1``.
        deviation: Our mean minus it; None where we have none.
        departs: The keys in which our runs are not what their study's file says, which is as near to the paper as it
            comes: what was set for one call (``--set``), or reduced (``--reduce``).
    """

    score: str
    value: float
    std: float | None
    source: str
    deviation: float | None
    departs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One method: runs that differ in nothing but their seed.

    Attributes:
        label: What it is called, unlike any other of its comparison.
        results: Its runs, in ascending order of their seeds.
        scores: By score key, the mean over its runs with a finite value; without a key where there is none.
        differences: By score key, the paired difference to its baseline; empty for a baseline.
        rank: Mean rank over domains among the methods on the same data, 1 is best; None with one method or domain.
        paper: By score key, what a paper reports.
        baseline: The label of the method that ``differences`` are to; None where there are none.
    """

    label: str
    results: tuple[Result, ...]
    scores: Mapping[str, Interval]
    differences: Mapping[str, Difference]
    rank: float | None
    paper: Mapping[str, Paper]
    baseline: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods whose scores may stand side by side: one kind of run, one title of data, one split that is scored.

    Attributes:
        title: The data's title, and the split where it is not the test images.
        kind: ``federated`` or ``continual``.
        headline: The key of the score that comes first.
        scores: The scores that at least one method has, the headline among them.
        methods: The methods, in the order of their first result.
        baseline: What differences are to, as a caption calls it; None where there are none.
        caption: Sentences that say what the numbers are.
        split: The images that are scored: ``test`` or ``validation``.
        reduced: The factor by which the study was made smaller; None where one of the runs is of a whole study.
        baselines: The labels of the methods that are a baseline; several where a study has one for each batch size,
            say: each method is compared with the one that shares most settings with it.
    """

    title: str
    kind: str
    headline: str
    scores: tuple[Score, ...]
    methods: tuple[Method, ...]
    baseline: str | None
    caption: tuple[str, ...]
    split: str = "test"
    baselines: tuple[str, ...] = ()
    reduced: float | None = None

    @property
    def first(self) -> TypedResult:
        """The first result, which tells what all of them are about."""
        return result_of(self.methods[0].results[0])

    def score(self, key: str) -> Score | None:
        """Return the score with a key; None where no method has it."""
        return next((score for score in self.scores if score.key == key), None)


def comparisons(
    results: Sequence[Result],
    *,
    studies: Sequence[Study] = (),
    baseline: str | None = None,
    interval: str = "t",
) -> list[Comparison]:
    """Return the comparisons that results allow: one for each kind of run, title of data, and split.

    Args:
        results: Results of finished runs; one that comes twice counts once.
        studies: Manifests of studies, for baselines, selection rules and papers' numbers.
        baseline: The label of the method that differences are to, or what tables call it without its settings; by
            default each study's own.
        interval: How intervals are made: ``t`` or ``bootstrap`` (:func:`fednorm.study.statistics.interval`).

    Returns:
        The comparisons, in the order of their first result.

    Raises:
        ConfigError: Results that would stand in one mean, or be paired, have different data; a method has two runs of
            one seed; or the interval is unknown.
        UnknownNameError: No comparison has the baseline.
    """
    distinct = unique(results)
    made, known = [], []
    for key in dict.fromkeys(map(scored_on, distinct)):
        group = [result for result in distinct if scored_on(result) == key]
        require_same_data(group)
        groups = by_method(group, name_of)
        require_one_run_a_seed(groups)
        known += list(groups)
        hashes = {result["hash"] for result in group}
        concerned = [study for study in studies if not hashes.isdisjoint(_runs(study, "runs", "selection_runs"))]
        made.append(_compare(groups, concerned, baseline, interval))
    if baseline is not None and made and not any(comparison.baseline for comparison in made):
        raise unknown_name("method to be the baseline", baseline, known)
    return made


def _runs(study: Study, *keys: str) -> set[str]:
    return {run for key in keys for run in study.get(key, ())}


def _compare(groups: Groups, studies: Sequence[Study], baseline: str | None, interval: str) -> Comparison:
    results = [result for group in groups.values() for result in group]
    kind, title, split = scored_on(results[0])
    scores = tuple(score for score in _scores(results) if any(score_of(r, score.key) is not None for r in results))
    own = {label: settings(group[0]) for label, group in groups.items()}
    means = {label: _intervals(group, scores, interval) for label, group in groups.items()}
    ranks = _ranks(own, means)
    baselines = baselines_of(groups, studies, baseline)
    nearest = Nearest(baselines, own)
    reported = [(study, _runs(study, "runs")) for study in studies if study.get("paper")]
    methods = []
    for label, group in groups.items():
        against = nearest.to(label)
        differences = _differences(group, groups[against], scores, interval) if against else {}
        methods.append(
            Method(
                label,
                tuple(sorted(group, key=lambda result: int(result["config"]["seed"]))),
                means[label],
                differences,
                ranks.get(label),
                _papers(group, means[label], reported) if split == "test" else {},
                against if differences else None,
            )
        )
    headline = scores[0].key if scores else _scores(results)[0].key
    called = " or ".join(dict.fromkeys(name_of(groups[label][0]) for label in baselines))
    called = baselines[0] if len(baselines) == 1 else called
    caption = _caption(methods, headline, called, len(baselines), studies, interval)
    shown = title if split == "test" else f"{title}, {split} images"
    reduced = captions.reduction_of(results, studies)
    shown += "" if reduced is None else f", reduced to {reduced:g} of the study"
    about = (called or None, caption, split, tuple(baselines), reduced)
    return Comparison(shown, kind, headline, scores, tuple(methods), *about)


def _scores(results: Sequence[Result]) -> list[Score]:
    """Return the scores that results of a kind can have, the headline first."""
    if kind_of(results[0]) == "federated_continual":
        return [Score(key, label, True, -1 if "forgetting" in key else 1) for key, label in grid_table.SCORES.items()]
    if kind_of(results[0]) == "federated":
        domains = dict.fromkeys(name for result in results for name in result["final"].get("per_domain", {}))
        return [
            Score("mean", "mean accuracy", True, 1),
            Score("worst", "worst domain", True, 1),
            *(Score(f"per_domain.{domain}", domain, True, 1) for domain in domains),
        ]
    found = [
        Score(key, label, cell is percent, 0 if key == "drift" else -1 if key.startswith("forgetting") else 1)
        for label, (key, cell) in stream_table.SCORES.items()
    ]
    if result_of(results[0]).memorizes:
        return [Score("plasticity", "plasticity", True, 1), *found]
    return found


def by_seed(group: Sequence[Result], key: str) -> dict[int, float]:
    """Return a score by seed, of the results that have a finite one."""
    found: dict[int, float] = {}
    for result in group:
        if (value := score_of(result, key)) is not None:
            found[int(result["config"]["seed"])] = value
    return found


def _intervals(group: Sequence[Result], scores: Sequence[Score], method: str) -> dict[str, Interval]:
    measured = {score.key: list(by_seed(group, score.key).values()) for score in scores}
    bounds = {score.key: score.bounds for score in scores}
    return {key: interval_of(values, method=method, within=bounds[key]) for key, values in measured.items() if values}


def _differences(
    group: Sequence[Result], baseline: Sequence[Result], scores: Sequence[Score], method: str
) -> dict[str, Difference]:
    found = {
        score.key: paired_difference(
            by_seed(group, score.key),
            by_seed(baseline, score.key),
            method=method,
            better=score.better,
            within=(-1.0, 1.0) if score.percent else None,
        )
        for score in scores
        if score.better
    }
    return {key: difference for key, difference in found.items() if difference is not None}


def _ranks(own: Mapping[str, Settings], means: Mapping[str, Mapping[str, Interval]]) -> dict[str, float]:
    ranks: dict[str, float] = {}
    data: dict[str, list[str]] = {}
    for label, values in own.items():
        data.setdefault(data_settings(values), []).append(label)
    for labels in data.values():
        by_domain = {
            label: {key: found.mean for key, found in means[label].items() if key.startswith("per_domain.")}
            for label in labels
        }
        if len(by_domain) > 1 and len(set.intersection(*map(set, by_domain.values()))) > 1:
            ranks |= mean_ranks(by_domain)
    return ranks


def _papers(
    group: Sequence[Result], scores: Mapping[str, Interval], studies: Sequence[tuple[Study, set[str]]]
) -> dict[str, Paper]:
    """Return the numbers that studies, given with their runs, have for a method; of a score's the most specific."""
    found: dict[str, tuple[int, Paper]] = {}
    for study, runs in studies:
        entries = study["paper"] if any(result["hash"] in runs for result in group) else ()
        own = resolved(group[0]) if entries else {}
        for entry in entries:
            if not covers(own, entry["match"]):
                continue
            key, value = entry["score"], float(entry["value"])
            deviation = scores[key].mean - value if key in scores else None
            depth = len(flat(entry["match"]))
            if key not in found or depth > found[key][0]:
                departs = tuple((study.get("departs") or {}).get(group[0]["hash"], ()))
                found[key] = depth, Paper(key, value, entry.get("std"), str(entry["source"]), deviation, departs)
    return {key: paper for key, (_, paper) in found.items()}


def _caption(
    methods: Sequence[Method],
    headline: str,
    baseline: str,
    baselines: int,
    studies: Sequence[Study],
    interval: str,
) -> tuple[str, ...]:
    said = [_of_seeds(methods, headline, interval), *_of_cuts(methods), _of_scoring(methods)]
    said += _of_missing(methods, headline)
    said += incomplete({method.label: method.results for method in methods})
    if baseline:
        which = f"{baseline}, to the one that shares most settings with the method" if baselines > 1 else baseline
        said.append(f"Difference: to {which}, paired by seed; mean, interval, and seeds in which the method is better.")
    elif told := [json.dumps(study["baseline"]) for study in studies if study.get("baseline")]:
        said.append(f"No difference is shown: no method here is the study's baseline, {told[0]}.")
    if any(method.rank is not None for method in methods):
        said.append("Rank: mean over domains of the method's rank in each, 1 is best, ties share.")
    said += [text for study in studies if (text := _of_selection(study))]
    return tuple(said + captions.of_departures([r for method in methods for r in method.results], studies))


def _of_seeds(methods: Sequence[Method], headline: str, interval: str) -> str:
    seeds = sorted({result["config"]["seed"] for method in methods for result in method.results})
    counts = [method.scores[headline].n for method in methods if headline in method.scores] or [0]
    few, most = min(counts), max(counts)
    named = f"Seed{'s'[: len(seeds) != 1]} {', '.join(map(str, seeds))}"
    if most <= 1:
        return f"{named} (n = {most}): one seed a method, so no deviation and no interval."
    count = f"n = {most} seeds" if few == most else f"n = {few} to {most} seeds"
    alone = "; none for one seed" if few == 1 else ""
    made = METHODS[interval]
    if interval == "bootstrap":
        made += f" ({RESAMPLES:,} resamples{'; too short for so few seeds' if most < FEW else ''})"
    return f"{named} ({count}). Standard deviation with n − 1; {100 * LEVEL:g} % interval of the mean: {made}{alone}."


def _of_cuts(methods: Sequence[Method]) -> list[str]:
    ends = {end for method in methods for key, found in method.scores.items() if found.std and key != "drift"
            for end in (found.low, found.high)}  # fmt: skip
    cut = ends & {0.0, 1.0}
    return ["Intervals end at 0 and 100, beyond which no mean accuracy lies."] if cut else []


def _of_scoring(methods: Sequence[Method]) -> str:
    results = [result for method in methods for result in method.results]
    first = results[0]
    if result_of(first).memorizes:
        return "Scored on training images, because there is nothing to hold out on this stream."
    rule = first["final"].get("selection", f"{first['config']['evaluate']['split']} images")
    rounds = sorted({result["final"]["round"] for result in results if "round" in result["final"]})
    return f"Scored after round {', '.join(map(str, rounds))} ({rule})." if rounds else f"Scored {rule}."


def _of_missing(methods: Sequence[Method], headline: str) -> list[str]:
    told = []
    for method in methods:
        found = method.scores[headline].n if headline in method.scores else 0
        if found < len(method.results):
            told.append(f"{method.label}: {len(method.results) - found} of {len(method.results)}")
    return [f"Runs left out, their score not measured or not finite: {'; '.join(told)}."] if told else []


def _of_selection(study: Study) -> str:
    chosen = study.get("selection")
    if not chosen:
        return ""
    told = f"Study {study['study']}: {chosen['rule'].rstrip('.')}; {chosen['configurations']} configurations a method."
    if chosen["split"] == "test":
        return f"{told} Chosen on TEST images (--select-on-test): these numbers are too good."
    return told


def comparison_table(comparison: Comparison) -> Table:
    """Return a comparison as a table: a row a method; columns that would be empty are left out.

    That is: the headline's mean, standard deviation, interval, n, paired difference to the baseline, the worst domain,
    the mean rank over domains, the paper's number and how far ours is from it.
    """
    head = comparison.score(comparison.headline)
    label = head.label if head else comparison.headline
    columns: dict[str, Callable[[Method], str]] = {
        label: lambda method: _mean(method.scores.get(comparison.headline)),
        "± sd": lambda method: _deviation(method.scores.get(comparison.headline)),
        f"{100 * LEVEL:g} % interval": lambda method: _ends(method.scores.get(comparison.headline)),
        "n": lambda method: str(method.scores[comparison.headline].n if comparison.headline in method.scores else 0),
        "difference": lambda method: _difference(method, comparison),
        "worst domain": lambda method: _mean(method.scores.get("worst")),
        "rank": lambda method: numbers.fixed(method.rank),
        "paper": lambda method: _paper(method.paper.get(comparison.headline)),
        "ours − paper": lambda method: _from_paper(method.paper.get(comparison.headline)),
    }
    cells = {name: [cell(method) for method in comparison.methods] for name, cell in columns.items()}
    shown = [name for name, column in cells.items() if name in (label, "n") or set(column) - {UNKNOWN, BASELINE}]
    rows = tuple(zip((m.label for m in comparison.methods), *(cells[name] for name in shown), strict=True))
    return Table(
        f"Comparison (%): {comparison.title}",
        ("method", *shown),
        rows,
        comparison.caption,
        captions.of_comparison(comparison),
        captions.warnings_of({method.label: method.results for method in comparison.methods}, comparison.caption),
        (label, "difference", "paper", "ours − paper", "n", f"{100 * LEVEL:g} % interval"),
    )


def paper_table(comparison: Comparison) -> Table | None:
    """Return every paper number beside ours, a row a method, a column a score; None where there is none."""
    keys = [s for s in comparison.scores if any(s.key in method.paper for method in comparison.methods)]
    if not keys:
        return None
    told = [method for method in comparison.methods if method.paper]
    rows = tuple((m.label, *(_beside(m.scores.get(s.key), m.paper.get(s.key)) for s in keys)) for m in told)
    sources = dict.fromkeys(paper.source for method in told for paper in method.paper.values())
    notes = ("Ours (paper's, ours − paper's), in per cent.", f"Papers: {'; '.join(sources)}.", *comparison.caption[:2])
    title = f"Beside the paper (%): {comparison.title}"
    return Table(title, ("method", *(s.label for s in keys)), rows, notes, notes[0])


def _mean(found: Interval | None) -> str:
    return UNKNOWN if found is None else numbers.percent(found.mean)


def _deviation(found: Interval | None) -> str:
    return UNKNOWN if found is None or found.std is None else f"± {numbers.percent(found.std)}"


def _ends(found: Interval | None) -> str:
    return UNKNOWN if found is None else numbers.ends(found.low, found.high)


def _difference(method: Method, comparison: Comparison) -> str:
    if method.label in comparison.baselines:
        return BASELINE
    found = method.differences.get(comparison.headline)
    if found is None:
        return UNKNOWN
    if found.low is None or found.high is None:
        return signed(found.mean) + (" (one seed)" if method.scores[comparison.headline].n > 1 else "")
    ends = numbers.ends(found.low, found.high)
    return f"{signed(found.mean)} {ends}, {found.better} of {found.n} seeds better"


def _paper(paper: Paper | None) -> str:
    if paper is None:
        return UNKNOWN
    return numbers.percent(paper.value) + ("" if paper.std is None else f" ± {numbers.percent(paper.std)}")


def _from_paper(paper: Paper | None) -> str:
    if paper is None or paper.deviation is None:
        return UNKNOWN
    return signed(paper.deviation) + (captions.DEPARTS if paper.departs else "")


def _beside(ours: Interval | None, paper: Paper | None) -> str:
    if paper is None:
        return UNKNOWN
    return f"{_mean(ours)} ({_paper(paper)}, {_from_paper(paper)})"
