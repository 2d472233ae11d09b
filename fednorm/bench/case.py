"""What the engines are timed on: a federation of synthetic images, small enough to be made anew in every process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch

from fednorm.config import RunConfig, resolve
from fednorm.data.domain import Client, Federation, Split
from fednorm.errors import unknown_name
from fednorm.federation.workbench import Workbench
from fednorm.rng import stream

NUM_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """One federation, every client in every round; by default FedAvg of a ``digits_cnn`` with batch normalization.

    Pixels and labels are drawn uniformly: what is timed does not depend on what they show.

    Attributes:
        name: The case's name.
        clients: Number of clients.
        train: Training images of each client.
        test: Test images of each client; all are evaluated in every round.
        image_size: Height and width of the images.
        width: Channels of the network's first convolution; 64 is FedBN's network, with 14 million parameters.
        batch_size: Images a step; one epoch a round.
        rounds: Rounds that are timed. One more goes before them, to warm up.
        seed: Of the images, the weights and the batches.
        model: The network.
        strategy: The strategy, with the norm that it brings along.
        device: Where clients train and are evaluated.
    """

    name: str
    clients: int
    train: int
    test: int
    image_size: int
    width: int
    batch_size: int
    rounds: int
    seed: int = 1
    model: str = "digits_cnn"
    strategy: str = "fedavg"
    device: str = "cpu"

    @property
    def plain(self) -> bool:
        """Whether it is federated averaging and nothing else, as the bare loop does it."""
        return self.strategy == "fedavg"

    def small(self) -> Case:
        """Return the case with as little of everything as it takes to run it."""
        return replace(
            self,
            clients=min(self.clients, 3),
            train=min(self.train, 2 * self.batch_size),
            test=min(self.test, 2),
            image_size=min(self.image_size, 8),
            width=4,
            rounds=1,
        )

    @property
    def summary(self) -> str:
        """Return the case in words."""
        steps = -(-self.train // self.batch_size)
        return (
            f"{self.clients:,} clients × {self.train} training images ({steps} step{'s' * (steps > 1)} of "
            f"{self.batch_size}) and {self.test} test images, {self.image_size}×{self.image_size}, "
            f"{self.model} of width {self.width}{'' if self.plain else f', {self.strategy}'}"
            f"{'' if self.device == 'cpu' else f', on {self.device}'}"
        )

    def config(self) -> RunConfig:
        """Return the run's configuration."""
        return resolve(
            {
                "seed": self.seed,
                "device": self.device,
                "model": {"name": self.model, "width": self.width},
                "strategy": {"name": self.strategy},
                "train": {"batch_size": self.batch_size, "learning_rate": 0.01},
                "rounds": {"num_rounds": self.rounds + 1},
            }
        )

    def federation(self) -> Federation:
        """Return the clients with their images: the same ones at every call."""
        each = self.train + self.test
        rng = stream(self.seed, "bench", "images")
        size = (self.clients * each, 3, self.image_size, self.image_size)
        images = torch.from_numpy(rng.integers(0, 256, size, dtype="uint8"))
        labels = torch.from_numpy(rng.integers(0, NUM_CLASSES, len(images)))

        def split(first: int, count: int) -> Split:
            return Split(images, labels, torch.arange(first, first + count))

        clients = tuple(
            Client(
                partition_id=number,
                domain="synthetic",
                train=split(number * each, self.train),
                validation=split(0, 0),
                test=split(number * each + self.train, self.test),
            )
            for number in range(self.clients)
        )
        return Federation("synthetic images", NUM_CLASSES, self.image_size, clients)

    def workbench(self) -> Workbench:
        """Return a new workbench for the case."""
        return Workbench(self.config(), self.federation())

    def to_json(self) -> str:
        """Return the case as a text, for a process that Flower starts."""
        return json.dumps(asdict(self))


CASES = {
    case.name: case
    for case in (
        Case(name="digits-cnn", clients=5, train=256, test=128, image_size=28, width=64, batch_size=32, rounds=2),
        Case(name="small-50", clients=50, train=64, test=32, image_size=28, width=8, batch_size=32, rounds=3),
        Case(name="tiny-1000", clients=1000, train=8, test=8, image_size=8, width=4, batch_size=8, rounds=3),
        Case(
            name="mlp-1000", clients=1000, train=8, test=8, image_size=8, width=64, batch_size=8, rounds=3, model="mlp"
        ),
        Case(
            name="fedwon-1",
            clients=20,
            train=32,
            test=32,
            image_size=28,
            width=8,
            batch_size=1,
            rounds=3,
            strategy="fedwon",
        ),
    )
}
"""The cases by name."""


def case_of(name: str) -> Case:
    """Return the case called ``name``.

    Raises:
        UnknownNameError: There is no such case.
    """
    if name not in CASES:
        raise unknown_name("benchmark case", name, CASES)
    return CASES[name]
