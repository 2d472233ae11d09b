"""SCAFFOLD with batch normalization: what each rule for the buffers does, and what makes it collapse.

Karimireddy et al. SCAFFOLD. ICML 2020. https://arxiv.org/abs/1910.06378. The paper has no buffers, so every tool has a
rule of its own for running statistics (x: the server's tensor, y: the client's, c, c_i: control variates):

    averaged     x <- mean_i y_i, no c_i            fednorm's scaffold
    local        they stay on their client           SiloBN's rule, by strategy.local
    stepped      x <- x + eta_g (mean_i y_i - x)     FLGo (WwZzz/easyFL, flgo/algorithm/scaffold.py); with eta_g = 1
                                                     the average
    controlled   y <- y - eta (c - c_i) after every step, and c_i by option II, as if they were trained
                                                     NIID-Bench; NVIDIA FLARE (nvflare/app_opt/pt/scaffold.py)

A public benchmark (WwZzz/FLGo-Bench, ProstateMRI, a U-Net with batch normalization) has 52.0 for SCAFFOLD, 93.3 for
FedAvg; its optimizer there is Adam. Option II, c_i+ = c_i - c + (x - y) / (K eta), takes the way of K steps for the
mean gradient, which holds for plain SGD: Adam's way is up to eta a step in every weight, so that (x - y) / (K eta) is
of size 1 whatever the gradient. fednorm's ``scaffold`` refuses Adam; here it is let through, to see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import fmean
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fednorm.analyses.analysis import Analysis, Column, Row, Setup, Values
from fednorm.cards import STRATEGIES
from fednorm.config import merge, resolve
from fednorm.errors import FedNormError
from fednorm.federation.local import Turn
from fednorm.federation.simulate import simulate
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common
from fednorm.federation.workbench import Workbench
from fednorm.roles import Kind, Role
from fednorm.training.trainee import Trainee

RULES = ("averaged", "stepped", "controlled")

STATISTICS = "*.running_mean,*.running_var,*.num_batches_tracked"
"""What stays on its client by the rule ``local``."""


Scaffold = STRATEGIES["scaffold"].make  # found by its name, since a strategy is nothing that fednorm imports


class Watched(Scaffold.local):  # type: ignore[misc,name-defined]
    """SCAFFOLD's client under any rule for buffers and any optimizer; its strategy is told what it sees."""

    def check(self, trainee: Trainee) -> None:
        """Let everything through: what SCAFFOLD refuses is what is looked at."""

    def begin(self, turn: Turn) -> None:
        """Take what SCAFFOLD takes, and the buffers' part of it."""
        super().begin(turn)
        self._see_variances(turn)
        self.buffers = {key: turn.tensors[key] for key in self.strategy.controlled}
        self.first = {key: tensor.clone() for key, tensor in self.buffers.items()}
        self.own |= {key: turn.state.get(key, torch.zeros_like(tensor)) for key, tensor in self.buffers.items()}
        self.server |= {key: turn.extra[key] for key in self.buffers}

    @torch.no_grad()
    def adjust(self, turn: Turn) -> None:
        """Add c - c_i to the gradients and, by the rule ``controlled``, to the buffers."""
        gradients = [p.grad for p in turn.shared.values() if p.grad is not None]
        length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        correction = math.sqrt(sum(float(c.square().sum()) for c in self.corrections.values()))
        self.strategy.ratios.setdefault(turn.server_round, []).append(correction / max(length, 1e-12))
        super().adjust(turn)
        for key, tensor in self.buffers.items():
            tensor.sub_(self.server[key] - self.own[key], alpha=turn.rate)

    @torch.no_grad()
    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Keep c_i+ and send its change, of the buffers as of the weights."""
        self._see_variances(turn)
        sent = dict(super().end(turn))
        for key, tensor in self.buffers.items():
            new = self.own[key] - self.server[key] + (self.first[key] - tensor) / (turn.steps * turn.rate)
            turn.state = turn.state | {key: new}
            sent[key] = new - self.own[key]
        return {key: sent[key] for key in self.strategy._control}

    def _see_variances(self, turn: Turn) -> None:
        variances = [float(turn.tensors[e.key].min()) for e in turn.plan.entries if e.kind is Kind.VAR]
        self.strategy.lowest = min([self.strategy.lowest, *variances])


class Ruled(Scaffold):  # type: ignore[misc,valid-type]
    """SCAFFOLD with a rule for running statistics.

    Args:
        model: The network.
        buffers: A key of :data:`RULES`.
        server_learning_rate: eta_g, greater than 0.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Attributes:
        controlled: Keys of the buffers that have control variates.
        ratios: ||c - c_i|| / ||g|| of every step, by round.
        lowest: The smallest running variance that a client was given or sent.
    """

    local = Watched

    def __init__(
        self,
        model: nn.Module,
        *,
        buffers: str = "averaged",
        server_learning_rate: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(model, server_learning_rate=server_learning_rate, **common)
        self.buffers, self.ratios, self.lowest = buffers, dict[int, list[float]](), math.inf
        moments = (Kind.MEAN, Kind.VAR)
        self._moments = tuple(e.key for e in self.plan.entries if e.role is Role.SHARED and e.kind in moments)
        self.controlled = self._moments if buffers == "controlled" else ()
        state = model.state_dict()
        self._control |= {key: torch.zeros_like(state[key]) for key in self.controlled}

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move c, and the learned tensors by eta_g; the buffers by eta_g too, or to the average."""
        updated: dict[str, Tensor] = super().server_update(old, mean)
        far = 1.0 if self.buffers == "averaged" else self.server_learning_rate
        return updated | {key: old[key] + far * (mean[key] - old[key]) for key in self._moments}


SPEC = StrategySpec(
    name="ruled_scaffold",
    summary="SCAFFOLD with a rule for running statistics, and with any optimizer, for the analysis scaffold.",
    make=Ruled,
)


ADAM: Mapping[str, Any] = {"train": {"optimizer": "adam", "learning_rate": 0.001}}
RULED: Mapping[str, Any] = {"strategy": {"name": f"{__name__}:SPEC"}}
CONTROLLED: Mapping[str, Any] = {"strategy": {"buffers": "controlled"}}
FURTHER: Mapping[str, Any] = {"strategy": {"server_learning_rate": 2.0}}
GROUP_NORM: Mapping[str, Any] = {"norm": {"name": "group_norm"}}
SOME: Mapping[str, Any] = {"rounds": {"fraction": 0.4}}


def rows(setup: Setup, steps: int) -> Iterator[Row]:
    """Yield the rows."""

    def of(name: str, *values: Mapping[str, Any]) -> Row:
        return Row(name, partial(_measure, setup, steps, merge({}, *values)))

    yield of("fedavg")
    yield of("fedbn", {"strategy": {"name": "fedbn"}})
    yield of("bn_scaffold", {"strategy": {"name": "bn_scaffold"}})
    yield of("averaged", RULED)
    yield of("local", RULED, {"strategy": {"local": STATISTICS}})
    yield of("controlled", RULED, CONTROLLED)
    yield of("averaged, 2 of 5 clients", RULED, SOME)
    yield of("controlled, 2 of 5 clients", RULED, CONTROLLED, SOME)
    yield of("averaged, eta_g 2", RULED, FURTHER)
    yield of("stepped, eta_g 2", RULED, FURTHER, {"strategy": {"buffers": "stepped"}})
    yield of("fedavg, adam", ADAM)
    yield of("averaged, adam", RULED, ADAM)
    yield of("group_norm: fedavg, adam", GROUP_NORM, ADAM)
    yield of("group_norm: averaged", RULED, GROUP_NORM)
    yield of("group_norm: averaged, adam", RULED, GROUP_NORM, ADAM)


class _Rounds:
    """Counts a run's rounds."""

    def __init__(self) -> None:
        self.done = 0

    def begin(self, *_: Any) -> None:
        """Begin."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Count a round."""
        self.done = line["round"]


def _measure(setup: Setup, steps: int, values: Mapping[str, Any], seed: int) -> Values:
    own = {
        "kind": "federated",
        "seed": seed,
        "engine": "client",
        "workers": 1,
        "model": {"name": "cnn", "width": 8},
        "data": {
            "name": setup.data,
            "dir": setup.data_dir,
            "train_per_client": 64,
            "test_per_domain": 100,
            "image_size": 16,
        },
        "train": {"learning_rate": 0.03, "local_epochs": 2, "batch_size": 16},
        "rounds": {"num_rounds": steps, "evaluate_every": steps},
        "evaluate": {"diagnostics": True},
    }
    bench = Workbench(resolve(merge(own, values), only="federated"))
    found, counted = dict[str, float](), _Rounds()
    try:
        result = simulate(bench.config, runs=None, bench=bench, observer=counted)
    except FedNormError:  # no client's update could be used any more
        found |= {"accuracy": math.nan, "worst": math.nan, "drift": math.nan}
    else:
        found |= {"accuracy": result["final"]["mean"], "worst": result["final"]["worst"]}
        drifts = [
            value for layers in result["rounds"][-1]["diagnostics"]["drift"].values() for value in layers.values()
        ]
        found |= {"drift": fmean(drifts)} if drifts else {}
    found["rounds"] = counted.done
    strategy = bench.strategy
    if isinstance(strategy, Ruled):
        found |= {"ratio": fmean(strategy.ratios[max(strategy.ratios)]), "lowest": strategy.lowest}
    return found


ANALYSIS = Analysis(
    name="scaffold",
    title="SCAFFOLD by its rule for running statistics, its server rate and its optimizer",
    about="Why does SCAFFOLD collapse with batch normalization: by its rule for running statistics, by a server rate "
    "above 1, or by an optimizer that is not SGD?",
    papers=("1910.06378", "2410.03281"),
    columns=(
        Column("accuracy", "mean accuracy (%)", ".1f", 100),
        Column("worst", "worst domain (%)", ".1f", 100),
        Column("ratio", "‖c − c_i‖ / ‖g‖, last round", ".2f"),
        Column("drift", "drift of statistics", ".2f"),
        Column("rounds", "rounds", ".0f"),
        Column("lowest", "smallest running variance", ".2g"),
    ),
    notes=(
        "A cnn of width 8 on images of 16 × 16, batch_norm unless group_norm is named; a client a domain with 64 "
        "images, 2 epochs a round, batches of 16, SGD at 0.03 or Adam at 0.001.",
        "Rows without another strategy's name are SCAFFOLD, by what becomes of running statistics: averaged (fednorm's "
        "scaffold), local to their client, stepped by eta_g as the weights, controlled as the weights.",
        "Drift: Wasserstein distance of a client's statistics from all clients', in joint standard deviations, mean of "
        "layers and clients, last round. A run ends before its last round where no client's update can be used, for "
        "negative variances or NaN: scores are the mean of the runs that went to the end, – where none did.",
    ),
    steps=20,
    unit="rounds",
    rows=rows,
)
