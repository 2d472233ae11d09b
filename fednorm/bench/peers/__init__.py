"""Other simulators on the cases of ``fednorm bench engine``, as their own documentation has one use them.

Each of them gets what the bare loop gets: the images as floats in memory, in the engine's memory layout, the same
initial weights, and each client's batches in the same order, for which the place where it draws an order is replaced;
so that the final weights can be compared. The shared model is evaluated on all clients' test images in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fednorm.bench.bare import Data
from fednorm.bench.case import Case
from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.rng import torch_stream


@dataclass(frozen=True, eq=False)
class Setting:
    """A case's network and its clients' images, as a loop written for nothing else would hold them.

    Attributes:
        case: The case.
        model: The network, with its initial weights.
        clients: The clients' images.
        learning_rate: Of SGD.
        layout: How images and weights lie in memory.
    """

    case: Case
    model: nn.Module
    clients: tuple[Data, ...]
    learning_rate: float
    layout: torch.memory_format

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The test images of all clients, and their labels."""
        images = torch.cat([data.test_images for data in self.clients])
        return images.contiguous(memory_format=self.layout), torch.cat([data.test_labels for data in self.clients])

    def order(self, client: int, server_round: int) -> Tensor:
        """Return the order of a client's training images in a round, the first of which is 1."""
        generator = torch_stream(self.case.seed, "client", client, "round", server_round, "batches")
        return torch.randperm(self.case.train, generator=generator)

    def batches(self, client: int, server_round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a client's batches of a round: images and labels."""
        data = self.clients[client]
        for rows in torch.split(self.order(client, server_round), self.case.batch_size):
            yield data.train_images[rows], data.train_labels[rows]


def setting_of(case: Case, layout: torch.memory_format = torch.channels_last) -> Setting:
    """Return a case's network and images.

    Args:
        case: The case.
        layout: How images and weights lie in memory.
    """
    bench = case.workbench()

    def images(split: Tensor, index: Tensor) -> Tensor:
        return pixels(split[index]).contiguous(memory_format=layout)

    clients = tuple(
        Data(
            images(client.train.images, client.train.index),
            client.train.labels[client.train.index],
            images(client.test.images, client.test.index),
            client.test.labels[client.test.index],
        )
        for client in bench.federation.clients
    )
    return Setting(case, bench.model.to(memory_format=layout), clients, bench.config.train.learning_rate, layout)


class Peer(NamedTuple):
    """Another simulator.

    Attributes:
        package: What is installed.
        title: What it calls itself.
        python: Which versions of Python it is made for.
    """

    package: str
    title: str
    python: str


PEERS: Mapping[str, Peer] = {
    "fluke": Peer("fluke-fl", "fluke-fl", "3.10 or later"),
    "blazefl": Peer("blazefl", "BlazeFL", "3.12 or later"),
    "pfl": Peer("pfl", "pfl-research", "3.10 to 3.12"),
}
"""The simulators, by the names of their modules."""


def require_peer(module: str) -> None:
    """Require that a simulator is installed.

    Args:
        module: Its name in :data:`PEERS`.

    Raises:
        ConfigError: It is not.
    """
    if find_spec(module) is None:
        _, title, python = PEERS[module]
        raise ConfigError(
            f"Engine {module} is the simulator {title}, which is not installed here. pip install 'fednorm[bench]' "
            f"brings it on Python {python}; or leave it out of --against."
        )
