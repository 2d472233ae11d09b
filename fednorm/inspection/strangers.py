"""Models by name that are not ours: torchvision's, timm's, and what an import path names. No weights are downloaded."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fednorm.cards import MODELS
from fednorm.errors import ConfigError, canonical, unknown_name
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.recognition.buffers import quietly, said


def load_model(name: str, *, device: str = "cpu") -> nn.Module:
    """Return a model by name, in training mode, with random weights.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, a name of :data:`~fednorm.models.MODELS`, or ``PACKAGE.MODULE:NAME``
            of a model or of a function that makes one without arguments; the working directory is looked in, too.
        device: ``cpu``, or ``meta`` for a model without values, which is quick to make and takes no memory.

    Raises:
        UnknownNameError: The library has no such model.
        ConfigError: The library is not installed; the import, or the function, raises; what is named is no model.
    """
    source, colon, rest = name.partition(":")
    if not colon:
        return _ours(name, device)
    makers: dict[str, Callable[[str], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}
    make = makers.get(source)
    with quietly(), contextlib.redirect_stdout(sys.stderr):
        if make is None:
            return _imported(name).to(device)
        try:
            with torch.device(device):
                return make(rest)
        except ConfigError:  # some compute with values while they are built
            return make(rest).to(device)


def _ours(name: str, device: str) -> nn.Module:
    if canonical(name) not in MODELS.names:
        raise unknown_name(
            "model (torchvision:NAME, timm:NAME and PACKAGE.MODULE:NAME are read as well)", name, MODELS.names
        )
    return make_model(name, make_norm("batch_norm"), num_classes=10).to(device)


def library_names(library: str) -> list[str]:
    """Return the names of the classifiers that torchvision or timm has."""
    module = _library(library)
    if library == "torchvision":
        return list(module.models.list_models(module=module.models))
    return list(module.list_models())


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} cannot be imported ({said(error)}). Install it: pip install {name}.") from error


def _torchvision(name: str) -> nn.Module:
    models = _library("torchvision").models
    if canonical(name) not in models.list_models():
        raise unknown_name("model of torchvision", name, models.list_models())
    builder = models.get_model_builder(canonical(name))
    # Some builders load a backbone's weights unless told not to, and some draw initial weights for seconds.
    quiet = {"weights": None, "weights_backbone": None, "init_weights": False}
    accepted = inspect.signature(builder).parameters
    passed = {key: value for key, value in quiet.items() if key in accepted}
    if "init_weights" not in accepted and canonical(name) in ("googlenet", "inception_v3"):
        passed["init_weights"] = False
    model: nn.Module = _made(f"torchvision:{name}", lambda: builder(**passed))
    return model


def _timm(name: str) -> nn.Module:
    timm = _library("timm")
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise unknown_name("model of timm", name, timm.list_models())
    return _made(f"timm:{name}", lambda: timm.create_model(plain, pretrained=False))


def _imported(path: str) -> nn.Module:
    module_name, _, attribute = path.partition(":")
    with _working_directory():
        try:
            value: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"{module_name!r} of {path!r} cannot be imported: {said(error)}. Give PACKAGE.MODULE:NAME, of a module "
                "that Python finds from here."
            ) from error
        for part in attribute.split("."):
            if not hasattr(value, part):
                public = [key for key in vars(value) if not key.startswith("_")]
                raise unknown_name(f"name in {module_name}", attribute, public)
            value = getattr(value, part)
        return value if isinstance(value, nn.Module) else _made(path, value)


def _made(path: str, make: Any) -> nn.Module:
    """Call what makes a model."""
    if not callable(make):
        raise ConfigError(f"{path!r} is a {type(make).__name__}; it must be a model or a function that makes one.")
    try:
        model = make()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path!r} could not be made without arguments: {said(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path!r} made a {type(model).__name__}; it must make a torch.nn.Module.")
    return model


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Let Python import from the working directory, as ``python -m`` does."""
    before = list(sys.path)
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path[:] = before
