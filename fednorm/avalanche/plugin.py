"""What a norm needs of a training step beside its forward pass, as an Avalanche plugin for any Avalanche strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.avalanche.quietly import avalanche_imports
from fednorm.avalanche.reading import number_of
from fednorm.cards import NORMS
from fednorm.errors import ConfigError, DataError
from fednorm.norms import make_norm, spec_of
from fednorm.optim.projection import WeightProjection
from fednorm.spec import HookedLayer, Norm
from fednorm.training.step import announce

with avalanche_imports():
    from avalanche.core import SupervisedPlugin

TaskOf = Callable[[Any], Tensor]
"""Returns the experience that each sample of a strategy's present batch comes from, int64, shape (n,)."""

_BY = ("auto", "label", "task_label", "experience")


class NormPlugin(SupervisedPlugin):  # type: ignore[misc]
    """Does for a strategy of Avalanche what fednorm's training step does for fednorm's learners.

    Before a training forward pass the layers with hooks (adab2n, task_balanced_norm) are told the task of every sample;
    their penalties are added to the loss before the backward pass; after the update the norm's projection is made
    (nap); after an experience its layers are told that it has ended. Put it first among a strategy's plugins. On
    fednorm's own learners, which do all this, it is refused.

    A task is an experience, numbered in the order in which experiences came first; for a part of an online stream it is
    the experience that the part was cut from. Which task a sample belongs to is found ``by``:

    * ``label``: the experience that first brought its class. Right where a class is in one experience only.
    * ``task_label``: the experience that first brought its task label.
    * ``experience``: the present one, for all samples. Right for a strategy without memory.
    * ``auto`` (default): by task label where experiences have different ones, by label where no class came twice,
      else by the experience if the batch comes from its data alone. Where neither says it, a DataError.

    What is not a pass over the strategy's own batch (A-GEM's reference gradients, MIR's choice among its memory) is
    normalized as one task, as in a federation. Strategies with several steps an iteration (LaMAML, MER) have a penalty
    in none but the last.

    Args:
        norm: The method whose projection is made after every update, a name or an object with options
            (``fednorm.norms.make_norm``). By default that of each method with a projection that the model has layers
            of, with default options.
        by: ``auto``, ``label``, ``task_label``, ``experience``, or a function of the strategy.
        project: Whether hidden weights keep their initial norm under any norm (NaP's projection).

    Attributes:
        tasks_seen: The numbers of the experiences so far, each once, in the order in which they came first.

    Raises:
        ConfigError: ``by`` is none of these, or there is no such norm.
    """

    supports_distributed = False

    def __init__(self, norm: Norm | str | None = None, *, by: str | TaskOf = "auto", project: bool = False) -> None:
        super().__init__()
        if not callable(by) and by not in _BY:
            raise ConfigError(f"NormPlugin's by is one of {', '.join(_BY)}, or a function of the strategy; got {by!r}.")
        self.norm = make_norm(norm) if isinstance(norm, str) else norm
        self.by, self.project = by, project
        self.tasks_seen: list[int] = []
        self._current = 0
        self._of_class: dict[int, int] = {}
        self._of_task_label: dict[int, int] = {}
        self._repeated: set[int] = set()
        self._model: nn.Module | None = None
        self._hooked: list[HookedLayer] = []
        self._projections: list[Any] = []
        self._handles: list[Any] = []
        self._penalties: list[Tensor] = []

    # Avalanche's callbacks --------------------------------------------------------------------------------------------

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Find the network's layers, and its initial norms."""
        del kwargs
        self._attach(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Count the experience's task."""
        del kwargs
        self._attach(strategy)
        self._scan(strategy.model)  # it may have grown
        # Joint training has all experiences at once, and calls the first the present one.
        for experience in getattr(strategy, "_experiences", None) or [strategy.experience]:
            self._count(experience)

    def _count(self, experience: Any) -> None:
        number = number_of(experience, unnamed=max(self.tasks_seen, default=-1) + 1)
        if number not in self.tasks_seen:
            self.tasks_seen.append(number)
        self._current = self.tasks_seen.index(number)
        if not self._hooked:
            return
        for label in _uniques(experience.dataset, "targets"):
            if self._of_class.setdefault(label, self._current) != self._current:
                self._repeated.add(label)
        for label in _uniques(experience.dataset, "targets_task_labels"):
            self._of_task_label.setdefault(label, self._current)

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Forget the penalties of passes that belong to no step."""
        del kwargs
        self._attach(strategy)
        self._penalties.clear()

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalties of the step's forward passes to the loss."""
        del kwargs
        for penalty in self._penalties:
            strategy.loss = strategy.loss + penalty
        self._penalties.clear()

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Project the parameters."""
        del strategy, kwargs
        for projection in self._projections:
            projection()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Tell the layers that the experience has ended."""
        del strategy, kwargs
        for layer in self._hooked:
            layer.end_experience()

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Take the hooks off, so that the network can be pickled."""
        del strategy, kwargs
        for handle in self._handles:
            handle.remove()
        self._handles, self._penalties = [], []

    # The network ------------------------------------------------------------------------------------------------------

    def _attach(self, strategy: Any) -> None:
        """Take note of the strategy's network, which a strategy may replace."""
        if hasattr(strategy, "step") and hasattr(strategy, "tasks_seen"):
            raise ConfigError(
                "fednorm's learners tell the norms' layers their tasks, add their penalties and project by themselves: "
                "leave NormPlugin out. It is for Avalanche's own strategies."
            )
        model = strategy.model
        if model is not self._model:
            self.after_training(strategy)
            self._projections = self._projections_of(model)
            self._model = model
            self._scan(model)
        if self._hooked and not self._handles:
            announce(self._hooked, None, 1)
            self._handles = [
                model.register_forward_pre_hook(_Before(self, strategy)),
                model.register_forward_hook(_After(self, strategy)),
            ]

    def _scan(self, model: nn.Module) -> None:
        self._hooked = [module for module in model.modules() if isinstance(module, HookedLayer)]

    def _projections_of(self, model: nn.Module) -> list[Any]:
        norms = [self.norm] if self.norm is not None else _with_projection(model)
        made: list[Any] = [projection for norm in norms if (projection := norm.after_update(model)) is not None]
        if self.project and not made:
            made = [WeightProjection(model)]
        for old, new in zip(self._projections, made, strict=False):
            if hasattr(new, "radii") and old.radii.keys() == new.radii.keys():
                new.load_state_dict(old.state_dict())  # the norms to keep are those of the first network
        return made

    # Tasks ------------------------------------------------------------------------------------------------------------

    def announce(self, strategy: Any, images: Any) -> None:
        """Tell the layers the tasks of a pass that is about to be made over some images."""
        tasks = self._tasks(strategy, images)
        current = None if self._current == len(self.tasks_seen) - 1 else self._current
        announce(self._hooked, tasks, len(self.tasks_seen) if tasks is not None else 1, current)

    def _tasks(self, strategy: Any, images: Any) -> Tensor | None:
        """Return the task of every image, or None where they are not those of the strategy's batch."""
        batch = getattr(strategy, "mbatch", None)
        if not batch or not self.tasks_seen:
            return None
        memory = getattr(strategy, "mb_buffer_x", None)
        if images is batch[0]:
            labels, task_labels, ours = batch[1], batch[-1], True
        elif images is memory:
            labels, task_labels, ours = strategy.mb_buffer_y, strategy.mb_buffer_tid, False
        else:
            return None
        count = len(labels)
        if not count or len(images) % count:
            return None
        tasks = self._of_batch(strategy, labels, task_labels, ours=ours).to(torch.int64)
        # Several views of each sample, one block after the other, as in SCR.
        return tasks.repeat(len(images) // count)

    def _of_batch(self, strategy: Any, labels: Tensor, task_labels: Tensor, *, ours: bool) -> Tensor:
        if callable(self.by):
            numbers = self.by(strategy)
            return torch.tensor([self.tasks_seen.index(int(number)) for number in numbers], device=labels.device)
        by = self.by if self.by != "auto" else self._which(strategy, labels, ours=ours)
        if by == "experience":
            return torch.full((len(labels),), self._current, dtype=torch.int64, device=labels.device)
        known, asked = (self._of_class, labels) if by == "label" else (self._of_task_label, task_labels)
        try:
            return torch.tensor([known[int(label)] for label in asked], dtype=torch.int64, device=labels.device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"NormPlugin takes a sample's task from its {by.replace('_', ' ')}, and one in this batch came in no "
                f"experience ({error}). Say by='experience', or give by a function of the strategy that returns the "
                "experience of each sample."
            ) from error

    def _which(self, strategy: Any, labels: Tensor, *, ours: bool) -> str:
        if len(set(self._of_task_label.values())) > 1:
            return "task_label"
        known = labels.ndim == 1 and not labels.is_floating_point()
        if known and not (self._repeated and self._repeated.intersection(labels.tolist())):
            return "label"
        if ours and _from_the_experience_alone(strategy, len(labels)):
            return "experience"
        raise DataError(
            "NormPlugin cannot tell which experience the samples of this batch come from: their classes came in "
            "several, and the strategy has a memory. Give the benchmark task labels (to_avalanche(stream, "
            "task_labels=True)), say by='experience', or give by a function of the strategy that returns the "
            "experience of each sample."
        )


class _Before:
    """Called before a network's forward pass; kept out of copies of the network, which a strategy may make."""

    def __init__(self, plugin: NormPlugin, strategy: Any) -> None:
        self.plugin, self.strategy = plugin, strategy

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and module is self.strategy.model and self.strategy.is_training:
            self.plugin.announce(self.strategy, inputs[0] if inputs else None)

    def __deepcopy__(self, memo: Any) -> _Before:
        return self


class _After(_Before):
    """Called after a network's forward pass."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        del inputs, output
        if not (module.training and module is self.strategy.model and self.strategy.is_training):
            return
        layers = self.plugin._hooked
        self.plugin._penalties += [penalty for layer in layers if (penalty := layer.penalty()) is not None]
        announce(layers, None, 1)  # the tasks of this batch are not those of what may come next


def _with_projection(model: nn.Module) -> list[Norm]:
    """Return every method with a projection of its own that a network has layers of, with its default options."""
    names = {spec.name for module in model.modules() if (spec := spec_of(module)) is not None}
    return [make_norm(name) for name in sorted(names) if NORMS[name].make.after_update is not Norm.after_update]


def _uniques(dataset: Any, name: str) -> set[int]:
    attribute = getattr(dataset, name, None)
    if attribute is None:
        return set()
    values = attribute.uniques if hasattr(attribute, "uniques") else set(map(int, attribute))
    return {int(value) for value in values}


def _from_the_experience_alone(strategy: Any, count: int) -> bool:
    """Return whether a batch holds samples of the present experience and no others, as far as can be seen."""
    adapted, own = strategy.adapted_dataset, strategy.experience.dataset
    replays = "Replay" in type(strategy.dataloader).__name__ or count > strategy.train_mb_size
    return adapted is not None and len(adapted) == len(own) and not replays
