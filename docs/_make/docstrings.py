"""Docstrings as autodoc reads them: formulas and examples that are indented become literal blocks."""

from __future__ import annotations

import re
from typing import Any

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Keyword Args|Example|Examples|Note|Notes|Warns):")
_ITEM = re.compile(r"\s*([*+-]|\d+[.)])\s")


def formulas_apart(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Mark every block that is indented under plain text as literal, in place."""
    lines[:] = marked(lines)


def marked(lines: list[str]) -> list[str]:
    """Return a docstring's lines with ``::`` before each indented block that no section, list or ``::`` opens."""
    made: list[str] = []
    within_section = literal = False
    base = 0
    for i, line in enumerate(lines):
        if not line.strip():
            made.append(line)
            continue
        indent = len(line) - len(line.lstrip())
        if literal and indent > base:
            made.append(line)
            continue
        literal = False
        if indent == 0:
            within_section = bool(_SECTION.fullmatch(line.strip()))
        before = next((other for other in reversed(lines[:i]) if other.strip()), "")
        opens = i > 0 and not lines[i - 1].strip() and indent > 0 and before.strip()
        if opens and not within_section and not before.rstrip().endswith("::") and not _ITEM.match(before):
            base = len(before) - len(before.lstrip())
            if indent > base:
                made += ["::", ""] if base == 0 else [" " * base + "::", ""]
                literal = True
        made.append(line)
    return made
