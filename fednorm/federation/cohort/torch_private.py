"""What cohorts use of PyTorch that is not public, and nothing else: what ``vmap`` shows, as it lies in memory.

``torch.func`` has no public way to get at the tensor of all clients behind the one of a client that ``vmap`` shows a
layer, short of a function of its own with a rule, which costs half a millisecond a call. A new PyTorch version breaks
one file, and says so at the import. Tried on 2.14.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

__all__ = ["each", "outside", "together"]


def together(tensor: Tensor, axis: int) -> Tensor | None:
    """Return what ``vmap`` shows of each client as one tensor of all clients; None for what is not a client's own.

    To compute on that and give the result back by :func:`each` takes microseconds, where a function of its own with a
    rule for ``vmap`` takes half a millisecond a call.

    Args:
        tensor: As a layer is given it within ``vmap``.
        axis: Where the clients' axis is to be.
    """
    if not functorch.is_batchedtensor(tensor):
        return None
    whole: Tensor = functorch.get_unwrapped(tensor)
    return whole.movedim(functorch.maybe_get_bdim(tensor), axis)


def each(tensor: Tensor, axis: int) -> Tensor:
    """Return a tensor of all clients, whose axis is given, as ``vmap`` shows it of each: the inverse of `together`."""
    level = functorch.maybe_current_level()
    assert level is not None, "it is called within vmap"
    one: Tensor = functorch._add_batch_dim(tensor, axis, level)
    return one


def outside() -> AbstractContextManager[object]:
    """Leave ``vmap`` for a block whose tensors are all clients'; nothing where there is none."""
    return temporarily_pop_interpreter_stack() if functorch.maybe_current_level() else nullcontext()
