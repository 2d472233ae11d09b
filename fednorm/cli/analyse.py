"""``fednorm analyse``: measure what papers say that a normalization does to a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fednorm.analyses import ANALYSES, Setup, analyse, analysis_of
from fednorm.cli.console import err, print_json
from fednorm.cli.options import names
from fednorm.cli.report import show
from fednorm.errors import ConfigError, RecordError
from fednorm.limits import shown
from fednorm.report.table import Table


def run_analyse(
    name: str | None,
    *,
    data: str,
    data_dir: Path | None,
    seeds: str,
    steps: int,
    out: Path | None,
    markdown: bool,
    as_json: bool,
) -> None:
    """Make an analysis and print its table; without a name, list them.

    Args:
        name: The analysis, or the file of one that was made.
        data: The benchmark.
        data_dir: The folder of the real data.
        seeds: Numbers with commas between.
        steps: Updates of each training; 0 for the analysis's own number.
        out: Where to write the document, too.
        markdown: Whether the table is printed in Markdown.
        as_json: Whether the document is printed instead.

    Raises:
        FedNormError: There is no such analysis, or the data cannot be had.
    """
    style = "markdown" if markdown else "table"
    if name is None:
        return (
            print_json({"analyses": [_about(known) for known in ANALYSES]}) if as_json else show(_list(), style=style)
        )
    if name.endswith(".json"):
        document = _read(Path(name))
    else:
        analysis_of(name)
        folder = "" if data_dir is None else str(data_dir)
        setup = Setup(data=data, data_dir=folder, seeds=_numbers(seeds), steps=steps)
        document = analyse(name, setup, on_line=lambda line: err().print(line, markup=False))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        return print_json(document)
    return show(analysis_of(document["analysis"]).table(document), style=style)


def _numbers(written: str) -> tuple[int, ...]:
    parts = names(written, ())
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds takes numbers with commas between, e.g. 1,2,3; got {shown(written)}.")
    return tuple(map(int, parts))


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        analysis_of(document["analysis"]).table(document)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no file {path}. Give the name of an analysis ({', '.join(ANALYSES)}), or a file that --out made."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path} is no document of an analysis: fednorm analyse NAME --out {path} writes one."
        ) from error
    return document


def _about(name: str) -> dict[str, Any]:
    analysis = ANALYSES[name]
    return {"name": name, "title": analysis.title, "about": analysis.about, "papers": list(analysis.papers)}


def _list() -> Table:
    rows = tuple((name, analysis.about, ", ".join(analysis.papers)) for name, analysis in ANALYSES.items())
    return Table("Analyses", ("name", "question", "arXiv"), rows, ("'fednorm analyse NAME' makes one, in minutes.",))
