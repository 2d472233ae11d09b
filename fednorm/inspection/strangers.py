"""A model by name, as it is: a library's, ours, or what an import path names. No weights are downloaded.

A run builds a network for its data, converted to its norm (:mod:`fednorm.models`); this gives the same network before
that, or any module that stands at an import path.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from inspect import Parameter
from typing import Any, cast

import torch
from torch import nn

from fednorm.cards import MODELS, is_path
from fednorm.errors import ConfigError, canonical, unknown_name
from fednorm.importing import import_object
from fednorm.models import Order, make_model
from fednorm.models._foreign import ForeignModel
from fednorm.models._zoo import MAKERS
from fednorm.norms import make_norm
from fednorm.recognition.buffers import quietly, said

CLASSES = 10
"""Of a model that asks for a number of classes."""


def load_model(name: str, *, device: str = "cpu") -> nn.Module:
    """Return a model by name, in training mode, with random weights.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, a name of :data:`~fednorm.models.MODELS`, or ``PACKAGE.MODULE:NAME``
            of a model, or of what makes one without arguments or as a run's model is made; the working directory is
            looked in, too.
        device: ``cpu``, or ``meta`` for a model without values, which is quick to make and takes no memory.

    Raises:
        UnknownNameError: The library has no such model.
        ConfigError: The library is not installed; the import, or the function, raises; what is named is no model.
    """
    library, _, rest = name.partition(":")
    with quietly(), contextlib.redirect_stdout(sys.stderr):
        if library in MAKERS:
            make = MAKERS[library](rest)
            try:
                with torch.device(device):
                    return _made(name, make)
            except ConfigError:  # some compute with values while they are built
                return _made(name, make).to(device)
        if is_path(name):
            named = import_object(name, "model")
            return (named if isinstance(named, nn.Module) else _made(name, _filled(name, named))).to(device)
    if canonical(name) not in MODELS.names:
        raise unknown_name(
            "model (torchvision:NAME, timm:NAME and PACKAGE.MODULE:NAME are read as well)", name, MODELS.names
        )
    return make_model(name, make_norm("batch_norm"), num_classes=CLASSES).to(device)


def _filled(path: str, make: Any) -> Callable[..., Any]:
    """Return what makes a model, given what it asks for as a run gives it."""
    if not callable(make):
        raise ConfigError(f"{path!r} is a {type(make).__name__}; it must be a model or a function that makes one.")
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # compiled, and says nothing of itself
        return cast(Callable[..., Any], make)
    if not any(p.default is p.empty and p.kind not in (Parameter.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return cast(Callable[..., Any], make)
    card = MODELS[path]
    assert isinstance(card, ForeignModel)
    order = Order(norm=make_norm("batch_norm"), num_classes=CLASSES, image_size=card.input_size)
    return partial(make, **card.arguments(order))


def _made(path: str, make: Callable[..., Any]) -> nn.Module:
    """Call what makes a model."""
    try:
        model = make()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path!r} could not be made: {said(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path!r} made a {type(model).__name__}; it must make a torch.nn.Module.")
    return model
