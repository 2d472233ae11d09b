"""The variance of the residual stream by depth, for each way of scaling the branches.

Dherin, Munn. On residual network depth. 2025. https://arxiv.org/abs/2510.03470; De, Smith. Batch Normalization Biases
Residual Blocks Towards the Identity Function in Deep Networks. NeurIPS 2020. https://arxiv.org/abs/2002.10444

    h_{l+1} = h_l + lambda f_l(h_l),    l = 1 ... n,    growth = Var h_{n+1} / Var h_1

With branches of the size of their input (SELU) and lambda = 1 the variance about doubles with every branch, 2^n in
all; with 1 / sqrt(n) it is about (1 + 1 / n)^n < e, with 1 / n about (1 + 1 / n^2)^n, near 1; with SkipInit it stays.
With normalized branches, whose size does not depend on h, it grows by the same amount each. A vision transformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.analyses.analysis import Analysis, Column, Row, Setup, Values
from fednorm.analyses.trial import Images, Trial
from fednorm.norms.residual_scale import SCALES, ScaledResidual

DEPTHS = (3, 12)
"""Blocks, of two branches each."""

BESIDE = ("selu", "layer_norm")
"""What is in the branches: SELU with LeCun's initialisation, which keeps the size of what it is given; a normalization,
behind which the weights are drawn small."""

LOOKED_AT = 256
"""Test images on which variances are taken."""


def rows(setup: Setup, steps: int) -> Iterator[Row]:
    """Yield the rows."""
    for beside in BESIDE:
        for depth in DEPTHS:
            for scale in SCALES:
                yield Row(
                    f"{beside}, {2 * depth} branches, {scale}", partial(_measure, setup, steps, beside, depth, scale)
                )


def _measure(setup: Setup, steps: int, beside: str, depth: int, scale: str, seed: int) -> Values:
    values = {
        "model": {"name": "vit", "width": 48, "depth": depth},
        "data": {"image_size": 28, "train_per_client": 5000, "test_per_domain": 1000},
        "norm": {"name": "residual_scale", "beside": beside, "scale": scale},
        "train": {"optimizer": "adamw", "learning_rate": 0.001},
    }
    trial = Trial(setup, seed, values)
    test = trial.images("test")
    before = variances(trial.model, test)
    trial.fit(steps, trial.images("train"))
    after = variances(trial.model, test)
    return {
        "middle": before[len(before) // 2] / before[0],
        "first": before[-1] / before[0],
        "last": after[-1] / after[0],
        "accuracy": trial.accuracy(test),
    }


@torch.no_grad()
def variances(model: nn.Module, data: Images) -> list[float]:
    """Return the variance of the residual stream, over all its entries: before the first branch and after each.

    Args:
        model: A network with fednorm's scaled residual sums.
        data: Images; the first :data:`LOOKED_AT` are used.
    """
    found: list[float] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        del module
        if not found:
            found.append(float(inputs[0].double().var()))
        found.append(float(output.double().var()))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, ScaledResidual)]
    try:
        model.eval()(data[0][:LOOKED_AT])
    finally:
        for hook in hooks:
            hook.remove()
    return found


ANALYSIS = Analysis(
    name="residual_stream",
    title="Variance of the residual stream by depth and scale",
    about="How does the variance of a residual stream grow with depth, at initialisation and after training, for "
    "branches scaled by 1, 1/sqrt(n), 1/n and a learned number from 0?",
    papers=("2510.03470", "2002.10444"),
    columns=(
        Column("middle", "growth by half the depth, at first", ".3g"),
        Column("first", "growth, at first", ".3g"),
        Column("last", "growth, trained", ".3g"),
        Column("accuracy", "test accuracy (%)", ".1f", 100),
    ),
    notes=(
        "A ViT of width 48 on images of 28 × 28, patches of 4; AdamW, rate 0.001, batches of 32 of "
        "at most 5,000 images a domain.",
        "Growth: the variance over images, tokens and features after the branches over that before the first.",
        "Names: what is in the branches (selu: SELU, weights from N(0, 1 / fan_in)), their number n, and their scale; "
        "–: not finite.",
    ),
    steps=100,
    rows=rows,
)
