"""What ``fednorm`` says by itself: the jobs it does, with a line to type for each."""

from __future__ import annotations

from typing import Annotated

import typer

import fednorm
from fednorm.cli.console import out

JOBS: tuple[tuple[str, str, str], ...] = (
    ("look", "fednorm demo", "Three minutes, no data folder; ends in a page."),
    ("clients", "fednorm federated --strategy fedbn", "Five clients, each with digits of its own kind."),
    ("a stream", "fednorm continual --norm adab2n --online", "Two digits at a time, seen once, with a small memory."),
    (
        "compare",
        "fednorm compare digits_small --data-dir DIR",
        "A study: methods, settings, seeds; goes on where it stopped.",
    ),
)
"""A job, what to type, and what comes of it."""


def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Answer a call without a command: what fednorm does, or its version."""
    if version:
        say_version()
    elif context.invoked_subcommand is None:
        say_welcome()
    else:
        return
    raise typer.Exit


def say_welcome() -> None:
    """Print what fednorm is for, and an example of each of its jobs."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    for job in JOBS:
        table.add_row(*job)
    out().print("What should a network's normalization do when its data is not one distribution?\n")
    out().print(table)
    out().print(
        "\nWhat there is: fednorm list norms (strategies, learners, …). What one is: fednorm explain NAME.\n"
        "All commands: fednorm --help."
    )


def say_version() -> None:
    """Print the version alone."""
    out().print(f"fednorm {fednorm.__version__}", markup=False)
