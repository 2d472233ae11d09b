"""The README's made blocks: the answers so far, and what is there with links to the files."""

from __future__ import annotations

from pathlib import Path

from _make.blocks import ROOT, filled
from _make.results import answers
from fednorm.cards import FAMILIES, Card
from fednorm.study.recipes import recipe_names

README = ROOT / "README.md"


def page() -> str:
    """Return the README with its made blocks made anew."""
    return filled(README.read_text(encoding="utf-8"), {"answers": answers(), "what-is-there": catalogue()})


def catalogue() -> str:
    """Return a row a family: the names of its methods, each with a link to its file."""
    rows = ["| | |", "| --- | --- |"]
    for plural, family in FAMILIES.items():
        rows.append(f"| {plural} | {' '.join(f'[{card.name}]({file_of(card)})' for card in built_in(plural))} |")
        assert family.built_in
    links = (f"[{name}](fednorm/recipes/{name}.toml)" for name in recipe_names())
    return "\n".join([*rows, f"| studies | {' '.join(links)} |"])


def built_in(plural: str) -> list[Card]:
    """Return the cards of a family that ship, in the order of their names."""
    family = FAMILIES[plural]
    return [family[name] for name in family.built_in]


def file_of(card: Card) -> str:
    """Return the path of the file that declares a card, from the repository's root."""
    path = Path(*card.origin.split("."))
    package = ROOT / path / "__init__.py"
    return f"{path}/__init__.py" if package.exists() else f"{path}.py"
