"""The normalization methods: one file each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from fednorm.cards import NORMS
from fednorm.config import checked_options
from fednorm.recognition.layers import Recognition, recognize
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
def _built_in() -> Mapping[type[nn.Module], NormSpec]:
    return {layer: spec for spec in NORMS for layer in spec.layers}


def specs_by_layer() -> Mapping[type[nn.Module], NormSpec]:
    """Return every layer type that a method speaks for, with that method's identity card.

    Of strangers' methods those that were given in this process are there, but for types of PyTorch's that one of our
    methods speaks for already, or for an ancestor of theirs: no card changes what somebody else's network is.
    """
    ours = _built_in()
    met = {layer: spec for spec in NORMS.met for layer in spec.layers if not _is_taken(layer, ours)}
    return {**met, **ours} if met else ours


def _is_taken(layer: type[nn.Module], ours: Mapping[type[nn.Module], NormSpec]) -> bool:
    return layer.__module__.startswith("torch.") and any(base in ours for base in layer.__mro__)


def spec_of(module: nn.Module) -> NormSpec | None:
    """Return the card of the method that speaks for a module, or None.

    A descendant of a known layer counts where it computes what its ancestor does, up to an activation inside; so does
    a foreign class that computes a known formula, and a class that was declared: see :mod:`fednorm.recognition.layers`.
    """
    recognition = recognition_of(module)
    return None if recognition is None else recognition.spec


def recognition_of(module: nn.Module) -> Recognition | None:
    """Return what is known of a normalization layer, or of a method's convolution; None for any other module."""
    return recognize(module, specs_by_layer())
