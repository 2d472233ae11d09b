"""The identity card of a federated strategy."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self, Unpack

from torch import nn

from fednorm.cards import Card, Option, options_of
from fednorm.config import DEFAULT_NORM
from fednorm.federation.strategy import Common, NormStrategy

LOCAL = "local"
"""The option that every strategy takes: what stays on its client, by place (:mod:`fednorm.recognition.places`)."""


@dataclass(frozen=True, kw_only=True)
class StrategySpec(Card):
    """What a strategy's file declares beside its class.

    Attributes:
        make: The class; its own keyword arguments are the strategy's options.
        defaults: Configuration it brings along, laid under the user's: its own norm first of all.
        personalised: Whether each client is tested with a model of its own: it keeps tensors, or is fine-tuned first.
        pooled: Whether the first client is given the training images of all, and the others none.
        own_scaling: Whether each client's images are scaled by statistics of its own, in place of ``data.normalize``.
        needs_experiences: Whether it does nothing of its own where clients do not learn on streams.
    """

    make: type[NormStrategy]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    personalised: bool = False
    pooled: bool = False
    own_scaling: bool = False
    needs_experiences: bool = False

    expects: ClassVar[str] = "A strategy is a subclass of NormStrategy, or a StrategySpec beside it."

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return the card that stands beside a subclass of :class:`NormStrategy`, or one made for it."""
        if not (inspect.isclass(method) and issubclass(method, NormStrategy)):
            return None
        beside = vars(sys.modules[method.__module__]).values()
        own = next((card for card in beside if isinstance(card, cls) and card.make is method), None)
        return own or cls(name=reference, summary=(method.__doc__ or "").strip().partition("\n")[0], make=method)

    @property
    def maker(self) -> type[NormStrategy]:
        """The strategy's class."""
        return self.make

    @property
    def own_norm(self) -> str:
        """The name of the norm that it brings along, or that every run has where it brings none."""
        return str(self.defaults.get("norm", {}).get("name", DEFAULT_NORM))

    def made(self, model: nn.Module, options: Mapping[str, Any], **common: Unpack[Common]) -> NormStrategy:
        """Return the strategy for a model.

        Args:
            model: The run's model.
            options: The strategy's own options.
            common: What every strategy takes.

        Raises:
            ConfigError: There is no such option, or its value is out of range.
            RoleError: The strategy would do nothing on this model.
        """
        return self.make(model, **common, **options)

    @cached_property
    def declared(self) -> Mapping[str, Option]:
        """The strategy's own options, and ``local``, which every strategy takes."""
        own = options_of(self.make, self.beyond)
        taken = inspect.signature(self.make).parameters.values()
        takes_more = any(p.kind is p.VAR_KEYWORD or p.name == LOCAL for p in taken)
        return {**own, LOCAL: Option(LOCAL, str, "")} if takes_more else own

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's own options with their defaults; ``local`` is told of where it is set."""
        return {name: option.default for name, option in self.declared.items() if name != LOCAL}

    @cached_property
    def beyond(self) -> frozenset[str]:
        """The arguments that every strategy takes."""
        return frozenset(inspect.signature(NormStrategy.__init__).parameters)
