"""Fine-tuning, a linear probe, and the one after the other: the head's norm, and how far the features move.

Kumar et al. Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution. ICLR 2022.
https://arxiv.org/abs/2202.10054; Tomihari, Sato. Understanding Linear Probing then Fine-tuning Language Models from NTK
Perspective. NeurIPS 2024. https://arxiv.org/abs/2405.16747

A network is trained on all domains but one, then gets a new head and is trained on the one. The papers: a probe first
makes the head long, a long head makes the features' gradients large against their change, and LP-FT changes features
less than fine-tuning from a new head.

    moved = mean over images of || phi(x) - phi_0(x) || / || phi_0(x) ||,  phi what the head is given
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.analyses.analysis import Analysis, Column, Row, Setup, Values
from fednorm.analyses.trial import Images, Trial
from fednorm.device import as_written
from fednorm.recognition.places import head_of

BEFORE = 2
"""The first training is so many times as long as the second."""

ROWS = {"fine-tuning": 0.0, "linear probe": 1.0, "LP-FT": 0.5}
"""The rows, with the share of the steps in which the head alone is trained."""


def rows(setup: Setup, steps: int) -> Iterator[Row]:
    """Yield the rows."""
    for name, share in ROWS.items():
        yield Row(name, partial(_measure, setup, steps, share))


def _measure(setup: Setup, steps: int, share: float, seed: int) -> Values:
    values: dict[str, Any] = {
        "model": {"name": "digits_cnn", "width": 16},
        "norm": {"name": "batch_norm"},
        "train": {"learning_rate": 0.03, "momentum": 0.9, "linear_probe_rounds": 1},
    }
    trial = Trial(setup, seed, values)
    new, old = trial.domains[:1], trial.domains[1:]
    fresh = {key: tensor.clone() for key, tensor in trial.model.state_dict().items()}
    trial.fit(BEFORE * steps, trial.images("train", old), name="before")
    head = head_of(trial.model)
    # The head begins anew, as it was drawn.
    trial.model.load_state_dict(
        {key: fresh[key] if key.startswith(f"{head}.") else t for key, t in trial.model.state_dict().items()}
    )
    trial.trainee.optimizer.state.clear()
    test = trial.images("test", new)
    features = features_of(trial.model, test)
    norms = [_norm(trial.model, head)]
    probed = round(share * steps)
    train = trial.images("train", new)
    for probing, count in ((True, probed), (False, steps - probed)):
        with trial.trainee.trainable.stage(probing):
            trial.fit(count, train, name="probe" if probing else "tune") if count else None
        norms.append(_norm(trial.model, head))
    moved = (features_of(trial.model, test) - features).norm(dim=1) / features.norm(dim=1)
    return {
        "head_first": norms[0],
        "head_probed": norms[1],
        "head_last": norms[2],
        "moved": float(moved.mean()),
        "accuracy": trial.accuracy(test),
        "others": trial.accuracy(trial.images("test", old)),
    }


def _norm(model: nn.Module, head: str) -> float:
    parameters = [p.detach().double().flatten() for p in model.get_submodule(head).parameters()]
    return float(torch.cat(parameters).norm())


@torch.no_grad()
def features_of(model: nn.Module, data: Images) -> Tensor:
    """Return what a network's head is given for images, in evaluation mode, shape (n, d)."""
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: Any) -> None:
        del module
        seen.append(inputs[0].double().flatten(1))

    hook = model.get_submodule(head_of(model)).register_forward_pre_hook(look)
    try:
        with as_written(model):
            model.eval()(data[0])
    finally:
        hook.remove()
    return seen[0]


ANALYSIS = Analysis(
    name="linear_probe",
    title="Linear probe, then fine-tuning: the head's norm",
    about="Does a linear probe before fine-tuning make the head longer, and leave the features more as they were?",
    papers=("2202.10054", "2405.16747"),
    columns=(
        Column("head_first", "head's norm, new", ".2f"),
        Column("head_probed", "after the probe", ".2f"),
        Column("head_last", "at the end", ".2f"),
        Column("moved", "features moved", ".2f"),
        Column("accuracy", "test accuracy (%)", ".1f", 100),
        Column("others", "on the domains before (%)", ".1f", 100),
    ),
    notes=(
        "digits_cnn of width 16 with batch_norm, trained on all domains but the first for twice as many steps, then "
        "on the first, with a new head; SGD, rate 0.03, momentum 0.9, batches of 32. LP-FT: half of the steps each.",
        "Features moved: the mean over the new domain's test images of ||phi - phi_0|| / ||phi_0||, phi what the head "
        "is given; where the head alone is trained, statistics stay too.",
    ),
    steps=200,
    rows=rows,
)
