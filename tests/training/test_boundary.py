"""An experience's boundary sets back what the cards say, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fednorm.cards import NORMS
from fednorm.config import resolve
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.roles import Carry
from fednorm.streams.learner import Learner
from fednorm.streams.simulate import simulate
from fednorm.streams.workbench import ContinualWorkbench
from fednorm.training.boundary import Boundary

RESETTING = [card.name for card in NORMS if any(t.carry is Carry.RESET for t in card.tensors.values())]


def test_some_norm_is_set_back() -> None:
    assert {"power_norm", "unified_norm"} <= set(RESETTING)


@pytest.mark.parametrize("norm", [*RESETTING, "batch_norm", "adab2n", "group_norm"])
def test_what_the_card_says_is_set_back_and_nothing_else(norm: str) -> None:
    model = make_model("digits_cnn", make_norm(norm), num_classes=10, width=4)
    initial = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    boundary = Boundary(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    boundary.cross()
    back = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, initial[key])}
    assert back == set(boundary.reset)
    assert bool(back) == (norm in RESETTING)
    carries = {key.rsplit(".", 1)[-1]: NORMS[norm].tensors[key.rsplit(".", 1)[-1]].carry for key in back}
    assert set(carries.values()) <= {Carry.RESET}


def test_a_stream_sets_back_at_every_boundary_but_the_first() -> None:
    values: dict[str, Any] = {
        "kind": "continual",
        "learner": {"name": "naive"},
        "norm": {"name": "power_norm"},
        "scenario": {"num_experiences": 3, "train_per_experience": 8, "test_per_experience": 4},
        "model": {"width": 4},
        "train": {"batch_size": 4, "epochs": 1},
    }
    bench = ContinualWorkbench(resolve(values))
    seen: list[float] = []

    def look(_: Learner) -> None:
        seen.append(float(sum(t.abs().sum() for key, t in bench.model.state_dict().items() if "ema_gz" in key)))

    bench.learner.epoch_watchers.append(look)
    bench.learner.watchers.append(look)
    simulate(bench.config, runs=None, bench=bench)
    begins = seen[::3]  # each experience is one pass of two steps
    assert begins == [0.0, 0.0, 0.0]
    assert all(value > 0 for place, value in enumerate(seen) if place % 3)
