"""What is measured inside a network when an experience has ended, on training images of all experiences so far."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.device import as_written
from fednorm.norms._precision import widened
from fednorm.norms.sws import ScaledActivation
from fednorm.rng import torch_stream
from fednorm.spec import ACTIVATIONS
from fednorm.streams.stream import Experience
from fednorm.training.diagnostics import (
    Moments,
    Optimizer,
    dead_units,
    dormant_units,
    drift_by_layer,
    effective_learning_rates,
    entropy_and_threshold_rank,
    weight_norms,
)
from fednorm.training.recalibration import batch_layers, in_batches, reestimate

ACTIVATION_TYPES: tuple[type[nn.Module], ...] = (
    *{type(make()) for name, make in ACTIVATIONS.items() if name != "identity"},
    ScaledActivation,
)
"""Modules whose outputs are units."""


def probe_images(experiences: Sequence[Experience], count: int, seed: int) -> Tensor:
    """Return training images of experiences, as many of each, in random order, as the model takes them.

    Args:
        experiences: The experiences so far.
        count: Images in all; fewer where the experiences have not so many.
        seed: Of the stream (seed, "probe", number) that chooses them.
    """
    each = max(1, count // len(experiences))
    images = []
    for experience in experiences:
        generator = torch_stream(seed, "probe", experience.number)
        rows = torch.randperm(len(experience.train), generator=generator)[:each]
        images.append(experience.train.inputs(rows)[0])
    joined = torch.cat(images)
    order = torch.randperm(len(joined), generator=torch_stream(seed, "probe", "order", len(experiences)))
    return joined[order].contiguous(memory_format=torch.channels_last)


def diagnose(model: nn.Module, images: Tensor, *, rate: float, optimizer: Optimizer, batch_size: int) -> dict[str, Any]:
    """Return what the network has become.

    Args:
        model: The model, in evaluation mode; it is not changed.
        images: The probe images.
        rate: The learning rate; a schedule's mean over the experience.
        optimizer: What updates it, ``sgd`` or ``adam``, for the effective learning rate.
        batch_size: Images a forward pass.

    Returns:
        ``dead_units`` and ``dormant_units`` (a share by activation), ``entropy_rank`` and ``threshold_rank`` (of the
        last layer's input), ``weight_norm`` and ``effective_learning_rate`` (by weight layer), and ``drift`` of the
        running statistics from those of the probe images (by layer; empty where there are none).
    """
    activations, features = _activations(model, images, batch_size)
    ranks = entropy_and_threshold_rank(features) if features.isfinite().all() else (None, None)
    return {
        "dead_units": {path: float(dead_units(a).double().mean()) for path, a in activations.items()},
        "dormant_units": {path: float(dormant_units(a).double().mean()) for path, a in activations.items()},
        "entropy_rank": ranks[0],
        "threshold_rank": ranks[1],
        "weight_norm": weight_norms(model),
        "effective_learning_rate": effective_learning_rates(model, rate, optimizer=optimizer),
        "drift": drift(model, images, batch_size=batch_size),
    }


def drift(model: nn.Module, images: Tensor, *, batch_size: int) -> dict[str, float]:
    """Return how far each layer's running statistics are from those that some images would give it.

    The reference is :func:`~fednorm.training.recalibration.reestimate` on a copy of the model; the distance is
    :func:`~fednorm.training.diagnostics.wasserstein_drift`. With images of all experiences so far, as many of each, it
    is the recency bias of the running statistics.
    """
    if not batch_layers(model) or len(images) < 2:
        return {}
    reference = copy.deepcopy(model)
    reestimate(reference, in_batches(images, min(batch_size, 128)))
    return drift_by_layer(_moments(model), _moments(reference))


def _moments(model: nn.Module) -> dict[str, Moments]:
    moments = {}
    for path, layer in batch_layers(model).items():
        assert layer.running_mean is not None
        assert isinstance(layer.running_var, Tensor)
        moments[path] = Moments(layer.running_mean.cpu(), layer.running_var.cpu())
    return moments


@torch.no_grad()
def _activations(model: nn.Module, images: Tensor, batch_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the mean size of what follows each activation module, (n, C), and what the last linear layer is given.

    Both are on the CPU, which alone has what is computed of them on all machines.

    A map is zero where its mean size is, and the mean size over samples is that over samples and positions: all that
    dead and dormant units are defined by, without keeping the maps.
    """
    kept: dict[str, list[Tensor]] = {}
    features: list[Tensor] = []
    inside = {id(m.activation) for m in model.modules() if isinstance(m, ScaledActivation)}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, ACTIVATION_TYPES) and id(module) not in inside:

            def keep(_: nn.Module, __: Any, output: Tensor, path: str = path) -> None:
                size = widened(output).abs()
                kept.setdefault(path, []).append((size.flatten(2).mean(2) if size.ndim > 2 else size).cpu())

            hooks.append(module.register_forward_hook(keep))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    hooks.append(last.register_forward_pre_hook(lambda _, args: features.append(widened(args[0]).cpu())))
    try:
        with as_written(model):
            for batch in torch.split(images, batch_size):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in kept.items()}, torch.cat(features)
