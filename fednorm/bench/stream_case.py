"""What the learners are timed on: a stream of two experiences of synthetic images, of which the second is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fednorm.config import RunConfig, resolve
from fednorm.data.domain import Split
from fednorm.errors import unknown_name
from fednorm.rng import stream
from fednorm.streams.stream import Experience, Stream
from fednorm.streams.workbench import ContinualWorkbench

NUM_CLASSES = 10

_TEST = 10
"""Test images of each experience, which nothing here looks at; a stream has some."""


@dataclass(frozen=True, kw_only=True)
class StreamCase:
    """One stream: ER-ACE online on a network with batch normalization, new and memory samples in one forward pass.

    Pixels and labels are drawn uniformly: what is timed does not depend on what they show.

    Attributes:
        name: The case's name.
        model: The network.
        width: Channels of its first convolution.
        image_size: Height and width of the images.
        warmup: Training images of the first experience, which fills the memory and is not timed.
        train: Training images of the second experience.
        augment: ``none``, ``crop`` or ``crop_flip``.
        batch_size: New images a step; as many come from memory.
        memory_size: Images that the memory holds.
        learning_rate: Of SGD.
        seed: Of the images, the weights, the batches, the memory and the augmentation.
        norm: The normalization.
        compile: Whether forward passes go through ``torch.compile``.
    """

    name: str
    model: str
    width: int
    image_size: int
    warmup: int
    train: int
    augment: str
    batch_size: int = 10
    memory_size: int = 500
    learning_rate: float = 0.03
    seed: int = 1
    norm: str = "batch_norm"
    compile: bool = False

    @property
    def steps(self) -> int:
        """Return the number of timed steps."""
        return -(-self.train // self.batch_size)

    @property
    def summary(self) -> str:
        """Return the case in words."""
        augment = {"none": "no augmentation", "crop": "random crops", "crop_flip": "random crops and flips"}
        return (
            f"{self.model} of width {self.width} with {self.norm}, {self.image_size}×{self.image_size}, "
            f"{self.batch_size} new and {self.batch_size} memory images a step, {augment[self.augment]}, "
            f"{self.steps} timed steps"
        )

    def config(self) -> RunConfig:
        """Return the run's configuration; its scenario is a name only, the stream being :meth:`stream`."""
        return resolve(
            {
                "kind": "continual",
                "seed": self.seed,
                "compile": self.compile,
                "model": {"name": self.model, "width": self.width},
                "norm": {"name": self.norm},
                "learner": {"name": "er_ace", "memory_size": self.memory_size},
                "train": {
                    "batch_size": self.batch_size,
                    "epochs": 1,
                    "learning_rate": self.learning_rate,
                    "augment": self.augment,
                },
            }
        )

    def stream(self) -> Stream:
        """Return the stream, half of the classes in each experience: the same images at every call."""
        rng = stream(self.seed, "bench", "images")
        sizes = (self.warmup + _TEST, self.train + _TEST)
        shape = (sum(sizes), 3, self.image_size, self.image_size)
        images = torch.from_numpy(rng.integers(0, 256, shape, dtype="uint8"))
        half = NUM_CLASSES // 2
        labels = torch.from_numpy(rng.integers(0, half, len(images)))
        labels[sizes[0] :] += half

        def split(first: int, count: int) -> Split:
            return Split(images, labels, torch.arange(first, first + count))

        def experience(number: int, first: int, count: int) -> Experience:
            return Experience(
                number=number,
                title=f"half {number + 1}",
                classes=tuple(range(half * number, half * (number + 1))),
                train=split(first, count),
                validation=split(0, 0),
                test=split(first + count, _TEST),
            )

        experiences = (experience(0, 0, self.warmup), experience(1, sizes[0], self.train))
        return Stream("synthetic images", NUM_CLASSES, self.image_size, experiences, tuple(range(NUM_CLASSES)), half)

    def workbench(self) -> ContinualWorkbench:
        """Return a new workbench for the case."""
        return ContinualWorkbench(self.config(), self.stream())


STREAM_CASES = {
    case.name: case
    for case in (
        StreamCase(
            name="resnet18-slim",
            model="resnet18",
            width=20,
            image_size=32,
            warmup=600,
            train=600,
            augment="crop_flip",
        ),
        StreamCase(
            name="small-cnn",
            model="digits_cnn",
            width=8,
            image_size=28,
            warmup=600,
            train=2000,
            augment="none",
        ),
    )
}
"""The cases by name: the network of ``split_cifar10`` as it trains by default, and a small one."""


def stream_case_of(name: str) -> StreamCase:
    """Return the case called ``name``.

    Raises:
        UnknownNameError: There is no such case.
    """
    if name not in STREAM_CASES:
        raise unknown_name("benchmark case", name, STREAM_CASES)
    return STREAM_CASES[name]
