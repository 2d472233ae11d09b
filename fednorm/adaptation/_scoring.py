"""The accuracy of a network that adapts itself to the very images that it is scored on, as they come."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.adaptation import Adaptation, Adapter, Knowledge
from fednorm.cards import ADAPTATIONS
from fednorm.config import EvaluateConfig
from fednorm.data.domain import Split
from fednorm.rng import Name, torch_stream
from fednorm.training.work import Work

ALONE = 4
"""About how many images of a batch take as long as one that comes alone."""


def made_adaptations(config: EvaluateConfig) -> tuple[Adaptation, ...]:
    """Return the methods that a run is evaluated under, in the order of its configuration."""
    made = []
    for table in config.adaptation:
        options = {key: value for key, value in table.items() if key != "name"}
        made.append(ADAPTATIONS[table["name"]].made(options))
    return tuple(made)


def require_adaptable(config: EvaluateConfig, model: nn.Module) -> None:
    """Refuse, before training, a network that one of a run's adaptations cannot adapt.

    Raises:
        ConfigError: It has nothing to adapt, or layers whose formula the method does not know.
    """
    for how in made_adaptations(config):
        how.check(model)


def work(config: EvaluateConfig, scored: int, learned_on: int) -> Work:
    """Return what a run's adaptations do, for an estimate of its time.

    Args:
        config: Which adaptations.
        scored: Images that each of them is scored on.
        learned_on: Images of all who learn before, where a method does: with gradients, twice a round.
    """
    trained = untrained = 0.0
    for how in made_adaptations(config):
        small = max(1.0, ALONE / how.batch_size)
        with_gradients, without = how.passes
        trained += small * (with_gradients * scored + 2 * how.rounds_of_learning * learned_on)
        untrained += small * without * scored
    return Work(trained, untrained)


def described(how: Adaptation, name: str) -> dict[str, Any]:
    """Return what a result says of an adaptation: its name, the composition of its batches, its own options."""
    return {"name": name, "batch_size": how.batch_size, "order": how.order, "reset": how.reset, "options": how.options}


def rows_in_order(split: Split, order: str, generator: torch.Generator) -> Tensor:
    """Return the rows of a split in the order in which they come, int64, shape (n,)."""
    if order == "shuffled":
        return torch.randperm(len(split), generator=generator)
    if order == "class_sorted":
        return torch.argsort(split.targets.cpu(), stable=True)
    return torch.arange(len(split))


class Adapted:
    """A trained network that adapts itself wherever it is scored; the network that is given stays as it is.

    Args:
        adaptation: How.
        model: The trained network; it is copied.
        knowledge: What the method has learned before.
    """

    def __init__(self, adaptation: Adaptation, model: nn.Module, knowledge: Knowledge) -> None:
        self._adaptation, self._knowledge = adaptation, knowledge
        self._trained = fresh(model)
        self._adapter: Adapter | None = None

    def accuracy(self, split: Split, seed: int, *names: Name) -> float:
        """Return the share of a split's images that is right; 0 where there are none.

        Outputs that are no numbers are wrong.

        Args:
            split: The images.
            seed: Of the order in which they come.
            *names: Likewise.
        """
        how = self._adaptation
        rows = rows_in_order(split, how.order, torch_stream(seed, "adaptation", *names))
        if how.reset != "never":
            self._adapter = None
        hits = 0
        for part in torch.split(rows, how.batch_size) if len(rows) else ():
            if self._adapter is None or how.reset == "batch":
                self._adapter = how.begin(copy.deepcopy(self._trained), self._knowledge)
            images, labels = split.inputs(part)
            logits = self._adapter(images)
            hits += int(((logits.argmax(1) == labels) & ~logits.isnan().any(1)).sum())
        return hits / max(len(rows), 1)


def fresh(model: nn.Module) -> nn.Module:
    """Return a copy of a network in evaluation mode, without gradients."""
    made = copy.deepcopy(model).eval()
    for parameter in made.parameters():
        parameter.grad = None
    return made


def refined(
    adaptation: Adaptation, model: nn.Module, knowledge: Knowledge, split: Split, seed: int, *names: Name
) -> dict[str, Tensor]:
    """Return what one training client's images make of what is known; see :meth:`Adaptation.refine`.

    Args:
        adaptation: The method.
        model: The trained network; it is copied.
        knowledge: What is known.
        split: The client's images; of none nothing is learned.
        seed: Of the batches.
        *names: Likewise.
    """
    rows = rows_in_order(split, "shuffled", torch_stream(seed, "adaptation", *names))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(rows, adaptation.batch_size) if len(rows) else ():
            yield split.inputs(part)

    return adaptation.refine(fresh(model), knowledge, batches())


def averaged(learned: Sequence[Knowledge]) -> dict[str, Tensor]:
    """Return the mean of what several clients learned, all clients alike, in float64."""
    first = learned[0]
    return {key: torch.stack([each[key].double() for each in learned]).mean(0).to(first[key].dtype) for key in first}
