"""Tables of continual results: accuracies and forgetting, the accuracy matrix, plasticity, and drift by layer.

Made from results, never typed. Experiences are counted from 1 here, from 0 in results. What was not measured, and what
is not finite, is a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from fednorm.config import METHOD_OPTIONS, METHOD_SWITCHES, RunConfig
from fednorm.report._common import (
    SHORT,
    UNKNOWN,
    Result,
    Table,
    by_method,
    evenly,
    interval,
    known,
    name_of,
    percent,
    reconstructions,
    seeds,
)
from fednorm.report.captions import of_table, warnings_of
from fednorm.report.numbers import fixed, significant

Cell = Callable[[Sequence[float | None]], str]

SCORES: Mapping[str, tuple[str, Cell]] = {
    "average accuracy": ("average_accuracy", percent),
    "average incremental": ("average_incremental_accuracy", percent),
    "forgetting (max − last)": ("forgetting_max_minus_last", percent),
    "forgetting (first − last)": ("forgetting_first_minus_last", percent),
    "task inferred": ("task_inference", percent),
    "late average": ("average_late_accuracy", percent),
    "worst case": ("worst_case_accuracy", percent),
    "online accuracy": ("online_accuracy", percent),
    "train accuracy": ("train_accuracy", percent),
    "drift": ("drift", lambda values: interval(values, significant)),
}
"""Columns of :func:`stream_table`: the score of ``final`` that each shows, and how."""

FIRST = ("average accuracy", "plasticity", "forgetting (max − last)", "late average", "online accuracy")
"""Columns that a narrow terminal has before the others."""

MEANINGS: Mapping[str, str] = {
    "forgetting (max − last)": "forgetting: percentage points, mean over all experiences but the last",
    "task inferred": "task inferred: test images of which the right experience was inferred",
    "late average": "late: average accuracy, mean over the last evaluations",
    "worst case": "worst case: WC-ACC, the last experience's accuracy and of earlier ones the lowest since their end",
    "online accuracy": "online: every batch just before training on it for the first time",
    "train accuracy": "train: every experience's own training images after it",
    "drift": "drift: running statistics against those of all the data seen, in standard deviations, mean over layers",
}
"""What a reader must know of a column, said where it is shown."""

MOST_IN_MATRIX = 20
"""Experiences that an accuracy matrix or a curve shows at most."""

MOST_TITLED = 10
"""Experiences up to which an accuracy matrix has room for their titles."""

MOST_IN_PLASTICITY = 10
"""Experiences that a table of plasticity shows at most."""


def stream_table(results: Sequence[Result]) -> Table:
    """Return accuracy, forgetting, drift and time, a row a method, over seeds where there are several.

    Columns without any value are left out: a memorization stream has no forgetting, a norm without running statistics
    no drift.

    Args:
        results: Results of finished runs on the same stream, scored on the same images.
    """
    groups = by_method(results, name_of)
    shown = {
        column: (key, cell)
        for column, (key, cell) in SCORES.items()
        if known([result["final"].get(key) for result in results])
    }
    rows = tuple(
        (
            name,
            *(cell([result["final"].get(key) for result in group]) for key, cell in shown.values()),
            fixed(fmean(result["seconds"] for result in group), 0),
        )
        for name, group in groups.items()
    )
    meanings = [MEANINGS[column] for column in shown if column in MEANINGS]
    mode = f" Online accuracy is measured {_mode(results)}." if "online accuracy" in shown else ""
    notes = (
        f"{seeds(results, groups)}; {_scored(results[0])}; wall clock.",
        *([f"{_capital('; '.join(meanings))}.{mode}"] if meanings else []),
        *_settings(groups),
        *reconstructions(results),
        *dict.fromkeys(note for result in results for note in result["data"]["notes"]),
    )
    columns = ("method", *shown, "seconds")
    title = f"Accuracy (%): {results[0]['data']['title']}"
    return Table(title, columns, rows, notes, of_table(groups), warnings_of(groups), FIRST)


def matrix_table(result: Result) -> Table:
    """Return the accuracy matrix of one run: a row for each experience that has ended, a column for each there is.

    Of more than 20 experiences, 20 are shown, evenly spaced; of more than ten, without their titles.
    """
    matrix = result["accuracy_matrix"]
    count = len(matrix[0])
    columns = evenly(count, MOST_IN_MATRIX)
    rows = tuple(
        (
            f"after experience {line['experience'] + 1}" + (f" ({line['title']})" if count <= MOST_TITLED else ""),
            *(percent([matrix[line["experience"]][column]]) for column in columns),
        )
        for line in result["experiences"]
        if line["experience"] in columns
    )
    notes = [f"{name_of(result)}, seed {result['config']['seed']}; {result['config']['evaluate']['split']} images."]
    if len(columns) < count:
        notes.append(f"{len(columns)} of {count} experiences, evenly spaced.")
    heads = ("accuracy on experience", *(str(column + 1) for column in columns))
    return Table(f"Accuracy matrix (%): {result['data']['title']}", heads, rows, tuple(notes))


def average_table(results: Sequence[Result]) -> Table:
    """Return the average accuracy over the experiences seen, after each of at most 20 experiences.

    Args:
        results: Results of finished runs on the same stream.
    """
    groups = by_method(results, name_of)
    curves = {name: [_averages(result) for result in group] for name, group in groups.items()}
    return _by_experience(
        curves, "average accuracy after", f"Average accuracy by experience (%): {results[0]['data']['title']}"
    )


def plasticity_table(results: Sequence[Result]) -> Table:
    """Return the training accuracy after each of at most ten experiences, and what proves the regime.

    Plasticity is the mean training accuracy of the last tenth of the experiences. Weight norm and effective learning
    rate are geometric means over the hidden layers, all but the last one; the geometric mean keeps
    ``rate = lr / norm^p`` true of the means.

    Args:
        results: Results of finished runs on the same stream.
    """
    groups = by_method(results, name_of)
    curves = {
        name: [{line["experience"]: line["train_accuracy"] for line in result["experiences"]} for result in group]
        for name, group in groups.items()
    }
    title = f"Plasticity: training accuracy by experience (%): {results[0]['data']['title']}"
    table = _by_experience(curves, "after experience", title, MOST_IN_PLASTICITY)
    rows = tuple(
        (
            *row,
            percent([result["final"].get("plasticity") for result in group]),
            _from_to(group, "weight_norm"),
            _from_to(group, "effective_learning_rate"),
        )
        for row, group in zip(table.rows, groups.values(), strict=True)
    )
    notes = (
        f"{seeds(results, groups)}; {_scored(results[0])}; each experience after training on it.",
        "Plasticity: mean of the last tenth of the experiences. Weight norm, effective lr: after the first → after the "
        "last experience; geometric mean over hidden layers (all but the last), mean over seeds.",
    )
    columns = (*table.columns, "plasticity", "weight norm", "effective lr")
    first = ("plasticity", table.columns[-1], table.columns[1])
    return Table(title, columns, rows, notes, of_table(groups), warnings_of(groups), first)


def drift_table(results: Sequence[Result]) -> Table:
    """Return the drift of each layer's running statistics after the last experience, a row a layer, a column a method.

    Methods whose norm has no running statistics are left out.

    Args:
        results: Results of finished runs on the same stream.
    """
    groups = {
        name: drifts
        for name, group in by_method(results, name_of).items()
        if any(drifts := [_diagnostic(result["experiences"][-1], "drift") for result in group])
    }
    layers = dict.fromkeys(layer for drifts in groups.values() for drift in drifts for layer in drift)
    rows = tuple(
        (layer, *(interval([drift.get(layer) for drift in drifts], significant) for drifts in groups.values()))
        for layer in layers
    )
    note = (
        "After the last experience: how far running mean and deviation are from those of all the data seen, root mean "
        "square over channels, in standard deviations."
    )
    return Table(f"Drift by layer: {results[0]['data']['title']}", ("layer", *groups), rows, (note,))


def _by_experience(
    curves: Mapping[str, Sequence[Mapping[int, float | None]]], head: str, title: str, at_most: int = MOST_IN_MATRIX
) -> Table:
    """Return a table of values by experience: a row a method, a mean over its seeds a cell."""
    count = 1 + max(max(curve) for seeds_of in curves.values() for curve in seeds_of)
    shown = evenly(count, at_most)
    rows = tuple(
        (name, *(percent([curve.get(number) for curve in seeds_of]) for number in shown))
        for name, seeds_of in curves.items()
    )
    notes = (f"{len(shown)} of {count} experiences, evenly spaced.",) if len(shown) < count else ()
    return Table(title, (head, *(str(number + 1) for number in shown)), rows, notes)


def _averages(result: Result) -> dict[int, float | None]:
    """Return the average accuracy over the experiences seen after each, None where one of them was not measured."""
    averages: dict[int, float | None] = {}
    for line in result["experiences"]:
        number = line["experience"]  # a joint learner's only line is that of the last experience
        seen = result["accuracy_matrix"][number][: number + 1]
        averages[number] = fmean(seen) if len(known(seen)) == number + 1 else None
    return averages


def _diagnostic(line: Mapping[str, Any], what: str) -> Mapping[str, float | None]:
    return (line.get("diagnostics") or {}).get(what) or {}


def _from_to(group: Sequence[Result], what: str) -> str:
    """Return a quantity of the hidden layers after the first and after the last experience."""
    ends = [[_hidden_mean(_diagnostic(result["experiences"][end], what)) for result in group] for end in (0, -1)]
    means = [fmean(values) if (values := known(end)) else None for end in ends]
    if means == [None, None]:
        return UNKNOWN
    return " → ".join(map(significant, means))


def _hidden_mean(by_layer: Mapping[str, float | None]) -> float | None:
    """Return the geometric mean over all layers but the last; None where there is none, or one is not known."""
    hidden = list(by_layer.values())[:-1]
    values = known(hidden)
    if not hidden or len(values) < len(hidden):
        return None
    return geometric_mean(values) if all(values) else 0.0


def _mode(results: Sequence[Result]) -> str:
    """Return what mode online accuracy was measured in; in training mode a batch norm takes the batch's statistics."""
    modes = dict.fromkeys(result["config"]["evaluate"].get("online", "train") for result in results)
    names = {"train": "training", "eval": "evaluation"}
    return f"in {' and '.join(names.get(mode, mode) for mode in modes)} mode"


def _scored(result: Result) -> str:
    if result["data"]["memorization"]:
        return "training images, because there is nothing to hold out on this stream"
    return str(result["final"]["selection"])


def _settings(groups: Mapping[str, Sequence[Result]]) -> tuple[str, ...]:
    """Return how the methods were trained: what they share, then what each has of its own; and the learners' options.

    An option that is not at its default stands in the method's name.
    """
    each = {name: _training(group[0]) for name, group in groups.items()}
    first = next(iter(each.values()))
    shared = [text for text in first if all(text in texts for texts in each.values())]
    parts = [", ".join(shared)] if shared else []
    for name, texts in each.items():
        own = [text for text in texts if text not in shared and text not in name]
        parts += [f"{name}: {', '.join(own)}"] if own else []
    return (f"Settings: {'; '.join(parts)}.", *_defaults([result for group in groups.values() for result in group]))


def _training(result: Result) -> list[str]:
    config, defaults = result["config"], RunConfig.default_values("continual")["train"]
    train, model = config["train"], config["model"]
    width = f" of width {model['width']}" if model.get("width") else ""
    told = [f"{model['name']}{width}", train["optimizer"], f"lr {train['learning_rate']:g}"]
    told += [f"batch {train['batch_size']}", f"{train['epochs']} epoch{'s'[: train['epochs'] != 1]}"]
    named = METHOD_OPTIONS | METHOD_SWITCHES - {"weight_decay"}  # by the method's name
    skip = {"optimizer", "learning_rate", "batch_size", "epochs", "checkpoint_every", *named}
    for key, value in train.items():
        if key not in skip and value != defaults.get(key):
            told.append(f"{SHORT.get(f'train.{key}', key)} {_text(value)}")
    return told


def _defaults(results: Sequence[Result]) -> list[str]:
    """Return, for each learner, the options that no method's name tells."""
    notes = []
    for name in dict.fromkeys(result["learner"]["name"] for result in results):
        mine = [result for result in results if result["learner"]["name"] == name]
        told = dict.fromkeys(
            f"{key} {_text(value)}"
            for result in mine
            for key, value in result["learner"].items()
            if key != "name" and key not in result["config"]["learner"]
        )
        notes += [f"{name}, where its name does not tell: {', '.join(told)}."] if told else []
    return notes


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
