"""What a command says and where: results on standard output, all else on standard error; how it ends when it fails."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from fednorm.report.text import printable


def err() -> Console:
    """Return the console for everything that is not a result."""
    return _console(stderr=True)


def out() -> Console:
    """Return the console for results."""
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    """Return a console, wide when it is no terminal, so that no table and no line is cut."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=200)


class Stopped(SystemExit):
    """A command was stopped and has said what stands: no more words.

    Args:
        code: The exit code: 130 after Ctrl-C, 128 + its number after another signal.
    """

    def __init__(self, code: int = 130) -> None:
        super().__init__(code)


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def show_warnings() -> None:
    """Let a user's warnings be sentences on standard error, without the line of code that gave them."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, UserWarning):
            return shown(message, category, *where, **more)
        return err().print(f"[yellow]warning:[/] {escape(printable(str(message)))}", soft_wrap=True)

    warnings.showwarning = show


def fail(message: str, code: int = 2) -> NoReturn:
    """Say what went wrong on standard error, and leave."""
    with suppress(OSError):  # the terminal may be gone
        err().print(f"[bold red]error:[/] {escape(printable(message))}", soft_wrap=True)
    raise SystemExit(code)


def of_the_system(error: OSError) -> str:
    """Return the sentence for what the operating system refuses: a name that is too long, a full disk."""
    where = f" ({str(error.filename)[:200]})" if error.filename else ""
    return f"The system refuses: {error.strerror or error}{where}. Mend that or name another path, then call again."
