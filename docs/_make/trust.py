"""The pages of docs/trust that commands and tests make: replayed traces, and what was done to break things."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from _make.blocks import DOCS, ROOT, filled
from _make.methods import cell
from fednorm.verify.golden import replay_folder

PAGES = DOCS / "trust"
TRACES = ROOT / "tests/golden"
TESTS = ROOT / "tests"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the pages and what they say with their blocks made anew."""
    for name, blocks in (("golden.md", {"golden": golden()}), ("faults.md", {"faults": faults()})):
        path = PAGES / name
        yield path, filled(path.read_text(encoding="utf-8"), blocks)


@cache
def golden() -> str:
    """Return what ``fednorm verify golden`` finds, without the errors' last digits, which are the machine's."""
    rows = ["| trace | | |", "| --- | --- | --- |"]
    for replay in replay_folder(TRACES):
        what = f"{replay.method}: " if replay.method else ""
        rows.append(f"| {replay.file.stem} | {replay.status.value} | {cell(what + replay.detail)} |")
    return "\n".join(rows)


# Faults ---------------------------------------------------------------------------------------------------------------


def faults() -> str:
    """Return the table of faults: what was tried, what happens, and the tests that try it."""
    parts = []
    for group in groups():
        rows = [f"**{group['title']}**", "", "| what was done | what happens | tests |", "| --- | --- | --- |"]
        for row in group["fault"]:
            tests = "<br>".join(f"`{test.partition('::')[2]}`" for test in row["tests"])
            rows.append(f"| {cell(row['done'])} | {cell(row['happens'])} | {tests} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def groups() -> list[dict[str, object]]:
    """Return the groups of faults as they are written down in ``faults.toml``."""
    return tomllib.loads((PAGES / "faults.toml").read_text(encoding="utf-8"))["group"]  # type: ignore[no-any-return]


@cache
def tests_of(path: str) -> frozenset[str]:
    """Return the names of the tests in a file below ``tests``."""
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))
