"""The tree of commands: made of each command only what is asked for, it is the one that Typer makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from click.testing import CliRunner

from fednorm.cli.app import app
from fednorm.cli.command import command_of


def leaves(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, *path, name)
    yield path


def found(command: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        command = command.commands[name]
    return command


WHOLE = typer.main.get_command(app)


def test_the_same_commands_stand_in_the_same_order() -> None:
    assert list(leaves(command_of(app))) == list(leaves(WHOLE))


@pytest.mark.parametrize("path", list(leaves(WHOLE)), ids=" ".join)
def test_a_command_helps_as_typers_does(path: tuple[str, ...]) -> None:
    lazily = CliRunner().invoke(command_of(app), [*path, "--help"], prog_name="fednorm")
    eagerly = CliRunner().invoke(WHOLE, [*path, "--help"], prog_name="fednorm")
    assert lazily.exit_code == eagerly.exit_code == 0
    assert lazily.output == eagerly.output


@pytest.mark.parametrize("path", [("federated",), ("bench", "engine")], ids=" ".join)
def test_a_command_parses_what_typers_does(path: tuple[str, ...]) -> None:
    mine, typers = found(command_of(app), path), found(WHOLE, path)
    assert mine.make_context(path[-1], []).params == typers.make_context(path[-1], []).params


def test_parameters_are_read_when_a_command_is_called() -> None:
    command = found(command_of.__wrapped__(app), ("demo",))
    assert not command.params
    assert [p.name for p in command.make_context("demo", []).command.params] == [
        p.name for p in found(WHOLE, ("demo",)).params
    ]
