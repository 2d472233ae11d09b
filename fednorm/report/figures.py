"""Figures ready for a paper: curves with seed bands, bars with intervals, accuracy matrices, the normalization view.

One file a figure, as wide as a page's text, fonts embedded. The same results give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fednorm.errors import ConfigError
from fednorm.report._common import Result
from fednorm.report.comparison import Comparison, Method
from fednorm.report.curves import Curve, mean_matrix, named, of_diagnostic, of_domain, of_forgetting
from fednorm.report.files import write_whole
from fednorm.report.grouping import score_of
from fednorm.report.numbers import fixed, percent, significant
from fednorm.report.plotting import COLOURS, Bands, Curves, finish, legend, legend_height, look, plain, styled
from fednorm.report.sweep import Sweep, group_names, kin, sweeps
from fednorm.study.statistics import LEVEL

FORMATS = ("pdf", "svg", "png")
"""What a figure can be written as."""

MOST_METHODS = 12
"""Methods that one figure shows at most, the best by the headline score."""

MOST_NUMBERED = 10
"""Experiences up to which the cells of an accuracy matrix have room for their numbers."""

WIDTH = 5.5
"""Inches: the text width of the usual one-column styles."""

LABEL = 44
"""Characters in a line of a bar's label: about half of the width, which leaves the other half to the bars."""

QUANTITIES: Mapping[str, str] = {
    "drift": "drift (sd)",
    "weight_norm": "weight norm",
    "effective_learning_rate": "effective learning rate",
}
"""Diagnostics of the normalization view, and what they are called."""

_UNDATED: Mapping[str, Mapping[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


@dataclass(frozen=True)
class Drawing:
    """A figure that is drawn when its turn comes.

    Attributes:
        end: The end of its file's name.
        shows: What it shows, for a caption.
        draw: Draws it.
    """

    end: str
    shows: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class _Panel:
    """Curves in one pair of axes, and whether they are shares, shown in per cent."""

    curves: Curves
    share: bool = True


def write_figures(
    folder: Path, compared: Sequence[Comparison], *, figure_format: str = "pdf"
) -> Iterator[tuple[Path, str]]:
    """Write every figure that comparisons have the numbers for.

    Args:
        folder: Where to; made where it is not there. Files of the same names are replaced.
        compared: The comparisons.
        figure_format: ``pdf``, ``svg`` or ``png``.

    Yields:
        Each file once it is written, and what it shows.

    Raises:
        ConfigError: There is no such format.
        RecordError: A file cannot be written.
    """
    if figure_format not in FORMATS:
        raise ConfigError(f"The figure format is one of {', '.join(FORMATS)}; got {figure_format!r}.")
    taken: Counter[str] = Counter()
    for comparison in compared:
        for drawing in drawings(comparison):
            stem = f"{_slug(re.sub(r'[(][^)]*[)]', '', comparison.title))}-{drawing.end}"
            taken[stem] += 1
            path = folder / f"{stem}{f'-{taken[stem]}' if taken[stem] > 1 else ''}.{figure_format}"
            buffer = BytesIO()
            with styled():
                drawing.draw().savefig(buffer, format=figure_format, metadata=_UNDATED[figure_format])
            write_whole(path, buffer.getvalue())
            yield path, drawing.shows


def drawings(comparison: Comparison) -> list[Drawing]:
    """Return the figures that a comparison has the numbers for.

    Args:
        comparison: The comparison; of more than 12 methods the best 12 are shown.
    """
    figures = _Figures(comparison)
    found = [figures.bars(), *map(figures.swept, sweeps(comparison))]
    found += [figures.curve(label, partial(named, name=name)) for label, name in comparison.first.curves.items()]
    if comparison.kind == "continual" and not comparison.first.memorizes:
        found.append(figures.curve("forgetting", of_forgetting))
    found += [figures.by_domain(), *map(figures.matrix, figures.methods)]
    return [drawing for drawing in (*found, figures.normalization()) if drawing is not None]


class _Figures:
    """The figures of one comparison."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.methods = _best(comparison)
        self.looks = _looks(comparison, self.methods)
        self.bands = Bands(self.looks)
        self.step = comparison.first.unit

    def bars(self) -> Drawing | None:
        """Return the headline score of each method: its mean, interval and seeds, and a paper's number."""
        score = self.comparison.score(self.comparison.headline)
        told = [method for method in self.methods if score and score.key in method.scores]
        if score is None or not told:
            return None
        shown = score.key
        counts = sorted({method.scores[shown].n for method in told})
        seeds = f"{100 * LEVEL:g} % {told[0].scores[shown].method} interval, circles: seeds, n = {_range(counts)}"
        papers = ", diamonds: papers' numbers" if any(shown in method.paper for method in told) else ""
        shows = score.label + ("" if counts == [1] else f"; {seeds}") + papers

        def draw() -> Figure:
            labels = [plain(method.label, LABEL) for method in told]
            lines = max(label.count("\n") for label in labels)
            height = 0.7 + (0.26 + 0.13 * lines) * len(told)
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            axes = figure.add_subplot()
            for place, method in enumerate(told):
                _bar(axes, place, method, shown)
            axes.set_yticks(range(len(told)), labels)
            axes.invert_yaxis()
            axes.set_xlim(0, max(axes.get_xlim()[1], 100 * 1.12 * max(m.scores[shown].mean for m in told)))
            axes.grid(visible=False, axis="y")
            figure.supxlabel(shows.replace(score.label, f"{score.label} (%)", 1), fontsize="medium")
            figure.suptitle(plain(self.comparison.title, 90), x=0.01, ha="left", fontsize="medium")
            return figure

        return Drawing("comparison", self._caption(shows), draw)

    def swept(self, sweep: Sweep) -> Drawing | None:
        """Return the headline score against a setting that has several values: a line a method, intervals on it."""
        score = self.comparison.score(self.comparison.headline)
        lines = _swept(self.comparison, sweep)
        if score is None or not any(len(line) > 1 for line in lines.values()):
            return None
        n = _range(sorted({method.scores[score.key].n for line in lines.values() for _, method in line}))
        shows = self._caption(f"{score.label} against {sweep.label}; bars: {100 * LEVEL:g} % intervals, n = {n} seeds")

        def draw() -> Figure:
            figure = Figure(figsize=(WIDTH, 2.5 + legend_height(list(lines))), layout="constrained")
            axes = figure.add_subplot()
            looks = [_swept_line(axes, line, score.key, look(number)) for number, line in enumerate(lines.values())]
            axes.set_xlabel(sweep.label)
            axes.set_ylabel(f"{score.label} (%)")
            values = [value for line in lines.values() for value, _ in line]
            finish(axes, share=True)
            axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
            if min(values) > 0 and max(values) >= 10 * min(values):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
                axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value)))
            legend(figure, looks, list(lines), f"{100 * LEVEL:g} % intervals, n = {n} seeds")
            return figure

        return Drawing(f"{score.label.replace(' ', '_')}_against_{sweep.label}", shows, draw)

    def curve(self, label: str, curve_of: Callable[[Result], Curve]) -> Drawing | None:
        """Return an accuracy by round or experience; None where no run has two points of it."""
        curves = self._curves(curve_of)
        if not curves:
            return None
        shows = self._caption(f"{label} by {self.step}; {self.bands.told(curves)}")

        def draw() -> Figure:
            panels = {self.comparison.title: _Panel(curves)}
            return self._panels(panels, f"{label} (%)", height=2.5)

        return Drawing(f"{label.replace(' ', '_')}_by_{self.step}", shows, draw)

    def by_domain(self) -> Drawing | None:
        """Return the accuracy on each domain by round; None for summaries, which keep the means only."""
        names = [score.label for score in self.comparison.scores if score.key.startswith("per_domain.")]
        panels = {name: _Panel(self._curves(partial(of_domain, domain=name))) for name in names}
        panels = {name: panel for name, panel in panels.items() if panel.curves}
        if len(panels) < 2:
            return None
        shows = f"accuracy by round on each domain; {self.bands.told(next(iter(panels.values())).curves)}"
        return Drawing(
            "accuracy_by_round_and_domain", self._caption(shows), lambda: self._panels(panels, "accuracy (%)")
        )

    def normalization(self) -> Drawing | None:
        """Return drift of statistics, weight norm and effective learning rate by round or experience."""
        panels: dict[str, _Panel] = {}
        for quantity, label in QUANTITIES.items():
            if curves := self._curves(partial(of_diagnostic, quantity=quantity)):
                panels[label] = _Panel(curves, share=False)
        if not panels:
            return None
        told = self.bands.told(next(iter(panels.values())).curves)
        shows = f"{', '.join(panels)} by {self.step}, means over layers; {told}"
        return Drawing("normalization", self._caption(shows), lambda: self._panels(panels, ""))

    def matrix(self, method: Method) -> Drawing | None:
        """Return a method's accuracy matrix, the mean over its seeds, as a heat map."""
        cells = [[math.nan if v is None else 100 * v for v in row] for row in mean_matrix(method.results)]
        if len(cells) < 2:
            return None
        count = len(method.results)
        over = f"mean over n = {count} seeds" if count > 1 else "one seed"

        def draw() -> Figure:
            figure = Figure(figsize=(3.4, 3.0), layout="constrained")
            axes = figure.add_subplot()
            _heat(figure, axes, cells)
            axes.set_title(f"{plain(method.label, 48)}\n{over}")
            return figure

        shows = f"accuracy on each experience after each, {method.label}; {over}"
        return Drawing(f"accuracy_matrix-{_slug(method.label)}", shows, draw)

    def _panels(self, panels: Mapping[str, _Panel], ylabel: str, height: float = 1.7) -> Figure:
        """Return axes side by side under one legend; a method looks the same in all of them."""
        labels = list(dict.fromkeys(label for panel in panels.values() for label in panel.curves))
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(WIDTH, height * rows + legend_height(labels)), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False, sharey=bool(ylabel)).ravel()
        looks: list[Line2D] = []
        for number, (axes, (name, panel)) in enumerate(zip(places, panels.items(), strict=False)):
            placed = {label: panel.curves.get(label, ()) for label in labels}
            looks = self.bands.draw(axes, placed, 100 if panel.share else 1)
            axes.set_title(plain(name, 95 // columns))
            axes.set_xlabel(self.step)
            if number % columns == 0:
                axes.set_ylabel(ylabel)
        for axes, panel in zip(places, panels.values(), strict=False):
            finish(axes, share=panel.share)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        most = max((panel.curves for panel in panels.values()), key=len)
        legend(figure, looks, labels, self.bands.told(most))
        return figure

    def _curves(self, curve_of: Callable[[Result], Curve]) -> Curves:
        found = {method.label: [curve_of(result) for result in method.results] for method in self.methods}
        found = {label: [curve for curve in curves if curve] for label, curves in found.items()}
        return {label: curves for label, curves in found.items() if max(map(len, curves), default=0) > 1}

    def _caption(self, shows: str) -> str:
        cut = len(self.comparison.methods) - len(self.methods)
        return shows + (f"; the best {len(self.methods)} of {len(self.methods) + cut} methods" if cut else "")


def _best(comparison: Comparison) -> list[Method]:
    """Return the methods that are shown, in the comparison's order."""
    key, methods = comparison.headline, comparison.methods
    known = [method for method in methods if key in method.scores]
    kept = sorted(known, key=lambda method: -method.scores[key].mean)[:MOST_METHODS]
    return [method for method in methods if method in kept]


def _looks(comparison: Comparison, shown: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """Return how each method that is shown looks: rows of one method have its colour, in tones."""
    places = [place for place, method in zip(kin(comparison), comparison.methods, strict=True) if method in shown]
    order = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in places))}
    tones = {group: sorted(tone for other, tone in places if other == group) for group in order}
    return {
        method.label: look(order[group], tones[group].index(tone), len(tones[group]))
        for method, (group, tone) in zip(shown, places, strict=True)
    }


def _swept(comparison: Comparison, sweep: Sweep) -> dict[str, list[tuple[float, Method]]]:
    """Return by method its rows in order of the swept value; of several rows with one value the best."""
    names = group_names(comparison)
    best: dict[str, dict[float, Method]] = {}
    for method, value, (group, _) in zip(comparison.methods, sweep.values, kin(comparison), strict=True):
        if value is not None and (found := method.scores.get(comparison.headline)) is not None:
            line = best.setdefault(names[group], {})
            if value not in line or found.mean > line[value].scores[comparison.headline].mean:
                line[value] = method
    return {name: sorted(line.items(), key=lambda each: each[0]) for name, line in best.items()}


def _swept_line(axes: Axes, line: Sequence[tuple[float, Method]], key: str, looks: Mapping[str, Any]) -> Line2D:
    scores = [method.scores[key] for _, method in line]
    below = [0.0 if s.low is None else 100 * (s.mean - s.low) for s in scores]
    above = [0.0 if s.high is None else 100 * (s.high - s.mean) for s in scores]
    means = [100 * s.mean for s in scores]
    drawn = axes.errorbar(
        [value for value, _ in line], means, yerr=[below, above], capsize=2.5, elinewidth=0.8, **looks
    )
    main: Line2D = drawn.lines[0]
    return main


def _bar(axes: Axes, place: int, method: Method, key: str) -> None:
    found = method.scores[key]
    axes.barh(place, 100 * found.mean, height=0.62, color=COLOURS[0], alpha=0.35, edgecolor=COLOURS[0], linewidth=0.8)
    ends = percent(found.mean)
    right = found.mean
    if found.low is not None and found.high is not None:
        reach = [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
        axes.errorbar(100 * found.mean, place, xerr=reach, color="black", linewidth=1, capsize=2.5)
        right = max(right, found.high)
    values = [100 * value for result in method.results if (value := score_of(result, key)) is not None]
    if len(values) > 1:
        axes.plot(values, [place] * len(values), "o", markersize=3, markerfacecolor="white", color=COLOURS[3])
    if (paper := method.paper.get(key)) is not None:
        axes.plot(100 * paper.value, place, "D", markersize=4, markerfacecolor="none", color="black")
        right = max(right, paper.value)
    axes.annotate(ends, (100 * right, place), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _heat(figure: Figure, axes: Axes, cells: Sequence[Sequence[float]]) -> None:
    """Draw an accuracy matrix in per cent; grey where nothing was measured."""
    axes.set_facecolor("0.88")
    image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=100)
    axes.grid(visible=False)
    rows, columns = len(cells), len(cells[0])
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    image.set_extent(extent)
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.set_xlabel("accuracy on experience (%)")
    axes.set_ylabel("after experience")
    figure.colorbar(image, ax=axes, shrink=0.8)
    if max(rows, columns) <= MOST_NUMBERED:
        for row, values in enumerate(cells, start=1):
            for column, value in enumerate(values, start=1):
                if not math.isnan(value):
                    ink = "white" if value < 48 else "black"
                    axes.annotate(fixed(value, 0), (column, row), ha="center", va="center", color=ink, fontsize=7)


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _slug(text: str) -> str:
    """Return text as part of a file's name: at most 80 characters, none of which any system objects to."""
    return re.sub(r"[^a-z0-9_.=]+", "-", text.lower()).strip("-.")[:80] or "figure"
