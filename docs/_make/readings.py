"""Sentences on results with numbers in them: what is typed is the sentence, what is counted comes from the record.

A reading in ``docs/results/readings.toml`` has places like ``{difference fedbn}``:

=================================  ====================================================================================
``{mean METHOD}``                  its headline score, in per cent; ``{mean METHOD | KEY}`` another score
``{difference METHOD}``            its mean difference to its baseline, in points, without a sign; ``| KEY`` of a score
``{low METHOD}``, ``{high ...}``   the ends of that difference's interval, signed where below 0
``{of_seeds METHOD}``              the differences seed by seed, signed
``{of_seeds_behind METHOD}``       the same for one that is behind in all, without signs
``{over A - B}``                   the paired difference of two methods, its interval, and the seeds in which A is ahead
``{paper A - B}``                  how far the paper's number of one method is above that of another
``{behind METHOD}``                how far a method is below the paper's number
``{without METHOD}``               the mean score without test-time adaptation of what was adapted
``{change METHOD | ADAPTATION}``   what an adaptation, by its name in the table, its order and its batch size with
                                   semicolons between, changes that by: the mean over seeds, signed
``{KIND STUDY: METHOD}``           any of these, of another study: a page on several has each number from its own
=================================  ====================================================================================
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from statistics import fmean

from _make import results
from _make.blocks import DOCS
from fednorm.report.adaptation_table import adaptation_label
from fednorm.report.comparison import Comparison, Method, score_of
from fednorm.report.numbers import fixed, percent, signed

FILE = DOCS / "results/readings.toml"
PLACE = re.compile(r"\{(\w+) (?:(\w+): )?([^{}|]+?)(?: \| ([^{}]+))?\}")


def reading(study: str) -> str:
    """Return the reading of a study's results with its numbers filled in; empty where none is written.

    Raises:
        KeyError: It names a method or a score that the record does not have.
    """
    text = readings().get(study, "")
    if not text:
        return ""

    def filled(place: re.Match[str]) -> str:
        kind, method = place[1], place[3]
        against = method.partition(" - ")[2] if kind == "over" else ""
        (comparison,) = results.compared(place[2] or study, against)
        key = place[4] or comparison.headline
        return PLACES[kind](comparison, method, key)

    return PLACE.sub(filled, text).strip()


def readings() -> Mapping[str, str]:
    """Return the sentences as they are written, by study."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def _method(comparison: Comparison, label: str) -> Method:
    return next(method for method in comparison.methods if method.label == label)


def _difference(comparison: Comparison, label: str, key: str) -> str:
    return percent(abs(_method(comparison, label).differences[key].mean))


def _end(name: str) -> Callable[[Comparison, str, str], str]:
    return lambda comparison, label, key: percent(getattr(_method(comparison, label).differences[key], name))


def _seeds(comparison: Comparison, label: str, key: str) -> list[float]:
    method = _method(comparison, label)
    other = {r["config"]["seed"]: r for r in _method(comparison, str(method.baseline)).results}
    pairs = [(score_of(r, key), score_of(other[r["config"]["seed"]], key)) for r in method.results]
    return [own - theirs for own, theirs in pairs if own is not None and theirs is not None]


def _of_seeds(comparison: Comparison, label: str, key: str) -> str:
    return ", ".join(map(signed, _seeds(comparison, label, key)))


def _of_seeds_behind(comparison: Comparison, label: str, key: str) -> str:
    values = _seeds(comparison, label, key)
    assert max(values) < 0, f"{label} is not behind in all seeds"
    *first, last = map(percent, (-value for value in values))
    return f"{', '.join(first)} and {last}"


def _over(comparison: Comparison, labels: str, key: str) -> str:
    del key
    return results.verdict(_method(comparison, labels.partition(" - ")[0]), comparison)[1]


def _paper(comparison: Comparison, labels: str, key: str) -> str:
    one, other = (_method(comparison, label).paper[key].value for label in labels.split(" - "))
    return fixed(100 * (one - other))


def _behind(comparison: Comparison, label: str, key: str) -> str:
    deviation = _method(comparison, label).paper[key].deviation
    assert deviation is not None
    assert deviation < 0, f"{label} is not below the paper"
    return percent(-deviation)


def _without(comparison: Comparison, label: str, key: str) -> str:
    del key
    return percent(fmean(r["adaptation"]["without"]["mean"] for r in _method(comparison, label).results))


def _change(comparison: Comparison, label: str, key: str) -> str:
    name, order, batch = (part.strip() for part in key.split(";"))
    changes = []
    for result in _method(comparison, label).results:
        tables, rows = result["config"]["evaluate"]["adaptation"], result["adaptation"]["methods"]
        changes += [
            row["change"]
            for table, row in zip(tables, rows, strict=True)
            if (adaptation_label(table), row["order"].replace("_", " "), str(row["batch_size"])) == (name, order, batch)
        ]
    assert len(changes) == len(_method(comparison, label).results), key
    return signed(fmean(changes))


PLACES: Mapping[str, Callable[[Comparison, str, str], str]] = {
    "mean": lambda comparison, label, key: percent(_method(comparison, label).scores[key].mean),
    "difference": _difference,
    "low": _end("low"),
    "high": _end("high"),
    "of_seeds": _of_seeds,
    "of_seeds_behind": _of_seeds_behind,
    "over": _over,
    "paper": _paper,
    "behind": _behind,
    "without": _without,
    "change": _change,
}
"""What may stand in a place."""
