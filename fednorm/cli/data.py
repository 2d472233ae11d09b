"""``fednorm data``: who holds what, before any model is built; ``fednorm data prepare``: folders out of archives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fednorm.cli.console import err, out, print_json
from fednorm.config import RunConfig
from fednorm.data import Client, Federation, Split, load_federation
from fednorm.data.prepare import RECIPES
from fednorm.data.prepare import prepare as prepare_data
from fednorm.data.prepare.preparing import find_recipe
from fednorm.errors import ConfigError
from fednorm.report.table import Table


def run_data(config: RunConfig, *, as_json: bool) -> None:
    """Print every client's numbers of images and of labels."""
    federation = load_federation(config.data, image_size=config.data.image_size, seed=config.seed)
    clients = [_client(client, federation) for client in federation.clients]
    if as_json:
        return print_json({"title": federation.title, "notes": list(federation.notes), "clients": clients})
    rows = tuple(
        (
            f"{c['client']} {c['domain']}{' (held out)' if c['held_out'] else ''}",
            str(c["train"]),
            str(c["validation"]),
            str(c["test"]),
            " ".join(map(str, c["train_labels"])),
        )
        for c in clients
    )
    columns = ("client", "train", "validation", "test", f"training images of labels 0 to {federation.num_classes - 1}")
    out().print(Table(federation.title, columns, rows, federation.notes, texts=columns[-1:]).rich())
    return None


def run_prepare(
    name: str | None,
    source: Path | None,
    directory: Path | None,
    *,
    domains: str | None,
    classes: str | None,
    as_json: bool,
) -> None:
    """Write a data set's Parquet folders and say what is in them; without a name, list what can be prepared.

    Raises:
        ConfigError: The source or the folder to write to is not named.
        FedNormError: The data set cannot be prepared.
    """
    if name is None:
        return _list_recipes(as_json=as_json)
    recipe = find_recipe(name)
    if source is None or directory is None:
        raise ConfigError(
            f"Name the folder of the archives and the one to write to: fednorm data prepare {name} SRC DIR. "
            f"{recipe.expected}"
        )
    with _counting(recipe.title) as step:
        written = prepare_data(name, source, directory, domains=_words(domains), classes=_words(classes), step=step)
    if as_json:
        folders = [{**vars(one), "folder": str(one.folder)} for one in written]
        return print_json({"recipe": recipe.name, "folders": folders})
    rows = tuple(
        (one.folder.name, domain or "-", str(train), str(test), str(one.classes))
        for one in written
        for domain, (train, test) in (one.domains or {"": (one.train, one.test)}).items()
    )
    notes = tuple(dict.fromkeys(note for one in written for note in one.notes))
    out().print(Table(recipe.title, ("folder", "domain", "train", "test", "classes"), rows, notes).rich())
    shown = recipe.name.replace("_", "-")
    out().print(f"fednorm data {shown} --data-dir {directory}", markup=False, soft_wrap=True)
    return None


def _list_recipes(*, as_json: bool) -> None:
    if as_json:
        keys = ("name", "title", "source", "layout", "folders")
        rows = [
            {key: getattr(recipe, key) for key in keys} | {"archives": [vars(archive) for archive in recipe.archives]}
            for recipe in RECIPES.values()
        ]
        return print_json({"recipes": rows})
    table = tuple(
        (
            recipe.name.replace("_", "-"),
            ", ".join(archive.name for archive in recipe.archives),
            "checked" if any(archive.md5 for archive in recipe.archives) else "none is published",
            recipe.source,
        )
        for recipe in RECIPES.values()
    )
    columns = ("data set", "archives", "MD5", "published at")
    out().print(Table("fednorm data prepare NAME SRC DIR", columns, table, texts=columns[1:]).rich())
    return None


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


@contextmanager
def _counting(title: str) -> Iterator[Callable[[int], None] | None]:
    """Count images on a terminal: how many there will be is known only at the end."""
    console = err()
    if not console.is_terminal or os.environ.get("TERM") == "dumb":
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} images"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda count: progress.advance(task, count)


def _client(client: Client, federation: Federation) -> dict[str, Any]:
    return {
        "client": client.partition_id,
        "domain": client.domain,
        "held_out": client.held_out,
        "train": len(client.train),
        "validation": len(client.validation),
        "test": len(client.test),
        "train_labels": _histogram(client.train, federation.num_classes),
        "test_labels": _histogram(client.test, federation.num_classes),
    }


def _histogram(split: Split, num_classes: int) -> list[int]:
    return torch.bincount(split.labels[split.index], minlength=num_classes).tolist()
