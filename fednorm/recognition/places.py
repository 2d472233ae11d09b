"""Where a tensor stands in a model: from patterns over keys to the entries of the state dict that they mean.

A pattern is one of

* ``head``: the last weight layer (linear or convolution) by module order;
* a module's path, ``layer4`` or ``layer4.1``: everything within it;
* a key of the state dict, ``fc3.bias``;
* a shell pattern over keys, ``fc3.*`` or ``*.bias``; ``head.*`` means the last weight layer's where no module of the
  model is called ``head``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fednorm.errors import ConfigError

HEAD = "head"


def head_of(model: nn.Module) -> str:
    """Return the path of a model's last weight layer, a linear one or a convolution, by module order.

    Raises:
        ConfigError: It has none.
    """
    layers: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer and no convolution, so which part is its head cannot be told. "
            "Name its keys by a pattern, such as 'classifier.*'."
        )
    return layers[-1]


def keys_at(model: nn.Module, patterns: Iterable[str]) -> frozenset[str]:
    """Return the keys of a model's state dict that patterns mean; one tensor under several keys counts as a whole.

    Args:
        model: The model.
        patterns: As this module's description has them.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    state = model.state_dict(keep_vars=True)
    chosen = {key for pattern in patterns for key in _matches(model, state, pattern.strip())}
    tensors = {id(state[key]) for key in chosen}
    return frozenset(key for key, tensor in state.items() if id(tensor) in tensors)


def _matches(model: nn.Module, state: dict[str, Tensor], pattern: str) -> list[str]:
    if pattern == HEAD:
        return _within(state, head_of(model))
    matches = [key for key in state if fnmatchcase(key, pattern)] or (_within(state, pattern) if pattern else [])
    if not matches and pattern.startswith(f"{HEAD}.") and not hasattr(model, HEAD):
        matches = [key for key in state if fnmatchcase(key, head_of(model) + pattern.removeprefix(HEAD))]
    if not matches:
        paths = [path for path, _ in model.named_modules() if path]
        near = difflib.get_close_matches(pattern, [*state, *paths], n=3, cutoff=0.3) or list(state)[-3:]
        raise ConfigError(
            f"No tensor of {type(model).__name__} matches {pattern!r}. The nearest: {', '.join(near)}. A pattern is "
            "'head' (the last weight layer), a module's path, or a shell pattern over keys such as 'fc3.*'."
        )
    return matches


def _within(state: Iterable[str], path: str) -> list[str]:
    """Return the keys of a module, or the key itself; a model that is one layer is at the empty path."""
    return [key for key in state if not path or key == path or key.startswith(f"{path}.")]


def patterns_of(text: str) -> tuple[str, ...]:
    """Return the patterns of a comma-separated list; none of an empty one."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
