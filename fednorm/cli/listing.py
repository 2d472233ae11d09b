"""``fednorm list``: what is there, a line each, from the methods' own cards, most of which need no import for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from fednorm.cards import FAMILIES
from fednorm.cli.console import out, print_json
from fednorm.cli.reading_list import NOT_APPLICABLE
from fednorm.config import read_config
from fednorm.errors import ConfigError, canonical, unknown_name
from fednorm.study.recipes import find_study, recipe_names

Row = dict[str, Any]


def _studies() -> list[Row]:
    about = {name: read_config(find_study(name)).get("study", {}) for name in recipe_names()}
    return [{"name": name, "summary": table.get("title", "")} for name, table in about.items()]


def _cards(what: str) -> list[Row]:
    family = FAMILIES[what]
    rows = []
    for name in family.names:
        row = {field: family.stated(name, field, "") for field in ("name", "summary")}
        if what == "data":
            row["note"] = family.stated(name, "note", "")
        if reconstruction := family.stated(name, "reconstruction", ""):
            row["reconstruction"] = reconstruction
        rows.append(row)
    return rows


def run_list(what: str, *, every: bool = False, as_json: bool) -> None:
    """List the names of a kind with a line each.

    Args:
        what: The kind; may be empty where ``every`` is set.
        every: List all kinds if none is named, and the papers of the reading list that have no place here.
        as_json: Print one JSON document.

    Raises:
        ConfigError: No kind is named.
        UnknownNameError: There is no such kind.
    """
    kinds = (*FAMILIES, "studies")
    what = canonical(what)
    if not what and not every:
        raise ConfigError(f"What is to be listed: {', '.join(kinds)}, or all of it (--all)?")
    if what and what not in kinds:
        raise unknown_name("list", what, kinds)
    found = {kind: _studies() if kind == "studies" else _cards(kind) for kind in ((what,) if what else kinds)}
    absent: list[Row] = [
        {"name": paper.name, "why": paper.why, "citation": dataclasses.asdict(paper.citation)}
        for paper in NOT_APPLICABLE
    ]
    if as_json:
        return print_json({**found, **({"not_applicable": absent} if every else {})})
    for kind, rows in found.items():
        if every:
            out().print(f"{kind}:", markup=False)
        _print_rows(kind, rows)
    if every:
        from fednorm.cli.identity import cited  # imports PyTorch

        out().print("not applicable to an image classifier, of the reading list:", markup=False)
        _print_rows("", [{"name": p["name"], "summary": p["why"], "note": cited(p["citation"])} for p in absent])
    return None


def _print_rows(what: str, rows: list[Row]) -> None:
    width = max((len(row["name"]) for row in rows), default=0)
    if rows and out().is_terminal:
        return _print_for_a_person(rows)
    for row in rows:
        mark = "[reconstruction, unverified]" if row.get("reconstruction") else ""
        lines = [row.get("summary", ""), mark, row.get("note", "")]
        out().print(f"{row['name']:<{width}}  {' '.join(line for line in lines if line)}", markup=False, soft_wrap=True)
    if not rows:
        out().print(f"There are no {what} yet.")
    return None


def _print_for_a_person(rows: list[Row]) -> None:
    """Print names beside what they are, broken between words; notes stand beneath, dim."""
    grid = Table.grid(Column(no_wrap=True), Column(), padding=(0, 2, 0, 0))
    for row in rows:
        lines = Text(row.get("summary", ""))
        if row.get("reconstruction"):
            lines.append("\nreconstruction, unverified", style="yellow")
        if row.get("note"):
            lines.append(f"\n{row['note']}", style="dim")
        grid.add_row(Text(row["name"], style="bold"), lines)
    out().print(grid)
