"""Running statistics: estimated anew from images, or kept from changing; for AdaBN, the drift and the controls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.norms import spec_of
from fednorm.norms._quadratic import QuadraticLayer
from fednorm.roles import STATISTICS
from fednorm.spec import HookedLayer


def batch_layers(model: nn.Module) -> dict[str, _BatchNorm | QuadraticLayer]:
    """Return the layers that track a running mean and variance of their input, or a quadratic mean, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm | QuadraticLayer) and module.running_mean is not None
    }


def in_batches(images: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return images in batches as equal as can be: two or more in each, wherever there are as many.

    Args:
        images: Two or more images, or whatever has as many rows.
        size: Most images a batch; 3 where it is less, for pairs could leave one alone, which has no variance.
    """
    return images.tensor_split(-(-len(images) // max(size, 3)))


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace a model's running statistics by those of some images, and leave it in evaluation mode.

    The average over the batches, computed layer upon layer in one pass without gradients, the other layers in
    evaluation mode; labels are not used. Without a batch, the statistics are the initial ones. Li et al., Revisiting
    Batch Normalization for Practical Domain Adaptation, arXiv 1603.04779.

    Args:
        model: The model.
        batches: Images as the model takes them, two or more a batch.
    """
    layers = list(batch_layers(model).values())
    momenta = [layer.momentum for layer in layers]
    model.eval()  # only the layers in question train: dropout would disturb what they measure
    for layer in layers:
        if isinstance(layer, HookedLayer):
            layer.set_tasks(None, 1)  # those of the latest training batch would be taken for these images'
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    for images in batches:
        model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


class Statistics:
    """The running statistics of a model, counters included; they can be kept and put back.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: list[Tensor] = []
        for module in model.modules():
            spec = spec_of(module)
            own = dict(module.named_buffers(recurse=False))
            if spec is not None:
                self._tensors += [own[k] for k, t in spec.tensors.items() if k in own and t.kind in STATISTICS]

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run a block, then put the statistics back to what they were before it."""
        before = [tensor.clone() for tensor in self._tensors]
        try:
            yield
        finally:
            if before:
                with torch.no_grad():
                    torch._foreach_copy_(self._tensors, before)
