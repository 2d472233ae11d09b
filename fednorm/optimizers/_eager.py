"""PyTorch's optimizers without its compiler, which they import at their first use and then never need.

``torch.optim`` guards four methods of every optimizer (``torch._disable_dynamo``) and its step
(``torch._dynamo.graph_break``) against being compiled. The first guard that is reached imports all of
``torch._dynamo``: 1.5 CPU-seconds and about 140 MB in every process, for an optimizer that nothing compiles. Here the
same methods are called inside their guards, so that a step is PyTorch's own, to the bit, in every option. What cannot
be done is to compile the optimizer itself, or to differentiate through its step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


def unguarded(method: Callable[..., Any]) -> Any:
    """Return a method of PyTorch's inside its guards; the method itself where this PyTorch has none around it."""
    return inspect.unwrap(method)


def _without_profile(step: Callable[..., Any]) -> Any:
    """Return a step that is not entered in a profile, which takes as long as the update of a small network.

    PyTorch puts that, and the hooks before and after a step, around every optimizer's step; here it is there where
    somebody has such a hook.
    """
    whole = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        anybody = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or any(_GLOBAL_HOOKS)
        return (whole if anybody else step)(self, *args, **kwargs)

    plain.hooked = True  # type: ignore[attr-defined]  # or PyTorch wraps it again
    return plain


class Eager(torch.optim.Optimizer):
    """An optimizer whose step is never compiled; the first base of one, before PyTorch's own."""

    add_param_group = unguarded(torch.optim.Optimizer.add_param_group)
    state_dict = unguarded(torch.optim.Optimizer.state_dict)
    load_state_dict = unguarded(torch.optim.Optimizer.load_state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients, or set them to zero, as PyTorch does, without an entry in a profile."""
        if not set_to_none:
            unguarded(torch.optim.Optimizer.zero_grad)(self, set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _bare_step(step: Callable[..., Any]) -> Any:
    """Return SGD's step, which without momentum and weight decay is one call, as it is for PyTorch in the end.

    On its way there PyTorch sorts the parameters by device and type, which for a small network takes longer than to
    update them.
    """

    @functools.wraps(step)
    def bare(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        if closure is not None or not all(map(_is_bare, self.param_groups)):
            whole: float | None = step(self, closure)
            return whole
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained:
                torch._foreach_add_(trained, [parameter.grad for parameter in trained], alpha=-group["lr"])
        return None

    return bare


def _is_bare(group: dict[str, Any]) -> bool:
    """Return whether w <- w - lr * gradient is all that SGD does to a group of parameters."""
    more = group["momentum"] or group["weight_decay"] or group["maximize"] or group["differentiable"]
    plain = group["foreach"] is True and type(group["lr"]) is float and not more
    return plain and not any(parameter.grad is not None and parameter.grad.is_sparse for parameter in group["params"])


class SGD(Eager, torch.optim.SGD):
    """PyTorch's SGD, never compiled."""

    step = _without_profile(torch.no_grad()(_bare_step(unguarded(torch.optim.SGD.step))))


class Adam(Eager, torch.optim.Adam):
    """PyTorch's Adam, never compiled."""

    step = _without_profile(torch.no_grad()(unguarded(torch.optim.Adam.step)))


class AdamW(Eager, torch.optim.AdamW):
    """PyTorch's AdamW, never compiled."""

    step = _without_profile(torch.no_grad()(unguarded(torch.optim.AdamW.step)))
