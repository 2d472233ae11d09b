"""Whether bfloat16 pays on a CPU: what a run that asks for it is told, from the CPU's and the network's properties.

Autocast rounds every weight anew in every forward pass; what it saves, it saves in products. So what counts is how
often a step uses each weight. Measured on one core with AMX, training steps under autocast against single precision:

    floating-point operations a parameter and step     time
    190 (an MLP, 32 images)                             1.35 ×
    250 (digits_cnn, width 16, 10 images)               0.98 ×
    645 to 1,400 (digits_cnn, width 64 to 4, 32 images) 0.79 to 0.98 ×
    6,000 (ResNet-18, width 4, 20 images)               0.83 ×
    3,800 (ResNet-18, width 20, 20 images)              0.61 ×

It is told and not refused, and nothing is timed: a run does not depend on the machine.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LEAST_USES = 240
"""Floating-point operations a parameter and step below which bfloat16 is slower than single precision on a CPU."""


def cpu_features() -> Mapping[str, Any]:
    """Return what this machine's CPU can do, by PyTorch's names; nothing where PyTorch does not say."""
    with contextlib.suppress(AttributeError, RuntimeError):
        return dict(torch.cpu.get_capabilities())
    return {}


def operations(model: nn.Module, image_size: int) -> int:
    """Return the floating-point operations of convolutions and linear layers for one image, forward and backward.

    A multiplication and an addition are two; the backward pass takes twice the forward pass's.

    Args:
        model: The network, on any device; it is not changed.
        image_size: Height and width of the image.
    """
    total = 0

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            total += output.numel() * weight[0].numel()

    trial = copy.deepcopy(model).cpu().eval()
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    for module in trial.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(count)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial(torch.zeros(1, 3, image_size, image_size))
    return 3 * 2 * total


def bf16_advice(model: nn.Module, *, image_size: int, batch_size: int) -> str:
    """Return a sentence where ``amp = bf16`` makes training on this machine's CPU slower; empty where it pays.

    Args:
        model: The network, before it computes under autocast.
        image_size: Height and width of the images.
        batch_size: Images a step.
    """
    features = cpu_features()
    if features.get("architecture") == "x86_64" and not (features.get("avx512_bf16") or features.get("amx_bf16")):
        return (
            "amp is bf16, and this CPU has neither AVX512-BF16 nor AMX: products in bfloat16 are slower on it than in "
            "single precision. Leave amp at none here."
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        uses = batch_size * operations(model, image_size) / max(parameters, 1)
    except Exception:  # a stranger's network may take another input, and may raise anything
        return ""
    if uses >= LEAST_USES:
        return ""
    return (
        f"amp is bf16, and a step of {batch_size} images uses each of this network's {parameters:,} parameters for "
        f"{uses:.0f} operations (it takes about {LEAST_USES}): rounding them all in every step costs more than it "
        "saves. Leave amp at none, or take larger batches."
    )
