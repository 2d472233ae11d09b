"""BN-SCAFFOLD: SCAFFOLD whose control variates correct batch normalization's moments as well as the gradients.

Quintana, Vancamberg, Jugnon, Mougeot, Desolneux. BN-SCAFFOLD: controlling the drift of Batch Normalization statistics
in Federated Learning. 2024. https://arxiv.org/abs/2410.03281

    the weights' part is that of ``scaffold``. In every batch normalization, client i, of a batch B in training:
        m = m_B - m_i + mbar,     q = q_B - q_i + qbar,     v = max(0, q - m^2)     m_B mean, q_B mean square of B
        y = (x - m) / sqrt(v + eps) * weight + bias         gradients go through m_B and q_B
    m_i, q_i <- means of m_B and q_B over the round's batches;    sent: how they have changed;    kept: m_i, q_i
    server:  mbar <- mbar + |S| / N mean_i dm_i,    qbar likewise

All begin at 0, and a client that has no m_i yet is not corrected. Plain SCAFFOLD corrects gradients that each client
takes by moments of its own, so that a bias stays that no control variate of the weights removes. Of mean squares,
unlike of variances, the clients' average is that of all data, so that v is the variance over all clients, that between
their means included. Running moments are those of the batches as they are, averaged as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.cards import Citation
from fednorm.errors import RoleError
from fednorm.federation.local import Turn
from fednorm.federation.plan import NormPlan
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common
from fednorm.norms import spec_of
from fednorm.roles import Role
from strategies.scaffold import Controlled, Scaffold


class Corrected:
    """A batch normalization's forward pass by corrected moments.

    Args:
        layer: The layer.
        mean: What is added to a batch's mean, shape (C,).
        square: What is added to its mean square.

    Attributes:
        batches: How many batches were seen in training.
        sums: The sums of their means and mean squares.
    """

    def __init__(self, layer: _BatchNorm, mean: Tensor, square: Tensor) -> None:
        self.layer, self.mean, self.square = layer, mean, square
        self.batches = 0
        self.sums = torch.zeros_like(mean), torch.zeros_like(square)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalized input; in evaluation as the layer does it."""
        layer = self.layer
        if not layer.training:
            evaluated: Tensor = type(layer).forward(layer, x)
            return evaluated
        layer._check_input_dim(x)  # type: ignore[no-untyped-call]
        var, mean = torch.var_mean(x.float(), (0, *range(2, x.ndim)), correction=0)
        square = var + mean.square()
        self._see(mean.detach(), var.detach(), square.detach(), x.numel() // len(mean))
        centre = mean + self.mean
        spread = (square + self.square - centre.square()).clamp(min=0)
        scale = torch.rsqrt(spread + layer.eps)
        shift = -centre * scale
        if layer.affine:
            scale, shift = scale * layer.weight, shift * layer.weight + layer.bias
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _see(self, mean: Tensor, var: Tensor, square: Tensor, count: int) -> None:
        """Add a batch's moments, and move the layer's running ones."""
        layer = self.layer
        self.batches += 1
        for total, value in zip(self.sums, (mean, square), strict=True):
            total.add_(value)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        rate = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), rate)
        layer.running_var.lerp_((var * (count / max(count - 1, 1))).to(layer.running_var.dtype), rate)


class ControlledStatistics(Controlled):
    """Corrects gradients, and batch normalization's moments."""

    def state_bytes(self, plan: NormPlan) -> int:
        """Return the bytes of c_i, m_i and q_i."""
        return super().state_bytes(plan) + sum(plan.by_key[key].nbytes for key in self.strategy.statistics)

    def begin(self, turn: Turn) -> None:
        """Take what SCAFFOLD takes, and the moments' control variates."""
        super().begin(turn)
        self.forwards: dict[tuple[str, str], Corrected] = {}
        for pair in self.strategy.pairs:
            layer, known = turn.model.get_submodule(pair[0].rpartition(".")[0]), pair[0] in turn.state
            like = turn.tensors[pair[0]].float()
            mean, square = (
                (turn.extra[key] - turn.state[key]).to(like) if known else torch.zeros_like(like) for key in pair
            )
            assert isinstance(layer, _BatchNorm)
            self.forwards[pair] = Corrected(layer, mean, square)
            vars(layer)["forward"] = self.forwards[pair]

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Keep c_i+, m_i and q_i, and send their changes; without a batch they stay."""
        before = dict(turn.state)
        sent, kept = dict(super().end(turn)), dict[str, Tensor]()
        for pair, forward in self.forwards.items():
            del vars(forward.layer)["forward"]
            for key, total in zip(pair, forward.sums, strict=True):
                old = before.get(key, torch.zeros_like(total)).to(total)
                new = total / forward.batches if forward.batches else old
                sent[key] = new - old
                if forward.batches or key in before:
                    kept[key] = new
        turn.state = {**turn.state, **kept}
        return sent


class BNScaffold(Scaffold):
    """Averages every tensor, and control variates of the learned ones and of batch normalization's moments.

    Args:
        model: The network.
        server_learning_rate: eta_g, greater than 0.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Attributes:
        pairs: The keys of the running mean and variance of each corrected layer, under which m and q travel.
        statistics: The same keys, one after the other.

    Raises:
        ConfigError: An argument is out of range.
        RoleError: The network has no batch normalization, or has other layers with running moments.
    """

    local = ControlledStatistics

    def __init__(self, model: nn.Module, *, server_learning_rate: float = 1.0, **common: Unpack[Common]) -> None:
        super().__init__(model, server_learning_rate=server_learning_rate, **common)
        self.pairs = tuple(
            pair for pair in self.plan.moments() if all(self.plan.by_key[key].role is Role.SHARED for key in pair)
        )
        self.statistics = tuple(key for pair in self.pairs for key in pair)
        of_layers = {pair: model.get_submodule(pair[0].rpartition(".")[0]) for pair in self.pairs}
        other = [pair[0].rpartition(".")[0] for pair, layer in of_layers.items() if not _is_batch_norm(layer)]
        if other or not self.pairs:
            what = f"layer {other[0]!r} has running moments of another norm" if other else "it shares none"
            raise RoleError(
                f"Strategy bn_scaffold corrects batch normalization's moments, and of this {type(model).__name__} "
                f"{what}. Build it with --norm batch_norm, or take strategy scaffold."
            )
        state = model.state_dict()
        self._control |= {key: torch.zeros_like(state[key], dtype=torch.float32) for key in self.statistics}

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move c, mbar and qbar, and the learned tensors by eta_g; running moments are averaged."""
        return super().server_update(old, mean) | {key: mean[key] for key in self.statistics}


def _is_batch_norm(layer: nn.Module) -> bool:
    spec = spec_of(layer)
    return isinstance(layer, _BatchNorm) and spec is not None and spec.name == "batch_norm"


SPEC = StrategySpec(
    name="bn_scaffold",
    summary="SCAFFOLD whose control variates correct batch normalization's moments as well as the gradients.",
    citation=Citation(
        title="BN-SCAFFOLD: controlling the drift of Batch Normalization statistics in Federated Learning",
        authors="Quintana, Vancamberg, Jugnon, Mougeot, Desolneux",
        year=2024,
        arxiv="2410.03281",
    ),
    make=BNScaffold,
    deviations=("Weights of both means are those of rounds.weighting, as with scaffold.",),
    verified=(
        "Three rounds of a federation of three clients written in plain PyTorch, with the same tensors.",
        "Where weights stand still and a batch is all of a client's images, every client normalizes by the moments of "
        "all images together.",
    ),
    reconstruction="that mean squares are corrected rather than variances, that a client's own moments are those of "
    "its round's batches, and that running moments are not corrected; the paper's algorithm was not at hand.",
)
