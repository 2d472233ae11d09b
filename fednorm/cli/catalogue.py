"""``fednorm list`` and ``fednorm explain``: what is there, from the methods' own cards."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from importlib import import_module
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from fednorm.cards import FAMILIES, Card, is_path
from fednorm.cli.console import out, print_json
from fednorm.cli.explain import explained
from fednorm.cli.identity import cited, roles_of_kinds, roles_of_tensors, text_of
from fednorm.cli.reading_list import NOT_APPLICABLE
from fednorm.config import read_config
from fednorm.errors import ConfigError, FedNormError, canonical, unknown_name
from fednorm.federation.spec import StrategySpec
from fednorm.spec import NormSpec
from fednorm.streams.learner import LearnerSpec
from fednorm.study.recipes import find_study, recipe_names

Row = dict[str, Any]


def _studies() -> list[Row]:
    about = {name: read_config(find_study(name)).get("study", {}) for name in recipe_names()}
    return [{"name": name, "summary": table.get("title", "")} for name, table in about.items()]


def _cards(what: str) -> list[Row]:
    return [
        {
            "name": card.name,
            "summary": card.summary,
            **({"note": card.note} if hasattr(card, "note") else {}),
            **({"reconstruction": card.reconstruction} if card.reconstruction else {}),
        }
        for card in FAMILIES[what]
    ]


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


def run_explain(name: str, *, as_json: bool) -> None:
    """Explain one name, wherever it is registered, or what an import path names."""
    if explained(name, as_json=as_json):
        return None
    found = _described(name)
    if as_json:
        return print_json(found)
    out().print(text_of(found), markup=False, soft_wrap=True)
    return None


def _described(name: str) -> Row:
    """Return what the first family that has a name says of it."""
    if is_path(name):
        return _of_path(name)
    for family in FAMILIES.values():
        if canonical(name) in family.names:
            return _card(family.noun, family[name])
    raise AssertionError(name)  # fednorm.cli.explain has refused it


def _of_path(name: str) -> Row:
    reasons = []
    for family in FAMILIES.values():
        try:
            return _card(family.noun, family[name])
        except FedNormError as error:
            reasons.append(str(error))
    raise ConfigError(reasons[0])


def _card(what: str, card: Card) -> Row:
    """Return everything that a card declares, as plain values."""
    citation = dataclasses.asdict(card.citation) if card.citation else None
    named = {"what": what, "name": card.name, "summary": card.summary, "citation": citation}
    rest = {field.name: getattr(card, field.name) for field in dataclasses.fields(card) if field.name not in named}
    facts = {key: _plain(value) for key, value in rest.items() if key not in ("make", "load", "layers", "origin")}
    if isinstance(card, NormSpec):
        facts["tensors"] = {
            key: {**facts["tensors"][key], "roles": roles} for key, roles in roles_of_tensors(card).items()
        }
    elif isinstance(card, StrategySpec):
        facts["roles"] = roles_of_kinds(card.make.rule)
    return {**named, "options": _plain(card.options), "about": _about(card), **facts}


def _about(card: Card) -> str:
    """Return the text at the head of the method's file, and that of its options' records."""
    module = sys.modules.get(card.origin) or import_module(card.origin)
    about = [inspect.cleandoc(module.__doc__ or "")]
    if isinstance(card, LearnerSpec):
        # A record of options documents its own and leaves the rest to the one that it extends.
        records = [cls for cls in reversed(card.maker.__mro__) if dataclasses.is_dataclass(cls) and card.declared]
        about += [inspect.getdoc(record) or "" for record in records if dataclasses.fields(record)]
    return "\n\n".join(about).strip()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list | frozenset) else value
