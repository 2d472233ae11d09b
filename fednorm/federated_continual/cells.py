"""The grid: clients times experiences; who meets which part of a stream when.

A stream's experiences are dealt to the clients that meet them, each image to one client; a client's row of the grid is
a stream of its own, at each time one experience, or nothing. A plain stream is the grid of one client, a plain
federation that of one experience.

Shapes: ``same``, everyone is at the same experience at the same time (Zhang et al., TARGET, arXiv 2303.06937, and those
after it, with ``grid.partition = "dirichlet"`` within an experience); ``own``, each client meets the experiences in an
order of its own (Yoon et al., FedWeIT, arXiv 2003.03196; Wuerkaixi et al., AF-FCL, arXiv 2402.01095); ``rotated``,
client k begins with experience k and goes on from there, so that all experiences are met at all times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from fednorm.config import GridConfig
from fednorm.data.domain import Client, Federation, Split
from fednorm.data.partition import dirichlet, iid
from fednorm.data.source import Rows
from fednorm.errors import ConfigError, DataError
from fednorm.federated_continual.measures import Course
from fednorm.rng import stream as generator
from fednorm.streams.stream import Experience, JoinedSplit, Stream

Cell = Experience | None


@dataclass(frozen=True, eq=False)
class Grid:
    """Each client's stream.

    Attributes:
        stream: The stream that was dealt.
        cells: Row k, place t: what client k holds of the experience that it meets at time t, numbered as in the stream
            and with all of that experience's test images; None where it holds nothing.
        present: Row k: whether client k is there at each time: it has come and has not left.

    Raises:
        DataError: A client's row is longer or shorter than the stream.
    """

    stream: Stream
    cells: tuple[tuple[Cell, ...], ...]
    present: tuple[tuple[bool, ...], ...]

    def __post_init__(self) -> None:
        for client, (cells, present) in enumerate(zip(self.cells, self.present, strict=True)):
            if not len(cells) == len(present) == len(self.stream):
                raise DataError(
                    f"All clients of a grid go from experience to experience at the same times, {len(self.stream)} of "
                    f"them here; client {client} has a stream of {len(cells)}. Put None at the times at which it holds "
                    "nothing: it skips them."
                )

    @property
    def num_times(self) -> int:
        """Return how many experiences come one after another."""
        return len(self.stream)

    def row(self, client: int) -> Iterator[tuple[int, Experience]]:
        """Yield the times at which a client holds something, and what."""
        for time, cell in enumerate(self.cells[client]):
            if cell is not None:
                yield time, cell

    def met(self, client: int, time: int) -> list[int]:
        """Return the experiences that a client has met by a time, that one included, in the order in which it did."""
        return [cell.number for when, cell in self.row(client) if when <= time]

    def scored(self, client: int, time: int) -> list[int]:
        """Return the experiences that a client is scored on after a time: those it has met, while it is there."""
        return self.met(client, time) if self.present[client][time] else []

    def course(self, client: int) -> Course:
        """Return what a client meets, for :mod:`fednorm.federated_continual.measures`."""
        cells = tuple((time, cell.number) for time, cell in self.row(client))
        last = max(time for time, there in enumerate(self.present[client]) if there)
        return Course(cells, last)

    def federation(self) -> Federation:
        """Return who holds what over all times; a client's domain is its own name."""
        clients = []
        for number in range(len(self.cells)):
            held = [cell for _, cell in self.row(number)]
            if not held:
                raise ConfigError(
                    f"Client {number} of {len(self.cells)} holds no image of any experience. Lower grid.clients, raise "
                    "grid.alpha, or lower grid.leaving and grid.joining."
                )
            train, validation = (_joined([getattr(c, part) for c in held]) for part in ("train", "validation"))
            test = _joined([experience.test for experience in self.stream])
            clients.append(Client(number, f"client {number}", train, validation, test))
        stream = self.stream
        return Federation(
            f"{stream.title}, on {len(clients)} client{'s'[: len(clients) > 1]}",
            stream.num_classes,
            stream.image_size,
            tuple(clients),
            stream.notes,
        )


def make_grid(stream: Stream, config: GridConfig, seed: int) -> Grid:
    """Deal a stream to clients.

    Args:
        stream: The stream.
        config: The shape.
        seed: Of the streams ``(seed, "grid", ...)`` that draw orders and deal images.

    Raises:
        ConfigError: Everyone has left before the last experience, or nobody has come.
    """
    orders = tuple(_order(config, client, len(stream), seed) for client in range(config.clients))
    times = range(len(stream))
    there = [[_is_there(config, client, time, len(stream)) for time in times] for client in range(config.clients)]
    for time in times:
        if not any(row[time] for row in there):
            raise ConfigError(
                f"No client is there at experience {time + 1} of {len(stream)}: of grid.clients = {config.clients}, "
                f"{config.joining} join (grid.joining) and {config.leaving} leave (grid.leaving) at each. Raise "
                "grid.clients, or lower them."
            )
    cells: list[list[Cell]] = [[None] * len(stream) for _ in orders]
    for experience in stream:
        places = [
            (client, time)
            for client, order in enumerate(orders)
            for time, number in enumerate(order)
            if number == experience.number and there[client][time]
        ]
        for (client, time), cell in zip(places, _dealt(experience, len(places), config, seed), strict=True):
            cells[client][time] = cell
    for time in times:
        if not any(row[time] for row in cells):
            raise ConfigError(
                f"At time {time + 1} of {len(stream)} no client has {config.min_images} training images "
                "(grid.min_images) of the experience it is at. Raise grid.alpha, or lower grid.clients or "
                "grid.min_images."
            )
    return Grid(stream, tuple(map(tuple, cells)), tuple(map(tuple, there)))


def _order(config: GridConfig, client: int, count: int, seed: int) -> tuple[int, ...]:
    if config.order == "own":
        return tuple(generator(seed, "grid", "order", client).permutation(count).tolist())
    shift = client if config.order == "rotated" else 0
    return tuple((time + shift) % count for time in range(count))


def _is_there(config: GridConfig, client: int, time: int, times: int) -> bool:
    """Return whether a client has come by a time, and has not left."""
    first_late = config.clients - config.joining * (times - 1)
    comes = 0 if client < first_late else 1 + (client - first_late) // config.joining
    return comes <= time and client >= config.leaving * time


def _dealt(experience: Experience, count: int, config: GridConfig, seed: int) -> list[Cell]:
    """Deal an experience's training and validation images; a client that gets too few training images gets nothing."""
    if count == 0:
        return []
    parts = {}
    for name, split in (("train", experience.train), ("validation", experience.validation)):
        rng = generator(seed, "grid", "deal", experience.number, name)
        labels = split.targets.cpu().numpy()
        if not len(labels):
            parts[name] = [np.zeros(0, dtype=np.int64) for _ in range(count)]
        elif count == 1:
            parts[name] = [np.arange(len(labels))]
        elif config.partition == "dirichlet":
            parts[name] = dirichlet(labels, count, rng, config.alpha)
        else:
            parts[name] = iid(labels, count, rng)
    rows = zip(parts["train"], parts["validation"], strict=True)
    return [_cell(experience, *own) if len(own[0]) >= config.min_images else None for own in rows]


def _cell(experience: Experience, train: Rows, validation: Rows) -> Cell:
    own = {
        name: _rows(split, rows)
        for name, split, rows in (
            ("train", experience.train, train),
            ("validation", experience.validation, validation),
        )
    }
    return replace(experience, train=own["train"], validation=own["validation"])


def _rows(split: Split, rows: Rows) -> Split:
    """Return some rows of a split, in the order of the split's own."""
    return replace(split, index=split.index[torch.from_numpy(np.sort(rows))])


def _joined(parts: list[Split]) -> Split:
    first = parts[0]
    return JoinedSplit(
        first.images, first.labels, first.index, tuple(parts), content=first.content, scaling=first.scaling
    )
