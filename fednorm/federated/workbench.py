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
from fednorm.data.normalize import normalized
from fednorm.federated.wire import pack, unpack
from fednorm.footprint import require_footprint
from fednorm.memory import require_memory
from fednorm.plan import NormPlan
from fednorm.roles import LEARNED, STATISTICS, Role
from fednorm.spec import Norm
from fednorm.training.trainee import Trainee

if TYPE_CHECKING:
    from fednorm.federated.strategy import NormStrategy

LOCAL_RECORD = "fednorm.local"
"""The record of a client's ``Context.state`` that holds its local tensors."""

TRAINEE_RECORD = "fednorm.trainee"
"""The record of a client's ``Context.state`` that holds what its optimizer and effects remember between rounds."""


class Workbench:
    """The data, the model and the strategy of a run, in this process.

    Attributes:
        config: The run's configuration.
        federation: Every client's data.
        norm: The normalization method with its options.
        model: The one model; whose tensors it holds changes with every turn.
        strategy: The run's strategy.
        plan: The strategy's norm plan.
        trainee: What trains: the model, its optimizer, the effects around an update.
        schedule: Of the learning rate, over the rounds.
    """

    def __init__(self, config: RunConfig, federation: Federation | None = None) -> None:
        """Load the data (unless given) and build the model and the strategy.

        Raises:
            FedNormError: Something in the configuration does not fit the rest.
        """
        self.config = config
        input_size = config.model.card.input_size
        data = federation or load_federation(config.data, image_size=input_size, seed=config.seed)
        self.federation = normalized(data, config.data.normalize)
        self.norm: Norm = config.norm.card.made(config.norm.options)
        self._require_memory()
        self.trainee = Trainee(
            config, self.norm, num_classes=self.federation.num_classes, image_size=self.federation.image_size
        )
        self.model: nn.Module = self.trainee.model
        self.schedule = self.trainee.schedule(config.rounds.num_rounds)
        limit = config.rounds.max_update_norm
        self.strategy: NormStrategy = config.strategy.card.made(
            self.model,
            config.strategy.options,
            **({"max_update_norm": limit} if limit else {}),  # a stranger's strategy may not know it
            fraction=config.rounds.fraction,
            weighting=config.rounds.weighting,
            seed=config.seed,
            min_nodes=len(self.federation.clients),
        )
        self.plan: NormPlan = self.strategy.plan
        self._state: dict[str, Tensor] = self.model.state_dict(keep_vars=False)
        self._initial = {key: tensor.clone() for key, tensor in self._state.items() if key not in self.plan.sent}
        self._learned = tuple(
            parameter
            for key, parameter in self.model.named_parameters()
            if self.plan.by_key[key].role is Role.SHARED and self.plan.by_key[key].kind in LEARNED
        )
        clients = self.federation.training_clients
        self.trainee.require_batches(
            (f"Client {client.partition_id} (domain {client.domain!r})", len(client.train)) for client in clients
        )
        self._require_memory_of_clients()

    def _require_memory(self) -> None:
        """Refuse a model or a batch that this machine cannot hold, before it is allocated."""
        clients = self.federation.clients
        require_footprint(
            self.config,
            self.norm,
            num_classes=self.federation.num_classes,
            image_size=self.federation.image_size,
            copies=5 + bool(self.config.train.momentum),  # gradients, the initial, the server's, the average's
            train_images=max((len(client.train) for client in clients), default=0),
            test_images=max((len(client.test) for client in clients), default=0),
        )

    def _require_memory_of_clients(self) -> None:
        """Refuse more clients than this machine can hold the local tensors of."""
        count, each = len(self.federation.training_clients), self.plan.bytes_by_role()[Role.LOCAL.value]
        require_memory(
            count * each,
            f"The local tensors of {count:,} clients",
            "Lower data.clients_per_domain or model.width, or take a strategy that keeps less on its clients.",
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

    def begin_turn(self, state: RecordDict) -> None:
        """Let the trainee go on from what it remembered after the client's last round; by default it begins anew."""
        self.trainee.begin_turn(unpack(state.array_records[TRAINEE_RECORD]) if TRAINEE_RECORD in state else {})

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
        if remembered := self.trainee.end_turn():
            state[TRAINEE_RECORD] = pack(remembered)


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
