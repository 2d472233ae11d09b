"""What training nothing but a network's normalization reaches, against as many other parameters drawn at random.

Frankle, Schwab, Morcos. Training BatchNorm and Only BatchNorm. ICLR 2021. https://arxiv.org/abs/2003.00152 (section 4)

All else keeps its initial value. The paper's control: in place of a channel's scale and shift, two weights of that
channel's own filter, drawn at random; so each layer trains as many numbers. Every row has the best of :data:`RATES`, by
validation images of the first seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.analyses.analysis import Analysis, Column, Row, Setup, Values
from fednorm.analyses.trial import Trial
from fednorm.rng import torch_stream
from fednorm.training.diagnostics import weight_layers
from fednorm.training.effects import Effect

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
A_CHANNEL = 2
"""Numbers that a channel trains: its scale and its shift, or as many weights."""

TRAINED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "everything": ({"trainable": "all"}, ""),
    "head alone": ({"trainable": "head"}, ""),
    "batch norm alone": ({"trainable": "norm"}, ""),
    "batch norm alone, scales from U(0, 1)": ({"trainable": "norm", "scale_init": "uniform"}, ""),
    "as many random weights": ({"trainable": "all"}, "random"),
    "batch norm and head": ({"trainable": "norm,head"}, ""),
    "batch norm and head, scales from U(0, 1)": ({"trainable": "norm,head", "scale_init": "uniform"}, ""),
    "as many random weights, and head": ({"trainable": "all"}, "random,head"),
}
"""The rows: what they change in section ``train``, and what alone is let through of the gradients."""


def rows(setup: Setup, steps: int) -> Iterator[Row]:
    """Yield the rows."""
    for name, (train, only) in TRAINED.items():
        chosen: list[float] = []
        yield Row(name, partial(_measure, setup, steps, train, only, chosen))


def _measure(setup: Setup, steps: int, train: Mapping[str, Any], only: str, chosen: list[float], seed: int) -> Values:
    trained = {rate: _trained(setup, steps, train, only, rate, seed) for rate in chosen or RATES}
    if not chosen:
        scores = {rate: trial.accuracy(trial.images("validation")) for rate, (trial, _) in trained.items()}
        chosen.append(max(RATES, key=lambda rate: scores[rate]))
    trial, count = trained[chosen[0]]
    return {
        "parameters": float(count),
        "rate": chosen[0],
        "accuracy": trial.accuracy(trial.images("test")),
        "train": trial.accuracy(trial.images("train")),
    }


def _trained(
    setup: Setup, steps: int, train: Mapping[str, Any], only: str, rate: float, seed: int
) -> tuple[Trial, int]:
    """Return a trained network, and how many numbers were trained."""
    values = {
        "model": {"name": "resnet18", "width": 8},
        "norm": {"name": "batch_norm"},
        "data": {"validation": 0.2},
        "train": {"momentum": 0.9, **train, "learning_rate": rate},
    }
    trial = Trial(setup, seed, values)
    adjust: tuple[Effect, ...] = ()
    count = sum(p.numel() for p in trial.model.parameters() if p.requires_grad)
    if only:
        masks = random_masks(trial.model, seed, head="head" in only)
        count = int(sum(mask.sum().item() for mask in masks.values()))
        adjust = (partial(keep_only, trial.model, masks),)
    trial.fit(steps, trial.images("train"), adjust=adjust)
    return trial, count


def random_masks(model: nn.Module, seed: int, *, head: bool = False) -> dict[str, Tensor]:
    """Return which weights are trained: :data:`A_CHANNEL` of every channel's own filter, and the head's if asked for.

    Args:
        model: The network; its last weight layer is the head.
        seed: Of the streams ``(seed, "analysis", "mask", path)``.
        head: Whether the head is trained too.

    Returns:
        Masks of 0 and 1 by the parameter's key; parameters without one are not trained at all.
    """
    layers = weight_layers(model)
    last = list(layers)[-1]
    masks: dict[str, Tensor] = {}
    for path, weight in layers.items():
        if path == last:
            continue
        flat = torch.zeros(weight.shape[0], weight[0].numel())
        drawn = torch.rand(flat.shape, generator=torch_stream(seed, "analysis", "mask", path))
        masks[f"{path}.weight"] = flat.scatter_(1, drawn.topk(A_CHANNEL, 1).indices, 1.0).view(weight.shape)
    if head:
        masks |= {key: torch.ones_like(p) for key, p in model.named_parameters() if key.startswith(f"{last}.")}
    return masks


def keep_only(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let gradients through where a mask is 1; a parameter without a mask gets none."""
    for key, parameter in model.named_parameters():
        if key not in masks:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad.mul_(masks[key])


ANALYSIS = Analysis(
    name="norm_only",
    title="Batch normalization alone, against as many random weights",
    about="What does a network learn of which only the batch normalization is trained, and is it more than as many "
    "other parameters, drawn at random, learn?",
    papers=("2003.00152",),
    columns=(
        Column("parameters", "trained parameters", ",.0f"),
        Column("rate", "rate", "g"),
        Column("train", "training accuracy (%)", ".1f", 100),
        Column("accuracy", "test accuracy (%)", ".1f", 100),
    ),
    notes=(
        "resnet18 of width 8 with batch_norm, SGD with momentum 0.9, batches of 32 of all domains together; of the "
        f"rates {', '.join(map(str, RATES))} that which is best on the first seed's validation images (a fifth of the "
        "training images).",
        "Random weights: two of every channel's own filter in place of its scale and shift; running statistics follow "
        "the data in every row but 'head alone'.",
    ),
    steps=600,
    rows=rows,
)
