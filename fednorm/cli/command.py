"""What Click runs, made of the application once a process."""

from __future__ import annotations

from functools import cache
from typing import Any

import click
import typer


@cache
def command_of(app: typer.Typer) -> Any:
    """Return an application's command, in which a misspelt one is told what was meant, once."""
    command: Any = typer.main.get_command(app)
    if hasattr(click.exceptions, "NoSuchCommand"):  # then Click says it, and Typer would once more
        for group in (command, *command.commands.values()):
            group.suggest_commands = False
    return command
