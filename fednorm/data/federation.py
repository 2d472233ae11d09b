"""From a configuration to the clients of a federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fednorm.cards import DATA
from fednorm.config import DataConfig
from fednorm.data.benchmarks import Loaded, Reader
from fednorm.data.clients import Clients, Group
from fednorm.data.clients import Share as Dealt
from fednorm.data.domain import Client, Domain, Federation
from fednorm.data.partition import Share, deal, draw_test, merged_split
from fednorm.data.shards import holds_parquet
from fednorm.errors import DataError

SMALL = 512
"""Clients up to which a federation has a tuple of them."""


def load_federation(
    config: DataConfig, *, image_size: int, seed: int, cache_dir: Path | None = None, reader: type[Reader] = Reader
) -> Federation:
    """Load a benchmark and deal its images to clients.

    Pixels are decoded once into one uint8 array a data set, kept on disk and memory-mapped; clients hold rows of it.
    Clients are numbered domain by domain, in the order of the domains; a held-out domain's one client comes last, has
    no training images and keeps the domain's whole test split.

    Args:
        config: Which data, and who holds what of it.
        image_size: The model's input size in pixels, used where ``config.image_size`` is 0.
        seed: Of the streams ``(seed, "data", domain, ...)`` that deal the images, where ``config.split_seed`` is 0.
        cache_dir: Where decoded arrays are kept; by default ``$FEDNORM_CACHE``, else the user's cache folder.
        reader: What reads the data sets.

    Returns:
        The federation.

    Raises:
        UnknownNameError: There is no such benchmark.
        DataError: The data is missing, corrupt or unfit, or a client would be empty.
    """
    size = config.image_size or image_size
    if size < 1:
        raise DataError(f"The images need a size of at least 1 pixel; got {size}. Set data.image_size.")
    loaded = DATA[config.name].read(reader(config, size, cache_dir))
    seed = config.split_seed or seed
    domains = [_merged(domain) for domain in loaded.domains] if config.merge else list(loaded.domains)
    return Federation(
        title=loaded.title,
        num_classes=loaded.num_classes,
        image_size=size,
        clients=_clients(domains, config, seed),
        notes=(*loaded.notes, *_protocol_notes(loaded, config)),
        class_names=loaded.class_names,
    )


def load_site(
    config: DataConfig, domain: str, directory: str, *, image_size: int, seed: int, cache_dir: Path | None = None
) -> Federation:
    """Load one site's own data, and nothing else: a federation of the one client that holds the whole domain.

    The folder is read in the form that the run's benchmark has (``data.name``). Of ``folders`` and ``image_folders``
    it may be the domain's own folder, whatever that is called, or one that holds the domain's; of any other benchmark
    the one domain is read. Images are dealt by the streams ``(seed, "data", domain, ...)``, so that a site holds the
    very images that it holds in a simulation of all domains in one process.

    Args:
        config: The run's data; its folder is another machine's and is not looked at, and nothing is downloaded.
        domain: What the site calls its data.
        directory: The site's folder; empty for a benchmark that needs none.
        image_size: The model's input size in pixels, used where ``config.image_size`` is 0.
        seed: As for :func:`load_federation`.
        cache_dir: As for :func:`load_federation`.

    Returns:
        The federation; its client is number 0 here, whatever number the server gives the site.

    Raises:
        DataError: The data is missing, corrupt or unfit, or the folder holds several domains and none of that name.
    """
    own = config.replace(dir=directory, domains=(domain,), held_out="", download=False)
    path = Path(directory).expanduser()
    if directory and config.name in ("folders", "image_folders") and not (path / domain).is_dir():
        if config.name == "folders" and holds_parquet(path.resolve()):
            own = own.replace(dir=str(path.resolve().parent), domains=(path.resolve().name,))
        elif config.name == "image_folders":
            own = own.replace(domains=())
    size = config.image_size or image_size
    loaded = DATA[config.name].read(Reader(own, size, cache_dir))
    if len(loaded.domains) > 1:
        names = ", ".join(part.name for part in loaded.domains)
        raise DataError(
            f"The folder {directory} holds several domains ({names}), and none is called {domain!r}. Name one of them "
            "in the node's configuration (domain), or its own folder (data-dir)."
        )
    (one,) = (replace(part, name=domain) for part in loaded.domains)
    one = _merged(one) if config.merge else one
    held_out = domain == config.held_out
    (share,) = _shares(one, config, config.split_seed or seed, held_out=held_out)
    parts = [(one.train, share.train), (one.train, share.validation), (one.test, share.test)]
    train, validation, test = (replace(split, index=split.index[torch.from_numpy(rows)]) for split, rows in parts)
    client = Client(0, domain, train, validation, test, held_out)
    return Federation(loaded.title, loaded.num_classes, size, (client,), loaded.notes, loaded.class_names)


def _merged(domain: Domain) -> Domain:
    """Merge a domain's images and split them again as FedBN does."""
    rows = torch.cat([domain.train.index, domain.test.index])
    try:
        train, test = merged_split(domain.train.labels[rows].numpy())
    except DataError as error:
        raise DataError(f"Domain {domain.name}: {error}") from error
    splits = [replace(domain.train, index=rows[torch.from_numpy(part)]) for part in (train, test)]
    return Domain(domain.name, splits[0], splits[1], domain.note)


def _clients(domains: Sequence[Domain], config: DataConfig, seed: int) -> Sequence[Client]:
    names = [domain.name for domain in domains]
    if config.held_out and config.held_out not in names:
        raise DataError(f"data.held_out is {config.held_out!r}, which is no domain of this run: {', '.join(names)}.")
    if names == [config.held_out]:
        raise DataError(f"data.held_out leaves no domain to train on: {config.held_out} is the only one.")
    groups = []
    for domain in sorted(domains, key=lambda domain: domain.name == config.held_out):
        held_out = domain.name == config.held_out
        shares = _shares(domain, config, seed, held_out=held_out)
        groups.append(
            Group(
                domain=domain.name,
                train=Dealt.of(domain.train, [share.train for share in shares]),
                validation=Dealt.of(domain.train, [share.validation for share in shares]),
                test=Dealt.of(domain.test, [share.test for share in shares]),
                held_out=held_out,
            )
        )
    clients = Clients(tuple(groups))
    return clients if len(clients) > SMALL else tuple(clients)


def _shares(domain: Domain, config: DataConfig, seed: int, *, held_out: bool) -> list[Share]:
    if held_out:
        none = np.empty(0, dtype=np.int64)
        return [Share(none, none, draw_test(domain.name, len(domain.test), config, seed))]
    labels = domain.train.labels[domain.train.index].numpy()
    return deal(domain.name, labels, len(domain.test), config, seed)


def _protocol_notes(loaded: Loaded, config: DataConfig) -> tuple[str, ...]:
    """Return what the configuration did to the data that a reader of a table must know."""
    notes = []
    if config.merge:
        notes.append("Each domain's train and test images were merged and split again 80/20, stratified (FedBN).")
    if {"mnist", "mnistm"} <= {domain.name for domain in loaded.domains}:
        splits = "of either split, because they were merged" if config.merge else "of the same split, never across"
        notes.append(
            "mnistm is made from MNIST's digits: its images share digits with mnist images "
            f"{splits}, so these two domains are not independent."
        )
    if config.held_out:
        notes.append(f"No client trained on {config.held_out}.")
    return tuple(notes)
