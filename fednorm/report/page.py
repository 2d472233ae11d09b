"""One self-contained HTML page of a comparison: it opens from disk, without a network.

Text goes into the page through Jinja2 with autoescape on, numbers and names as JSON that holds no ``<``; the scripts
put them into the document as text, never as markup. A Content-Security-Policy forbids the page every connection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednorm import __version__
from fednorm.errors import RecordError
from fednorm.report.comparison import Comparison, comparison_table
from fednorm.report.files import write_whole
from fednorm.report.page_data import document
from fednorm.report.sections import sections
from fednorm.report.verdict import verdict

if TYPE_CHECKING:
    from fednorm.records.results import Loaded

SCRIPTS = (
    "dom.js",
    "numbers.js",
    "theme.js",
    "charts.js",
    "methods.js",
    "table.js",
    "export.js",
    "headline.js",
    "sweep.js",
    "curves.js",
    "matrix.js",
    "grid.js",
    "layers.js",
    "roles.js",
    "runs.js",
    "main.js",
)
"""The page's own scripts, in the order in which they run; together they are one function's body."""


def write_page(path: Path, loaded: Loaded, *, baseline: str | None = None, interval: str = "t") -> None:
    """Write the page of some results.

    Args:
        path: The file; its folder is made where there is none.
        loaded: The results, and what was wrong with those that are missing.
        baseline: Label of the method that the others are compared with; that of the study if None.
        interval: ``t`` or ``bootstrap``.

    Raises:
        ConfigError: Results that cannot stand in one comparison, or an unknown baseline or interval.
        RecordError: There is no result, or the file cannot be written.
    """
    if not loaded.results:
        raise RecordError("A page needs at least one finished run, and there is none in what was given.")
    parts = sections(loaded, baseline=baseline, interval=interval)
    text = page(document(loaded, parts), [part.comparison for part in parts], folder=path.parent)
    write_whole(path, text)


def page(document: Mapping[str, Any], compared: Sequence[Comparison], *, folder: Path) -> str:
    """Return the page as text.

    Args:
        document: What :func:`~fednorm.report.page_data.document` returned.
        compared: The comparisons, for readers without scripts.
        folder: Where the page will lie; records are linked from there.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    assets = files("fednorm.report") / "assets"
    # What is marked as safe is the package's own, Plotly's (a test looks for ends of scripts in it), or escaped JSON.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((assets / "page.html.j2").read_text(encoding="utf-8"))
    own = "\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return template.render(
        title=document["title"],
        version=__version__,
        style=Markup((assets / "page.css").read_text(encoding="utf-8")),
        script=Markup(f'(() => {{\n"use strict";\n{own}\n}})();'),
        plotly=Markup(get_plotlyjs()),
        data=Markup(embeddable(_linked(document, folder))),
        tables=[(verdict(comparison), comparison_table(comparison)) for comparison in compared],
    )


def embeddable(document: Mapping[str, Any]) -> str:
    """Return a document as JSON that can stand in a ``<script>``: without ``<``, ``>`` and ``&``, which it escapes.

    Neither ``</script>`` nor ``<!--`` can then end or change the element it stands in.

    Raises:
        ValueError: It holds a number that JSON has not.
    """
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _linked(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the document with each run's folder as its name and, where it is there, the way to it from the page."""
    sections = [
        {**section, "runs": [{**run, **_folder(run["folder"], folder)} for run in section["runs"]]}
        for section in document["sections"]
    ]
    return {**document, "sections": sections}


def _folder(run: str | None, page_folder: Path) -> dict[str, str | None]:
    if not run:
        return {"folder": None, "link": None}
    there = Path(run)
    link = None
    if (there / "result.json").is_file():
        try:
            link = Path(os.path.relpath(there.resolve(), page_folder.resolve())).as_posix()
        except ValueError:  # another drive
            link = None
    return {"folder": there.name, "link": link}
