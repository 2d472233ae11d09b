"""What a process needs to act as any client of a run: the data, one model, the plan, the strategy.

Made once a process and configuration; clients take turns on the one model. Nothing a client leaves in it reaches the
next: every turn begins by writing every entry of the state dict.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, Context, RecordDict
from torch import Tensor, nn

from fednorm.config import RunConfig, resolve
from fednorm.data import load_federation
from fednorm.data.domain import Client, Federation
from fednorm.errors import ConfigError, DataError
from fednorm.federated.wire import pack, unpack
from fednorm.models import chosen_model, describe_model
from fednorm.norms import spec_of
from fednorm.optim.agc import AdaptiveGradientClipping
from fednorm.plan import NormPlan
from fednorm.roles import LEARNED, STATISTICS, Role
from fednorm.spec import Norm
from fednorm.step import batch_coupled

if TYPE_CHECKING:
    from fednorm.federated.strategy import NormStrategy

LOCAL_RECORD = "fednorm.local"
"""The record of a client's ``Context.state`` that holds its local tensors."""


class Workbench:
    """The data, the model and the strategy of a run, in this process.

    Attributes:
        config: The run's configuration.
        federation: Every client's data.
        norm: The normalization method with its options.
        about_model: What the record says of the model.
        model: The one model; whose tensors it holds changes with every turn.
        strategy: The run's strategy.
        plan: The strategy's norm plan.
        batch_coupled: Whether a batch of one cannot be trained on.
    """

    def __init__(self, config: RunConfig, federation: Federation | None = None) -> None:
        """Load the data (unless given) and build the model and the strategy.

        Raises:
            FedNormError: Something in the configuration does not fit the rest.
        """
        self.config = config
        input_size = config.model.card.input_size
        self.federation = federation or load_federation(config.data, image_size=input_size, seed=config.seed)
        self.norm: Norm = config.norm.card.made(config.norm.options)
        size = (self.federation.num_classes, self.federation.image_size)
        built = chosen_model(config.model, self.norm, *size, config.seed)
        self.about_model = describe_model(config.model, built, *size)
        self.model: nn.Module = built.model.to(
            memory_format=torch.channels_last
        )  # oneDNN's convolutions are a tenth to a third faster in this layout
        self.strategy: NormStrategy = config.strategy.card.made(
            self.model,
            config.strategy.options,
            fraction=config.rounds.fraction,
            weighting=config.rounds.weighting,
            seed=config.seed,
            min_nodes=len(self.federation.clients),
        )
        self.plan: NormPlan = self.strategy.plan
        self.batch_coupled = batch_coupled(self.model, spec_of)
        self._state: dict[str, Tensor] = self.model.state_dict(keep_vars=False)
        self._initial = {key: tensor.clone() for key, tensor in self._state.items() if key not in self.plan.sent}
        self._learned = tuple(
            parameter
            for key, parameter in self.model.named_parameters()
            if self.plan.by_key[key].role is Role.SHARED and self.plan.by_key[key].kind in LEARNED
        )
        self._check_batches()
        self.agc = AdaptiveGradientClipping(self.model, config.train.agc) if config.train.agc else None
        # Made on the initial weights, once: averaging shortens weights, and no round may take that for its measure.
        self.after_update = self.norm.after_update(self.model)

    def _check_batches(self) -> None:
        """Refuse what would leave a batch-coupled layer with a batch of one."""
        if not self.batch_coupled:
            return
        norm = self.config.norm.name
        if self.config.train.batch_size == 1:
            raise ConfigError(
                f"norm {norm!r} estimates a variance from each batch, and train.batch_size is 1. Use a batch size of "
                "at least 2, or a norm that works on single images: group_norm, layer_norm, sws, none."
            )
        for client in self.federation.training_clients:
            if len(client.train) == 1:
                raise DataError(
                    f"Client {client.partition_id} (domain {client.domain!r}) has one training image, and norm "
                    f"{norm!r} needs at least two in a batch. Use fewer clients (data.clients_per_domain), a larger "
                    "data.alpha, or a norm that works on single images: group_norm, layer_norm, sws, none."
                )

    def client(self, context: Context) -> Client:
        """Return the client that a node's context stands for."""
        return self.federation.clients[int(context.node_config["partition-id"])]

    @property
    def shared_parameters(self) -> tuple[Tensor, ...]:
        """Return the learned tensors that are shared: those a proximal term acts on."""
        return self._learned

    @property
    def statistics(self) -> tuple[str, ...]:
        """Return the keys of the running statistics."""
        return tuple(entry.key for entry in self.plan.entries if entry.kind in STATISTICS)

    def receive(self, arrays: ArrayRecord, state: RecordDict) -> bool:
        """Write one client's model, as :func:`received` puts it together.

        Args:
            arrays: What the server sent. It may hold local tensors too: an evaluation under given statistics.
            state: The client's ``Context.state``.

        Returns:
            Whether every local tensor came from the message or the client's state; False for a client that has never
            trained.
        """
        sent = unpack(arrays)
        own = unpack(state.array_records[LOCAL_RECORD]) if LOCAL_RECORD in state.array_records else {}
        self.write(received(self.plan, sent, own, self._initial))
        return all(key in sent or key in own for key in self.plan.local)

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the model.

        Raises:
            KeyError: An entry of the state dict is missing; that is our own mistake.
        """
        targets = list(self._state.values())
        torch._foreach_copy_(targets, [tensors[key] for key in self._state])

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of some of the model's tensors."""
        return {key: self._state[key].clone() for key in keys}

    def keep_local(self, state: RecordDict) -> None:
        """Store the model's local tensors in a client's ``Context.state``; without any, a client keeps nothing.

        Tensors of a training that diverged are not kept: the server rejects its update, and the client's next round
        starts from what it had before.
        """
        kept = self.read(self.plan.local)
        floats = [tensor for tensor in kept.values() if tensor.is_floating_point()]
        if floats and not torch.stack(torch._foreach_norm(floats, math.inf)).isfinite().all():
            return
        if kept:
            state[LOCAL_RECORD] = pack(kept)


def received(
    plan: NormPlan, sent: Mapping[str, Tensor], own: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return one client's whole model: what the server sent, its own tensors, initial values for the rest.

    A client that keeps a batch counter of its own goes on with it, as in FedBN's code, also where the server sends
    one; a client that keeps nothing yet takes the server's.

    Args:
        plan: Which of the tensors are counters.
        sent: What the server sent.
        own: What the client keeps.
        initial: Initial values of the tensors that the server need not send.
    """
    counters = {key: own[key] for key in plan.counters if key in own}
    return {**initial, **own, **sent, **counters}


BenchSource = Callable[[Context], Workbench]
"""How an app finds the workbench of the run that a context belongs to."""


@lru_cache(maxsize=2)
def _workbench(config: str) -> Workbench:
    bench = Workbench(resolve(json.loads(config or "{}")))
    torch.set_num_threads(bench.config.threads)  # Flower's processes are ours alone
    return bench


def process_workbench(context: Context) -> Workbench:
    """Return this process's workbench for a run of Flower's runtimes, made at the first call."""
    return _workbench(str(context.run_config.get("config", "")))
