"""Rows of one method with several settings: one colour, tones in order of what was swept, and the chart of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fednorm.report.comparison import Comparison, comparisons
from fednorm.report.curves import of_forgetting
from fednorm.report.downloads import csv_of
from fednorm.report.figures import drawings
from fednorm.report.plotting import styled
from fednorm.report.sweep import group_names, kin, sweeps
from fednorm.streams.metrics import forgetting_max_minus_last

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def swept(stream_result: Make) -> Comparison:
    """A comparison of two learners, each at three rates, whose accuracy is the rate, and one at one rate."""
    results = [
        stream_result(
            learner={"name": learner},
            config={"seed": seed, "train": {"learning_rate": rate}},
            final={"average_accuracy": rate + seed / 100 + (0.1 if learner == "naive" else 0)},
        )
        for learner, rates in (("er_ace", (0.4, 0.02, 0.1)), ("naive", (0.02, 0.1, 0.4)), ("joint", (0.1,)))
        for rate in rates
        for seed in (1, 2)
    ]
    (comparison,) = comparisons(results, baseline="joint + batch_norm")
    return comparison


def test_rows_of_a_method_are_kin_in_order_of_what_was_swept(swept: Comparison) -> None:
    assert group_names(swept) == ["er_ace + batch_norm", "naive + batch_norm", "joint + batch_norm"]
    assert kin(swept) == [(0, 2), (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    (sweep,) = sweeps(swept)
    assert (sweep.key, sweep.label) == ("train.learning_rate", "lr")
    assert sweep.values == (0.4, 0.02, 0.1, 0.02, 0.1, 0.4, 0.1)


def test_the_figure_shows_accuracy_against_it_in_the_methods_colour(swept: Comparison) -> None:
    drawing = next(each for each in drawings(swept) if each.end == "average_accuracy_against_lr")
    assert drawing.shows == "average accuracy against lr; bars: 95 % intervals, n = 2 seeds"
    with styled():
        (axes,) = drawing.draw().axes
        (curves,) = next(each for each in drawings(swept) if each.end == "average_accuracy_by_experience").draw().axes
    drawn = [container.lines[0] for container in axes.containers]
    np.testing.assert_allclose(drawn[0].get_xdata(orig=False), [0.02, 0.1, 0.4])
    np.testing.assert_allclose(drawn[0].get_ydata(orig=False), [3.5, 11.5, 41.5])
    np.testing.assert_allclose(drawn[1].get_ydata(orig=False), [13.5, 21.5, 51.5])
    assert axes.get_xscale() == "log"
    colours = [line.get_color() for line in curves.lines]
    assert colours[1] == drawn[0].get_color() == "#0072B2"  # the lowest rate has the full colour
    assert len(set(colours)) == 6  # a joint learner has one point, so no curve


def test_the_forgetting_curve_ends_at_the_score(stream_result: Make) -> None:
    matrix = [[0.9, 0.1, 0.0, 0.0], [0.5, 0.8, 0.0, 0.0], [0.7, 0.6, 0.9, 0.0], [0.2, 0.9, 0.3, 0.7]]
    curve = of_forgetting(stream_result(matrix=matrix))
    assert curve == {2: pytest.approx(0.4), 3: pytest.approx((0.2 + 0.2) / 2), 4: pytest.approx((0.7 + 0 + 0.6) / 3)}
    assert curve[4] == pytest.approx(forgetting_max_minus_last(matrix))
    assert of_forgetting(stream_result(matrix=[[0.9, None], [None, 0.8]])) == {}


def test_a_downloaded_table_has_every_digit(swept: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_of(swept))))
    row = next(
        r
        for r in rows
        if r["method"].startswith("naive") and "0.02" in r["method"] and r["score"] == "average_accuracy"
    )
    assert float(row["mean"]) == pytest.approx(0.135, rel=1e-11)
    assert float(row["std"]) == pytest.approx(0.01 / np.sqrt(2), rel=1e-11)
    assert (row["n"], row["paper"]) == ("2", "")
    assert row["baseline"].startswith("joint")
    assert float(row["difference"]) == pytest.approx(0.02, rel=1e-9)
