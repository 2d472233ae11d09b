"""``fednorm data`` and ``fednorm data prepare``: who holds what, and official archives into folders that are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fednorm.cli.parameters import DataDirOption, JsonOption, SetOption
from fednorm.signals import starting

_SHOW, _PREPARE = "show", "prepare"


class _NameOrWord(TyperGroup):
    """``fednorm data NAME`` shows a benchmark; the words that are none are ``prepare``, and ``show`` for the same.

    Attributes:
        unsaid: The command that is meant where none is named.
    """

    unsaid = _SHOW

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in front that is meant."""
        return super().parse_args(ctx, args if args[:1] in ([_PREPARE], [_SHOW]) else [_SHOW, *args])


data_app = typer.Typer(cls=_NameOrWord, help="Show who holds what: images and labels of every client.")


@data_app.command(_SHOW)
def show(
    name: Annotated[
        str, typer.Argument(metavar="DATA", help="Benchmark (fednorm list data), or package.module:yours.")
    ] = "digits_mini",
    data_dir: DataDirOption = None,
    domains: Annotated[str | None, typer.Option(help="Domains to use, separated by commas.")] = None,
    image_size: Annotated[int, typer.Option(help="Height and width to decode to, in pixels.")] = 28,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who holds what: images and labels of every client. fednorm data prepare --help: data sets from archives."""
    with starting():
        from fednorm.cli.options import collect

    flags = {
        "data.name": name,
        "data.dir": None if data_dir is None else str(data_dir),
        "data.domains": domains,
        "data.image_size": image_size,
    }
    with starting():
        config = collect(None, flags, settings or [])
        from fednorm.cli.data import run_data

    run_data(config, as_json=as_json)


@data_app.command(_PREPARE)
def prepare(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The data set; all that can be prepared are listed without.")
    ] = None,
    source: Annotated[
        Path | None, typer.Argument(metavar="SRC", help="Folder of the official archives, packed or unpacked.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder to write to, what --data-dir then names.")
    ] = None,
    domains: Annotated[str | None, typer.Option(help="Domains to take, separated by commas; all by default.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes to take, separated by commas; for domainnet also fedbn, FedBN's ten.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a data set's official archives into the Parquet folders that fednorm reads; nothing is downloaded."""
    with starting():
        from fednorm.cli.data import run_prepare

    run_prepare(name, source, directory, domains=domains, classes=classes, as_json=as_json)
