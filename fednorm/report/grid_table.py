"""Tables of federations whose clients learn on streams of their own: the grid, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from fednorm.report import numbers
from fednorm.report._common import UNKNOWN, Result, Table, by_method, interval, name_of, percent, seeds

SCORES: Mapping[str, str] = {
    "average_accuracy": "average accuracy",
    "worst_client": "worst client",
    "average_incremental_accuracy": "average incremental",
    "forgetting_max_minus_last": "forgetting (max − last)",
    "forgetting_first_minus_last": "forgetting (first − last)",
    "spatial_forgetting": "spatial forgetting",
}
"""The numbers of a run, in the order of the columns."""

DRIFT = "drift"
"""How far clients' running statistics are from the pooled ones; no share."""

INFERENCE = "task_inference"
"""The share of test images whose experience is inferred right."""


def grid_table(results: Sequence[Result]) -> Table:
    """Return what came of each method, over seeds where there are several.

    Args:
        results: Results of finished runs on the same grid.
    """
    groups = by_method(results, name_of)
    drifts, infers = (any(key in result["final"] for result in results) for key in (DRIFT, INFERENCE))
    rows = [
        (
            name,
            *(percent([result["final"][key] for result in group]) for key in SCORES),
            *([percent([result["final"].get(INFERENCE) for result in group])] if infers else []),
            *([interval([result["final"].get(DRIFT) for result in group], numbers.significant)] if drifts else []),
            f"{mean(result['seconds'] for result in group):.0f}",
        )
        for name, group in groups.items()
    ]
    notes = (
        "Means over clients after the last experience. Spatial forgetting: what a client's own network, just trained, "
        "has more than the server's average of all, on the experiences that the client has met.",
        *(
            ["Drift: of clients' running statistics from those of all pooled, in standard deviations."]
            if drifts
            else []
        ),
        *(["Task inferred (%): test images of which the right experience was inferred."] if infers else []),
        f"{seeds(results, groups)}.",
        *_unheard(results),
    )
    return Table(
        f"Accuracy (%): {results[0]['data']['title']}",
        ("method", *SCORES.values(), *(["task inferred"] if infers else []), *([DRIFT] if drifts else []), "seconds"),
        tuple(rows),
        notes,
        caption=f"Means over clients after the last experience. {seeds(results, groups)}.",
        first=(SCORES["average_accuracy"], SCORES["forgetting_max_minus_last"], SCORES["spatial_forgetting"]),
    )


BETWEEN: Mapping[str, str] = {
    "student_accuracy": "student's accuracy",
    "teacher_confidence": "teacher's confidence",
    "as_wanted": "of the wanted class",
}
"""What is measured of synthetic images, all shares, in the order of the columns."""


def between_table(results: Sequence[Result]) -> Table | None:
    """Return how good the synthetic images of each method are; None where no method draws any.

    Args:
        results: Results of finished runs on the same grid.
    """
    drawn = [result for result in results if result["final"].get("between")]
    if not drawn:
        return None
    groups = by_method(results, name_of)
    rows = []
    for name, group in groups.items():
        measured = [result["final"].get("between", {}) for result in group]
        shares = [_shares([one.get(key) for one in measured]) for key in BETWEEN]
        distances = [one["moment_distance"] for one in measured if one.get("moment_distance") is not None]
        rows.append((name, *shares, f"{mean(distances):.2f}" if len(distances) == len(group) else UNKNOWN))
    notes = (
        "Means over the boundaries between experiences. The student is a new network that has learned from synthetic "
        "images and the teacher's answers alone; its accuracy (%) is on the test images of all experiences so far, "
        "among their classes. "
        "Confidence (%): the largest of the teacher's probabilities; of the wanted class (%): images that the teacher "
        f"takes for what they were drawn as. Moments: sum over layers of the distance from those aimed at; {UNKNOWN}: "
        "there is no such term, or nothing was measured.",
    )
    return Table("Synthetic images", ("method", *BETWEEN.values(), "distance of moments"), tuple(rows), notes)


def _shares(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return percent(known) if known and len(known) == len(values) else UNKNOWN


def _unheard(results: Sequence[Result]) -> list[str]:
    """Return which clients gave no accuracies, and when."""
    silent: dict[int, set[int]] = {}
    for result in results:
        for each in result["final"].get("unheard", ()):
            silent.setdefault(each["experience"], set()).add(each["client"])
    return [
        f"Client{'s'[: len(clients) > 1]} {', '.join(map(str, sorted(clients)))} gave no accuracies after experience "
        f"{time + 1}, and are not in the means that need them."
        for time, clients in sorted(silent.items())
    ]


def tensor_table(result: Result) -> Table:
    """Return the mean over clients of the accuracy on each experience, after each time."""
    tensor = result["accuracy_tensor"]
    rows = [
        (f"after {time + 1}", *(_cell([row[number] for row in clients]) for number in range(len(clients[0]))))
        for time, clients in enumerate(tensor)
    ]
    columns = ("experience", *(str(number + 1) for number in range(len(tensor[0][0]))))
    notes = (f"Means over clients of the network that the server sent; {UNKNOWN}: nobody has met it.",)
    return Table("Accuracy on each experience (%)", columns, tuple(rows), notes)


def _cell(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return percent([mean(known)]) if known else UNKNOWN


def cells_table(grid: Mapping[str, Any]) -> Table:
    """Return the grid: what each client meets at each time, and how many training images it has of it.

    Args:
        grid: ``grid`` of a run's plan or result.
    """
    cells, present = grid["cells"], grid["present"]
    rows = []
    for client, row in enumerate(cells):
        told = []
        for time, cell in enumerate(row):
            away = "away" if not present[client][time] else "nothing, skipped"
            told.append(away if cell is None else f"{cell['experience'] + 1}: {cell['train']}")
        rows.append((f"client {client}", *told))
    columns = ("", *(f"time {time + 1}" for time in range(len(cells[0]))))
    notes = (
        f"Experience: training images. {grid['rounds_per_experience']} rounds each. "
        + "; ".join(f"{number + 1}: {title}" for number, title in enumerate(grid["experiences"]))
        + ".",
    )
    return Table("The grid: clients and experiences", columns, tuple(rows), notes)


def boundaries_table(grid: Mapping[str, Any]) -> Table:
    """Return what happens to each kind of tensor when a round ends, and when an experience ends."""
    rows = tuple(
        (row["norm"] or UNKNOWN, row["kind"], str(row["tensors"]), row["round"], row["experience"])
        for row in grid["boundaries"]
    )
    return Table("At the boundaries", ("norm", "kind", "tensors", "round", "experience"), rows)
