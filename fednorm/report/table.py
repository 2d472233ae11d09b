"""Tables of federated results: a row a method, a column a domain; made from results, never typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

Result = Mapping[str, Any]

IMMATERIAL = frozenset({"seed", "data.dir", "data.download", "rounds.checkpoint_every"})
"""Keys of the configuration in which two results of one method may differ."""

SHORT: Mapping[str, str] = {"train.learning_rate": "lr", "train.agc": "agc"}
"""How tables call settings that they name often."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Column heads; the first column holds names, the others numbers.
        rows: The cells.
        notes: Sentences under it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", *self.notes])

    def rich(self) -> RichTable:
        """Return the table for a terminal."""
        table = RichTable(
            title=self.title,
            caption="\n".join(self.notes),
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,  # without lines and margins, ten columns fit a terminal of 80 characters
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=not i, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def method_name(result: Result) -> str:
    """Return how a table calls a result's method: the strategy, and the norm where it is not the strategy's own."""
    config = result["config"]
    strategy, norm = config["strategy"], config["norm"]
    own = {"fedwon": "sws"}.get(strategy["name"], "batch_norm")
    options = [f"{key}={value}" for section in (strategy, norm) for key, value in section.items() if key != "name"]
    name = strategy["name"] if norm["name"] == own else f"{strategy['name']} + {norm['name']}"
    return f"{name} ({', '.join(options)})" if options else name


def accuracy_table(results: Sequence[Result]) -> Table:
    """Return the table of test accuracy by domain, over seeds where there are several.

    Args:
        results: Results of finished runs on the same data.
    """
    groups = _by_method(results)
    domains = list(dict.fromkeys(domain for result in results for domain in result["final"]["per_domain"]))
    rows = []
    for name, group in groups.items():
        cells = [_percent([r["final"]["per_domain"].get(domain) for r in group]) for domain in domains]
        rows.append(
            (
                name,
                *cells,
                _percent([r["final"]["mean"] for r in group]),
                _percent([r["final"]["worst"] for r in group]),
                f"{mean(r['seconds'] for r in group):.0f}",
                f"{mean(_bytes_per_round(r) for r in group) / 1e6:.2f}",
            )
        )
    columns = ("method", *domains, "mean", "worst", "seconds", "MB a round")
    return Table(f"Accuracy (%): {results[0]['data']['title']}", columns, tuple(rows), _notes(results, groups))


def curve_table(results: Sequence[Result]) -> Table:
    """Return the mean accuracy over domains after every evaluated round: how far the last one can be trusted.

    Args:
        results: Results of finished runs on the same data.
    """
    groups = _by_method(results)
    rounds = sorted({line["round"] for result in results for line in result["rounds"] if "mean" in line})
    rows = []
    for name, group in groups.items():
        curves = [{line["round"]: line["mean"] for line in result["rounds"] if "mean" in line} for result in group]
        rows.append((name, *(_percent([curve.get(number) for curve in curves]) for number in rounds)))
    columns = ("mean accuracy after round", *map(str, rounds))
    return Table(f"Mean accuracy by round (%): {results[0]['data']['title']}", columns, tuple(rows))


def evaluation_table(results: Sequence[Result]) -> Table:
    """Return the evaluation matrix: for each method and choice of statistics, the accuracy by domain."""
    rows: list[tuple[str, ...]] = []
    names = _names(results)
    domains = list(
        dict.fromkeys(
            domain
            for result in results
            for scores in _flat(result["evaluation"]).values()
            for domain in scores.get("per_domain", {})
        )
    )
    for name_of_run, result in zip(names, results, strict=True):
        for kind, scores in _flat(result["evaluation"]).items():
            name = f"{name_of_run}: {kind}"
            if "not_applicable" in scores:
                rows.append((name, *("–" for _ in domains), "–"))
            else:
                cells = [_percent([scores["per_domain"].get(domain)]) for domain in domains]
                rows.append((name, *cells, _percent([scores["mean"]])))
    reasons = dict.fromkeys(
        f"–: {scores['not_applicable']}."
        for result in results
        for scores in _flat(result["evaluation"]).values()
        if "not_applicable" in scores
    )
    columns = ("evaluated under", *domains, "mean")
    return Table(f"Evaluation matrix (%): {results[0]['data']['title']}", columns, tuple(rows), tuple(reasons))


def plan_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return the norm plan, an entry of the state dict a row."""
    rows = tuple(
        (e["key"], e["layer_type"], e["norm"] or "–", e["kind"], e["role"], "×".join(map(str, e["shape"])) or "scalar")
        for e in entries
    )
    return Table("Norm plan", ("entry", "layer", "norm", "kind", "role", "shape"), rows)


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group results by everything but the seed; methods that share a name are told apart by what differs."""
    keys: dict[str, list[Result]] = {}
    for result in results:
        keys.setdefault(_without_seed(result), []).append(result)
    groups = list(keys.values())
    names = [method_name(group[0]) for group in groups]
    alike = [[other[0] for other, called in zip(groups, names, strict=True) if called == name] for name in names]
    labels = [
        f"{name} {_difference(group[0], others)}" if len(others) > 1 else name
        for name, group, others in zip(names, groups, alike, strict=True)
    ]
    return dict(zip(labels, groups, strict=True))


def _names(results: Sequence[Result]) -> list[str]:
    """Return a name for each result that no other has: its group's, and the seed where the group has several."""
    names = {
        id(result): f"{name}, seed {result['config']['seed']}" if len(group) > 1 else name
        for name, group in _by_method(results).items()
        for result in group
    }
    return [names[id(result)] for result in results]


def _flat_config(result: Result) -> dict[str, Any]:
    """Return the configuration that numbers depend on, the seed left out, as dotted keys."""
    flat: dict[str, Any] = {}
    for section, values in result["config"].items():
        inner = values.items() if isinstance(values, Mapping) else (("", values),)
        flat |= {f"{section}.{key}".rstrip("."): value for key, value in inner}
    return {key: value for key, value in flat.items() if key not in IMMATERIAL}


def _without_seed(result: Result) -> str:
    return repr(sorted(_flat_config(result).items()))


def _difference(result: Result, others: Sequence[Result]) -> str:
    """Return the settings that tell a result from others of the same name."""
    own, rest = _flat_config(result), [_flat_config(other) for other in others]
    odd = [key for key in own if any(own[key] != other.get(key) for other in rest)]
    return ", ".join(f"{SHORT.get(key, key)} {own[key]}" for key in odd)


def _tuned(result: Result) -> str:
    train = result["config"]["train"]
    return f"lr {train['learning_rate']:g}" + (f", agc {train['agc']:g}" if train["agc"] else "")


def _percent(values: Sequence[float | None]) -> str:
    """Return accuracies in [0, 1] as per cent: the mean, and the standard deviation where there are several."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    return f"{mean(known):.1f} ± {stdev(known):.1f}" if len(known) > 1 else f"{known[0]:.1f}"


def _bytes_per_round(result: Result) -> float:
    lines = result["rounds"]
    return float(mean(line["bytes_down"] + line["bytes_up"] for line in lines))


def _notes(results: Sequence[Result], groups: Mapping[str, Sequence[Result]]) -> tuple[str, ...]:
    seeds = sorted({result["config"]["seed"] for result in results})
    fewest, most = min(map(len, groups.values())), max(map(len, groups.values()))
    number = f"n = {most} seeds, mean ± standard deviation" if most > 1 else "one seed, no interval"
    if fewest != most:
        number = f"n = {fewest} to {most} seeds, mean ± standard deviation where n > 1"
    tuned = {name: _tuned(group[0]) for name, group in groups.items()}
    settings = "; ".join(f"{name}: {values}" for name, values in tuned.items() if values.split(",")[0] not in name)
    rounds = sorted({result["final"]["round"] for result in results})
    selection = results[0]["final"]["selection"]
    after = ", ".join(map(str, rounds))
    return (
        f"Seed {', '.join(map(str, seeds))} ({number}); accuracy after round {after} ({selection}); wall clock.",
        *([f"Settings: {settings}."] if settings else []),
        *results[0]["data"]["notes"],
    )


def _flat(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    flat: dict[str, Mapping[str, Any]] = {}
    for kind, scores in evaluation.items():
        if "under" in scores:
            flat |= {f"{kind}, statistics of {name}": inner for name, inner in scores["under"].items()}
        else:
            flat[f"{kind}, {scores['with']} tensors" if "with" in scores else kind] = scores
    return flat
