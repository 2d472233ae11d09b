"""How figures look: colours and lines for colour-blind readers and grey print, seed bands, legends, embedded fonts.

Colours are those of Okabe and Ito (2008, Color Universal Design). Nothing of matplotlib's global state is kept changed,
and pyplot, which has such state, is not used.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fednorm.report.curves import Curve
from fednorm.study.statistics import LEVEL
from fednorm.study.statistics import interval as interval_of

Curves = Mapping[str, Sequence[Curve]]
"""The curves of each method's runs, by the method's label."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's palette without its yellow, which white paper swallows."""

LINES = ("-", "--", ":", "-.")

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")

MARKED = 8
"""Steps of a line that have a marker, about."""

STYLE: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType, embedded: publishers refuse Type 3
    "svg.fonttype": "path",
    "svg.hashsalt": "fednorm",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 3.4,
    "savefig.dpi": 300,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in our style, whatever the user's own matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # a box in the picture tells as much
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def plain(text: str, width: int = 1000) -> str:
    """Return text that matplotlib shows as it is, for it reads formulas between dollar signs, in lines of a width."""
    return textwrap.fill(text, width).replace("$", r"\$")


def look(number: int, tone: int = 0, tones: int = 1) -> dict[str, Any]:
    """Return the colour, line and marker of the method with a number; 308 methods are told apart.

    Args:
        number: Of the method; where a setting of it is swept, of what all its rows share.
        tone: Of a row among those that share a number: the first has the full colour, the others lighter ones.
        tones: How many rows share it.
    """
    pale = 0.6 * tone / max(1, tones - 1)
    red, green, blue = (part + (1 - part) * pale for part in to_rgb(COLOURS[number % len(COLOURS)]))
    return {
        "color": to_hex((red, green, blue)).upper(),
        "linestyle": LINES[(number if tones == 1 else tone) % len(LINES)],
        "marker": MARKERS[(number if tones == 1 else tone) % len(MARKERS)],
    }


class Bands:
    """Mean lines over seeds, with bands: Student's t intervals, as on the page.

    A bootstrap is for the few numbers of a table; a page's scripts, which draw bands of what a reader picks, have none.

    Args:
        looks: How each method looks, by its label; by its place among the others where it is not named.
    """

    ENOUGH = 3
    """Seeds from which a band is an interval: with two, Student's t interval is 9 standard deviations wide each way."""

    def __init__(self, looks: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._looks = looks or {}

    def draw(self, axes: Axes, curves: Curves, scale: float = 1.0) -> list[Line2D]:
        """Draw the line and the band of each method, over the steps that all of its runs have.

        Args:
            axes: Where to.
            curves: The curves.
            scale: What values are multiplied by; 100 for per cent.

        Returns:
            The lines, one a method.
        """
        lines: list[Line2D] = []
        for number, (label, runs) in enumerate(curves.items()):
            shared = sorted(set.intersection(*map(set, runs))) if runs else []
            values = [[scale * run[step] for run in runs] for step in shared]
            every = max(1, len(shared) // MARKED)
            lines += axes.plot(shared, list(map(mean, values)), markevery=every, **self._looks.get(label, look(number)))
            if shared and len(runs) > 1:
                low, high = zip(*(self._ends(each, scale) for each in values), strict=True)
                axes.fill_between(shared, low, high, color=lines[-1].get_color(), alpha=0.14, linewidth=0)
        return lines

    def told(self, curves: Curves) -> str:
        """Return what the lines and bands of these curves are, for a legend."""
        counts = {len(runs) for runs in curves.values() if runs}
        few, most = min(counts), max(counts)
        if most == 1:
            return "one seed, no band"
        bands = [f"{100 * LEVEL:g} % t interval"] if most >= self.ENOUGH else []
        bands += ["lowest to highest" + (" where n = 2" if bands else "")] if 2 in counts else []
        return f"mean over n = {f'{few} to ' if few < most else ''}{most} seeds, band: {', '.join(bands)}"

    def _ends(self, values: Sequence[float], scale: float) -> tuple[float, float]:
        # A scale of 100 is that of shares; none of their means is above it, and those of forgetting are not below -100.
        within = (0.0 if min(values) >= 0 else -scale, scale) if scale != 1 else None
        found = interval_of(values, within=within) if len(values) >= self.ENOUGH else None
        if found is None or found.low is None or found.high is None:
            return min(values), max(values)
        return found.low, found.high


def finish(axes: Axes, *, share: bool) -> None:
    """Set the axes' limits and ticks: no accuracy leaves 0 to 100 %, whatever its band; few whole steps.

    Call it when all that shares an axis is drawn: limits that are set do not grow. Other quantities get a logarithmic
    axis where they span a factor of ten or more.
    """
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if share:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2), min(high, 102))
        return
    values = [float(y) for line in axes.lines for y in np.asarray(line.get_ydata())]
    if values and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_yscale("log")


def legend(figure: Figure, lines: Sequence[Line2D], labels: Sequence[str], title: str) -> None:
    """Put a legend under a figure; its title says what lines and bands are."""
    figure.legend(
        handles=list(lines),
        labels=[plain(label, LEGEND) for label in labels],
        title=title,
        loc="outside lower left",
        ncols=_columns(labels),
        alignment="left",
    )


LEGEND = 85
"""Characters in a line of a legend that has one column."""


def legend_height(labels: Sequence[str]) -> float:
    """Return the inches that :func:`legend` needs."""
    columns = _columns(labels)
    heights = [plain(label, LEGEND).count("\n") + 1 for label in labels]
    rows = -(-len(labels) // columns)
    # Labels go down a column and then into the next.
    deepest = max(sum(heights[first : first + rows]) for first in range(0, len(labels), rows))
    return 0.15 * (1 + deepest) + 0.1


def _columns(labels: Sequence[str]) -> int:
    """Return how many labels stand side by side: a line has room for about 95 characters, and a handle takes ten."""
    return max(1, min(len(labels), 95 // (10 + max(map(len, labels)))))
