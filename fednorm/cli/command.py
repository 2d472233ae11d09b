"""What Click runs, made of the application once a process, and of each command only what is asked for."""

from __future__ import annotations

import copy
import inspect
from functools import cache, cached_property
from typing import Any

import click
import typer
from typer.core import TyperCommand
from typer.main import get_command_name
from typer.models import CommandInfo


@cache
def command_of(app: typer.Typer) -> Any:
    """Return an application's command, in which a misspelt one is told what was meant, once."""
    command: Any = typer.main.get_command(_without_commands(app))
    _fill(command, app)
    if hasattr(click.exceptions, "NoSuchCommand"):  # then Click says it, and Typer would once more
        for group in (command, *command.commands.values()):
            group.suggest_commands = False
    return command


def _without_commands(app: typer.Typer) -> typer.Typer:
    """Return an application with its groups, and theirs, and no command in any of them."""
    bare = copy.copy(app)
    bare.registered_commands = []
    bare.registered_groups = [copy.copy(info) for info in app.registered_groups]
    for info in bare.registered_groups:
        info.typer_instance = _without_commands(_app_of(info))
    return bare


def _fill(group: Any, app: typer.Typer) -> None:
    """Put an application's commands before the groups that its command has already, as Typer does."""
    for info in app.registered_groups:
        _fill(group.commands[info.name], _app_of(info))
    group.commands = {command.name: command for command in map(_Later, app.registered_commands)} | group.commands


def _app_of(info: Any) -> typer.Typer:
    app: typer.Typer = info.typer_instance
    return app


class _Later(TyperCommand):
    """A command's name and help. It is made of its function, parameter by parameter, when it is called.

    To read the parameters of all commands takes longer than most that one of them does.
    """

    def __init__(self, info: CommandInfo) -> None:
        callback = info.callback
        super().__init__(
            name=info.name or get_command_name(getattr(callback, "__name__", "")),
            help=inspect.getdoc(callback) if info.help is None else inspect.cleandoc(info.help),
            short_help=info.short_help,
            hidden=info.hidden,
            deprecated=info.deprecated,
            rich_help_panel=info.rich_help_panel,
        )
        self._info = info

    @cached_property
    def made(self) -> Any:
        """The command itself."""
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.registered_commands = [self._info]
        return typer.main.get_command(alone)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return the context of a call of the command itself, which is then its context's."""
        return self.made.make_context(*args, **kwargs)
