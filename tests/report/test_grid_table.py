"""What is shown of synthetic images."""

from __future__ import annotations

from typing import Any

from fednorm.report._common import UNKNOWN
from fednorm.report.grid_table import between_table


def result(norm: str, seed: int, between: dict[str, Any] | None) -> dict[str, Any]:
    config = {"strategy": {"name": "target"}, "learner": {"name": "naive"}, "norm": {"name": norm}, "seed": seed}
    final = {"average_accuracy": 0.5} | ({"between": between} if between else {})
    return {"kind": "federated_continual", "config": config, "final": final, "own_norm": False}


def test_the_table_of_synthetic_images_has_means_and_what_is_unknown() -> None:
    drawn = {"images": 8, "teacher_confidence": 0.5, "as_wanted": 0.25, "student_accuracy": 0.125}
    rows = between_table(
        [
            result("batch_norm", 1, {**drawn, "moment_distance": 2.0}),
            result("batch_norm", 2, {**drawn, "moment_distance": 3.0}),
            result("sws", 1, drawn),
        ]
    )
    assert rows is not None
    with_moments, without = rows.rows
    assert with_moments[1:] == ("12.5 ± 0.0", "50.0 ± 0.0", "25.0 ± 0.0", "2.50")
    assert without[1:] == ("12.5", "50.0", "25.0", UNKNOWN)


def test_there_is_no_table_where_nothing_is_drawn() -> None:
    assert between_table([result("batch_norm", 1, None)]) is None
