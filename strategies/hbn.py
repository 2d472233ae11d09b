"""HBN: hybrid batch normalization, whose moments of all clients come from a second pass over them, not from training.

Chen, Xu, Wu, Kittler. Hybrid Batch Normalisation: Resolving the Dilemma of Batch Normalisation in Federated Learning.
ICML 2025. https://arxiv.org/abs/2505.21877. Official code: Hongyao-Chen/HybridBN, FedBaseline/models/FedHBN.

Norm ``hybrid_bn`` mixes a batch's moments with those of all clients, (M, V). A round, with the weights w:

    client k:  n_k images, 64 at most, pass through w in one batch:  m_k, v_k, mixed moments of every layer
               w_k <- training from w, with (M, V) held still;       a_k, its share of the batch, stays there
    server:    w' = sum_k p_k w_k
               (M, V) <- (1 - beta) (M, V) + beta pooled(m, v),      beta = ``global_momentum``
               second pass: the same clients' images through w', with the new (M, V)
    evaluation of w':  by the second pass's pooled moments

    pooled:    mean = sum_k n_k m_k / n;   var = sum_k n_k (v_k + (m_k - mean)^2) / (n - 1)

So averaging local statistics of *different* weights, which is what biases batch normalization here, is never done. The
second pass sends the network once more to every client of a round. (M, V) begin at 0 and 1 and move slowly, by design.

The server's tensors hold the moments of the second pass, so that what is evaluated, recorded and exported is a network
that works; (M, V) travel beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError, IncompleteError, RoleError
from fednorm.federation.local import Local, Passes, Turn
from fednorm.federation.replies import EXTRA, Form, UnfitReply, read_measured
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.federation.wire import nbytes, pack
from fednorm.norms._precision import widened
from fednorm.norms.hybrid_bn import IMAGES, Estimate, hybrid_layers, measured, pooled_estimates
from fednorm.roles import Kind, Role, RoleRule

if TYPE_CHECKING:
    from fednorm.training.trainee import Trainee

SAMPLES = "samples"
"""Key of how many images a client is to look at, and of how many it has looked at."""
MEAN, VAR = "running_mean", "running_var"
SECONDS = 3600.0
"""How long to wait for the second pass; as for a round."""


class Hybrid(Local):
    """Holds the moments of all clients still in training, and measures its own of what the server sent."""

    @classmethod
    def passes(cls, options: Mapping[str, Any]) -> Passes:
        """Add both measurements of a round."""
        del options
        return Passes(measured=2 * IMAGES)

    def check(self, trainee: Trainee) -> None:
        """Refuse other layers with running moments, which would be averaged over different weights."""
        ours = {f"{path}." for path in hybrid_layers(trainee.model)}
        plan = self.strategy.plan
        odd = [mean for mean, _ in plan.moments() if not mean.startswith(tuple(ours))]
        if odd:
            raise ConfigError(
                f"Strategy hbn estimates the moments of hybrid_bn's layers, and {odd[0].rpartition('.')[0]!r} has "
                "running moments of another norm. Convert the whole network: --norm hybrid_bn."
            )

    def begin(self, turn: Turn) -> None:
        """Take (M, V), look at the client's images, and hold (M, V) still."""
        self.found = self.measure(turn)
        self.momenta = {layer: layer.momentum for layer in hybrid_layers(turn.model).values()}
        for layer in self.momenta:
            layer.momentum = 0.0

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Send what was found before the training."""
        del turn
        for layer, momentum in self.momenta.items():
            layer.momentum = momentum
        return self.found

    def measure(self, turn: Turn) -> dict[str, Tensor]:
        """Return the mixed moments of the client's first images, in one batch, and how many these are."""
        sent = turn.extra
        turn.write({key: tensor for key, tensor in sent.items() if key != SAMPLES})
        split = turn.client.train
        images, _ = split.inputs(torch.arange(min(int(sent[SAMPLES]), len(split))))
        found = measured(turn.model, images)
        return as_tensors({path: (one.mean, one.var) for path, one in found.items()}, len(images))


def as_tensors(moments: Mapping[str, tuple[Tensor, Tensor]], samples: float) -> dict[str, Tensor]:
    """Return moments by layer, and a number of samples, as they travel: on the CPU, in single precision or more."""
    sent = {f"{path}.{name}": widened(value.detach()).to("cpu", copy=True)
            for path, pair in moments.items() for name, value in zip((MEAN, VAR), pair, strict=True)}  # fmt: skip
    return {**sent, SAMPLES: torch.tensor(float(samples))}


class HBN(NormStrategy):
    """Averages what is learned but for the shares, and estimates moments in a second pass over a round's clients.

    Args:
        model: The network.
        global_momentum: beta, the weight of a round in (M, V), in (0, 1].
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range.
        RoleError: The network has no layer of norm ``hybrid_bn``.
    """

    local = Hybrid
    rule = RoleRule({Kind.GATE: Role.LOCAL}, why="HBN keeps each client's share of the batch local: it")

    def __init__(self, model: nn.Module, *, global_momentum: float = 0.002, **common: Unpack[Common]) -> None:
        if not 0 < global_momentum <= 1:
            raise ConfigError(f"strategy.global_momentum, beta, is in (0, 1]; got {global_momentum}.")
        self.global_momentum = global_momentum
        super().__init__(model, **common)
        layers = hybrid_layers(model)
        self._layers = tuple(layers)
        self._moments = as_tensors({path: (layer.running_mean, layer.running_var) for path, layer in layers.items()}, 0)
        del self._moments[SAMPLES]
        self._found: list[dict[str, Estimate]] = []

    def check(self, model: nn.Module) -> None:
        """Refuse a network without hybrid layers."""
        if not hybrid_layers(model):
            raise RoleError(
                f"Strategy hbn is about norm hybrid_bn, and this {type(model).__name__} has no layer of it. "
                "Build it with --norm hybrid_bn, or fednorm.convert(model, 'hybrid_bn')."
            )

    def extra_to_send(self) -> Mapping[str, Tensor]:
        """Send (M, V), and how many images a client is to look at."""
        return {**self._moments, SAMPLES: torch.tensor(float(IMAGES))}

    def extra_expected(self) -> Mapping[str, Form]:
        """Expect a client's moments, and of how many images they are."""
        return {key: Form.of(tensor) for key, tensor in self.extra_to_send().items()}

    def bytes_beside(self) -> int:
        """Return the bytes that the second pass sends and receives for each client of a round."""
        return self.plan.bytes_sent + 2 * sum(form.nbytes for form in self.extra_expected().values())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round's list of what clients found."""
        self._found = []
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_extra(self, partition_id: int, extra: Mapping[str, Tensor], weight: float) -> None:
        """Take what one client found of the weights that the round began with."""
        del partition_id, weight
        self._found.append(self._estimates(extra))

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move (M, V), and put the second pass's moments into the average."""
        del old
        for path, moments in pooled_estimates(self._found).items():
            for name, new in zip((MEAN, VAR), moments, strict=True):
                held = self._moments[f"{path}.{name}"]
                self._moments[f"{path}.{name}"] = held.double().lerp(new, self.global_momentum).to(held.dtype)
        pooled = pooled_estimates(self._second_pass(mean))
        fresh = {f"{path}.{name}": value for path, pair in pooled.items()
                 for name, value in zip((MEAN, VAR), pair, strict=True)}  # fmt: skip
        return {key: fresh[key].to(tensor.dtype) if key in fresh else tensor for key, tensor in mean.items()}

    def _second_pass(self, mean: Mapping[str, Tensor]) -> list[dict[str, Estimate]]:
        """Return what the clients whose updates were used find of the weights that were made of these."""
        assert self._grid is not None
        used = {report.partition_id for report in self.report.train}
        nodes = [node for node in self.nodes if node.partition_id in used]
        arrays, beside = pack(mean), pack(self.extra_to_send())
        config = ConfigRecord({"server-round": self.report.server_round})
        content = RecordDict({"arrays": arrays, "config": config, EXTRA: beside})
        self.report.bytes_down += (nbytes(arrays.values()) + nbytes(beside.values())) * len(nodes)
        replies = self._grid.send_and_receive(self._address(content, "query.measure", nodes), timeout=SECONDS)
        found = []
        for node, reply in self._in_order(replies, during="the second pass"):
            try:
                extra = read_measured(reply, self.extra_expected())
            except UnfitReply as unfit:
                self.report.reject(node.partition_id, unfit, during="the second pass")
                continue
            self.report.bytes_up += sum(tensor.nbytes for tensor in extra.values())
            found.append(self._estimates(extra))
        if not found:
            raise IncompleteError(
                f"Round {self.report.server_round}: none of the {len(nodes)} clients answered in HBN's second pass "
                "(query.measure), so that the new weights have no moments. fednorm's own clients do."
            )
        return found

    def _estimates(self, extra: Mapping[str, Tensor]) -> dict[str, Estimate]:
        samples = max(0.0, float(extra[SAMPLES]))
        return {path: Estimate(samples, extra[f"{path}.{MEAN}"], extra[f"{path}.{VAR}"].clamp(min=0))
                for path in self._layers}  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """Return (M, V)."""
        return {f"moments/{key}": tensor for key, tensor in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take (M, V) back."""
        if odd := sorted({f"moments/{key}" for key in self._moments} ^ set(state)):
            raise ConfigError(f"The checkpoint's moments do not fit HBN: {', '.join(odd[:5])}.")
        self._moments = {key: state[f"moments/{key}"] for key in self._moments}


SPEC = StrategySpec(
    name="hbn",
    summary="Batch norm by moments mixed of a batch's and all clients', which a second pass over them estimates.",
    citation=Citation(
        title="Hybrid Batch Normalisation: Resolving the Dilemma of Batch Normalisation in Federated Learning",
        authors="Chen, Xu, Wu, Kittler",
        year=2025,
        arxiv="2505.21877",
        where="Algorithm 1; official code Hongyao-Chen/HybridBN, FedBaseline/models/FedHBN",
    ),
    make=HBN,
    defaults={"norm": {"name": "hybrid_bn"}},
    personalised=True,
    deviations=(
        "The second pass for evaluation is made in every round; the official code makes it where it evaluates.",
        "A client whose reply cannot be used in the second pass is left out of the moments alone.",
    ),
    verified=("golden trace hybridbn_merge of Hongyao-Chen/HybridBN: the merge, and through the strategy itself.",),
)
