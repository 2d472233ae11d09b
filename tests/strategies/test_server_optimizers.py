"""FedAvgM, FedAdam and FedYogi against their published formulas in float64, and against Flower's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAdam as FlowerFedAdam
from flwr.serverapp.strategy import FedYogi as FlowerFedYogi
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.federation.wire import pack, unpack
from fednorm.roles import LEARNED
from strategies.fedadam import FedAdam
from strategies.fedavgm import FedAvgM
from strategies.fedyogi import FedYogi

State = dict[str, Tensor]
Step = Callable[[np.ndarray, np.ndarray, dict[str, np.ndarray]], np.ndarray]
ETA, BETA, BETA_1, BETA_2, TAU = 0.3, 0.7, 0.8, 0.95, 0.02


def momentum(w: np.ndarray, mean: np.ndarray, s: dict[str, np.ndarray]) -> np.ndarray:
    """Hsu et al. 2019: v <- beta v + d, w <- w - eta v, with d = w - mean."""
    s["v"] = BETA * s.get("v", 0.0) + (w - mean)
    return w - ETA * s["v"]


def adam(w: np.ndarray, mean: np.ndarray, s: dict[str, np.ndarray]) -> np.ndarray:
    """Reddi et al. 2021, Algorithm 2, FedAdam; v_{-1} = tau^2."""
    d = mean - w
    s["m"] = BETA_1 * s.get("m", 0.0) + (1 - BETA_1) * d
    s["v"] = BETA_2 * s.get("v", TAU**2) + (1 - BETA_2) * d * d
    return w + ETA * s["m"] / (np.sqrt(s["v"]) + TAU)


def yogi(w: np.ndarray, mean: np.ndarray, s: dict[str, np.ndarray]) -> np.ndarray:
    """Reddi et al. 2021, Algorithm 2, FedYogi; v_{-1} = tau^2."""
    d = mean - w
    s["m"] = BETA_1 * s.get("m", 0.0) + (1 - BETA_1) * d
    v = s.get("v", np.full_like(w, TAU**2))
    s["v"] = v - (1 - BETA_2) * d * d * np.sign(v - d * d)
    return w + ETA * s["m"] / (np.sqrt(s["v"]) + TAU)


ADAPTIVE = {"server_learning_rate": ETA, "beta_1": BETA_1, "beta_2": BETA_2, "tau": TAU}
FORMULAS: dict[str, tuple[Step, dict[str, float]]] = {
    "fedavgm": (momentum, {"server_learning_rate": ETA, "server_momentum": BETA}),
    "fedadam": (adam, ADAPTIVE),
    "fedyogi": (yogi, ADAPTIVE),
}


def in_float64(lab: Any, name: str) -> tuple[nn.Module, dict[int, dict[int, tuple[State, float]]]]:
    """Return a float64 network and what three clients send in each of five rounds."""
    model = lab.network(name).double()
    draw = torch.Generator().manual_seed(5)
    rounds: dict[int, dict[int, tuple[State, float]]] = {}
    for r in range(1, 6):
        rounds[r] = {}
        for pid in range(3):
            state = {k: torch.randn(t.shape, generator=draw).to(t.dtype) for k, t in model.state_dict().items()}
            state["1.running_var"].abs_()
            rounds[r][pid] = (state, 1.0 + pid)
    return model, rounds


@pytest.mark.parametrize("name", FORMULAS)
def test_five_rounds_are_the_formula_on_learned_tensors_and_the_average_elsewhere(name: str, lab: Any) -> None:
    step, options = FORMULAS[name]
    model, rounds = in_float64(lab, name)
    strategy = {"fedavgm": FedAvgM, "fedadam": FedAdam, "fedyogi": FedYogi}[name](model, **options)
    ours = unpack(strategy.initial_arrays(model))
    formula = {key: tensor.numpy().copy() for key, tensor in ours.items()}
    slots: dict[str, dict[str, np.ndarray]] = {key: {} for key in ours}
    for r, updates in rounds.items():
        ours = lab.round(strategy, ours, lab.answers(updates), r)
        strategy.nodes = ()  # every round has a grid of its own
        for key, entry in strategy.plan.by_key.items():
            mean = sum(n / 6 * state[key].numpy() for state, n in updates.values())
            if entry.kind in LEARNED:
                formula[key] = step(formula[key], mean, slots[key])
            else:
                formula[key] = updates[0][0][key].numpy() if entry.kind == "count" else mean
            np.testing.assert_allclose(ours[key].numpy(), formula[key], rtol=1e-10, atol=1e-12, err_msg=f"{key}, {r}")


@pytest.mark.parametrize(("name", "flower"), [("fedadam", FlowerFedAdam), ("fedyogi", FlowerFedYogi)])
def test_flowers_own_agrees_once_its_two_differences_are_undone(name: str, flower: Any, lab: Any) -> None:
    model, rounds = in_float64(lab, name)
    strategy = {"fedadam": FedAdam, "fedyogi": FedYogi}[name](model, **ADAPTIVE)
    learned = [key for key, entry in strategy.plan.by_key.items() if entry.kind in LEARNED]
    theirs = flower(eta=ETA, beta_1=BETA_1, beta_2=BETA_2, tau=TAU)
    # Flower's second moment starts at 0, ours at tau^2 as in the paper
    strategy.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in strategy.state_dict().items()})
    ours = unpack(strategy.initial_arrays(model))
    theirs.current_arrays = {key: ours[key].numpy().copy() for key in learned}
    for r, updates in rounds.items():
        if name == "fedadam":  # Flower corrects for bias, with one round more than there were; the paper does not
            strategy.server_learning_rate = ETA * (1 - BETA_2 ** (r + 1)) ** 0.5 / (1 - BETA_1 ** (r + 1))
        grid = lab.answers(updates)
        strategy.nodes = ()  # every round has a grid of its own
        replies = list(grid.send_and_receive(strategy.configure_train(r, pack(ours), ConfigRecord(), grid)))
        arrays, _ = strategy.aggregate_train(r, replies)
        assert arrays is not None
        ours = unpack(arrays)
        for reply in replies:
            records = reply.content.array_records
            records["arrays"] = pack({key: unpack(records["arrays"])[key] for key in learned})
        flowers, _ = theirs.aggregate_train(r, replies)
        assert flowers is not None
        for key in learned:
            np.testing.assert_allclose(ours[key].numpy(), flowers[key].numpy(), rtol=1e-9, atol=1e-12)
        theirs.current_arrays = {key: flowers[key].numpy() for key in learned}


@pytest.mark.parametrize("name", FORMULAS)
def test_slots_are_kept_for_learned_tensors_only(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    slots = {"fedavgm": {"velocity"}, "fedadam": {"first", "second"}, "fedyogi": {"first", "second"}}[name]
    keys = {key for key, entry in strategy.plan.by_key.items() if entry.kind in LEARNED}
    assert set(strategy.state_dict()) == {f"{slot}/{key}" for slot in slots for key in keys}
    assert not any("running" in key or "num_batches" in key for key in strategy.state_dict())


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_the_first_step_is_bounded_by_the_learning_rate(name: str, lab: Any) -> None:
    strategy = lab.make(name, server_learning_rate=0.01)
    old = lab.update(strategy, 1)
    new = lab.round(strategy, old, lab.answers({0: (lab.update(strategy, 2), 1)}))
    bound = 0.01 * (1 - 0.9) / (1 - 0.99) ** 0.5  # |m| / sqrt(v) with one difference in both
    for key, entry in strategy.plan.by_key.items():
        if entry.kind in LEARNED:
            # one unit in the last place of the largest weights is more than the step
            assert (new[key] - old[key]).abs().max() <= bound + 1e-6 * old[key].abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavgm", {"server_momentum": 1.0}),
        ("fedavgm", {"server_learning_rate": 0.0}),
        ("fedadam", {"beta_1": 1.0}),
        ("fedadam", {"beta_2": -0.1}),
        ("fedyogi", {"tau": 0.0}),
        ("fedyogi", {"server_learning_rate": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, float], lab: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        lab.make(name, **options)
