"""Docstrings as Markdown: what is plain text in a source file, as a page shows it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

_CODE = re.compile(r"(``.+?``|`[^`]+`)", flags=re.DOTALL)
_ROLE = re.compile(r":(?:py:)?\w+:`~?([^`<]+?)(?: <[^`]+>)?`")
_LINK = re.compile(r"(?<![<(\w/])(https?://[^\s)>,]+[^\s)>,.;])")
_EMPHASIS = re.compile(r"((?<![\w*])\*{1,2}[^\s*](?:[^*]*[^\s*])?\*{1,2}(?![\w*]))")
_STAR = re.compile(r"(?<!^)\*|^\*(?! )", flags=re.MULTILINE)  # but for those that begin an item
_ARXIV = re.compile(r"\barXiv:? ?(\d{4}\.\d{4,5})")


def markdown(docstring: str) -> str:
    """Return a module's or class's docstring as Markdown.

    Paragraphs and lists stay what they are; indented blocks, which hold formulas, become preformatted text.
    """
    return "\n\n".join(_block(block) for block in _blocks(inspect.cleandoc(docstring)))


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield the blocks that empty lines separate; neighbouring preformatted ones are one."""
    kept: list[str] = []
    for lines in _paragraphs(text):
        if kept and _is_formula(kept) and _is_formula(lines):
            kept += ["", *lines]
            continue
        if kept:
            yield kept
        kept = list(lines)
    if kept:
        yield kept


def _paragraphs(text: str) -> Iterator[list[str]]:
    """Yield what empty lines separate, and what begins as such sentences of our files do."""
    for block in re.split(r"\n\s*\n", text):
        if block.strip():
            yield from (part.split("\n") for part in re.split(r"\n(?=(?:Federated|Continual|Differs)\b)", block))


def _is_formula(lines: list[str]) -> bool:
    return all(line.startswith("    ") or not line for line in lines)


def _block(lines: list[str]) -> str:
    if _is_formula(lines):
        shift = min(len(line) - len(line.lstrip()) for line in lines if line)
        return "\n".join(["```text", *(line[shift:] for line in lines), "```"])
    head, *body = lines
    if head.endswith(":") and body and _is_formula(body):  # Args: and the like
        return f"**{head}**\n\n" + "\n".join(_items(body))
    return text("\n".join(lines))


def _items(lines: list[str]) -> Iterator[str]:
    for line in lines:
        name, colon, rest = line.strip().partition(":")
        if line.startswith("     "):
            yield f"  {text(line.strip())}"
        elif colon and re.fullmatch(r"[\w*, ().|\[\]]+", name):
            yield f"* `{name}`: {text(rest.strip())}"
        else:
            yield text(line.strip())


def text(line: str) -> str:
    """Return a line of plain text with ``code`` as Markdown that shows it as it is."""
    line = _ROLE.sub(lambda role: f"``{role[1].removeprefix('~').rpartition('.')[2] or role[1]}``", line)
    parts = _CODE.split(line)
    return "".join(part if i % 2 else _plain(part) for i, part in enumerate(parts))


def _plain(part: str) -> str:
    part = part.replace("\\", "\\\\").replace("<", "\\<").replace("[", "\\[")
    pieces = _EMPHASIS.split(part)
    part = "".join(piece if k % 2 else _STAR.sub(r"\\*", piece) for k, piece in enumerate(pieces))
    part = _LINK.sub(r"<\1>", part)
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", part)
