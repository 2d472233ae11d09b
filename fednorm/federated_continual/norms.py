"""What the boundary between two experiences does with normalization layers, beside what their cards say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fednorm.norms import spec_of


class NormBoundary:
    """Keeps, resets or freezes the tensors of a network's normalization layers (``grid.norms``).

    Args:
        model: The network, with its initial values.
        what: ``keep``, ``reset`` or ``freeze``.

    Attributes:
        keys: The entries of the state dict that it speaks of.
    """

    def __init__(self, model: nn.Module, what: str) -> None:
        self._what = what
        self._layers: list[nn.Module] = []
        tensors = {}
        for path, module in model.named_modules():
            spec = spec_of(module)
            if spec is None or not spec.normalizes:
                continue
            self._layers.append(module)
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensors[f"{path}.{name}" if path else name] = tensor
        self.keys = tuple(tensors)
        self._initial = [(t, t.detach().clone()) for t in tensors.values()] if what == "reset" else []
        self._learned = [t for t in tensors.values() if isinstance(t, nn.Parameter) and t.requires_grad]

    @torch.no_grad()
    def begin(self, number: int) -> None:
        """Begin an experience that is not a learner's first: set back what is to be."""
        del number
        for tensor, initial in self._initial:
            tensor.copy_(initial)

    @contextmanager
    def frozen(self, time: int) -> Iterator[None]:
        """Leave the layers as they are within, where they are frozen by that time; their modes are put back."""
        if self._what != "freeze" or not time:
            yield
            return
        for parameter in self._learned:
            parameter.requires_grad_(False)
            parameter.grad = None
        try:
            yield
        finally:
            for parameter in self._learned:
                parameter.requires_grad_(True)
            for layer in self._layers:
                layer.train()

    def rest(self, time: int) -> None:
        """Let frozen layers normalize as in evaluation, with the statistics that they have; called before each pass."""
        if self._what == "freeze" and time:
            for layer in self._layers:
                layer.eval()
