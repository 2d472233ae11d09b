"""Made blocks: what stands in a page between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is written by a command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

COMMAND = "python docs/make.py"
"""What writes all made blocks anew."""


def names(text: str) -> list[str]:
    """Return the names of the made blocks of a page, in order."""
    return re.findall(r"^<!-- /([\w-]+) -->$", text, flags=re.MULTILINE)


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """Return a page with its made blocks filled.

    Raises:
        KeyError: The page has no place for a block.
    """
    for name, made in blocks.items():
        pattern = re.compile(rf"(^<!-- {name} -->\n).*?(^<!-- /{name} -->$)", flags=re.DOTALL | re.MULTILINE)
        if not pattern.search(text):
            raise KeyError(f"the page has no place <!-- {name} --> … <!-- /{name} -->")
        text = pattern.sub(lambda found, made=made: f"{found[1]}\n{made.strip()}\n\n{found[2]}", text)
    return text
