"""Which hidden layers a network has whose units can be made new, and what belongs to the units of each.

A unit can be made new where all that leaves it is known: its layer's output goes through norms, one nonlinearity,
pooling, dropout and a flattening into one other layer, and nowhere else. Nested ``nn.Sequential`` are read in their
order. Any other network is traced (``torch.fx``), and there some layers keep their units:

* a layer whose output is added to, concatenated with or multiplied by something else, as the last of a residual
  branch, the shortcut's convolution, or a gate: its units belong to several layers;
* one whose output several layers read, as a residual network's stem;
* one with no nonlinearity before the next layer, as a linear bottleneck; and the output layer.

So of a residual block of two convolutions the units between them are made new, of a bottleneck those between the
first and the second and between the second and the third. The official code of continual backprop for residual
networks (``lop/algos/res_gnt.py``) takes all layers but those of shortcuts in their order: it replaces units of the
stream too, and cuts them from the layer that comes next alone, so that they go on acting through the shortcut.

Refused, by name: what does to a unit something that is not known here (a reshaping that is no flattening, an
attention), a depthwise convolution on its way (cutting its one input would leave a norm behind it a channel without
variance), and a layer that stands in several places.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from fednorm.chain import in_order
from fednorm.errors import ConfigError
from fednorm.norms import spec_of
from fednorm.norms.sws import ScaledActivation
from fednorm.optim.units import Link, Weighted, units_of
from fednorm.spec import ACTIVATIONS

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

_PASSIVE_FUNCTIONS = {
    *("dropout", "dropout2d", "max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"),
    *("contiguous", "stochastic_depth"),
}
"""The same as functions and methods of tensors."""


def hidden_units(model: nn.Module, method: str) -> tuple[Link, ...]:
    """Return the hidden layers of a network whose units can be made new, in the order in which they are run.

    Args:
        model: The network: linear layers and convolutions.
        method: Who needs them, for the message.

    Raises:
        ConfigError: It has none, cannot be traced, or does to a unit what is not known here; the message names the
            layer.
    """
    found = chain(model, method) if _is_nested(model) else _traced(model, method)
    if not found:
        raise ConfigError(
            f"{method} recycles the units of hidden layers, and {type(model).__name__} has none: it needs two linear "
            "layers or convolutions with a nonlinearity between them, and nothing else that reads the first's units."
        )
    return found


def chain(model: nn.Module, method: str) -> tuple[Link, ...]:
    """Return the hidden layers of a network in which each layer feeds the next one and nothing else.

    Args:
        model: Nested ``nn.Sequential``: linear layers and convolutions, with one nonlinearity between every two of
            them; normalization layers before it, a flattening behind it, pooling and dropout anywhere.
        method: Who needs them, for the message.

    Raises:
        ConfigError: It is something else; the message names the layer.
    """
    walk = _Walk(method)
    for path, module in _leaves(model):
        walk.take(path, module)
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
            raise _refusal(self.method, path, module, "stands in it twice: give each place a module of its own")
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
            raise _refusal(self.method, path, module, f"stands where {self.method} does not know what it does to units")

    def _weighted(self, path: str, module: Weighted) -> None:
        """Close the link that leads to a layer with weights, and begin the one behind it."""
        _require_plain(self.method, path, module)
        if self.layer is not None:
            if self.activation is None:
                raise ConfigError(
                    f"{self.method} scores units by what follows their nonlinearity, and there is none between layers "
                    f"{self.path!r} and {path!r}. Put one there, or train without {self.method}."
                )
            units, inputs = units_of(self.layer), _inputs(module)
            if inputs != units and not (self.flattened and inputs % units == 0):
                why = f"has {inputs} inputs, which are not the {units} units of {self.path!r}"
                raise _refusal(self.method, path, module, why)
            if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
                why = "is a depthwise convolution: a unit that is cut off from it takes one of its own units along"
                raise _refusal(self.method, path, module, why)
            self.links.append(Link(self.path, self.layer, tuple(self.norms), self.activation, module))
        self.layer, self.path = module, path
        self.norms, self.activation, self.flattened = [], None, False


def _is_nested(module: nn.Module) -> bool:
    """Return whether the order of the modules is that of their registration: nested ``nn.Sequential`` alone."""
    if in_order(module):
        return all(map(_is_nested, module._modules.values()))
    return _is_leaf(module) or not list(module.children())


def _is_leaf(module: nn.Module) -> bool:
    return spec_of(module) is not None or isinstance(module, (Weighted, *_NONLINEARITIES, *_PASSIVE, nn.Flatten))


def _leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of nested nn.Sequential in the order they are run, with their paths."""
    if in_order(module):
        for name, child in module._modules.items():
            yield from _leaves(child, f"{path}.{name}" if path else name)
    else:
        yield path, module


def _refusal(method: str, path: str, what: object, why: str) -> ConfigError:
    name = what if isinstance(what, str) else type(what).__name__
    return ConfigError(
        f"{method} follows units from each layer to the next one, and {path or 'the model itself'!r} ({name}) {why}. "
        f"Use a model of plain or residual layers, such as mlp, cnn, digits_cnn or resnet18, or train without {method}."
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


def _inputs(layer: Weighted) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


# --- networks that are traced ---------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces a network down to the modules that a walk knows; what was entered last is known when it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[str] = []

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return _is_leaf(module) or super().is_leaf_module(module, path)

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.entered.append(self.path_of_module(module))
        output = super().call_module(module, forward, args, kwargs)
        self.entered.pop()
        return output


def _traced(model: nn.Module, method: str) -> tuple[Link, ...]:
    """Return the hidden layers of a network that is no chain.

    Raises:
        ConfigError: It cannot be traced, or does to a unit what is not known here.
    """
    tracer, copied = _Tracer(), copy.deepcopy(model)  # a forward pass in Python may write to buffers
    try:
        graph = tracer.trace(copied)
    except Exception as error:  # whatever a forward pass does with a value that stands for all images
        path = tracer.entered[-1] if tracer.entered else ""
        why = f"cannot be traced (torch.fx: {str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise _refusal(method, path, model.get_submodule(path), why) from error
    places = Counter(model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op == "call_module":
            _require_seen_through(method, str(node.target), model.get_submodule(str(node.target)))
    links = (_followed(model, node, places, method) for node in graph.nodes if _layer(model, node) is not None)
    return tuple(link for link in links if link is not None)


def _require_seen_through(method: str, path: str, module: nn.Module) -> None:
    """Refuse a module of PyTorch's that is run as a whole and has layers inside, as an attention."""
    inside = [inner for inner in module.modules() if inner is not module and isinstance(inner, Weighted)]
    if inside and not _is_leaf(module):
        raise _refusal(method, path, module, "has layers inside that cannot be looked at one by one")


def _followed(model: nn.Module, node: fx.Node, places: Counter[nn.Module], method: str) -> Link | None:
    """Return the link that begins at a layer's node, or None where the layer keeps its units."""
    walk, alone = _Walk(method), True
    step: nn.Module = _layer(model, node)  # type: ignore[assignment]
    passed = [(str(node.target), step)]
    while True:
        readers = [reader for reader in node.users if not _is_number(reader)]
        if len(readers) != 1 or readers[0].op == "output" or _joins(readers[0]):
            return None
        node = readers[0]
        step = model.get_submodule(str(node.target)) if node.op == "call_module" else _stand_in(node, method)
        passed.append((str(node.target) if node.op == "call_module" else node.name, step))
        if isinstance(step, _NONLINEARITIES):
            alone = node.op == "call_module" and places[step] == 1
        if isinstance(step, Weighted):
            break
    if not any(isinstance(module, _NONLINEARITIES) for _, module in passed):
        return None
    for path, module in passed:
        if places[module] > 1 and not isinstance(module, (*_NONLINEARITIES, *_PASSIVE, nn.Flatten)):
            raise _refusal(method, path, module, "stands in it twice: give each place a module of its own")
        walk.take(path, module)
    (link,) = walk.links
    return link if alone else dataclasses.replace(link, activation=None)


def _layer(model: nn.Module, node: fx.Node) -> Weighted | None:
    """Return the layer that a node runs, or None where it runs none."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Weighted) else None


def _is_number(node: fx.Node) -> bool:
    """Return whether a node gives numbers, made of a tensor's shape, and no features."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim"):
        return True
    return bool(node.all_input_nodes) and all(map(_is_number, node.all_input_nodes))


def _joins(node: fx.Node) -> bool:
    """Return whether a node puts features of several nodes together."""
    return len([given for given in node.all_input_nodes if given.op != "get_attr" and not _is_number(given)]) > 1


def _stand_in(node: fx.Node, method: str) -> nn.Module:
    """Return a module that does to units what a function or a method of tensors does.

    Raises:
        ConfigError: It is none that is known.
    """
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
    rest = (*node.args[1:], *node.kwargs.values())
    activation = name.rstrip("_")
    if activation in ACTIVATIONS and activation != "identity":
        return ACTIVATIONS[activation]()
    if name == "flatten" and rest in ((1,), (1, -1)):
        return nn.Flatten()
    if name in ("view", "reshape") and len(rest) == 2 and isinstance(rest[0], fx.Node) and rest[1] == -1:
        return nn.Flatten()
    if name == "mean" and list(rest[0]) in ([2, 3], [-2, -1], [-1, -2]):  # type: ignore[arg-type]
        return nn.AdaptiveAvgPool2d(1)
    if name in _PASSIVE_FUNCTIONS:
        return nn.Identity()
    raise _refusal(method, node.name, name, f"stands where {method} does not know what it does to units")
