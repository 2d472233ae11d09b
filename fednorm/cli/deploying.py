"""``fednorm new`` and ``fednorm deploy``: the commands that write files to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fednorm.errors import ConfigError
from fednorm.signals import starting


@dataclass(frozen=True)
class Target:
    """Which SuperLink a command names, and how it is to be spoken to.

    Attributes:
        superlink: Its address; empty for none.
        root_certificates: The file that its certificate is checked against.
        insecure: Whether the connection need not be encrypted.
    """

    superlink: str = ""
    root_certificates: Path | None = None
    insecure: bool = False

    def require_none(self) -> None:
        """Refuse what only a deployed run has.

        Raises:
            ConfigError: Any of it is given.
        """
        if self != Target():
            raise ConfigError(
                "--superlink, --root-certificates and --insecure are for runs on real nodes: add --runtime deployment."
            )


deploy_app = typer.Typer(no_args_is_help=True, help="Federations of real nodes, each with its own data.")


@deploy_app.callback()
def _deploy() -> None:
    """Federations of real nodes, each with its own data."""


@deploy_app.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(help="The folder to write; new, or empty.")],
    sites: Annotated[str, typer.Option(help="The sites' names, separated by commas.")],
    data: Annotated[str, typer.Option(help="The form of their folders: image_folders, folders, or a benchmark.")] = (
        "image_folders"
    ),
    port: Annotated[int, typer.Option(help="The SuperLink's port.")] = 8000,
) -> None:
    """Write a folder of start scripts, node configurations, keys and certificates for a federation of sites."""
    with starting():
        from fednorm.cli.deploy import run_deploy_init

    run_deploy_init(folder, sites, data=data, port=port)


@deploy_app.command("check")
def deploy_check(
    folder: Annotated[Path, typer.Argument(help="A folder that fednorm deploy init has written.")],
    rounds: Annotated[int, typer.Option(help="How many rounds.", min=1, max=1000)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run the folder's scripts on this machine alone for a short federation, and print what each site sent."""
    with starting():
        from fednorm.cli.deploy import run_deploy_check

    run_deploy_check(folder, rounds=rounds, as_json=as_json)


def new(
    what: Annotated[str, typer.Argument(help="norm, strategy, learner, scenario, data, model or adaptation.")],
    name: Annotated[str, typer.Argument(help="Its name, and that of its file.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where to write it.")] = Path(),
) -> None:
    """Write a commented file of a method of your own, which keeps its family's contract as it is."""
    from fednorm.cli.new import run_new

    run_new(what, name, folder)
