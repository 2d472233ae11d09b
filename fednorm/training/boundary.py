"""What an experience's boundary does with a network's tensors, as the cards of its norms say (:class:`Carry`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fednorm.norms import spec_of
from fednorm.roles import Carry


class Boundary:
    """Sets back, when an experience begins, what tells of the one before and of nothing else.

    Args:
        model: The network, with its initial values.

    Attributes:
        reset: The entries of its state dict that are set back to those, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._initial: dict[str, tuple[Tensor, Tensor]] = {}
        for path, module in model.named_modules():
            spec = spec_of(module)
            if spec is None:
                continue
            for name, tensor in module.state_dict(keep_vars=True).items():
                if name in spec.tensors and spec.tensors[name].carry is Carry.RESET:
                    self._initial[f"{path}.{name}" if path else name] = tensor, tensor.detach().clone()
        self.reset = tuple(self._initial)

    @torch.no_grad()
    def cross(self) -> None:
        """Set back what is to be."""
        for tensor, initial in self._initial.values():
            tensor.copy_(initial)
