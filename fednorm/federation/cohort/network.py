"""One network with the tensors of K clients: every tensor that clients may differ in has an axis of clients before it.

``torch.func.vmap`` over the network's functional form computes all of them in one pass: K convolutions become one
convolution of K groups, K products of matrices one batched product. Tensors that no client changes (constants, and what
a run never trains) are there once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

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
        fixed = frozenset(constant)
        entries = {key: t for key, t in model.state_dict(keep_vars=True).items() if key not in fixed}
        first: dict[int, str] = {}
        self.same = {key: first.setdefault(id(tensor), key) for key, tensor in entries.items()}
        keys = tuple(dict.fromkeys(self.same.values()))
        self.parameters = tuple(key for key in keys if isinstance(entries[key], nn.Parameter))
        self.buffers = tuple(key for key in keys if not isinstance(entries[key], nn.Parameter))
        self._network = with_twins(copy.deepcopy(model), self._padding)
        for parameter in self._network.parameters():
            parameter.requires_grad_(False)
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {key: [] for key in keys}
        for path, module in self._network.named_modules():
            for held_by in (module._parameters, module._buffers):
                for name in held_by:
                    key = self.same.get(f"{path}.{name}" if path else name)
                    if key is not None:
                        self._places[key].append((held_by, name))

    @contextmanager
    def _holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Have the network hold tensors for a block, each in every place where it stands.

        As ``torch.func.functional_call`` does, which looks for these places at every call: a third of a millisecond.
        """
        before = [(held, name, held[name]) for key in tensors for held, name in self._places[key]]
        try:
            for key, tensor in tensors.items():
                for held, name in self._places[key]:
                    held[name] = tensor
            yield
        finally:
            for held, name, tensor in before:
                held[name] = tensor

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
        self, tensors: Mapping[str, Tensor], images: Tensor, mask: Tensor, count: Tensor, *, whole: bool = False
    ) -> tuple[Tensor, Tensors]:
        """Return the logits of a training pass, differentiable by the tensors, and what it makes of the buffers.

        Args:
            tensors: By stacked key, shape (K, ...); those that the pass writes in place must be the caller's own.
            images: Shape (K, B, C, H, W).
            mask: 1 for an image and 0 for padding, float, shape (K, B).
            count: The images of each batch, shape (K,).
            whole: Whether there is no padding in any batch of the run: moments are then taken in fewer passes. It is a
                matter of the run, since a client's last bits depend on it.

        Returns:
            Logits, shape (K, B, classes), and the buffers that changed, by key.
        """

        def one(own: Tensors, images: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensors]:
            self._padding.mask, self._padding.count, self._padding.made = mask, count, {}
            self._padding.whole = whole
            with self._holding(own):
                logits: Tensor = self._network(images)
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

            def one(own: Tensors, images: Tensor) -> Tensor:
                with self._holding({**shared, **own}):
                    logits: Tensor = self._network(images)
                return logits

            stacked: Tensor = vmap(one, randomness="error")(dict(tensors), channels_last(images))
            return stacked
        finally:
            for module, mode in modes:
                module.training = mode


def several(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor as that of ``count`` clients, in memory of its own; without the layout that one client's has."""
    return tensor.expand(count, *tensor.shape).clone(memory_format=torch.contiguous_format)


def alike(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor as that of ``count`` clients, of whom none has one of its own yet: they share its memory."""
    return tensor.contiguous().expand(count, *tensor.shape)


def is_shared(tensor: Tensor) -> bool:
    """Return whether a stacked tensor is one that clients share (:func:`alike`), and may not be written to."""
    return tensor.stride(0) == 0 and len(tensor) > 1


def own(tensors: Tensors, keys: Iterable[str]) -> None:
    """Give each client a copy of what clients share of some tensors."""
    for key in keys:
        if is_shared(tensors[key]):
            tensors[key] = tensors[key].clone(memory_format=torch.contiguous_format)
