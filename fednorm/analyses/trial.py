"""A training that an analysis watches: one network on the images of all domains together, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.analyses.analysis import Setup
from fednorm.config import DataConfig, merge, resolve
from fednorm.data.domain import Federation
from fednorm.data.federation import load_federation
from fednorm.rng import torch_seeded, torch_stream
from fednorm.training.effects import Effect
from fednorm.training.step import TrainingStep
from fednorm.training.trainee import Trainee

BATCH = 32
EVALUATED = 256
"""Images a forward pass of an evaluation."""

Images = tuple[Tensor, Tensor]
"""Images as a network is given them, float32 (n, 3, S, S), and their labels (n,)."""


@lru_cache(maxsize=4)
def _federation(data: DataConfig, image_size: int, seed: int) -> Federation:
    return load_federation(data, image_size=image_size, seed=seed)


def about_data(setup: Setup) -> tuple[str, tuple[str, ...]]:
    """Return the data's title, and the notes that belong under a table of it."""
    config = resolve({"data": {"name": setup.data, "dir": setup.data_dir}}, only="federated")
    federation = _federation(config.data, config.model.card.input_size, setup.seeds[0])
    return federation.title, federation.notes


class Trial:
    """A network, its optimizer and its data, for an analysis to train and to look at.

    Args:
        setup: The analysis's setup.
        seed: Of weights, batches and the division of the data.
        values: Configuration keys of the run: model, norm, train, data.

    Attributes:
        config: The run's configuration.
        trainee: What trains.
        domains: The names of the domains, in order.
    """

    def __init__(self, setup: Setup, seed: int, values: Mapping[str, Any]) -> None:
        own = {"seed": seed, "data": {"name": setup.data, "dir": setup.data_dir}, "train": {"batch_size": BATCH}}
        self.config = resolve(merge(own, values), only="federated")
        data, model = self.config.data, self.config.model.card
        self._federation = _federation(data, data.image_size or model.input_size, seed)
        self.trainee = Trainee(
            self.config,
            self.config.norm.card.made(self.config.norm.options),
            num_classes=self._federation.num_classes,
            image_size=self._federation.image_size,
        )
        self.domains = self._federation.domains
        self._seed = seed

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.trainee.model

    def images(self, split: str, domains: tuple[str, ...] = ()) -> Images:
        """Return all images of a split: ``train``, ``validation`` or ``test``.

        Args:
            split: Which.
            domains: Of which domains; of all if empty.
        """
        parts = [
            getattr(client, split) for client in self._federation.clients if not domains or client.domain in domains
        ]
        pairs = [part.inputs(torch.arange(len(part))) for part in parts]
        images, labels = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        return images.contiguous(memory_format=torch.channels_last), labels

    def train(self, steps: int, data: Images, *, adjust: tuple[Effect, ...] = (), name: str = "train") -> Iterator[int]:
        """Train, and yield the number of every update after it was made, from 1.

        Args:
            steps: Updates.
            data: Images to draw batches from.
            adjust: What is done to the gradients before an update.
            name: Of the random streams.
        """
        images, labels = data
        trainee = self.trainee
        step = TrainingStep(
            trainee.model,
            trainee.optimizer,
            adjust=[*adjust, *trainee.adjust],
            after=trainee.after,
            loss=trainee.loss,
        )
        generator = torch_stream(self._seed, "analysis", name)
        rows = _batches(len(labels), self.config.train.batch_size, generator)
        trainee.trainable.train_mode()
        with torch_seeded(self._seed, "analysis", name, "model"):
            for number in range(1, steps + 1):
                batch = next(rows)
                step(images[batch], labels[batch])
                yield number

    def fit(self, steps: int, data: Images, *, adjust: tuple[Effect, ...] = (), name: str = "train") -> None:
        """Train without looking at it; arguments are those of :meth:`train`."""
        for _ in self.train(steps, data, adjust=adjust, name=name):
            pass

    @torch.no_grad()
    def accuracy(self, data: Images) -> float:
        """Return the share of images that are classified correctly, in evaluation mode."""
        images, labels = data
        self.model.eval()
        hits = [
            int((self.model(part).argmax(1) == truth).sum())
            for part, truth in zip(torch.split(images, EVALUATED), torch.split(labels, EVALUATED), strict=True)
        ]
        return sum(hits) / len(labels)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield whole batches of rows, pass after pass, without end."""
    size = min(size, count)
    while True:
        rows = torch.randperm(count, generator=generator)
        yield from torch.split(rows[: count - count % size], size)
