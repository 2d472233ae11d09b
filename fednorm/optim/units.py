"""The units of a chain of layers, and how one is made new: what ReDo, continual backprop and SNR share.

A unit is a feature of a linear layer or a channel of a convolution. A new one has incoming weights of its layer's
initial distribution and outgoing weights of 0, so that the network computes what it would without it; the optimizer's
moments of both begin at 0. Behind a flattening its outgoing weights are the columns of all its positions.

For networks in which each layer feeds the next one and nothing else; a residual network is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.norms import spec_of
from fednorm.norms.sws import ScaledActivation
from fednorm.rng import Name, torch_seeded
from fednorm.roles import Kind
from fednorm.spec import ACTIVATIONS

Weighted = nn.Linear | nn.Conv2d

_NONLINEARITIES = (*(type(make()) for name, make in ACTIVATIONS.items() if name != "identity"), ScaledActivation)
_PASSIVE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
)
"""What a unit passes through as a unit, and what leaves a unit that is zero at zero."""

AFFINE: Mapping[Kind, float] = {Kind.SCALE: 1.0, Kind.SHIFT: 0.0}
"""What is learned of a unit in a norm, with its value in a new one."""

STATISTICS: Mapping[Kind, float] = {Kind.MEAN: 0.0, Kind.VAR: 1.0, Kind.QUADRATIC: 1.0}
"""What is estimated of a unit in a norm, with its value in a new one."""


@dataclass(frozen=True, eq=False)
class Link:
    """One hidden layer of a chain, with all that belongs to its units.

    Attributes:
        path: Path of the layer whose outputs are the units.
        layer: That layer: the incoming weights.
        norms: The normalization layers between it and the nonlinearity.
        activation: The nonlinearity.
        following: The next layer: the outgoing weights.
    """

    path: str
    layer: Weighted
    norms: tuple[nn.Module, ...]
    activation: nn.Module
    following: Weighted

    @property
    def units(self) -> int:
        """The number of units."""
        return _units(self.layer)

    @property
    def trained(self) -> bool:
        """Whether both its incoming and its outgoing weights are trained at the moment."""
        return self.layer.weight.requires_grad and self.following.weight.requires_grad

    @property
    def groups(self) -> int:
        """The groups that the next layer takes the units in."""
        return self.following.groups if isinstance(self.following, nn.Conv2d) else 1


def replace_units(
    chosen: Sequence[tuple[Link, Tensor]],
    optimizer: torch.optim.Optimizer,
    seed: int,
    *names: Name,
    whole: bool = False,
) -> None:
    """Make units new: their incoming weights are drawn anew, and then those outgoing are 0, of all layers.

    Args:
        chosen: Layers, and which of their units, bool, shape (units,).
        optimizer: Whose moments of all that is set begin anew.
        seed: Of the fresh weights, which come from the streams ``names`` and the layer's path.
        names: See there.
        whole: As the reference code of continual backprop and of SNR: the bias is 0, and running statistics begin
            anew. If not, as ReDo: the bias is drawn as the layer draws it, and statistics stay.
    """
    due = [(link, units) for link, units in chosen if units.any()]
    for link, units in due:
        _renew_incoming(link, units, optimizer, seed, *names, link.path, whole=whole)
    for link, units in due:
        _cut_outgoing(link, units, optimizer)


@torch.no_grad()
def _renew_incoming(
    link: Link, units: Tensor, optimizer: torch.optim.Optimizer, seed: int, *names: Name, whole: bool
) -> None:
    """Draw the units' incoming weights anew, and set their norms' scale and shift to 1 and 0."""
    fresh = copy.deepcopy(link.layer)
    with torch_seeded(seed, *names):
        fresh.reset_parameters()
    if whole and fresh.bias is not None:
        fresh.bias.zero_()
    renewed = [(p, fresh.get_parameter(name)[units]) for name, p in link.layer.named_parameters(recurse=False)]
    for parameter, values in (*renewed, *_in_norms(link, AFFINE)):
        parameter[units] = values
        for moment in moments(optimizer, parameter):
            moment[units] = 0
    for statistic, values in _in_norms(link, STATISTICS) if whole else ():
        statistic[units] = values


@torch.no_grad()
def _cut_outgoing(link: Link, units: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Set the units' outgoing weights and their moments to 0."""
    groups = link.groups
    cut = units.view(groups, 1, -1, 1)
    for tensor in (link.following.weight, *moments(optimizer, link.following.weight)):
        # (groups, outputs a group, units a group, positions): a flattening leaves a channel's positions together.
        tensor.view(groups, len(tensor) // groups, link.units // groups, -1).masked_fill_(cut, 0)


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return what an optimizer keeps for each entry of a parameter."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return [kept for kept in state.values() if isinstance(kept, Tensor) and kept.shape == parameter.shape]


def _in_norms(link: Link, values: Mapping[Kind, float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of a link's norms that has one number a unit, with the value of a new one, by its kind."""
    for norm in link.norms:
        spec = spec_of(norm)
        assert spec is not None
        own = (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))
        for name, tensor in own:
            kind = spec.tensors[name].kind
            if kind in values and (kind in AFFINE or tensor.shape == (link.units,)):
                yield tensor, tensor.new_tensor(values[kind])


def chain(model: nn.Module, method: str = "ReDo") -> tuple[Link, ...]:
    """Return the hidden layers of a network in which each layer feeds the next one and nothing else.

    Args:
        model: Nested ``nn.Sequential``: linear layers and convolutions, with one nonlinearity between every two of
            them; normalization layers before it, a flattening behind it, pooling and dropout anywhere.
        method: Who needs them, for the message.

    Raises:
        ConfigError: It is something else; the message names the layer.
    """
    walk = _Walk(method)
    for path, module in _leaves(model, method):
        walk.take(path, module)
    if not walk.links:
        raise ConfigError(
            f"{method} recycles the units of hidden layers, and {type(model).__name__} has none: it needs two linear "
            "layers or convolutions with a nonlinearity between them."
        )
    return tuple(walk.links)


class _Walk:
    """One walk along a chain: what has been seen since the latest layer with weights."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.links: list[Link] = []
        self.layer: Weighted | None = None
        self.path = ""
        self.norms: list[nn.Module] = []
        self.activation: nn.Module | None = None
        self.flattened = False
        self.seen: set[nn.Module] = set()

    def take(self, path: str, module: nn.Module) -> None:
        """Take the next module into account, or refuse it."""
        if module in self.seen and not isinstance(module, (*_PASSIVE, nn.Flatten)):
            raise _no_chain(self.method, path, module, "stands in it twice: give each place a module of its own")
        self.seen.add(module)
        spec = spec_of(module)
        if isinstance(module, Weighted):
            self._weighted(path, module)
        elif isinstance(module, _NONLINEARITIES) and self.activation is None:
            self.activation = module
        elif spec is not None and spec.normalizes and self.activation is None:
            self.norms.append(module)
        elif _flattens(module) and (self.layer is None or self.activation is not None):
            self.flattened = True
        elif not isinstance(module, _PASSIVE):
            raise _no_chain(
                self.method, path, module, f"stands where {self.method} does not know what it does to units"
            )

    def _weighted(self, path: str, module: Weighted) -> None:
        """Close the link that leads to a layer with weights, and begin the one behind it."""
        _require_plain(self.method, path, module)
        if self.layer is not None:
            if self.activation is None:
                raise ConfigError(
                    f"{self.method} scores units by what follows their nonlinearity, and there is none between layers "
                    f"{self.path!r} and {path!r}. Put one there, or train without {self.method}."
                )
            units, inputs = _units(self.layer), _inputs(module)
            if inputs != units and not (self.flattened and inputs % units == 0):
                why = f"has {inputs} inputs, which are not the {units} units of {self.path!r}"
                raise _no_chain(self.method, path, module, why)
            self.links.append(Link(self.path, self.layer, tuple(self.norms), self.activation, module))
        self.layer, self.path = module, path
        self.norms, self.activation, self.flattened = [], None, False


def _leaves(module: nn.Module, method: str, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of nested nn.Sequential in the order they are run, with their paths.

    Raises:
        ConfigError: A module with modules in it is no nn.Sequential, so that their order is not known.
    """
    if isinstance(module, nn.Sequential):
        for name, child in module._modules.items():
            yield from _leaves(child, method, f"{path}.{name}" if path else name)
    elif spec_of(module) is not None or isinstance(module, _NONLINEARITIES) or not list(module.children()):
        yield path, module
    else:
        raise _no_chain(method, path, module, "is not an nn.Sequential, so what feeds what in it is not known")


def _no_chain(method: str, path: str, module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"{method} works on a chain of layers, and {path or 'the model itself'!r} ({type(module).__name__}) {why}. Use "
        f"a model without residual branches, such as mlp, cnn or digits_cnn, or train without {method}."
    )


def _require_plain(method: str, path: str, layer: Weighted) -> None:
    """Refuse a layer that computes with something else than its raw weight, where zeros would not stay zeros."""
    kind = type(layer)
    plain = kind.forward in (nn.Linear.forward, nn.Conv2d.forward) and "weight" in layer._parameters
    if isinstance(layer, nn.Conv2d):
        plain = plain and type(layer)._conv_forward is nn.Conv2d._conv_forward
    if not plain:
        raise ConfigError(
            f"{method} sets outgoing weights to 0, and layer {path!r} ({kind.__name__}) does not compute with its raw "
            "weight, so that 0 would not stay 0. Use a norm that leaves the weights alone, such as batch_norm."
        )


def _flattens(module: nn.Module) -> bool:
    return isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1


def _units(layer: Weighted) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _inputs(layer: Weighted) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
