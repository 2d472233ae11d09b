"""What stands around the tensors of a layer that is replaced, and must outlive it.

``requires_grad``, tensors that several layers share, hooks, parametrizations, types, devices, training mode, other
references to the layer, and PyTorch's fused paths that read a layer's fields instead of calling it. Each is carried
over to the new layer; what cannot be is refused with the layer's path.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fednorm.computed import reparameterized
from fednorm.errors import ConfigError

_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


def named(path: str, module: nn.Module) -> str:
    """Return how an error names a module, e.g. ``'layer1.0.bn1' (BatchNorm2d)``."""
    return f"{path or 'the model itself'!r} ({type(module).__name__})"


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers by name."""
    kinds = (module._parameters, module._buffers)
    return {name: tensor for kind in kinds for name, tensor in kind.items() if tensor is not None}


def require_convertible(model: nn.Module) -> None:
    """Require a model whose layers can be seen and exchanged.

    Raises:
        ConfigError: A layer does not know its shape yet, or is compiled.
    """
    for path, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in own_tensors(module).values()):
            raise ConfigError(
                f"Layer {named(path, module)} does not know its shape yet. "
                "Run one forward pass through a model with lazy layers before converting it."
            )
        if isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch._dynamo"):
            raise ConfigError(
                f"Module {named(path, module)} is compiled: its layers cannot be exchanged any more. Convert the model "
                "first, and compile what comes out (torch.jit.script, torch.compile)."
            )


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, also of one that keeps tensors with a history, as ``spectral_norm`` does."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_in([value for name, value in vars(module).items() if name not in _REGISTERED]):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


_REGISTERED = ("_parameters", "_modules")


def _trains(layer: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
    """Return whether any of a layer's own parameters trains; where it has none, of its nearest neighbours'."""
    for parameters in (layer.parameters(recurse=False), *(module.parameters() for module in reversed(ancestors))):
        first = next(parameters, None)
        if first is not None:
            return first.requires_grad or any(parameter.requires_grad for parameter in parameters)
    return True


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


class Surroundings:
    """What surrounds the layers of one model while they are replaced.

    Args:
        model: The copy that is being converted, as it was before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: defaultdict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules():
            for name, tensor in own_tensors(module).items():
                self._owners[id(tensor)].append(f"{path}.{name}" if path else name)
        self._moved: defaultdict[int, list[str]] = defaultdict(list)
        self._stand_ins: dict[int, tuple[str, Tensor]] = {}
        self._replaced: dict[int, nn.Module] = {}
        self._kept: list[Any] = []  # an id is only unique while its object lives

    def like(self, old: nn.Module, ancestors: Sequence[nn.Module]) -> Tensor | None:
        """Return a tensor of the type and on the device that a layer's tensors have: its own, or its neighbours'."""
        for module in (old, *reversed(ancestors)):
            for tensor in chain(module.parameters(), module.buffers()):
                if tensor.is_floating_point():
                    return tensor
        return None

    def adopt(
        self, old: nn.Module, core: nn.Module, outer: nn.Module, path: str, ancestors: Sequence[nn.Module]
    ) -> None:
        """Let a new layer take an old one's place.

        Args:
            old: The layer that goes.
            core: The new layer.
            outer: What is called in its place: the new layer, or what it is wrapped in.
            path: Where it stands.
            ancestors: The modules that it stands in, the model first.

        Raises:
            ConfigError: Something that stands around the old layer cannot be kept.
        """
        reparameterization = reparameterized(old)
        if reparameterization:
            raise ConfigError(
                f"Layer {named(path, old)} has a parametrization, pruning or weight normalization of its own on "
                f"{reparameterization}, which {type(core).__name__} cannot take over. Take it off before converting "
                "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)."
            )
        self._kept += [old, core]
        like = self.like(old, ancestors)
        if like is not None:
            core.to(device=like.device, dtype=like.dtype)
        own, around = own_tensors(old), own_tensors(core)
        for name, tensor in around.items():
            twin = own.get(name)
            if twin is not None and tensor.is_floating_point() and twin.is_floating_point():
                tensor.data = tensor.data.to(device=twin.device, dtype=twin.dtype)
        self._train(old, core, ancestors)
        self._tie(own, core, path)
        self.replace(old, outer, path)

    def replace(self, old: nn.Module, new: nn.Module, path: str) -> None:
        """Move hooks and references from one module to what stands in its place, which is as the old one: in training.

        Raises:
            ConfigError: A hook belongs to the old module.
        """
        self._kept.append(old)
        self._replaced[id(old)] = new
        for module in new.modules():
            if id(module) not in {id(inner) for inner in old.modules()}:
                module.training = old.training
        for name in _HOOKS:
            value = vars(old).get(name)
            if not isinstance(value, dict):
                if value is not None:
                    vars(new)[name] = value
                continue
            for key, hook in value.items():
                if getattr(hook, "__self__", None) is old:
                    raise ConfigError(
                        f"Layer {named(path, old)} has a hook that is a method of its own ({hook.__name__}), which "
                        "cannot outlive it. Remove the hook before converting, or make it a function."
                    )
                # Hooks that are given their module keep a reference to it.
                given_module = getattr(hook, "with_module", False)
                vars(new)[name][key] = type(hook)(hook.hook, new) if given_module else hook

    def _train(self, old: nn.Module, core: nn.Module, ancestors: Sequence[nn.Module]) -> None:
        """Let new parameters train where the old ones did; where there were none, as the nearest neighbours do."""
        own = dict(old.named_parameters(recurse=False))
        of_core = list(core.named_parameters())
        trains = all(name in own for name, _ in of_core) or _trains(old, ancestors)
        for name, parameter in of_core:
            parameter.requires_grad_(own[name].requires_grad if name in own else trains)

    def _tie(self, own: dict[str, Tensor], core: nn.Module, path: str) -> None:
        """Let layers that shared a tensor share the new one.

        Raises:
            ConfigError: They shared tensors of different names.
        """
        for name, tensor in own.items():
            if len(self._owners[id(tensor)]) < 2 or name not in own_tensors(core):
                continue
            self._moved[id(tensor)].append(f"{path}.{name}" if path else name)
            kind = core._parameters if name in core._parameters else core._buffers
            first, twin = self._stand_ins.setdefault(id(tensor), (name, own_tensors(core)[name]))
            if first != name or twin.shape != own_tensors(core)[name].shape:
                self._refuse_tie(tensor)
            kind[name] = twin  # type: ignore[assignment]

    def _refuse_tie(self, tensor: Tensor) -> NoReturn:
        raise ConfigError(
            f"{', '.join(self._owners[id(tensor)])} are one tensor, and not all of these layers are replaced by the "
            "same method's, so that they could not stay one. Give each its own tensor before converting."
        )

    def finish(self, model: nn.Module) -> None:
        """Check the ties, mend other references to replaced layers, and switch off fused paths around them.

        Raises:
            ConfigError: A tensor of a replaced layer is shared with one that is not.
        """
        tensors = {id(tensor): tensor for old in self._kept for tensor in own_tensors(old).values()}
        for key, paths in self._moved.items():
            if len(paths) != len(self._owners[key]):
                self._refuse_tie(tensors[key])
        for module in model.modules():
            for name, value in vars(module).items():
                if name != "_modules" and name not in _HOOKS:
                    vars(module)[name] = self._mended(value)
            self._call_norms(module)

    def _mended(self, value: Any) -> Any:
        """Return a value with every replaced layer in it exchanged; lists and dictionaries are changed in place."""
        if isinstance(value, nn.Module):
            return self._replaced.get(id(value), value)
        if type(value) is tuple:
            return tuple(self._mended(inner) for inner in value)
        if type(value) is list:
            value[:] = [self._mended(inner) for inner in value]
        if type(value) is dict:
            value.update({key: self._mended(inner) for key, inner in value.items()})
        return value

    def _call_norms(self, module: nn.Module) -> None:
        """Make PyTorch's transformer layers call their norms: their fused path reads fields of ``nn.LayerNorm``."""
        new = {id(layer) for layer in self._replaced.values()}
        if isinstance(module, nn.TransformerEncoderLayer) and {id(module.norm1), id(module.norm2)} & new:
            module.activation_relu_or_gelu = 0  # its own sign that the fused path does not fit
        if isinstance(module, nn.TransformerEncoder) and any(id(inner) in new for inner in module.layers.modules()):
            module.use_nested_tensor = False
