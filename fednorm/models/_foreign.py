"""Networks that strangers write: a callable, or an nn.Module's class, becomes a model.

It is given ``num_classes``, and of ``norm``, ``image_size``, ``in_channels``, ``width`` and ``activation`` what its
signature names; its further keyword-only parameters with a default are its options::

    def make_net(num_classes: int, *, norm: Norm, dropout: float = 0.0) -> nn.Module: ...

A network that was given the norm is taken as it is. One that was not is converted to the run's norm
(:func:`fednorm.convert`), and what that did is noted; layers that are of the norm already stay, with their own options
where the run gives none. Before anything is trained, two images of zeros go through it, on
PyTorch's meta device where the network can: a network that cannot take the images, or whose output is no tensor with a
logit for each class, is refused in a sentence.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import Parameter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fednorm.conversion.replacement import ConversionReport, convert_with_report
from fednorm.errors import ConfigError, FedNormError, canonical
from fednorm.models import Built, ModelSpec, Order
from fednorm.models._weights import Weights, head_of, weights_file
from fednorm.norms import spec_of
from fednorm.options import one_of
from fednorm.rng import stream_seed, torch_seeded
from fednorm.spec import ACTIVATIONS, Norm

GIVEN = ("num_classes", "norm", "image_size", "in_channels", "width", "activation")
"""The parameters that a run fills in, where a signature has them."""

IMAGE_SIZE = 32
"""Height and width of images for a network that does not say which it wants."""


def foreign_card(method: Any, reference: str) -> ModelSpec | None:
    """Return the card of a stranger's model, or None for what is no callable.

    Raises:
        ConfigError: It is a network instead of what makes one, it takes no ``num_classes``, or a parameter has no
            value.
    """
    if isinstance(method, nn.Module):
        raise ConfigError(
            f"{reference} is a network ({type(method).__name__}), and a model is what makes one, for a number of "
            "classes and a seed. Give its class, or a function of num_classes that returns a new one."
        )
    if not callable(method) or (inspect.isclass(method) and not issubclass(method, nn.Module)):
        return None
    try:
        parameters = inspect.signature(method).parameters
    except (ValueError, TypeError):
        return None
    _require_signature(parameters, reference)
    sizes = {name: _whole(parameters.get(name)) for name in ("image_size", "width")}
    return ForeignModel(
        name=reference,
        summary=(inspect.getdoc(method) or "").partition("\n")[0],
        make=method,
        input_size=sizes["image_size"] or IMAGE_SIZE,
        width=sizes["width"],
        origin=getattr(method, "__module__", "") or "",
    )


def _whole(parameter: Parameter | None) -> int:
    default = None if parameter is None else parameter.default
    return default if type(default) is int and default > 0 else 0


def _require_signature(parameters: Mapping[str, Parameter], reference: str) -> None:
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if "num_classes" not in named and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"{reference} takes no num_classes: its parameters are {', '.join(parameters) or 'none'}. A model is a "
            f"callable of num_classes and any of {', '.join(GIVEN[1:])}; give its last layer num_classes outputs."
        )
    bare = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name not in GIVEN or p.kind is p.POSITIONAL_ONLY
    ]
    if bare:
        raise ConfigError(
            f"{reference} has {', '.join(bare)} without a default, which no run fills in: a model is given "
            f"{', '.join(GIVEN)} by name. Give every other parameter a default, keyword-only where it is an option."
        )


@dataclass(frozen=True, kw_only=True)
class ForeignModel(ModelSpec):
    """The card of a network that was not written for fednorm."""

    make: Callable[..., Any]

    @property
    def beyond(self) -> frozenset[str]:
        """What a run fills in is no option."""
        return frozenset(GIVEN)

    @property
    def has_width(self) -> bool:
        """Whether it takes a width."""
        return "width" in self.parameters

    @property
    def stream(self) -> tuple[str, ...]:
        """The names of the stream of initial weights: the same whether it was given as an object or by a path."""
        return ("model",)

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The callable's parameters by name."""
        return inspect.signature(self.make).parameters

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Beginnings of keys of a weights file that the network may do without."""
        return ()

    def arguments(self, order: Order) -> dict[str, Any]:
        """Return what the callable is given.

        Raises:
            ConfigError: A width or an activation was asked for and it takes none, or it needs one and none was.
        """
        given: dict[str, Any] = {"num_classes": order.num_classes}
        offered = {
            "norm": order.norm,
            "image_size": order.image_size,
            "in_channels": order.in_channels,
            "width": order.width or None,
            "activation": canonical(order.activation) or None,
        }
        for name, value in offered.items():
            if name in self.parameters and value is not None:
                given[name] = value
            elif name in self.parameters and self.parameters[name].default is Parameter.empty:
                raise ConfigError(f"model {self.name} takes a {name} and has no default. Set model.{name}.")
        return {**given, **order.options}

    def require(self, order: Order) -> None:
        """Refuse what the callable has no parameter for."""
        super().require(order)
        if order.activation:
            one_of("model", "activation", canonical(order.activation), ACTIVATIONS)
            if "activation" not in self.parameters:
                raise ConfigError(
                    f"model {self.name} takes no activation. Leave model.activation empty, or give its callable a "
                    "parameter of that name."
                )

    def build(self, order: Order) -> Built:
        """Return the network, converted to the norm where it was not built from it.

        Raises:
            ConfigError: The callable raises or returns no network; the network cannot take the images or has another
                number of outputs; it cannot be converted; the weights do not fit.
        """
        network, notes = self._called(order), tuple[str, ...]()
        if any(is_lazy(tensor) for tensor in network.parameters()):
            _forward(network.eval(), order, "cpu")  # gives lazy layers their shapes
            network.train()
        self._require_runs(network, order)
        weights, head = self._weights(order, network)
        misfit = weights.misfit(network, head) if weights else ""
        if weights and not misfit:
            notes += weights.load(network)
        if "norm" in self.parameters:
            model, conversion = order.norm.prepare(network), dict[str, list[str]]()
        else:
            model, said, conversion = _converted(network, order.norm)
            notes += said
            self._require_runs(model, order, f" after its conversion to norm {type(order.norm).__name__}")
        if not weights:
            order.norm.initialize(model)
        if weights and misfit:  # those of a network that was converted already, as fednorm export writes them?
            if weights.misfit(model, head):
                raise weights.refusal(self.name, misfit)
            notes += weights.load(model)
        return Built(model, notes, conversion)

    def _called(self, order: Order) -> nn.Module:
        given = self.arguments(order)
        try:
            with _process_wide_seeded():
                network = self.make(**given)
        except FedNormError:
            raise
        except Exception as error:
            options = ", ".join(f"{key} = {value!r}" for key, value in given.items() if key != "norm")
            raise ConfigError(
                f"model {self.name} raised {type(error).__name__} when it was called with {options}: "
                f"{_one_line(error)}. Mend it, or its options (model.KEY)."
            ) from error
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"model {self.name} returned a {type(network).__name__}, and a model's callable returns a network: an "
                "nn.Module."
            )
        elsewhere = any(tensor.device.type not in ("cpu", "meta") for tensor in network.parameters())
        return (network.cpu() if elsewhere else network).train()

    def _weights(self, order: Order, network: nn.Module) -> tuple[Weights | None, frozenset[str]]:
        if not order.weights:
            return None, frozenset()
        weights = Weights(weights_file(order.weights, self), self.unused_weights)
        head = head_of(network, lambda k: self._called(replace(order, num_classes=k)), order.num_classes)
        return weights, head

    def _require_runs(self, network: nn.Module, order: Order, when: str = "") -> None:
        """Refuse a network that does not give a logit for each class of each image, in evaluation or in training."""
        shape = (_IMAGES, order.in_channels, order.image_size, order.image_size)
        for training in (False, True):
            try:
                logits = _dry(network, order, training=training)
            except Exception as error:
                raise ConfigError(
                    f"model {self.name} cannot take images of shape {shape}{when}: {type(error).__name__}: "
                    f"{_one_line(error)}. Set data.image_size to a size that it takes"
                    f"{self._size_hint(order)}, or another norm where the norm is what refuses."
                ) from error
            if not isinstance(logits, Tensor) or logits.shape != (_IMAGES, order.num_classes):
                came = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise ConfigError(
                    f"model {self.name} returns {came} for {_IMAGES} images{' in training' if training else ''}, and "
                    f"there are {order.num_classes} classes: it must return a tensor of shape (N, num_classes), here "
                    f"({_IMAGES}, {order.num_classes}). Give its last layer num_classes outputs."
                )

    def _size_hint(self, order: Order) -> str:
        return f", e.g. {self.input_size}" if order.image_size != self.input_size else ""


_IMAGES = 2
"""Images of zeros that go through a network before it is trusted; two, because one has no variance in its batch."""


def _dry(network: nn.Module, order: Order, *, training: bool) -> Any:
    """Return what a network gives for images of zeros; the network and every generator are left as they are."""
    try:
        return _forward(copy.deepcopy(network).to("meta").train(training), order, "meta")
    except Exception:  # the meta device has no numbers to compute with: where a network looks at some, they are needed
        with torch_seeded(0, "dry"), _process_wide_seeded():
            return _forward(copy.deepcopy(network).train(training), order, "cpu")


@torch.no_grad()
def _forward(network: nn.Module, order: Order, device: str) -> Any:
    return network(torch.zeros(_IMAGES, order.in_channels, order.image_size, order.image_size, device=device))


def _converted(network: nn.Module, norm: Norm) -> tuple[nn.Module, tuple[str, ...], dict[str, list[str]]]:
    """Return a network converted to a norm, what to say of it, and the paths of what was replaced."""
    brings = norm.inserts or norm.brings_activation or norm.brings_attention
    does_nothing = type(norm.normalizer).layer is Norm.layer and not brings
    if does_nothing and not any(isinstance(m, nn.Conv2d) or _normalizes(m) for m in network.modules()):
        return norm.prepare(network), ("It has no normalization layer, and the norm puts none.",), {}
    there = {spec.make for m in network.modules() if (spec := spec_of(m)) is not None and spec.normalizes}
    if there == {type(norm)} and norm == type(norm)():
        return norm.prepare(network), ("Its normalization layers are of the run's norm, and stay as they are.",), {}
    model, report = convert_with_report(network, norm)
    paths = {name: list(getattr(report, name)) for name in _REPORTED if getattr(report, name)}
    return model, (_sentence(report), *report.notes), paths


_REPORTED = {
    "layers": "normalization layers replaced",
    "inserted": "layers inserted before activations",
    "convolutions": "convolutions rebuilt",
    "activations": "activations scaled",
    "attentions": "attentions replaced",
    "residuals": "residual sums replaced",
}


def _sentence(report: ConversionReport) -> str:
    counts = [f"{len(getattr(report, name))} {what}" for name, what in _REPORTED.items() if getattr(report, name)]
    return f"Converted to {type(report.norm).__name__}: {', '.join(counts)}."


def _normalizes(module: nn.Module) -> bool:
    spec = spec_of(module)
    return spec is not None and spec.normalizes


@contextmanager
def _process_wide_seeded() -> Iterator[None]:
    """Seed Python's and NumPy's process-wide generators as PyTorch's is, for a stranger's code, and put them back."""
    value = stream_seed(torch.default_generator.initial_seed(), "foreign")
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that strangers draw from
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 240 else f"{text[:237]}..."
