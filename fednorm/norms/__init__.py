"""The normalization methods: one file each, one line each in this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from fednorm.errors import ConfigError, canonical, unknown_name
from fednorm.recognition import Recognition, recognize
from fednorm.spec import Norm, NormSpec

NORMS: tuple[str, ...] = (
    "adab2n",
    "batch_norm",
    "batch_norm_corrected",
    "batch_renorm",
    "continual_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "nap",
    "none",
    "rms_norm",
    "switch_norm",
    "sws",
    "task_balanced_norm",
    "ws_group_norm",
)


def norm_spec(name: str) -> NormSpec:
    """Return the identity card of the method called ``name``.

    Raises:
        UnknownNameError: There is no such method.
    """
    name = canonical(name)
    if name not in NORMS:
        raise unknown_name("norm", name, NORMS)
    spec: NormSpec = import_module(f"fednorm.norms.{name}").SPEC
    return spec


def make_norm(name: str, options: Mapping[str, Any] | None = None) -> Norm:
    """Return the method called ``name`` with the given options.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: It has no such option, or the option's value is out of range.
    """
    spec = norm_spec(name)
    known = [field.name for field in dataclasses.fields(spec.make)]
    for key in options or {}:
        if key not in known:
            raise ConfigError(f"norm {spec.name} has no option {key!r}. Its options: {', '.join(known) or 'none'}.")
    return spec.make(**(options or {}))


@cache
def specs_by_layer() -> Mapping[type[nn.Module], NormSpec]:
    """Return every layer type that a method speaks for, with that method's identity card."""
    return {layer: spec for spec in map(norm_spec, NORMS) for layer in spec.layers}


def spec_of(module: nn.Module) -> NormSpec | None:
    """Return the card of the method that speaks for a module, or None.

    A descendant of a known layer counts where it computes what its ancestor does, up to an activation inside; so does
    a foreign class that computes a known formula, and a class that was declared: see :mod:`fednorm.recognition`.
    """
    recognition = recognition_of(module)
    return None if recognition is None else recognition.spec


def recognition_of(module: nn.Module) -> Recognition | None:
    """Return what is known of a normalization layer, or of a method's convolution; None for any other module."""
    return recognize(module, specs_by_layer())
