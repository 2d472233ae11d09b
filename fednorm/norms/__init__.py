"""The normalization methods: one file each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from fednorm.cards import NORMS
from fednorm.config import checked_options
from fednorm.spec import Norm, NormSpec


def make_norm(name: str, options: Mapping[str, Any] | None = None) -> Norm:
    """Return the method called ``name`` with the given options.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: It has no such option, or the option's value is out of range.
    """
    spec = NORMS[name]
    return spec.made(checked_options(spec, "norm", options or {}))


@cache
def specs_by_layer() -> Mapping[type[nn.Module], NormSpec]:
    """Return every layer type that a method speaks for, with that method's identity card."""
    return {layer: spec for spec in NORMS for layer in spec.layers}


def spec_of(module: nn.Module) -> NormSpec | None:
    """Return the card of the method that speaks for a module's class or its nearest ancestor, or None."""
    table = specs_by_layer()
    return next((table[base] for base in type(module).__mro__ if base in table), None)
