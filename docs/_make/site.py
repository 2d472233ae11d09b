"""The Sphinx extension: writes the pages and figures that are made, and sets formulas without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from _make import docstrings, figures, mathml, methods, reference, results
from _make.blocks import DOCS
from fednorm.cards import NORMS
from fednorm.report.figures import write_figures
from fednorm.report.page import write_page

MADE = DOCS / "_made"
"""Figures; like the made pages it is not kept in the repository."""

FIGURES: dict[str, list[tuple[Path, str]]] = {}
"""The figures of each summary, with what they show."""

WITHOUT_PAGE = ("matrix", "digits_tuning", "online_cifar10_tuning")
"""Summaries for which no interactive page is written: tables say it all."""


def write_pages(_app: Sphinx) -> None:
    """Write every made page and figure; a file that says the same already is left alone, and not built again."""
    made = dict([*methods.pages(), *reference.pages()])
    for path, text in made.items():
        _write(DOCS / path, text)
    for path in DOCS.glob("methods/*/*.md"):  # of methods that are gone
        if str(path.relative_to(DOCS)) not in made:
            path.unlink()
    for name in NORMS.built_in:
        figures.norm_figure(name, MADE / f"norms/{name}.svg")
    figures.architecture_figure(MADE / "architecture.svg")
    for name in results.shown():
        if name not in WITHOUT_PAGE:
            folder = MADE / "results" / name
            FIGURES[name] = list(write_figures(folder, results.compared(name), figure_format="svg"))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def add_figures(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Put a study's figures, and the way to its interactive page, at the end of its page."""
    folder, _, name = docname.partition("/")
    if folder != "results" or name in WITHOUT_PAGE or name not in results.shown():
        return
    images = [
        f"```{{figure}} ../_made/results/{name}/{path.name}\n:alt: {shows}\n\n{shows[0].upper()}{shows[1:]}.\n```"
        for path, shows in FIGURES[name]
    ]
    link = f'<a class="external" href="../pages/{name}.html">The interactive page</a>'
    about = "sorts, filters, opens seeds, and shows curves by domain, layer by layer."
    source[0] += "\n\n".join(["\n## Figures", f"{link} {about}", *images]) + "\n"


def write_interactive_pages(app: Sphinx, error: Exception | None) -> None:
    """Write each study's interactive page beside the site."""
    if error is not None or app.builder.name != "html":
        return
    folder = Path(app.outdir) / "pages"
    folder.mkdir(exist_ok=True)
    for name in results.shown():
        if name not in WITHOUT_PAGE:
            write_page(folder / f"{name}.html", results.summary(name))


def results_again(_app: Sphinx, env: Any, *_changes: Any) -> list[str]:
    """Have the results' pages read again in every build: their figures are no part of their files."""
    return [name for name in env.found_docs if name.startswith("results/")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Let Sphinx know."""
    app.connect("builder-inited", write_pages)
    app.connect("env-get-outdated", results_again)
    app.connect("source-read", add_figures)
    app.connect("build-finished", write_interactive_pages)
    app.connect("autodoc-process-docstring", docstrings.formulas_apart, priority=400)
    app.add_node(mathml.nodes.math, override=True, html=(mathml.visit_math, None))
    app.add_node(mathml.nodes.math_block, override=True, html=(mathml.visit_math_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
