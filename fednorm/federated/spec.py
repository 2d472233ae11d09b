"""The identity card of a federated strategy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fednorm.federated.strategy import NormStrategy
from fednorm.spec import Citation


@dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """What a strategy's file declares beside its class.

    Attributes:
        name: The strategy's name, equal to its file's stem.
        summary: One sentence.
        citation: Where it was published.
        make: The class; its own keyword arguments are the strategy's options.
        defaults: Configuration it brings along, laid under the user's: its own norm first of all.
        personalised: Whether clients keep tensors of their own, so that each domain is tested with a different model.
    """

    name: str
    summary: str
    citation: Citation
    make: type[NormStrategy]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    personalised: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the strategy's options with their defaults."""
        parameters = inspect.signature(self.make.__init__).parameters.values()
        common = inspect.signature(NormStrategy.__init__).parameters
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in common}
