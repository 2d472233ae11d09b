"""SCAFFOLD: control variates correct every step of a client for how its gradients differ from all clients'.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
ICML 2020. https://arxiv.org/abs/1910.06378, Algorithm 1 with option II

    client i, K steps from y = x:   y <- y - eta (g_i(y) - c_i + c)
                                    c_i+ = c_i - c + (x - y) / (K eta)
    sent:                           y,  dc_i = c_i+ - c_i;        kept: c_i+
    server:                         x <- x + eta_g (mean_i y_i - x)
                                    c <- c + |S| / N mean_i dc_i

c and every c_i begin at 0. They are of the shared, learned parameters; **buffers** (running statistics, counters) have
none and are averaged as in FedAvg, and so does what stays on its client train without one. Both means have the weights
of ``rounds.weighting``: with ``equal`` they are the paper's; with ``examples``, c is the gradient of the objective that
weighs every image alike. eta is the round's learning rate, and K counts the client's updates.

Option II estimates the mean gradient from where K steps have led, which is right for plain SGD alone: other optimizers,
momentum, clipping and projections are refused. Weight decay is part of the gradient. What becomes of SCAFFOLD under
other rules for buffers, and with Adam, is the analysis ``scaffold`` (``fednorm analyse scaffold``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.local import Local, Turn
from fednorm.federation.plan import NormPlan
from fednorm.federation.replies import Form
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.roles import LEARNED, Role

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fednorm.training.trainee import Trainee


class Controlled(Local):
    """Corrects the gradients by c - c_i, and keeps c_i."""

    def check(self, trainee: Trainee) -> None:
        """Refuse what is not plain SGD."""
        train = trainee.config.train
        odd = [
            *([f"train.optimizer={train.optimizer}"] if train.optimizer != "sgd" else []),
            *([f"train.{key}={value}" for key in CHANGING if (value := getattr(train, key))]),
        ]
        if trainee.after and not odd:
            odd = [f"norm {trainee.config.norm.name}, which changes the weights after every update"]
        if odd:
            raise ConfigError(
                "SCAFFOLD's option II takes (x - y) / (K eta) for the mean gradient, which holds for plain SGD; got "
                f"{', '.join(odd)}. Leave that out, or take another strategy."
            )

    def state_bytes(self, plan: NormPlan) -> int:
        """Return the bytes of c_i."""
        return sum(e.nbytes for e in plan.entries if e.role is Role.SHARED and e.kind in LEARNED)

    def begin(self, turn: Turn) -> None:
        """Take x, c and c_i."""
        zeros = {key: torch.zeros_like(parameter) for key, parameter in turn.shared.items()}
        self.start = {key: parameter.detach().clone() for key, parameter in turn.shared.items()}
        self.server = {key: turn.extra.get(key, zero) for key, zero in zeros.items()}
        self.own = {key: turn.state.get(key, zero) for key, zero in zeros.items()}
        self.corrections = {key: self.server[key] - self.own[key] for key in zeros}

    @torch.no_grad()
    def adjust(self, turn: Turn) -> None:
        """Add c - c_i to every gradient."""
        for key, parameter in turn.shared.items():
            if parameter.grad is not None:
                parameter.grad.add_(self.corrections[key])

    @torch.no_grad()
    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Keep c_i+ and send its change; without a step, or at a learning rate of 0, c_i stays."""
        far = turn.steps * turn.rate
        if not far:
            return {key: torch.zeros_like(tensor) for key, tensor in self.own.items()}
        turn.state = {
            key: self.own[key] - self.server[key] + (self.start[key] - parameter) / far
            for key, parameter in turn.shared.items()
        }
        return {key: turn.state[key] - self.own[key] for key in turn.state}


CHANGING = (
    *("momentum", "agc", "clip_norm", "redo_every", "cbp_rate", "snr_eta"),
    *("project", "weight_clip", "hyperspherical"),
)
"""Keys of the section train that make an update something else than eta times a gradient."""


class Scaffold(NormStrategy):
    """Averages every tensor, and control variates of the learned ones.

    Args:
        model: The network.
        server_learning_rate: eta_g, greater than 0.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range.
    """

    local = Controlled

    def __init__(self, model: nn.Module, *, server_learning_rate: float = 1.0, **common: Unpack[Common]) -> None:
        if server_learning_rate <= 0:
            raise ConfigError(f"strategy.server_learning_rate, eta_g, must be positive; got {server_learning_rate}.")
        self.server_learning_rate = server_learning_rate
        super().__init__(model, **common)
        entries = self.plan.by_key
        self._control = {
            key: torch.zeros_like(parameter.detach(), memory_format=torch.contiguous_format)
            for key, parameter in model.named_parameters()
            if entries[key].role is Role.SHARED and entries[key].kind in LEARNED
        }
        self._changes: dict[str, Tensor] = {}
        self._weights: list[float] = []

    def extra_to_send(self) -> Mapping[str, Tensor]:
        """Send c."""
        return self._control

    def extra_expected(self) -> Mapping[str, Form]:
        """Expect dc_i."""
        return {key: Form.of(tensor) for key, tensor in self._control.items()}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round's sums."""
        self._changes, self._weights = {}, []
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_extra(self, partition_id: int, extra: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's dc_i."""
        del partition_id
        self._weights.append(weight)
        for key, change in extra.items():
            so_far = self._changes.get(key)
            self._changes[key] = change * weight if so_far is None else so_far.add_(change, alpha=weight)

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move c by the share of the clients that took part, and x by eta_g."""
        share = len(self._weights) / max(1, len(self.trainers))
        scale = share / sum(self._weights)
        self._control = {key: c + self._changes[key] * scale for key, c in self._control.items()}
        ahead = self.server_learning_rate - 1  # written so that eta_g = 1 gives the average to the last bit
        return mean | {key: mean[key] + ahead * (mean[key] - old[key]) for key in self._control}

    def state_dict(self) -> dict[str, Tensor]:
        """Return c."""
        return {f"control/{key}": tensor for key, tensor in self._control.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take c back."""
        if odd := sorted({f"control/{key}" for key in self._control} ^ set(state)):
            raise ConfigError(f"The checkpoint's control variates do not fit Scaffold: {', '.join(odd[:5])}.")
        self._control = {key: state[f"control/{key}"] for key in self._control}


SPEC = StrategySpec(
    name="scaffold",
    summary="Control variates correct every step of a client for how its gradients differ from all clients'.",
    citation=Citation(
        title="SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        authors="Karimireddy, Kale, Mohri, Reddi, Stich, Suresh",
        year=2020,
        arxiv="1910.06378",
        where="Algorithm 1, option II",
    ),
    make=Scaffold,
    deviations=(
        "Running statistics and counters have no control variate: they are averaged as in FedAvg.",
        "Both means are weighted by rounds.weighting; the paper's are equal.",
    ),
    verified=(
        "Two rounds of a federation of two clients written in plain PyTorch, with the same tensors.",
        "On quadratic losses it finds the optimum from which FedAvg drifts away.",
    ),
)
