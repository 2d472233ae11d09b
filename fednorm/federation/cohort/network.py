"""One network with the tensors of K clients: every tensor that clients may differ in has an axis of clients before it.

``torch.func.vmap`` over the network's functional form computes all of them in one pass: K convolutions become one
convolution of K groups, K products of matrices one batched product. Tensors that no client changes (constants, and what
a run never trains) are there once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fednorm.federation.cohort.kernels import channels_last
from fednorm.federation.cohort.layers import Padding, with_twins

Tensors = dict[str, Tensor]


class StackedNetwork:
    """A network as a function of the tensors of several clients.

    Args:
        model: The network. It is copied; its tensors as they are now are the values of those that are not stacked.
        constant: Keys of the state dict that no client changes.

    Attributes:
        parameters: Keys of the stacked parameters; of one that stands in two places the first.
        buffers: Keys of the stacked buffers, likewise.
        same: For every stacked key of the state dict the one of ``parameters`` or ``buffers`` that holds its values.
    """

    def __init__(self, model: nn.Module, constant: Iterable[str] = ()) -> None:
        self._padding = Padding()
        held = frozenset(constant)
        entries = {key: t for key, t in model.state_dict(keep_vars=True).items() if key not in held}
        first: dict[int, str] = {}
        self.same = {key: first.setdefault(id(tensor), key) for key, tensor in entries.items()}
        keys = tuple(dict.fromkeys(self.same.values()))
        self.parameters = tuple(key for key in keys if isinstance(entries[key], nn.Parameter))
        self.buffers = tuple(key for key in keys if not isinstance(entries[key], nn.Parameter))
        self._network = with_twins(copy.deepcopy(model), self._padding)
        for parameter in self._network.parameters():
            parameter.requires_grad_(False)

    def modes_of(self, model: nn.Module) -> None:
        """Take over which modules of the original are in training mode."""
        modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
        for path, module in self._network.named_modules(remove_duplicate=False):
            module.training = modes[path]

    def stack(self, tensors: Mapping[str, Tensor], count: int) -> Tensors:
        """Return one client's tensors, by keys of the state dict, as those of ``count`` clients, copied."""
        return {key: several(tensors[key], count) for key in self.keys}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all stacked tensors."""
        return self.parameters + self.buffers

    def train(
        self, tensors: Mapping[str, Tensor], images: Tensor, mask: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensors]:
        """Return the logits of a training pass, differentiable by the tensors, and what it makes of the buffers.

        Args:
            tensors: By stacked key, shape (K, ...); those that the pass writes in place must be the caller's own.
            images: Shape (K, B, C, H, W).
            mask: 1 for an image and 0 for padding, float, shape (K, B).
            count: The images of each batch, shape (K,).

        Returns:
            Logits, shape (K, B, classes), and the buffers that changed, by key.
        """

        def one(own: Tensors, images: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensors]:
            self._padding.mask, self._padding.count, self._padding.made = mask, count, {}
            logits = functional_call(self._network, own, (images,))
            return logits, self._padding.made

        try:
            logits, made = vmap(one, randomness="error")(dict(tensors), channels_last(images), mask, count)
        finally:
            self._padding.mask = self._padding.count = None
            self._padding.made = {}
        return logits, made

    @torch.no_grad()
    def evaluate(self, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return the logits in evaluation mode, shape (K, B, classes).

        Args:
            tensors: What each client has of its own, by key, shape (K, ...).
            shared: What all of them have alike, by key, without the axis of clients.
            images: Shape (K, B, C, H, W).
        """
        modes = [(module, module.training) for module in self._network.modules()]
        self._network.eval()
        try:
            one = vmap(lambda own, x: functional_call(self._network, {**shared, **own}, (x,)), randomness="error")
            stacked: Tensor = one(dict(tensors), channels_last(images))
            return stacked
        finally:
            for module, mode in modes:
                module.training = mode


def several(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor as that of ``count`` clients, in memory of its own; without the layout that one client's has."""
    return tensor.expand(count, *tensor.shape).clone(memory_format=torch.contiguous_format)
