"""The optimizers: one file each; PyTorch's own under their names, and others beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import nn

from fednorm.cards import Card, Option, options_of
from fednorm.config.sections import OF_OPTIMIZERS


class Make(Protocol):
    """Builds an optimizer from section ``train`` of a run.

    It may have keyword-only parameters named in :data:`~fednorm.config.sections.OF_OPTIMIZERS`, with their defaults.
    """

    def __call__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(Card):
    """The identity card of an optimizer.

    Attributes:
        make: Builds it.
        has_momentum: Whether ``train.momentum`` is its momentum; if not, setting that is refused.
        adaptive: Whether a step's length does not grow with the gradient, as Adam's; an effective learning rate is
            then the rate over the weight's norm, not over its square.
    """

    make: Make
    has_momentum: bool = False
    adaptive: bool = False

    expects: ClassVar[str] = (
        "An optimizer is a callable (parameters, *, lr, momentum, weight_decay), or an OptimizerSpec."
    )

    @property
    def maker(self) -> Make:
        """What builds it."""
        return self.make

    @cached_property
    def declared(self) -> Mapping[str, Option]:
        """Those of :data:`~fednorm.config.sections.OF_OPTIMIZERS` that it has."""
        try:
            declared = options_of(self.make, frozenset())
        except ValueError:  # a stranger's callable need not tell its parameters
            return {}
        return {name: option for name, option in declared.items() if name in OF_OPTIMIZERS}

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return a card for a callable that builds an optimizer."""
        if not callable(method):
            return None
        summary = (getattr(method, "__doc__", "") or "").strip().partition("\n")[0]
        return cls(name=reference, summary=summary, make=method, has_momentum=True)


def torch_adam(kind: Callable[..., torch.optim.Optimizer]) -> Make:
    """Return what builds one of PyTorch's Adams, which have no momentum to set."""

    def make(
        parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        del momentum
        return kind(list(parameters), lr=lr, weight_decay=weight_decay, foreach=True)

    return make
