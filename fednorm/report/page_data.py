"""The page's document: every number that the page shows, from results and comparisons, as plain JSON.

The keys are read by ``assets/*.js`` only. Numbers have as many digits as :mod:`fednorm.report.numbers` rounds from, so
that the page rounds once, as the tables do; curves have fewer where the page would grow too large. A configuration, a
plan, a list of layers and a list of rounds that several runs share are stored once. What JSON cannot hold (NaN,
infinity) is null.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fednorm.config import Kind, RunConfig
from fednorm.records.result import GridResult, result_of
from fednorm.report import captions
from fednorm.report._common import Result, flat
from fednorm.report.adaptation_table import adaptations, has_adaptation
from fednorm.report.comparison import Comparison, Method, Score
from fednorm.report.curves import of_forgetting
from fednorm.report.downloads import files_of
from fednorm.report.grouping import score_of
from fednorm.report.page_size import fitting, number
from fednorm.report.sections import Section
from fednorm.report.sweep import group_names, kin, sweeps
from fednorm.report.verdict import distinct_best, verdict
from fednorm.study.statistics import quantile

if TYPE_CHECKING:
    from fednorm.records.results import Loaded

Document = dict[str, Any]

WITH_CURVES = 1_000
"""Runs that have their curves and diagnostics on a page at most: those of the best methods by the headline score."""

LEARNING: Mapping[str, tuple[str, bool]] = {
    "mean": ("mean accuracy over domains", True),
    "worst": ("worst domain's accuracy", True),
    "train_loss": ("training loss", False),
    "train_accuracy": ("training accuracy", True),
}
"""Scalars of a federated round: how the page calls each, and whether it is a share."""

PLASTICITY: Mapping[str, tuple[str, bool]] = {
    "train_accuracy": ("training accuracy after the experience", True),
    "online_accuracy": ("online accuracy during the experience", True),
    "train_loss": ("training loss", False),
}
"""Scalars of an experience; those of the network's diagnostics are in :data:`NETWORK`."""

NETWORK: Mapping[str, tuple[str, bool]] = {
    "dead_units": ("dead units, mean over layers", True),
    "dormant_units": ("dormant units, mean over layers", True),
    "entropy_rank": ("effective rank of the features (entropy)", False),
    "threshold_rank": ("rank of the features (1 % of the largest singular value)", False),
}

BY_LAYER = ("drift", "weight_norm", "effective_learning_rate")
"""Diagnostics that are kept layer by layer."""


def document(loaded: Loaded, parts: Sequence[Section]) -> Document:
    """Return the page's document, thinned where it would otherwise be too large.

    Args:
        loaded: The results, and what was wrong with those that are missing.
        parts: The sections of the page.

    Returns:
        ``title``, ``about``, ``count`` of runs, ``problems``, ``sections``; ``configs``, ``plans``, ``layers``,
        ``grids`` (of curves) and ``times`` (of diagnostics), which runs name by number; ``settings``, which
        configurations name by number; and ``thinned``: null, or what says how curves were thinned or left out.
    """
    return fitting(_Builder().build(loaded, parts))


@dataclass
class _Pool:
    """Values that are stored once and named by their number."""

    values: list[Any] = field(default_factory=list)
    numbers: dict[Hashable, int] = field(default_factory=dict)

    def number(self, value: Any) -> int:
        key = json.dumps(value)
        if key not in self.numbers:
            self.numbers[key] = len(self.values)
            self.values.append(value)
        return self.numbers[key]


@dataclass
class _Builder:
    """Builds the document with every point."""

    configs: _Pool = field(default_factory=_Pool)
    settings: _Pool = field(default_factory=_Pool)
    plans: _Pool = field(default_factory=_Pool)
    grids: _Pool = field(default_factory=_Pool)
    times: _Pool = field(default_factory=_Pool)
    layers: _Pool = field(default_factory=_Pool)
    curved: frozenset[str] | None = None

    def build(self, loaded: Loaded, parts: Sequence[Section]) -> Document:
        self.curved = _with_curves([part.comparison for part in parts])
        sections = [self._section(part) for part in parts]
        count = len({run["hash"] for section in sections for run in section["runs"]})
        _name_runs(sections)
        return {
            "title": _title(parts),
            "count": count,
            "problems": list(loaded.problems),
            "sections": sections,
            "configs": self.configs.values,
            "settings": self.settings.values,
            "plans": self.plans.values,
            "grids": self.grids.values,
            "layers": self.layers.values,
            "times": self.times.values,
            "thinned": None if self.curved is None else _LEFT_OUT,
        }

    def _section(self, part: Section) -> Document:
        comparison = part.comparison
        runs = [
            self._run(result, index, comparison)
            for index, method in enumerate(comparison.methods)
            for result in method.results
        ]
        results = [result for method in comparison.methods for result in method.results]
        first = results[0]
        quantities = dict.fromkeys(key for run in runs for key in run["series"])
        return {
            "id": part.id,
            "name": part.name,
            "about": part.about,
            "verdict": verdict(comparison),
            "files": files_of(comparison),
            "sweeps": [{"label": sweep.label, "values": sweep.values} for sweep in sweeps(comparison)],
            "groups": group_names(comparison),
            "quantiles": {
                n: number(quantile(n)) for n in sorted({len(m.results) for m in comparison.methods}) if n > 2
            },
            "title": comparison.title,
            "kind": comparison.first.subject,
            "headline": comparison.headline,
            "baseline": comparison.baseline,
            "baselines": list(comparison.baselines),
            "caption": list(comparison.caption),
            "notes": list(dict.fromkeys(note for result in results for note in result["data"]["notes"])),
            "split": comparison.split,
            "scores": [_score(comparison, score) for score in comparison.scores],
            "methods": [_method(*each) for each in zip(comparison.methods, kin(comparison), strict=True)],
            "quantities": [_quantity(key, first) for key in quantities],
            "experiences": [str(line.get("title", "")) for line in _experiences(first)],
            "runs": runs,
        }

    def _run(self, result: Result, method: int, comparison: Comparison) -> Document:
        own = result_of(result)
        lines = own.lines
        whole = self.curved is None or result["hash"] in self.curved
        run: Document = {
            "hash": str(result["hash"]),
            "method": method,
            "seed": result["config"]["seed"],
            "folder": result.get("run"),
            "config": self.configs.number(self._configuration(result["config"])),
            "final": {score.key: number(score_of(result, score.key)) for score in comparison.scores},
            "seconds": number(result.get("seconds")),
            "parameters": result.get("parameters"),
            "series": self._curves(own) if whole else {},
            "layers": self._diagnostics(lines, "experience" if own.kind == "continual" else "round") if whole else {},
        }
        plan = result.get("plan")
        if plan:
            run["plan"] = self.plans.number(_plan(plan))
            run["bytes"] = _mean([line["bytes_down"] + line["bytes_up"] for line in lines])
        if whole and (evaluation := _evaluation(result)):
            run["evaluation"] = evaluation
        if whole and own.matrix:
            run["matrix"] = [[number(value) for value in row] for row in own.matrix]
        if whole and isinstance(own, GridResult):
            tensors = {"sent": own.accuracy_tensor, "own": own.own_accuracy_tensor}
            run["clients"] = {name: _by_client(tensor) for name, tensor in tensors.items()}
        return run

    def _configuration(self, config: Mapping[str, Any]) -> list[int]:
        """Return a configuration as numbers of its settings: [key, text, whether it is the default].

        Without the seed, which differs between runs of one configuration, and the folder of the data, which changes no
        number and tells of the machine.
        """
        defaults = _defaults(config.get("kind", "federated"))
        return [
            self.settings.number([key, _text(value), defaults.get(key) == value])
            for key, value in flat(config).items()
            if key not in ("seed", "kind", "data.dir")
        ]

    def _curves(self, own: Result) -> dict[str, list[Any]]:
        """Return a run's curves: [number of the grid, values] by quantity."""
        result = result_of(own)
        if isinstance(result, GridResult):
            return self._grid(result)
        return {"federated": self._federated, "continual": self._continual}[result.kind](result)

    def _grid(self, result: GridResult) -> dict[str, list[Any]]:
        """Return the curves of clients on streams by experience, counted from 1."""
        found = {
            key: [(number, line.get(name)) for number, line in result.steps]
            for key, name in (("average", "average_accuracy"), ("spatial", "spatial_forgetting"))
        }
        found["temporal"] = [(time + 1, value) for time, value in enumerate(result.get("temporal_forgetting", ()))]
        for client in range(len(result.accuracy_tensor[0])):
            found[f"drift.{client}"] = [
                (time + 1, row[client]) for time, row in enumerate(result.get("drift_tensor", ()))
            ]
        found |= {
            f"experience.{column}": [
                (time + 1, row[column]) for time, row in enumerate(result.matrix) if row[column] is not None
            ]
            for column in range(len(result.matrix[0]))
        }
        return self._series(found)

    def _federated(self, result: Result) -> dict[str, list[Any]]:
        """Return the curves of a federated run by round."""
        rounds = result["rounds"]
        domains = dict.fromkeys(domain for line in rounds for domain in line.get("per_domain", ()))
        found = {key: [(line["round"], line[key]) for line in rounds if key in line] for key in LEARNING}
        found |= {
            f"per_domain.{domain}": [
                (line["round"], line["per_domain"][domain]) for line in rounds if domain in line.get("per_domain", ())
            ]
            for domain in domains
        }
        return self._series(found)

    def _continual(self, result: Result) -> dict[str, list[Any]]:
        """Return the curves of a continual run by experience, counted from 1."""
        lines, matrix = result["experiences"], result["accuracy_matrix"]
        found: dict[str, list[tuple[int, Any]]] = {}
        if not result_of(result).memorizes:
            seen = [[value for value in row[: i + 1] if value is not None] for i, row in enumerate(matrix)]
            found["average"] = [(i + 1, _mean(row)) for i, row in enumerate(seen) if row]
            found["forgetting"] = list(of_forgetting(result).items())
            for column in range(len(matrix[0]) if matrix else 0):
                curve = [(i + 1, row[column]) for i, row in enumerate(matrix) if row[column] is not None]
                found[f"experience.{column}"] = curve
        for key in PLASTICITY:
            found[f"plasticity.{key}"] = [(line["experience"] + 1, line[key]) for line in lines if key in line]
        for key in NETWORK:
            found[f"plasticity.{key}"] = [
                (line["experience"] + 1, _scalar(line["diagnostics"][key]))
                for line in lines
                if key in line.get("diagnostics", {})
            ]
        return self._series(found)

    def _series(self, found: Mapping[str, Sequence[tuple[int, Any]]]) -> dict[str, list[Any]]:
        series = {}
        for key, points in found.items():
            if any(value is not None for _, value in points):
                series[key] = [self.grids.number([x for x, _ in points]), [number(y) for _, y in points]]
        return series

    def _diagnostics(self, lines: Sequence[Mapping[str, Any]], counted: str) -> dict[str, Document]:
        """Return what was measured by layer over time: ``values[layer][time]``, of drift ``values[domain][...]``."""
        measured = [line for line in lines if line.get("diagnostics")]
        found = {}
        for key in BY_LAYER:
            tables = [line["diagnostics"].get(key) or {} for line in measured]
            if not any(tables):
                continue
            domains = None
            if any(isinstance(value, Mapping) for table in tables for value in table.values()):
                domains = list(dict.fromkeys(domain for table in tables for domain in table))
            slices = [[t.get(d) or {} for t in tables] for d in domains] if domains else [tables]
            layers = list(dict.fromkeys(layer for part in slices for table in part for layer in table))
            cube = [[[number(table.get(layer)) for table in part] for layer in layers] for part in slices]
            found[key] = {
                "times": self.times.number([line[counted] + (counted == "experience") for line in measured]),
                "layers": self.layers.number(layers),
                "values": cube if domains else cube[0],
                **({"domains": domains} if domains else {}),
            }
        return found


_LEFT_OUT = (
    f"So that the page stays small, it has the curves, matrices and diagnostics of {WITH_CURVES:,} runs at most, those "
    "of the best methods by their first score; the final scores of all runs are here, and exports have every number."
)


def _by_client(tensor: Sequence[Sequence[Sequence[float | None]]]) -> list[list[list[Any]]]:
    """Return an accuracy tensor by client, time and experience."""
    return [[[number(value) for value in row] for row in rows] for rows in zip(*tensor, strict=True)]


def _with_curves(comparisons: Sequence[Comparison]) -> frozenset[str] | None:
    """Return the runs that have curves on the page; None where all have."""
    methods = [(method, comparison) for comparison in comparisons for method in comparison.methods]
    if sum(len(method.results) for method, _ in methods) <= WITH_CURVES:
        return None
    kept: list[str] = []
    for method, _ in sorted(methods, key=lambda each: -_headline(*each)):
        hashes = [str(result["hash"]) for result in method.results]
        if len(kept) + len(hashes) > WITH_CURVES:
            break
        kept += hashes
    return frozenset(kept)


def _headline(method: Method, comparison: Comparison) -> float:
    found = method.scores.get(comparison.headline)
    return -1.0 if found is None else found.mean


def _mean(values: Iterable[float]) -> float | int | None:
    known = list(values)
    return number(fmean(known)) if known else None


def _scalar(value: Any) -> Any:
    """Return a diagnostic as one number: one that was taken by layer as the mean over layers."""
    return _mean(value.values()) if isinstance(value, Mapping) else value


def _experiences(result: Result) -> Sequence[Mapping[str, Any]]:
    if "grid" in result:
        return [{"title": title} for title in result["grid"]["experiences"]]
    experiences: Sequence[Mapping[str, Any]] = result["data"].get("experiences") or result.get("experiences") or ()
    return experiences


def _title(parts: Sequence[Section]) -> str:
    """Return what a page is called: what its sections are, as many as can be read at a glance."""
    names = list(dict.fromkeys(part.name for part in parts))
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _name_runs(sections: Sequence[Document]) -> None:
    """Give each run of each section an address: that of its hash, in a second section with the section's own."""
    taken: set[str] = set()
    for section in sections:
        for run in section["runs"]:
            run["id"] = f"run-{run['hash']}"
            if run["id"] in taken:
                run["id"] += f"-{section['id']}"
            taken.add(run["id"])


def _score(comparison: Comparison, score: Score) -> Document:
    best = distinct_best(comparison, score.key)
    own = {"key": score.key, "label": score.label, "percent": score.percent, "better": score.better}
    return {**own, "best": comparison.methods.index(best) if best is not None else None}


def _method(method: Method, place: tuple[int, int]) -> Document:
    return {
        "kin": place,
        "label": method.label,
        "baseline": method.baseline,
        "scores": {
            key: [of.n, number(of.mean), number(of.std), number(of.low), number(of.high)]
            for key, of in method.scores.items()
        },
        "interval": next(({"method": of.method, "level": of.level} for of in method.scores.values()), None),
        "differences": {
            key: [of.n, number(of.mean), number(of.low), number(of.high), of.better, of.worse, of.ties]
            for key, of in method.differences.items()
        },
        "rank": number(method.rank),
        "paper": {
            key: {
                "value": number(of.value),
                "std": number(of.std),
                "source": of.source,
                "deviation": number(of.deviation),
                "mark": captions.DEPARTS if of.departs else "",
            }
            for key, of in method.paper.items()
        },
    }


def _quantity(key: str, first: Result) -> Document:
    """Return how the page offers a curve: its name, whether it is a share, and the group and view it belongs to."""
    head, _, rest = key.partition(".")
    if head == "per_domain":
        return {"key": key, "label": rest, "percent": True, "group": "Domain", "view": "learning"}
    if head == "experience":
        titles = [str(line.get("title", "")) for line in _experiences(first)]
        title = titles[int(rest)] if int(rest) < len(titles) else ""
        label = f"experience {int(rest) + 1}" + (f" ({title})" if title else "")
        return {"key": key, "label": label, "percent": True, "group": "Experience", "view": "learning"}
    if head in ("spatial", "temporal"):
        return {"key": key, "label": f"{head} forgetting", "percent": True, "group": "All", "view": "learning"}
    if head == "drift":
        label = f"drift of client {rest}'s running statistics from all clients', pooled"
        return {"key": key, "label": label, "percent": False, "group": "Drift", "view": "learning"}
    if head == "average":
        label = "average accuracy over experiences so far"
        return {"key": key, "label": label, "percent": True, "group": "All", "view": "learning"}
    if head == "forgetting":
        label = "forgetting: best accuracy so far minus today's, mean over earlier experiences"
        return {"key": key, "label": label, "percent": True, "group": "All", "view": "learning"}
    if head == "plasticity":
        label, share = {**PLASTICITY, **NETWORK}[rest]
        return {"key": key, "label": label, "percent": share, "group": "All", "view": "plasticity"}
    label, share = LEARNING[key]
    group = "Training" if key.startswith("train") else "All"
    return {"key": key, "label": label, "percent": share, "group": group, "view": "learning"}


def _plan(plan: Mapping[str, Any]) -> Document:
    """Return what travels: entries by role, and of newer records the bytes and every tensor."""
    counts = {role: plan[role] for role in ("shared", "local", "pooled", "reset") if role in plan}
    if plan.get("constant"):
        counts["constant"] = plan["constant"]
    columns = ("key", "layer", "norm", "kind", "role", "shape", "bytes")
    return {
        "counts": counts,
        "bytes_per_round": plan.get("bytes_per_round"),
        "bytes": plan.get("bytes"),
        "tensors": [[tensor.get(column) for column in columns] for tensor in plan.get("tensors", ())],
    }


def _evaluation(result: Result) -> list[list[Any]]:
    """Return the evaluation matrix where there is more than the run's own: [what it is, accuracies by domain]."""
    rows: list[list[Any]] = []
    adapted = (
        {"no adaptation": result["adaptation"]["without"], **dict(adaptations(result))}
        if (has_adaptation(result))
        else {}
    )
    for kind, scores in {**result.get("evaluation", {}), **adapted}.items():
        parts = {f"{kind}, statistics of {of}": part for of, part in scores.get("under", {}).items()} or {kind: scores}
        rows += [
            [name, {domain: number(value) for domain, value in part["per_domain"].items()}]
            for name, part in parts.items()
            if "per_domain" in part
        ]
    return rows if len(rows) > 1 else []


@cache
def _defaults(kind: Kind) -> Mapping[str, Any]:
    return flat(RunConfig.default_values(kind))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
