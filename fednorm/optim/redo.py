"""ReDo: units that hardly fire are recycled, with fresh incoming and zero outgoing weights.

Sokar, Agarwal, Castro, Evci. The Dormant Neuron Phenomenon in Deep Reinforcement Learning. ICML 2023.
https://arxiv.org/abs/2302.12902 (Equation 1, Algorithm 1). Official code: google/dopamine, ``labs/redo``.

    s_c = mean|a_c| / mean_c(mean|a_c|),       unit c is recycled where s_c <= tau

with a_c what follows the nonlinearity, means over samples and positions; a unit is a feature of a linear layer or a
channel of a convolution. Every ``every`` updates each recycled unit

* gets incoming weights, and its bias, from the layer's initial distribution;
* gets outgoing weights of 0, in the next layer; behind a flattening these are the columns of all its positions;
* loses the optimizer's moments of both (Adam's ``exp_avg`` and ``exp_avg_sq``, SGD's ``momentum_buffer``).

Scores of all layers are taken before anything changes, incoming weights are set before outgoing ones; the output layer
is not recycled; Adam's step count goes on: all as in the official code. A unit that never fired (a_c = 0) contributed
nothing, and with outgoing weights of 0 it still does not: the network's function is unchanged. Not so where a norm that
pools units (layer or group normalization) stands before the nonlinearity: its moments see the new weights. NaP's paper
names this where it finds ReDo the one rival that NaP does not improve (arXiv 2407.01800, section 5).

Differs:

* Scores come from the training batch of the update itself; the official code draws another batch from its replay
  memory (64 transitions in the paper). Use batches that are not tiny, or a small tau.
* A norm's scale and shift of a recycled unit go back to 1 and 0, and the statistics stay. The paper's networks have no
  normalization.
* A bias is drawn as the layer draws it; the official code's layers draw 0. Its moments are reset too.

An effect after the update, and before a projection of the weights where there is one. For a chain of layers; a residual
network is refused (the official code recycles the layers within its blocks).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fednorm import options
from fednorm.device import wide
from fednorm.errors import ConfigError, DataError
from fednorm.norms import spec_of
from fednorm.norms.sws import ScaledActivation
from fednorm.rng import torch_seeded
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

_INITIAL: Mapping[Kind, float] = {Kind.SCALE: 1.0, Kind.SHIFT: 0.0}


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


class ReDo:
    """Recycles the dormant units of a chain of layers, every so many calls.

    Call it after every update. It sees the activations through hooks that are on the model only between the update
    before a recycling and the recycling itself.

    Args:
        model: The network that is trained: nested ``nn.Sequential`` of linear layers and convolutions, each with a
            nonlinearity before the next one.
        optimizer: Of the network. Where training takes a new one, assign it to :attr:`optimizer`.
        every: Updates between recyclings, 1 or more; 1000 in the paper.
        tau: Largest score of a recycled unit, in [0, 1); 0.025 or 0.1 in the paper, and 0 takes only dead units.
        seed: Of the fresh weights, which come from the streams ``(seed, "redo", recycling, path)``.

    Attributes:
        links: The hidden layers, in order.
        updates: Calls so far.
        recycled: Paths of the layers with the numbers of units recycled in the latest recycling.

    Raises:
        ConfigError: An option is out of range, or the network is no such chain.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int, tau: float, seed: int = 0
    ) -> None:
        options.whole("redo", "every", every, at_least=1)
        options.number("redo", "tau", tau)
        if not 0 <= tau < 1:
            raise ConfigError(f"redo.tau is a share of the layer's mean activation, in [0, 1); got {tau!r}.")
        self.links = chain(model)
        self.optimizer = optimizer
        self.every = every
        self.tau = tau
        self.seed = seed
        self.updates = 0
        self.recycled: dict[str, int] = {}
        self._sizes: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._watch()

    @torch.no_grad()
    def __call__(self) -> None:
        """Count an update; recycle where it is one of every ``every``.

        Raises:
            ConfigError: It is, and the model has made no training forward pass since the last update.
        """
        self.updates += 1
        if self.updates % self.every == 0:
            dormant = self._dormant()
            for link, units in zip(self.links, dormant, strict=True):
                if units.any():
                    self._renew_incoming(link, units)
            for link, units in zip(self.links, dormant, strict=True):
                if units.any():
                    self._cut_outgoing(link, units)
            self.recycled = {link.path: int(units.sum()) for link, units in zip(self.links, dormant, strict=True)}
        self._watch()

    @property
    def counts(self) -> bool:
        """Whether the number of calls decides what a call does."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of calls so far."""
        return {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on after as many calls as :meth:`state_dict` had counted."""
        self.updates = int(state["updates"])
        self._watch()

    def _watch(self) -> None:
        """Put the hooks on the model where the next call recycles, and take them off where it does not."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sizes.clear()
        if (self.updates + 1) % self.every == 0:
            for index, link in enumerate(self.links):
                self._handles.append(link.activation.register_forward_hook(_measure(self._sizes, index, link)))

    def _dormant(self) -> list[Tensor]:
        """Return which units of each layer are dormant, bool of shape (units,)."""
        missing = [link.path for index, link in enumerate(self.links) if index not in self._sizes]
        if missing:
            raise ConfigError(
                f"ReDo has seen no training forward pass through {', '.join(missing)} since the last update. Build it "
                "on the model that is trained, after any conversion or copy of it, and train in model.train() mode."
            )
        sizes = [self._sizes[index] for index in range(len(self.links))]
        return [size <= self.tau * size.mean() for size in sizes]

    def _renew_incoming(self, link: Link, units: Tensor) -> None:
        """Draw the units' incoming weights and bias anew, and set their norms' scale and shift to 1 and 0."""
        fresh = copy.deepcopy(link.layer)
        with torch_seeded(self.seed, "redo", self.updates // self.every, link.path):
            fresh.reset_parameters()
        renewed = [(p, fresh.get_parameter(name)[units]) for name, p in link.layer.named_parameters(recurse=False)]
        for parameter, values in (*renewed, *_affine(link)):
            parameter[units] = values
            for moment in self._moments(parameter):
                moment[units] = 0

    def _cut_outgoing(self, link: Link, units: Tensor) -> None:
        """Set the units' outgoing weights and their moments to 0."""
        groups = link.following.groups if isinstance(link.following, nn.Conv2d) else 1
        cut = units.view(groups, 1, -1, 1)
        for tensor in (link.following.weight, *self._moments(link.following.weight)):
            # (groups, outputs a group, units a group, positions): a flattening leaves a channel's positions together.
            tensor.view(groups, len(tensor) // groups, link.units // groups, -1).masked_fill_(cut, 0)

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        """Return what the optimizer keeps for each entry of a parameter."""
        state: Mapping[str, Any] = self.optimizer.state.get(parameter, {})
        return [kept for kept in state.values() if isinstance(kept, Tensor) and kept.shape == parameter.shape]


def _measure(sizes: dict[int, Tensor], index: int, link: Link) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that keeps the mean size of each unit's activation in a training forward pass."""

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        # A copy of the model carries the hook along; its activations are not ours.
        if module is not link.activation or not module.training:
            return
        if output.ndim < 2 or output.shape[1] != link.units:
            raise DataError(
                f"ReDo expects the {link.units} units of layer {link.path!r} on axis 1 of its activations; got shape "
                f"{tuple(output.shape)}. Give the network batches of images."
            )
        sizes[index] = output.detach().transpose(0, 1).flatten(1).to(wide(output.device)).abs().mean(1)

    return hook


def _affine(link: Link) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each scale and shift of a link's norms, one number a unit, with their initial value."""
    for norm in link.norms:
        spec = spec_of(norm)
        assert spec is not None
        for name, parameter in norm.named_parameters(recurse=False):
            kind = spec.tensors[name].kind
            if kind in _INITIAL:
                yield parameter, parameter.new_tensor(_INITIAL[kind])


def chain(model: nn.Module) -> tuple[Link, ...]:
    """Return the hidden layers of a network in which each layer feeds the next one and nothing else.

    Args:
        model: Nested ``nn.Sequential``: linear layers and convolutions, with one nonlinearity between every two of
            them; normalization layers before it, a flattening behind it, pooling and dropout anywhere.

    Raises:
        ConfigError: It is something else; the message names the layer.
    """
    walk = _Walk()
    for path, module in _leaves(model):
        walk.take(path, module)
    if not walk.links:
        raise ConfigError(
            f"ReDo recycles the units of hidden layers, and {type(model).__name__} has none: it needs two linear "
            "layers or convolutions with a nonlinearity between them."
        )
    return tuple(walk.links)


class _Walk:
    """One walk along a chain: what has been seen since the latest layer with weights."""

    def __init__(self) -> None:
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
            raise _no_chain(path, module, "stands in it twice: give each place a module of its own")
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
            raise _no_chain(path, module, "stands where ReDo does not know what it does to units")

    def _weighted(self, path: str, module: Weighted) -> None:
        """Close the link that leads to a layer with weights, and begin the one behind it."""
        _require_plain(path, module)
        if self.layer is not None:
            if self.activation is None:
                raise ConfigError(
                    "ReDo scores units by what follows their nonlinearity, and there is none between layers "
                    f"{self.path!r} and {path!r}. Put one there, or train without ReDo."
                )
            units, inputs = _units(self.layer), _inputs(module)
            if inputs != units and not (self.flattened and inputs % units == 0):
                raise _no_chain(path, module, f"has {inputs} inputs, which are not the {units} units of {self.path!r}")
            self.links.append(Link(self.path, self.layer, tuple(self.norms), self.activation, module))
        self.layer, self.path = module, path
        self.norms, self.activation, self.flattened = [], None, False


def _leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of nested nn.Sequential in the order they are run, with their paths.

    Raises:
        ConfigError: A module with modules in it is no nn.Sequential, so that their order is not known.
    """
    if isinstance(module, nn.Sequential):
        for name, child in module._modules.items():
            yield from _leaves(child, f"{path}.{name}" if path else name)
    elif spec_of(module) is not None or isinstance(module, _NONLINEARITIES) or not list(module.children()):
        yield path, module
    else:
        raise _no_chain(path, module, "is not an nn.Sequential, so what feeds what in it is not known")


def _no_chain(path: str, module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"ReDo works on a chain of layers, and {path or 'the model itself'!r} ({type(module).__name__}) {why}. Use a "
        "model without residual branches, such as mlp, cnn or digits_cnn, or train without ReDo."
    )


def _require_plain(path: str, layer: Weighted) -> None:
    """Refuse a layer that computes with something else than its raw weight, where zeros would not stay zeros."""
    kind = type(layer)
    plain = kind.forward in (nn.Linear.forward, nn.Conv2d.forward) and "weight" in layer._parameters
    if isinstance(layer, nn.Conv2d):
        plain = plain and type(layer)._conv_forward is nn.Conv2d._conv_forward
    if not plain:
        raise ConfigError(
            f"ReDo sets outgoing weights to 0, and layer {path!r} ({kind.__name__}) does not compute with its raw "
            "weight, so that 0 would not stay 0. Use a norm that leaves the weights alone, such as batch_norm."
        )


def _flattens(module: nn.Module) -> bool:
    return isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1


def _units(layer: Weighted) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _inputs(layer: Weighted) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
