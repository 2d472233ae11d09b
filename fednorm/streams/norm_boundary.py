"""What the boundary between two experiences does with normalization layers, beside what their cards say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fednorm.norms import spec_of


class NormBoundary:
    """Keeps, resets, freezes or sets aside the tensors of a network's normalization layers (``grid.norms``).

    Args:
        model: The network, with its initial values.
        what: ``keep``, ``reset``, ``freeze`` or ``per_experience``.

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
        self._tensors = tensors
        self._initial = [(t, t.detach().clone()) for t in tensors.values()] if what == "reset" else []
        self._learned = [t for t in tensors.values() if isinstance(t, nn.Parameter) and t.requires_grad]

    @torch.no_grad()
    def begin(self, number: int) -> None:
        """Begin an experience that is not a learner's first: set back what is to be."""
        del number
        for tensor, initial in self._initial:
            tensor.copy_(initial)

    @property
    def per_experience(self) -> bool:
        """Whether the tensors are kept as they are at the end of each experience, for its test images."""
        return self._what == "per_experience"

    def read(self) -> dict[str, Tensor]:
        """Return copies of the tensors, on the CPU."""
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in self._tensors.items()}

    @contextmanager
    def wearing(self, tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Give the layers other tensors within, those that :meth:`read` gave at another time; None for their own."""
        if tensors is None:
            yield
            return
        own = self.read()
        self._write(tensors)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            self._tensors[key].copy_(tensor)

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
