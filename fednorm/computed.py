"""Weights that are computed from other tensors: which are, and how to read one without moving what it remembers.

A spectral normalization (``torch.nn.utils.parametrizations.spectral_norm``) takes a step of its power iteration
whenever its weight is *read* in training mode, be it only for the weight's type. Who looks must not train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized


def reparameterized(module: nn.Module) -> str:
    """Return which of a module's tensors are computed from others before every forward pass; empty if none is."""
    if is_parametrized(module):
        return ", ".join(module.parametrizations)  # type: ignore[arg-type]
    hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils")]
    return ", ".join(str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")) for hook in hooks)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Let the computed weights of a network be read within, and leave what they remember as it was."""
    parts = [part for made in model.modules() if isinstance(made, ParametrizationList) for part in made.modules()]
    modes = [(part, part.training) for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
