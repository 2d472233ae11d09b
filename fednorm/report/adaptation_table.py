"""The table of test-time adaptation: what a finished network scores with it, beside what it scores without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from fednorm.report import numbers
from fednorm.report._common import UNKNOWN, Result, Table, by_method, known, name_of, percent, seeds
from fednorm.report.numbers import signed

COMMON = ("batch_size", "order", "reset")
"""What of a method's batches stands in columns."""

NONE = "none"


def has_adaptation(result: Result) -> bool:
    """Return whether a result was scored under test-time adaptation."""
    return bool(result.get("adaptation"))


def adaptation_label(table: Mapping[str, Any]) -> str:
    """Return a method's name, and those of its own options that are not at their default.

    Args:
        table: One of ``evaluate.adaptation`` of a configuration.
    """
    told = [f"{key} {_written(value)}" for key, value in table.items() if key not in ("name", *COMMON)]
    return f"{table['name']} ({', '.join(told)})" if told else str(table["name"])


def adaptations(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what each adaptation is called, the composition of its batches included, and its scores."""
    for table, row in zip(result["config"]["evaluate"]["adaptation"], result["adaptation"]["methods"], strict=True):
        yield f"{adaptation_label(table)}, batches of {row['batch_size']}, {_order(row)}", row


def adaptation_table(results: Sequence[Result]) -> Table:
    """Return the accuracy under each adaptation beside that without any, a row each, over seeds where several.

    Where there are several batch sizes, each is a column, with what the adaptation changes the mean by.

    Args:
        results: Results of finished runs on the same data; those without adaptation are left out.
    """
    own = [result for result in results if has_adaptation(result)]
    groups = by_method(own, name_of)
    sizes = sorted({row["batch_size"] for result in own for row in result["adaptation"]["methods"]})
    return _by_batch_size(own, groups, sizes) if len(sizes) > 1 else _whole(own, groups)


def _whole(own: Sequence[Result], groups: Mapping[str, Sequence[Result]]) -> Table:
    """Return the table of adaptations of one batch size: the accuracies, by domain or experience where several."""
    parts = _parts(own)
    shown = parts if len(parts) > 1 else []
    rows = []
    for name, group in groups.items():
        without = [result["adaptation"]["without"] for result in group]
        rows.append((name, NONE, UNKNOWN, UNKNOWN, *_cells(without, shown), UNKNOWN))
        for label, scores in _scored(group):
            batch = (label, _order(scores[0]), str(scores[0]["batch_size"]))
            rows.append((name, *batch, *_cells(scores, shown), _change(scores)))
    named = [f"experience {part}" if own[0]["adaptation"]["of"] == "experiences" else part for part in shown]
    return Table(
        f"Test-time adaptation (%): {own[0]['data']['title']}",
        ("method", "adaptation", "order", "batch", *named, "mean", "change"),
        tuple(rows),
        _notes(own, groups, "change"),
        first=("mean", "change", "order", "batch"),
        texts=("adaptation", "order"),
    )


def _by_batch_size(own: Sequence[Result], groups: Mapping[str, Sequence[Result]], sizes: Sequence[int]) -> Table:
    """Return the table of adaptations of several batch sizes: the mean without, and each size's change of it."""
    rows = []
    for name, group in groups.items():
        without = percent([result["adaptation"]["without"]["mean"] for result in group])
        changes: dict[tuple[str, str], dict[int, str]] = {}
        for label, scores in _scored(group):
            changes.setdefault((label, _order(scores[0])), {})[scores[0]["batch_size"]] = _change(scores)
        rows += [
            (name, *row, without, *(by_size.get(size, UNKNOWN) for size in sizes)) for row, by_size in changes.items()
        ]
    return Table(
        f"Test-time adaptation, changes by batch size (points): {own[0]['data']['title']}",
        ("method", "adaptation", "order", "without (%)", *(f"batch {size}" for size in sizes)),
        tuple(rows),
        _notes(own, groups, "a batch size's column"),
        first=("order", *(f"batch {size}" for size in sizes)),
        texts=("adaptation", "order"),
    )


def _scored(group: Sequence[Result]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield each adaptation's name, and its scores in all runs of a group."""
    for place, table in enumerate(group[0]["config"]["evaluate"]["adaptation"]):
        yield adaptation_label(table), [result["adaptation"]["methods"][place] for result in group]


def _parts(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(part for r in results for part in _shares(r["adaptation"]["without"])))


def _change(scores: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean change in points, signed, and the standard deviation over seeds."""
    changes = known([s.get("change") for s in scores])
    told = signed(fmean(changes)) if changes else UNKNOWN
    return f"{told} ± {numbers.percent(stdev(changes))}" if len(changes) > 1 else told


def _notes(results: Sequence[Result], groups: Mapping[str, Sequence[Result]], column: str) -> tuple[str, ...]:
    of, parts = results[0]["adaptation"]["of"], _parts(results)
    stand_ins = sorted({result["adaptation"]["with"] for result in results if "with" in result["adaptation"]})
    local = [f"Tensors that the strategy keeps on clients: {', '.join(stand_ins)}."] if stand_ins else []
    whose = f"{of} of {', '.join(parts)}" if of == "held-out clients" else of
    return (
        f"{seeds(results, groups)}; {results[0]['final']['selection']}, {whose}. The finished network adapts itself to "
        f"the unlabelled images that it is scored on, in the order and the batches that are said; {column}: percentage "
        "points of the mean against no adaptation, paired by seed.",
        *local,
    )


def _shares(scores: Mapping[str, Any]) -> Mapping[str, float]:
    shares: Mapping[str, float] = scores.get("per_domain") or scores.get("per_experience") or {}
    return shares


def _cells(scores: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> tuple[str, ...]:
    return (*(percent([_shares(s).get(part) for s in scores]) for part in parts), percent([s["mean"] for s in scores]))


def _order(row: Mapping[str, Any]) -> str:
    order = str(row["order"]).replace("_", " ")
    return order if row["reset"] == "each" else f"{order}, reset {row['reset']}"


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
