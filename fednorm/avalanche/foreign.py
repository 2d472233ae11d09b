"""What a user hands to fednorm's learners that was written for Avalanche's: plugins and networks.

A plugin works as in Avalanche where it reads, adds to the loss or the gradients, changes the batch, its labels or the
output, changes ``adapted_dataset``, or stops training. What it cannot replace is what is not there, or is held
elsewhere too: the loader, the network object, the optimizer object, the methods of the training loop. A plugin that
does is refused when a learner is made, by what its code assigns; one that hides it, when it has done so.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

from fednorm.avalanche.quietly import avalanche_imports
from fednorm.errors import ConfigError
from fednorm.streams.passes import BatchChanges

with avalanche_imports():
    from avalanche.models.dynamic_modules import DynamicModule, MultiTaskModule
    from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin
    from avalanche.training.plugins.clock import Clock
    from avalanche.training.templates.base_sgd import PeriodicEval

LEARNERS = {
    "ReplayPlugin": "er",
    "GDumbPlugin": "gdumb",
    "MIRPlugin": "er",
    "RARPlugin": "er",
    "GSS_greedyPlugin": "er",
    "CoPEPlugin": "er",
    "BiCPlugin": "er",
}
"""Avalanche's plugins with a memory of their own, and the learner of fednorm that is like each, or nearest to it."""

ELSEWHERE = "one of Avalanche's own strategies with fednorm.avalanche.NormPlugin among its plugins"

REFUSED = {
    **{
        name: f"Take learner {learner} (scenarios.learners.{learner}), or {ELSEWHERE}."
        for name, learner in LEARNERS.items()
    },
    "GenerativeReplayPlugin": f"It adds generated samples, whose task is unknown, to every batch. Take {ELSEWHERE}.",
    "NormPlugin": "fednorm's learners tell layers their tasks, add penalties and project by themselves: leave it out.",
}
"""Avalanche's plugins that cannot work here, and what to take instead."""

_HOMES = ("avalanche.", "fednorm.avalanche")

UNTOUCHABLE = {
    "dataloader": "batches are cut out of arrays, without a loader",
    "model": "the training step, the effects and the optimizer hold the network that the learner was made with",
    "optimizer": "the training step and the effects hold the optimizer that the learner was made with",
    "retain_graph": "one backward pass is made a step",
    **dict.fromkeys(
        ("criterion", "forward", "backward", "optimizer_step", "training_epoch", "make_train_dataloader", "train"),
        "the learner has its own training loop",
    ),
}
"""What a plugin must not assign to a strategy, and why."""

_AT_BATCH = ("before_forward", "after_forward", "before_backward", "after_backward")
_SILENT = (EvaluationPlugin, Clock, PeriodicEval)
"""Avalanche's own, which only look on."""


class Plugins(BatchChanges):
    """What the plugins of a learner may do to a batch, and what stands where Avalanche has its loader.

    Args:
        plugins: The plugins.
    """

    def __init__(self, plugins: Iterable[Any]) -> None:
        active = [plugin for plugin in plugins if not isinstance(plugin, _SILENT)]
        at_iteration = any(_overrides(plugin, "before_training_iteration") for plugin in active)
        at_batch = at_iteration or any(_overrides(plugin, name) for plugin in active for name in _AT_BATCH)
        super().__init__(at_iteration, at_batch)
        self.no_loader: list[Any] = []

    def require_untouched(self, learner: Any) -> None:
        """Require that a learner still has what it was made with.

        Raises:
            ConfigError: A plugin has replaced something.
        """
        for name, own in (
            ("dataloader", self.no_loader),
            ("model", learner.step.model),
            ("optimizer", learner.step.optimizer),
        ):
            if getattr(learner, name) is not own:
                raise ConfigError(
                    f"A plugin has replaced the learner's {name}, which would have no effect: {UNTOUCHABLE[name]}. "
                    f"Leave it out, or take {ELSEWHERE}."
                )


def require_plugins(plugins: Iterable[Any], *, scheduled: bool) -> None:
    """Require that all plugins work on fednorm's learners.

    Args:
        plugins: The plugins.
        scheduled: Whether the learner has a schedule of the learning rate.

    Raises:
        ConfigError: One does not; the message says what to take instead.
    """
    for plugin in plugins:
        if isinstance(plugin, _SILENT):
            continue
        name = type(plugin).__name__
        for ancestor in type(plugin).__mro__:
            if ancestor.__name__ in REFUSED and ancestor.__module__.startswith(_HOMES):
                raise ConfigError(f"{name} would have no effect on this learner. {REFUSED[ancestor.__name__]}")
        if scheduled and isinstance(plugin, LRSchedulerPlugin):
            raise ConfigError(
                f"{name} and the learner's schedule both set the learning rate. Leave out one: schedule=None, or the "
                "plugin."
            )
        for attribute in sorted(replaced(type(plugin)) & UNTOUCHABLE.keys()):
            raise ConfigError(
                f"{name} replaces the strategy's {attribute}, which would have no effect on this learner: "
                f"{UNTOUCHABLE[attribute]}. Leave the plugin out, or take {ELSEWHERE}."
            )


def require_model(model: nn.Module) -> None:
    """Require that a network has all its outputs from the start and needs no task label.

    Raises:
        ConfigError: A module of it grows with the stream, or takes task labels.
    """
    for path, module in model.named_modules():
        if isinstance(module, DynamicModule | MultiTaskModule):
            what = "takes task labels" if isinstance(module, MultiTaskModule) else "grows with the stream"
            raise ConfigError(
                f"{path or 'The network'} is a {type(module).__name__}, which {what}; fednorm's learners need all "
                "num_classes outputs from the start. Take nn.Linear(features, num_classes) in its place, or "
                f"{ELSEWHERE}."
            )


def replaced(kind: type) -> set[str]:
    """Return the attributes of a strategy that a plugin's methods assign, as far as their source says."""
    names: set[str] = set()
    for ancestor in kind.__mro__:
        if ancestor.__module__.startswith("avalanche.core") or ancestor is object:
            continue
        for method in vars(ancestor).values():
            if inspect.isfunction(method):
                names.update(_assigned(method))
    return names


@cache  # reading the source again for every learner would take a quarter of a short run
def _assigned(method: Any) -> frozenset[str]:
    """Return the attributes that a method assigns to its argument ``strategy``, or a callback to its first one."""
    return frozenset(_assignments(method))


def _assignments(method: Any) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # no source: what it does is seen when it has done it
        return
    arguments = list(inspect.signature(method).parameters)
    strategies = {"strategy"} & set(arguments)
    if method.__name__.startswith(("before_", "after_")):
        strategies |= set(arguments[1:2])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, strategies):
            yield node.attr
        elif (
            isinstance(node, ast.Call)
            and _is_name(node.func, {"setattr"})
            and len(node.args) == 3
            and _is_name(node.args[0], strategies)
            and isinstance(node.args[1], ast.Constant)
        ):
            yield str(node.args[1].value)


def _is_name(node: ast.expr, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _overrides(plugin: Any, name: str) -> bool:
    method = getattr(plugin, name, None)
    return method is not None and not str(getattr(method, "__module__", "")).startswith("avalanche.core")
