"""Figures: the numbers that are drawn, what stands in the files, and text that looks like a formula or a path."""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from fednorm.errors import ConfigError
from fednorm.report.comparison import comparisons
from fednorm.report.curves import mean_matrix, of_average, of_diagnostic
from fednorm.report.figures import Drawing, drawings, write_figures
from fednorm.report.plotting import COLOURS, Bands, look, plain, styled

Make = Callable[..., dict[str, Any]]


def drawn(results: Sequence[dict[str, Any]], **options: Any) -> dict[str, Drawing]:
    (comparison,) = comparisons(results, **options)
    return {drawing.end: drawing for drawing in drawings(comparison)}


def figure_of(drawing: Drawing) -> Figure:
    with styled():
        return drawing.draw()


def seeded(stream_result: Make, count: int, **arguments: Any) -> list[dict[str, Any]]:
    """Return runs whose accuracies differ by seed."""
    return [
        stream_result(
            matrix=[[0.9, 0.0], [0.4 + 0.1 * seed, 0.6]],
            final={"average_accuracy": 0.5 + 0.05 * seed},
            config={"seed": seed},
            diagnostics=[{"weight_norm": {"a": 2.0, "b": 8.0, "last": 99.0}, "drift": {"x": 0.2, "y": 0.4}}] * 2,
            **arguments,
        )
        for seed in range(1, count + 1)
    ]


def band(figure: Figure) -> np.ndarray[Any, Any]:
    (collection,) = figure.axes[0].collections
    return np.asarray(collection.get_paths()[0].vertices)


def test_a_curve_is_the_mean_and_its_band_students_interval(stream_result: Make) -> None:
    results = seeded(stream_result, 3)
    drawing = drawn(results)["average_accuracy_by_experience"]
    figure = figure_of(drawing)
    (line,) = figure.axes[0].lines
    last = [100 * (0.4 + 0.1 * seed + 0.6) / 2 for seed in (1, 2, 3)]
    assert line.get_xydata() == pytest.approx(np.array([[1, 90], [2, statistics.mean(last)]]))
    half = stats.t.ppf(0.975, 2) * statistics.stdev(last) / 3**0.5
    at_two = band(figure)[band(figure)[:, 0] == 2][:, 1]
    assert min(at_two) == pytest.approx(statistics.mean(last) - half)
    assert max(at_two) == pytest.approx(statistics.mean(last) + half)
    assert drawing.shows == "average accuracy by experience; mean over n = 3 seeds, band: 95 % t interval"
    assert figure.legends[0].get_title().get_text() == "mean over n = 3 seeds, band: 95 % t interval"


def test_two_seeds_have_a_band_from_lowest_to_highest_and_one_none(stream_result: Make) -> None:
    figure = figure_of(drawn(seeded(stream_result, 2))["average_accuracy_by_experience"])
    at_two = band(figure)[band(figure)[:, 0] == 2][:, 1]
    assert (min(at_two), max(at_two)) == pytest.approx((55, 60))
    assert figure.legends[0].get_title().get_text() == "mean over n = 2 seeds, band: lowest to highest"
    alone = figure_of(drawn(seeded(stream_result, 1))["average_accuracy_by_experience"])
    assert not alone.axes[0].collections
    assert alone.legends[0].get_title().get_text() == "one seed, no band"
    curves = {"a": [{1: 0.5}] * 3, "b": [{1: 0.5}] * 2, "c": [{1: 0.5}]}
    assert Bands().told(curves) == ("mean over n = 1 to 3 seeds, band: 95 % t interval, lowest to highest where n = 2")


def test_bars_have_the_scores_their_intervals_their_seeds_and_the_paper(stream_result: Make) -> None:
    results = [*seeded(stream_result, 3), *seeded(stream_result, 3, norm={"name": "group_norm"})]
    paper = {"match": {"norm": {"name": "group_norm"}}, "score": "average_accuracy", "value": 0.7, "source": "x"}
    study = {"study": "s", "runs": [result["hash"] for result in results], "selection_runs": [], "paper": [paper]}
    drawing = drawn(results, studies=[study])["comparison"]
    figure = figure_of(drawing)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([60, 60])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["er_ace + batch_norm", "er_ace + group_norm"]
    points = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert [list(xs) for xs in points] == [pytest.approx([55, 60, 65])] * 2
    (diamond,) = [line for line in axes.lines if line.get_marker() == "D"]
    assert (diamond.get_xdata()[0], diamond.get_ydata()[0]) == pytest.approx((70, 1))
    half = stats.t.ppf(0.975, 2) * 5 / 3**0.5
    ends = sorted(axes.collections[0].get_segments()[0][:, 0])
    assert ends == pytest.approx([60 - half, 60 + half])
    assert drawing.shows == (
        "average accuracy; 95 % t interval, circles: seeds, n = 3, diamonds: papers' numbers"
    )  # fmt: skip


def test_long_labels_leave_half_of_the_width_to_what_they_label(stream_result: Make) -> None:
    results = [*seeded(stream_result, 2), *seeded(stream_result, 2, norm={"name": "group_norm"})]
    (short,) = comparisons(results)
    methods = [
        replace(method, label=f"{method.label}, setting=1" + ", other_setting=2" * 12) for method in short.methods
    ]
    drawn_by_end = {drawing.end: drawing for drawing in drawings(replace(short, methods=tuple(methods)))}
    for end in ("comparison", "average_accuracy_by_experience"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib gives up on a layout with a warning
            figure = figure_of(drawn_by_end[end])
            with styled():
                figure.savefig(BytesIO(), format="svg")
        assert figure.axes[0].get_position().width > 0.45
        for text in figure.legends[0].get_texts() if figure.legends else figure.axes[0].get_yticklabels():
            box = text.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width


def test_a_matrix_is_the_mean_over_seeds_and_blank_where_nothing_was_measured(stream_result: Make) -> None:
    results = [
        stream_result(matrix=[[0.8, None], [first, 0.6]], config={"seed": seed}) for seed, first in ((1, 0.2), (2, 0.4))
    ]
    assert mean_matrix(results) == [[0.8, None], [pytest.approx(0.3), 0.6]]
    drawing = drawn(results)["accuracy_matrix-er_ace-batch_norm"]
    axes = figure_of(drawing).axes[0]
    shown = {(text.xy): text.get_text() for text in axes.texts}
    assert shown == {(1, 1): "80", (1, 2): "30", (2, 2): "60"}
    assert np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan)[0, 1])


def test_curves_of_diagnostics_are_means_over_layers(stream_result: Make) -> None:
    (result,) = seeded(stream_result, 1)
    assert of_diagnostic(result, "weight_norm") == {1: pytest.approx(4.0), 2: pytest.approx(4.0)}  # hidden: 2 and 8
    assert of_diagnostic(result, "drift") == {1: pytest.approx(0.3), 2: pytest.approx(0.3)}
    assert of_diagnostic(result, "effective_learning_rate") == {}
    assert of_average(result) == {1: 0.9, 2: pytest.approx(0.55)}
    federated = {
        "config": {"kind": "federated"},
        "rounds": [{"round": 3, "diagnostics": {"drift": {"a": {"x": 0.1, "y": 0.3}, "b": {"x": 0.2, "y": 0.6}}}}],
    }
    assert of_diagnostic(federated, "drift") == {3: pytest.approx(0.3)}


def test_a_stream_has_its_figures_and_a_memorization_stream_its_own(stream_result: Make, memorized: Make) -> None:
    assert set(drawn(seeded(stream_result, 1))) == {
        "comparison",
        "training_accuracy_by_experience",
        "average_accuracy_by_experience",
        "accuracy_matrix-er_ace-batch_norm",
        "normalization",
    }
    assert set(drawn([memorized([0.9, 0.8, 0.7])])) == {"comparison", "training_accuracy_by_experience"}


def test_of_many_methods_the_best_are_shown_and_it_is_said(stream_result: Make) -> None:
    results = [
        stream_result(learner={"memory_size": 100 + number}, final={"average_accuracy": number / 20})
        for number in range(15)
    ]
    drawing = drawn(results)["comparison"]
    assert drawing.shows.endswith("; the best 12 of 15 methods")
    assert [bar.get_width() for bar in figure_of(drawing).axes[0].patches] == pytest.approx(
        [5 * number for number in range(3, 15)]
    )


def test_methods_are_told_apart_without_colour() -> None:
    looks = [look(number) for number in range(12)]
    assert len({(one["linestyle"], one["marker"]) for one in looks}) == 12
    assert len({one["color"] for one in looks}) == len(COLOURS) == 7


@pytest.mark.slow
@pytest.mark.parametrize("figure_format", ["svg", *(pytest.param(f, marks=pytest.mark.slow) for f in ("pdf", "png"))])
def test_files_are_whole_the_same_each_time_and_leave_matplotlib_alone(
    figure_format: str, stream_result: Make, tmp_path: Path
) -> None:
    results = seeded(stream_result, 2, title="Split $x_1^2$ of <script> & 日本 (5 x 2)")
    other = stream_result(title="Split $x_1^2$ of <script> & 日本 (other)", norm={"name": "group_norm"})
    compared = comparisons([*results, other])
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in ("a", "b"):
            files = [path for path, _ in write_figures(tmp_path / folder, compared, figure_format=figure_format)]
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in write_figures.__globals__
    assert len({path.name for path in files}) == len(files)
    assert f"split-x_1-2-of-script-comparison-2.{figure_format}" in {path.name for path in files}
    for path in files:
        again = tmp_path / "a" / path.name
        assert path.read_bytes() == again.read_bytes()
        if figure_format == "svg":
            ElementTree.parse(path)
        elif figure_format == "pdf":
            assert b"/FontFile2" in path.read_bytes()
            assert b"/Type3" not in path.read_bytes()
        else:
            assert np.asarray(Image.open(path)).std() > 10


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of pdf, svg, png; got 'gif'"):
        next(write_figures(tmp_path, [], figure_format="gif"))


def test_text_is_no_formula() -> None:
    assert plain("a $x$ b") == r"a \$x\$ b"
    assert re.fullmatch(r"(word ?\n?){40}", plain("word " * 40, 30))
    assert max(map(len, plain("word " * 40, 30).splitlines())) <= 30
