"""``fednorm data``: who holds what, before any model is built."""

from __future__ import annotations

from typing import Any

import torch

from fednorm.cli.console import out, print_json
from fednorm.config import RunConfig
from fednorm.data import Client, Federation, Split, load_federation
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
