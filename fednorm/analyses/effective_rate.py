"""How far a step turns a weight that a normalization follows, while the weight grows: with and without a projection.

Van Laarhoven. L2 Regularization versus Batch and Weight Normalization. 2017. https://arxiv.org/abs/1706.05350
Heo et al. AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights. ICLR 2021.
https://arxiv.org/abs/2006.08217 (SGDP, AdamP). Lyle et al. Normalization and effective learning rates in reinforcement
learning. NeurIPS 2024. https://arxiv.org/abs/2407.01800 (NaP's projection).

    f(c w) = f(w)  =>  w's direction feels lr / ||w||^2 (SGD), lr / ||w|| (Adam)
    turn of a step = || w' / ||w'|| - w / ||w|| ||

Momentum makes the weight longer than its own steps would; SGDP and AdamP take the radial part out of the update, and
NaP's projection puts the weight back to its first norm. A row an optimizer; weights are those of all layers that a
scale-invariant normalization follows; norms and rates are geometric means over them, turns means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import Tensor

from fednorm.analyses.analysis import Analysis, Column, Row, Setup, Values
from fednorm.analyses.trial import Trial
from fednorm.optim.projection import WeightProjection
from fednorm.training.diagnostics import Optimizer, rates_of_norms, weight_layers

SGD: Mapping[str, Any] = {"learning_rate": 0.05, "momentum": 0.9}
ADAM: Mapping[str, Any] = {"learning_rate": 0.003}

TRAINED: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"optimizer": "sgd", **SGD},
    "sgdp": {"optimizer": "sgdp", **SGD},
    "sgd, projected (NaP)": {"optimizer": "sgd", "project": True, **SGD},
    "adam": {"optimizer": "adam", **ADAM},
    "adamp": {"optimizer": "adamp", **ADAM},
    "adam, projected (NaP)": {"optimizer": "adam", "project": True, **ADAM},
}
"""The rows, with what they change in section ``train``."""

PART = 10
"""The first and the last of so many parts of the training are told apart."""


def rows(setup: Setup, steps: int) -> Iterator[Row]:
    """Yield the rows."""
    for name, train in TRAINED.items():
        yield Row(name, partial(_measure, setup, steps, train))


def _measure(setup: Setup, steps: int, train: Mapping[str, Any], seed: int) -> Values:
    model = {"name": "digits_cnn", "width": 16}
    trial = Trial(setup, seed, {"model": model, "norm": {"name": "batch_norm"}, "train": train})
    hidden = list(WeightProjection(trial.model).radii)

    def weights() -> dict[str, Tensor]:
        layers = weight_layers(trial.model)
        return {path: layers[path].detach().double().clone() for path in hidden}

    first = before = weights()
    turns = []
    for _ in trial.train(steps, trial.images("train")):
        after = weights()
        turns.append(fmean(turn(before[path], after[path]) for path in hidden))
        before = after
    part = max(1, steps // PART)
    kind: Optimizer = "sgd" if "sgd" in train["optimizer"] else "adam"
    norms = [{path: float(weight.norm()) for path, weight in held.items()} for held in (first, before)]
    rates = [rates_of_norms(each, train["learning_rate"], optimizer=kind) for each in norms]
    return {
        "growth": geometric_mean(norms[1].values()) / geometric_mean(norms[0].values()),
        "rate_first": geometric_mean(rates[0].values()),
        "rate_last": geometric_mean(rates[1].values()),
        "turn_first": fmean(turns[:part]),
        "turn_last": fmean(turns[-part:]),
        "accuracy": trial.accuracy(trial.images("test")),
    }


def turn(before: Tensor, after: Tensor) -> float:
    """Return how far a weight's direction has moved: the distance of the two on the unit sphere."""
    return float(torch.dist(before / before.norm(), after / after.norm()))


ANALYSIS = Analysis(
    name="effective_rate",
    title="Effective learning rate against the weights' norm",
    about="Does a normalized network's weight grow until its steps no longer turn it, and do AdamP, SGDP and NaP's "
    "projection keep that from happening?",
    papers=("1706.05350", "2006.08217", "2407.01800"),
    columns=(
        Column("growth", "norm, last to first", ".2f"),
        Column("rate_first", "effective rate, first", ".2g"),
        Column("rate_last", "effective rate, last", ".2g"),
        Column("turn_first", "turn a step, first tenth (1/1000)", ".1f", 1000),
        Column("turn_last", "turn a step, last tenth (1/1000)", ".1f", 1000),
        Column("accuracy", "test accuracy (%)", ".1f", 100),
    ),
    notes=(
        "digits_cnn of width 16 with batch_norm, batches of 32 of all domains together, no weight decay, a constant "
        "rate: 0.05 with momentum 0.9 (sgd, sgdp), 0.003 (adam, adamp).",
        "Weights of the layers that a scale-invariant normalization follows. Effective rate: lr / ||w||^2 (sgd), "
        "lr / ||w|| (adam). Turn: how far a step moves w / ||w||.",
    ),
    steps=300,
    rows=rows,
)
