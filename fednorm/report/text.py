"""Text that came from a configuration or a record, as it may be shown and written: never a command, never a formula.

A label, a title or a note is whatever somebody called a folder, a study or a method. A terminal obeys escapes, a
spreadsheet computes cells that begin with ``=``, Markdown passes HTML and TeX on: each gets text that it shows.
"""

from __future__ import annotations

import re
import unicodedata

_FORMULA = re.compile(r"^[=+\-@\t\r]")
_REORDERING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


def printable(text: str) -> str:
    r"""Return text without anything that a terminal obeys: such characters are written out, ESC as ``\x1b``.

    Line breaks stay, and so do letters of every script. Control characters, lone surrogates and the marks that reorder
    text are written out.
    """
    if text.isprintable():  # most are; of what reorders text, nothing is printable
        return text
    return "".join(c if c == "\n" or not _is_obeyed(c) else _written_out(c) for c in text)


def _is_obeyed(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _REORDERING


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Return text as :func:`printable` does, in one line."""
    return printable(re.sub(r"\s*[\r\n\x85\u2028\u2029]+\s*", " ", text))


def in_markdown(text: str) -> str:
    r"""Return one line of text as Markdown that shows it: no HTML, no code, no link, no TeX.

    What cannot be mistaken stays as it is, so that tables can be read as they are: underscores within words, brackets
    of intervals.
    """
    text = one_line(text).replace("\\", r"\\").replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([`$*])", r"\\\1", text)
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)
    return re.sub(r"^(\s*)([#>+-]|\d+[.)])(?=\s)", r"\1\\\2", text)


def in_cell(text: str) -> str:
    """Return text as Markdown within a table, whose columns it leaves alone."""
    return in_markdown(text).replace("|", r"\|")


def in_csv(cell: str) -> str:
    """Return a cell of text that no spreadsheet takes for a formula: one that could be has an apostrophe before it."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def file_name(text: str, most: int = 80) -> str:
    """Return text as part of a file's name: letters, digits and ``_.=-``, no separator, at most so many characters."""
    return re.sub(r"[^\w.=]+", "-", text.encode("ascii", "ignore").decode()).strip("-.")[:most] or "unnamed"
