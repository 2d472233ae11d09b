"""Massive activations in a vision transformer: how large the largest entry of the residual stream is.

Sun et al. Massive Activations in Large Language Models. COLM 2024. https://arxiv.org/abs/2402.17762 (the measure: the
largest magnitude against the median one, where more than 1,000 counts as massive). Qwen team. A Unified View of
Attention and Residual Sinks: Outlier-Driven Rescaling. 2026. https://arxiv.org/abs/2601.22966 (GatedNorm and PreAffine,
which rescale in place of massive activations).

    ratio = max |h| / median |h|,  h the residual stream after a block; the largest over blocks

Trained with LayerNorm, with RMSNorm, and with the two; see ``fednorm explain gated_norm`` and ``pre_affine``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.analyses.analysis import Analysis, Column, Row, Setup, Values
from fednorm.analyses.trial import Images, Trial

NORMS = ("layer_norm", "rms_norm", "pre_affine", "gated_norm")
LOOKED_AT = 128
"""Test images on which the stream is looked at."""


def rows(setup: Setup, steps: int) -> Iterator[Row]:
    """Yield the rows."""
    for norm in NORMS:
        yield Row(norm, partial(_measure, setup, steps, norm))


def _measure(setup: Setup, steps: int, norm: str, seed: int) -> Values:
    over = {"over": "channels"} if norm in ("layer_norm", "rms_norm") else {}
    values = {
        "model": {"name": "vit", "width": 64, "depth": 6, "pool": "token"},
        "data": {"image_size": 28, "train_per_client": 5000, "test_per_domain": 1000},
        "norm": {"name": norm, **over},
        "train": {"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.05},
    }
    trial = Trial(setup, seed, values)
    test = trial.images("test")
    before = largest(trial.model, test)
    trial.fit(steps, trial.images("train"))
    after = largest(trial.model, test)
    return {
        "ratio_first": before[0],
        "ratio_last": after[0],
        "largest": after[1],
        "block": float(after[2]),
        "accuracy": trial.accuracy(test),
    }


@torch.no_grad()
def largest(model: nn.Module, data: Images) -> tuple[float, float, int]:
    """Return where the stream's largest magnitude stands out most.

    Args:
        model: A ViT of fednorm's.
        data: Images; the first :data:`LOOKED_AT` are used.

    Returns:
        max |h| / median |h|, max |h|, and the number of the block after which that is, from 1.
    """
    found: list[tuple[float, float, int]] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        del module, inputs
        size = output.double().abs()
        top = float(size.max())
        found.append((top / float(size.median()), top, len(found) + 1))

    blocks: Any = model.get_submodule("blocks")
    hooks = [block.register_forward_hook(look) for block in blocks]
    try:
        model.eval()(data[0][:LOOKED_AT])
    finally:
        for hook in hooks:
            hook.remove()
    return max(found)


ANALYSIS = Analysis(
    name="massive_activations",
    title="The largest activation of a ViT's residual stream",
    about="Do massive activations appear in a small vision transformer, and fewer of them with GatedNorm or PreAffine?",
    papers=("2402.17762", "2601.22966"),
    columns=(
        Column("ratio_first", "max / median, at first", ".1f"),
        Column("ratio_last", "max / median, trained", ".1f"),
        Column("largest", "max, trained", ".1f"),
        Column("block", "after block", ".1f"),
        Column("accuracy", "test accuracy (%)", ".1f", 100),
    ),
    notes=(
        "A ViT of width 64 with 6 blocks and a class token on images of 28 × 28, patches of 4; AdamW, rate 0.001, "
        "weight decay 0.05, batches of 32 of at most 5,000 images a domain.",
        "Of the magnitudes of the residual stream after each block, the block whose largest stands out most is told; "
        "above 1,000 counts as massive (arXiv 2402.17762).",
    ),
    steps=300,
    rows=rows,
)
