"""What torch.compile must not take into its graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)
Args = ParamSpec("Args")
Method = Callable[Concatenate[Layer, Args], Tensor]


def uncompiled(method: Method[Layer, Args]) -> Method[Layer, Args]:
    """Make a method of a layer run as it is written where ``torch.compile`` compiles what calls it.

    For methods that write to buffers which their backward pass reads, or in their backward pass: in a compiled graph
    such a pass computes again what it needs from buffers that have changed meanwhile, and is silently wrong.
    """

    @functools.wraps(method)
    def wrapped(layer: Layer, /, *args: Args.args, **named: Args.kwargs) -> Tensor:
        if not torch.compiler.is_compiling():
            return method(layer, *args, **named)
        # Not when the module is imported: it imports the compiler.
        outside: Callable[..., Tensor] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        return outside(layer, *args, **named)

    return wrapped
