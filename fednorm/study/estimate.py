"""How long a run of either kind will take on this machine: its own steps timed, its images counted.

The steps are timed on random images, so that no data is needed. The images are counted in the data folder where one is
given and holds the data; else the published sizes of the data sets are taken, and the estimate says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from fednorm.cards import DATA
from fednorm.config import MACHINE, DataConfig, RunConfig
from fednorm.data import load_federation
from fednorm.data.benchmarks import Reader
from fednorm.data.domain import Client, Domain, Federation, Split
from fednorm.data.partition import Share, deal, draw_test, merged_split
from fednorm.data.sets.digits import DIGITS_FIVE
from fednorm.data.source import Rows, Source
from fednorm.errors import DataError
from fednorm.federation import estimate as of_rounds
from fednorm.federation.workbench import Workbench
from fednorm.memory import require_memory
from fednorm.rng import stream
from fednorm.streams import estimate as of_streams
from fednorm.streams.stream import Stream
from fednorm.streams.workbench import ContinualWorkbench
from fednorm.threads import torch_threads

T = TypeVar("T")

PUBLISHED: Mapping[str, tuple[int, Mapping[str, tuple[int, int]]]] = {
    "mnist": (10, {"": (60_000, 10_000)}),
    "usps": (10, {"": (7_291, 2_007)}),
    "svhn": (10, {"": (73_257, 26_032)}),
    "syn": (10, {"": (479_400, 9_553)}),
    "mnistm": (10, {"": (59_001, 9_001)}),
    "cifar10": (10, {"": (50_000, 10_000)}),
    "cifar100": (100, {"": (50_000, 10_000)}),
    "office_caltech10": (
        10,
        {"amazon": (766, 192), "caltech10": (898, 225), "dslr": (125, 32), "webcam": (236, 59)},
    ),
}
"""Classes, and training and test images of each domain, of the published data sets; Office as FedBN splits it."""

SIZES = frozenset({"threads", "width", "image_size", "batch_size", "memory_batch"})
"""Keys whose value says how large a step is; of all other numbers only whether they are 0 enters its time."""


@dataclass(frozen=True)
class Estimate:
    """How long a run will take.

    Attributes:
        seconds: About so long, on a core of its own (on ``threads`` cores).
        basis: What was timed and what was counted, for a reader.
    """

    seconds: float
    basis: str


class _Blank(Reader):
    """Reads data sets of the published sizes, of random images; no file is opened."""

    def held(self) -> tuple[str, ...]:
        """Return what a folder with the published data sets would hold."""
        return tuple(sorted(DIGITS_FIVE | {"cifar10", "cifar100", "office_caltech10"}))

    def read(self, name: str) -> Source:
        """Return a data set's labels, one class after the other, and images that overlap in memory."""
        if name not in PUBLISHED:
            raise DataError(
                f"The size of data set {name!r} is not known without its files. Name their folder with --data-dir DIR "
                "(data.dir)."
            )
        classes, domains = PUBLISHED[name]
        train, test = (sum(sizes[split] for sizes in domains.values()) for split in (0, 1))
        of_row = np.concatenate([np.repeat(list(domains), [s[i] for s in domains.values()]) for i in (0, 1)])
        return Source(
            name=name,
            images=_windows(train + test, self.image_size),
            labels=np.arange(train + test, dtype=np.int64) % classes,
            train=np.arange(train, dtype=np.int64),
            test=np.arange(train, train + test, dtype=np.int64),
            files=(),
            class_names=tuple(map(str, range(classes))),
            domains=of_row if len(domains) > 1 else None,
        )


def _windows(count: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return random images, uint8, shape (count, 3, size, size), each the one before moved on by a byte.

    A hundred thousand of them take the memory of a few.
    """
    remedy = "Choose a smaller data.image_size."
    require_memory(count + 3 * size * size, f"Images of {size} x {size} pixels, to estimate from,", remedy, DataError)
    numbers = stream(0, "estimate", "images").integers(0, 256, count + 3 * size * size, dtype=np.uint8)
    strides = (1, size * size, size, 1)
    return np.lib.stride_tricks.as_strided(numbers, (count, 3, size, size), strides)


def estimate_seconds(config: RunConfig) -> Estimate:
    """Return about how long a run will take on this machine.

    Steps are timed once for all runs of a process that differ in nothing but seeds, rates, rounds and data of one image
    size; images are counted once for all that differ in nothing but seeds and methods.

    Args:
        config: The run's configuration.

    Raises:
        FedNormError: The configuration does not fit together, or neither a folder nor a publication tells how much
            data there is.
    """
    plain = config.to_dict()
    counted = _text({key: plain.get(key) for key in ("kind", "data", "scenario", "model")})
    timed = _text(_sizing(_whole(config)))
    with torch_threads(config.threads):
        if config.kind == "continual":
            experiences, basis = _stream(_Like(counted, config))
            step_rates = _step_rates(_Like(timed, (config, experiences)))
            return Estimate(of_streams.total_seconds(config, experiences, step_rates), basis)
        federation, basis = _federation(_Like(counted, config))
        round_rates = _round_rates(_Like(timed, (config, federation)))
        return Estimate(of_rounds.total_seconds(config, federation, round_rates), basis)


@dataclass(frozen=True)
class _Like(Generic[T]):
    """Something that stands for all with the same key, in a cache.

    Attributes:
        key: What makes them alike.
        one: One of them.
    """

    key: str
    one: T = field(compare=False)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _whole(config: RunConfig) -> dict[str, Any]:
    """Return what a step's time depends on, every option with its value."""
    plain = config.to_dict()
    if config.kind == "continual":
        method = {"learner": config.learner.name, **asdict(config.learner.card.made_options(config.learner.options))}
    else:
        method = {"strategy": config.strategy.name, **config.strategy.values}
    return {
        "kind": config.kind,
        "threads": config.threads,
        **{key: getattr(config, key) for key in MACHINE},
        "model": plain["model"],
        "image_size": config.data.image_size or config.model.card.input_size,
        "norm": {"name": config.norm.name, **asdict(config.norm.card.made(config.norm.options))},
        "method": method,
        "train": plain["train"],
    }


def _sizing(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with every number that does not size a step replaced by whether it is 0."""
    kept: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            kept[key] = _sizing(value)
        else:
            kept[key] = bool(value) if isinstance(value, int | float) and key not in SIZES else value
    return kept


@cache
def _round_rates(like: _Like[tuple[RunConfig, Federation]]) -> of_rounds.Rates:
    return of_rounds.measure(Workbench(*like.one))


@cache
def _step_rates(like: _Like[tuple[RunConfig, Stream]]) -> of_streams.Rates:
    return of_streams.measure(ContinualWorkbench(*like.one))


@cache
def _federation(like: _Like[RunConfig]) -> tuple[Federation, str]:
    """Return a run's clients and where their images were counted."""
    config = like.one
    data = config.data.replace(download=False)
    size = data.image_size or config.model.card.input_size
    return _counted(
        data,
        lambda: load_federation(data, image_size=size, seed=config.seed),
        lambda: _published_federation(data, size, data.split_seed or config.seed),
    )


@cache
def _stream(like: _Like[RunConfig]) -> tuple[Stream, str]:
    """Return a run's experiences and where their images were counted."""
    config, spec = like.one, like.one.scenario.card
    data = config.data.replace(download=False)
    size = data.image_size or config.model.card.input_size
    options = config.scenario.options

    def published() -> Stream:
        name = spec.data[0] if spec.data and data.name not in spec.data else data.name
        return spec.make(_Blank(data.replace(name=name), size), data.split_seed or config.seed, **options)

    return _counted(data, lambda: spec.stream(data, image_size=size, seed=config.seed, options=options), published)


def _counted(data: DataConfig, load: Callable[[], T], published: Callable[[], T]) -> tuple[T, str]:
    """Return what is loaded, else what the published sizes give, and a sentence on which it is."""
    try:
        embedded = "the embedded data" if DATA[data.name].ships else data.name
        return load(), f"Images counted in {data.dir or embedded}."
    except DataError as error:
        try:
            return published(), "Published sizes of the data; with its folder (--data-dir) they are counted."
        except DataError:
            raise error from None


def _published_federation(data: DataConfig, size: int, seed: int) -> Federation:
    """Return the clients that :func:`~fednorm.data.load_federation` would make of the published data sets."""
    loaded = DATA[data.name].load(_Blank(data, size))
    clients: list[Client] = []
    for domain in sorted(loaded.domains, key=lambda domain: domain.name == data.held_out):
        train, test = _merged(domain) if data.merge else (domain.train, domain.test)
        held_out = domain.name == data.held_out
        for share in _shares(domain.name, train, len(test), data, seed):
            clients.append(
                Client(
                    partition_id=len(clients),
                    domain=domain.name,
                    train=_rows(train, share.train),
                    validation=_rows(train, share.validation),
                    test=_rows(test, share.test),
                    held_out=held_out,
                )
            )
    return Federation(loaded.title, loaded.num_classes, size, tuple(clients))


def _shares(domain: str, train: Split, num_test: int, data: DataConfig, seed: int) -> list[Share]:
    """Return who holds what of a domain; one client that only tests, where it is held out."""
    if domain != data.held_out:
        return deal(domain, train.targets.numpy(), num_test, data, seed)
    none = np.empty(0, dtype=np.int64)
    return [Share(none, none, draw_test(domain, num_test, data, seed))]


def _rows(split: Split, rows: Rows) -> Split:
    return replace(split, index=split.index[torch.from_numpy(rows)])


def _merged(domain: Domain) -> tuple[Split, Split]:
    rows = torch.cat([domain.train.index, domain.test.index])
    train, test = (rows[torch.from_numpy(part)] for part in merged_split(domain.train.labels[rows].numpy()))
    return replace(domain.train, index=train), replace(domain.train, index=test)


def seconds_at_once(runs: Iterable[float], jobs: int) -> float:
    """Return about how long some runs take, ``jobs`` at a time: their share of the sum, and no less than the longest.

    Args:
        runs: The seconds that each takes alone.
        jobs: Runs at a time, each on a core of its own.
    """
    seconds = list(runs)
    return max([sum(seconds) / jobs, *seconds, 0.0])
