"""What norms use of PyTorch that is not public: whether ``torch.func`` is at work.

A function with a derivative of its own stands in ``torch.func`` only with rules, whose application takes longer than
what it saves: there a layer computes by its formula. A new PyTorch version breaks one line, and says so at the import.
Tried on 2.14.
"""

from __future__ import annotations

from torch._C import _are_functorch_transforms_active as _active

__all__ = ["transforms_active"]


def transforms_active() -> bool:
    """Return whether this is within ``torch.func.vmap``, ``grad`` or another of its transforms."""
    active: bool = _active()
    return active
