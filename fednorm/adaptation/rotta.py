"""rotta: the statistics of RoTTA: batch normalization by a slow average, over a memory balanced by predicted classes.

    M <- (1 - momentum) M + momentum m        V <- (1 - momentum) V + momentum v

m, v are the moments (v biased) not of the batch that comes but of a memory of images of the test stream, all layers in
one pass in which each layer normalizes by what it has just become. The memory keeps about as many images of each
*predicted* class, and of a class those that are fresh and sure: an image's score is

    timeliness 1 / (1 + exp(-age / capacity))  +  uncertainty: entropy / log K       (weighted by lambda_t, lambda_u)

and an image that comes replaces the one of the highest score of its own class where that has its share, of the
largest classes where the memory is full, and none where its own score is no less. So neither images of one class in a
row nor single images carry the statistics away. A batch is predicted *before* it enters the memory, and the
statistics move each ``update_every`` images. No gradient is used.

Yuan, Xie, Li. Robust Test-Time Adaptation in Dynamic Scenarios. CVPR 2023. https://arxiv.org/abs/2303.13899; official
code: https://github.com/BIT-DA/RoTTA. Its teacher and student, which train the affine tensors on the memory, are not
here: this is its robust batch normalization (RBN) with its memory (CSTU).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.adaptation import Adaptation, AdaptationSpec, Adapter, Knowledge
from fednorm.adaptation._layers import (
    entropy,
    moments,
    normalized,
    replace_forward,
    require_statistics,
    running,
    statistics_layers,
)
from fednorm.cards import Citation
from fednorm.options import number, share, whole


@dataclass
class Item:
    """An image in the memory.

    Attributes:
        image: The image, as a network is given it.
        uncertainty: The entropy of its prediction, in nats.
        age: Images that came since.
    """

    image: Tensor
    uncertainty: float
    age: int = 0


@dataclass
class Memory:
    """Images of the test stream, balanced by predicted class.

    Attributes:
        capacity: The most images.
        num_classes: K.
        lambda_t: Weight of the age in the score.
        lambda_u: Weight of the uncertainty.
        items: By class, in the order in which they came.
    """

    capacity: int
    num_classes: int
    lambda_t: float = 1.0
    lambda_u: float = 1.0
    items: list[list[Item]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.items = [[] for _ in range(self.num_classes)]

    def score(self, uncertainty: float, age: int) -> float:
        """Return how readily an image is given up."""
        timeliness = 1 / (1 + math.exp(-age / self.capacity))
        return self.lambda_t * timeliness + self.lambda_u * uncertainty / math.log(max(self.num_classes, 2))

    def add(self, image: Tensor, predicted: int, uncertainty: float) -> None:
        """Take an image in, where it is to be kept; all others are older by one then."""
        own = self.items[predicted]
        if len(own) >= self.capacity / self.num_classes:
            room = self._give_up([predicted], self.score(uncertainty, 0))
        elif sum(map(len, self.items)) < self.capacity:
            room = True
        else:
            most = max(map(len, self.items))
            largest = [kind for kind, items in enumerate(self.items) if len(items) == most]
            room = self._give_up(largest, self.score(uncertainty, 0))
        if room:
            own.append(Item(image, uncertainty))
        for item in (item for items in self.items for item in items):
            item.age += 1

    def _give_up(self, classes: list[int], score: float) -> bool:
        """Remove the image of the highest score of some classes, the last of equal ones, unless it is no higher."""
        worst, where = -math.inf, (0, 0)
        for kind in classes:
            for place, item in enumerate(self.items[kind]):
                if (own := self.score(item.uncertainty, item.age)) >= worst:
                    worst, where = own, (kind, place)
        if worst == -math.inf:  # of a class there is none yet
            return True
        if worst > score:
            self.items[where[0]].pop(where[1])
            return True
        return False

    def images(self) -> Tensor:
        """Return all images, class by class."""
        return torch.stack([item.image for items in self.items for item in items])


@dataclass(frozen=True, kw_only=True)
class RoTTA(Adaptation):
    """Moves the running statistics slowly towards those of a balanced memory.

    Attributes:
        momentum: Weight of the memory's statistics at an update.
        memory: Images that the memory holds at most.
        update_every: Images between two updates.
        lambda_t: Weight of an image's age in its score.
        lambda_u: Weight of its uncertainty.
    """

    method: ClassVar[str] = "rotta"

    momentum: float = 0.05
    memory: int = 64
    update_every: int = 64
    lambda_t: float = 1.0
    lambda_u: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.method, "momentum", self.momentum)
        whole(self.method, "memory", self.memory, at_least=2)
        whole(self.method, "update_every", self.update_every, at_least=1)
        number(self.method, "lambda_t", self.lambda_t)
        number(self.method, "lambda_u", self.lambda_u)

    @property
    def passes(self) -> tuple[float, float]:
        """A pass that predicts, and the memory's."""
        return 0.0, 1.0 + self.memory / self.update_every

    def check(self, model: nn.Module) -> None:
        """Refuse a network without running statistics."""
        require_statistics(model, self.method)

    def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
        """Return what predicts each batch, and then remembers its images."""
        del knowledge
        moving = False

        def robust(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
            plain = layer.forward

            def forward(x: Tensor) -> Tensor:
                if not moving:
                    return plain(x)
                for own, new in zip(running(layer), moments(x), strict=True):
                    own.lerp_(new, self.momentum)
                return normalized(layer, x, *running(layer))

            return forward

        for layer in statistics_layers(model, self.method).values():
            replace_forward(layer, robust(layer))
        memory: Memory | None = None
        met = 0

        @torch.no_grad()
        def predict(images: Tensor) -> Tensor:
            nonlocal memory, met, moving
            logits: Tensor = model(images)
            memory = memory or Memory(self.memory, logits.shape[1], self.lambda_t, self.lambda_u)
            guesses, unsure = logits.argmax(1).tolist(), entropy(logits).tolist()
            for image, guess, uncertainty in zip(images, guesses, unsure, strict=True):
                memory.add(image, guess, uncertainty)
                met += 1
                if met % self.update_every == 0:
                    moving = True
                    model(memory.images())
                    moving = False
            return logits

        return predict


SPEC = AdaptationSpec(
    name="rotta",
    summary="Running statistics move slowly towards those of a memory of test images, balanced by predicted class.",
    citation=Citation(
        title="Robust Test-Time Adaptation in Dynamic Scenarios",
        authors="Yuan, Xie, Li",
        year=2023,
        arxiv="2303.13899",
    ),
    make=RoTTA,
    statistics=True,
    predicts="before",
    deviations=(
        "Its statistics and its memory alone: no teacher and student, so that weights, scales and shifts stand still, "
        "and no strong augmentation.",
        "The entropy of a prediction is exact; the official code adds 1e-6 within the logarithm.",
    ),
    verified=("the average and the memory's choice against the formulas written out",),
)
