"""Whether a layer that no card speaks for normalizes, judged by what it computes and never by what it is called.

A normalization layer takes the size of its input away: doubling the input leaves the output as it is. It gives back
what it was given in shape, and its learned tensors hold a value a channel. A layer's own scale (``LayerScale``,
``nn.PReLU``) is not that, and neither is a linear layer that normalizes its input.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fednorm.recognition.buffers import quietly
from fednorm.rng import torch_stream

FACTOR = 1024.0
"""What the input is multiplied by, exactly in every floating-point type; much more than any epsilon counts for."""


def per_channel(module: nn.Module) -> bool:
    """Return whether a layer is a leaf whose parameters all hold one value a channel, or one for all."""
    own = list(module.parameters(recurse=False))
    if not own or any(True for _ in module.children()) or type(module).__module__.startswith("torch.nn."):
        return False  # torch.nn's own normalization layers have cards
    return all(sum(size > 1 for size in tensor.shape) <= 1 for tensor in own)


def normalizes(module: nn.Module) -> bool | None:
    """Return whether a per-channel layer normalizes: True, False, or None where it cannot be run by itself."""
    with quietly():
        try:
            trial = copy.deepcopy(module).to_empty(device="cpu").float().train()
        except Exception:  # a stranger's __deepcopy__
            return None
        generator = torch_stream(0, "structure")
        _fill(trial, module, generator)
        channels = max(parameter.numel() for parameter in module.parameters(recurse=False))
        for shape in _shapes(channels):
            with contextlib.suppress(Exception), torch.no_grad():
                x = torch.randn(shape, generator=generator)
                # Twice: what it learns from a batch in passing must not pass for an answer to the factor.
                small, large = trial(x * FACTOR), trial(x * FACTOR * FACTOR)
                if isinstance(small, Tensor) and small.shape == x.shape and bool(small.isfinite().all()):
                    return bool(torch.allclose(small, large, rtol=1e-2, atol=1e-3)) and bool(small.std() > 0)
    return None


def _fill(trial: nn.Module, module: nn.Module, generator: torch.Generator) -> None:
    """Give a layer random scales and its own buffers: many begin with a scale of 0, which would hide what it does."""
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for name, buffer in trial.named_buffers():
            original = module.get_buffer(name)
            buffer.zero_() if original.device.type == "meta" else buffer.copy_(original)


def _shapes(channels: int) -> Iterator[tuple[int, ...]]:
    channels = channels if channels > 1 else 6
    yield from ((4, channels), (4, 5, channels), (4, channels, 3, 5), (4, 3, 5, channels), (4, channels, 5))
