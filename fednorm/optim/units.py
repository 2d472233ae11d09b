"""The units of hidden layers, and how one is made new: what ReDo, continual backprop and SNR share.

A unit is a feature of a linear layer or a channel of a convolution. A new one has incoming weights of its layer's
initial distribution and outgoing weights of 0, so that the network computes what it would without it; the optimizer's
moments of both begin at 0. Behind a flattening its outgoing weights are the columns of all its positions.

Which layers a network has, and what belongs to the units of each, is found by :mod:`fednorm.optim.hidden_units`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fednorm.errors import DataError
from fednorm.norms import spec_of
from fednorm.rng import Name, torch_seeded
from fednorm.roles import Kind

Weighted = nn.Linear | nn.Conv2d

AFFINE: Mapping[Kind, float] = {Kind.SCALE: 1.0, Kind.SHIFT: 0.0}
"""What is learned of a unit in a norm, with its value in a new one."""

STATISTICS: Mapping[Kind, float] = {Kind.MEAN: 0.0, Kind.VAR: 1.0, Kind.QUADRATIC: 1.0}
"""What is estimated of a unit in a norm, with its value in a new one."""


@dataclass(frozen=True, eq=False)
class Link:
    """One hidden layer, with all that belongs to its units.

    Attributes:
        path: Path of the layer whose outputs are the units.
        layer: That layer: the incoming weights.
        norms: The normalization layers between it and the nonlinearity.
        activation: The nonlinearity; None where it is a function, or a module that stands in several places.
        following: The next layer: the outgoing weights.
    """

    path: str
    layer: Weighted
    norms: tuple[nn.Module, ...]
    activation: nn.Module | None
    following: Weighted

    @property
    def units(self) -> int:
        """The number of units."""
        return units_of(self.layer)

    @property
    def trained(self) -> bool:
        """Whether both its incoming and its outgoing weights are trained at the moment."""
        return self.layer.weight.requires_grad and self.following.weight.requires_grad

    @property
    def groups(self) -> int:
        """The groups that the next layer takes the units in."""
        return self.following.groups if isinstance(self.following, nn.Conv2d) else 1

    def listen(self, hear: Callable[[Tensor], None], method: str, *, graded: bool = False) -> RemovableHandle:
        """Tell of the units' activations in every training forward pass, from now on.

        They are what the nonlinearity gives; where that is no module of its own, what the next layer is given, which is
        the same thing behind a pooling or dropout that stands between the two.

        Args:
            hear: Called with the activations of a pass, shape (units, samples times positions).
            method: Who listens, for the message.
            graded: Whether passes without gradients are left out.

        Returns:
            What takes the hook off again.
        """
        heard = self.following if self.activation is None else self.activation

        def hook(module: nn.Module, output: Tensor) -> None:
            # A copy of the model carries the hook along; its activations are not ours.
            if module is not heard or not module.training or (graded and not torch.is_grad_enabled()):
                return
            features = output.detach()
            if module is self.following and isinstance(module, nn.Linear) and features.shape[1:] != (self.units,):
                features = features.view(len(features), self.units, -1) if features.ndim == 2 else features
            if features.ndim < 2 or features.shape[1] != self.units:
                raise DataError(
                    f"{method} looks for the {self.units} units of layer {self.path!r} on axis 1 of its activations; "
                    f"got shape {tuple(output.shape)}. Give the network batches of images."
                )
            hear(features.transpose(0, 1).flatten(1))

        if self.activation is None:
            return self.following.register_forward_pre_hook(lambda module, args: hook(module, args[0]))
        return self.activation.register_forward_hook(lambda module, _, output: hook(module, output))


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


def units_of(layer: Weighted) -> int:
    """Return the number of units that a layer has."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
