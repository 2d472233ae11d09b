"""Layers whose weight is computed from parameters: anew in each training pass, once in all while they evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_KEPT = "_kept_weight"


class ComputedWeight(nn.Module):
    """A mixin for a layer that uses :meth:`computed_weight` in place of ``weight``.

    In training, and wherever gradients are recorded, the weight is computed in every forward pass: once a step. In
    evaluation without gradients it is computed once and kept until the layer's mode is set again (``model.eval()``),
    or one of its parameters is another tensor, or one that was written to. What is kept is not part of the layer's
    state: copies, pickles and state dicts do not have it, and neither compilers nor exporters see it.
    """

    def computed_weight(self) -> Tensor:
        """Return the weight, differentiably."""
        raise NotImplementedError

    def weight_in_use(self) -> Tensor:
        """Return :meth:`computed_weight`, or what it was when it was last computed."""
        own = [parameter for parameter in self._parameters.values() if parameter is not None]
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            # A functional call gives other tensors than the layer's own; those of inference mode have no version.
            or any(type(p) is not nn.Parameter or p.is_inference() for p in own)
        ):
            return self.computed_weight()
        stamp = [(p, p.data_ptr(), p._version) for p in own]
        kept = vars(self).get(_KEPT)
        if kept is None or not _same(kept[0], stamp):
            kept = (stamp, self.computed_weight())
            vars(self)[_KEPT] = kept
        weight: Tensor = kept[1]
        return weight

    def train(self, mode: bool = True) -> ComputedWeight:
        """Set the mode, and forget the weight that was kept."""
        self.forget_weight()
        return super().train(mode)

    def forget_weight(self) -> None:
        """Compute the weight anew when it is used next."""
        vars(self).pop(_KEPT, None)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have."""
        return {name: value for name, value in vars(self).items() if name != _KEPT}


def _same(one: Sequence[tuple[Tensor, int, int]], other: Sequence[tuple[Tensor, int, int]]) -> bool:
    return len(one) == len(other) and all(
        a is b and rest == now for (a, *rest), (b, *now) in zip(one, other, strict=True)
    )
