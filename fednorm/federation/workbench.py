"""What a process needs to act as any client of a run: the data, one model, the plan, the strategy.

Made once a process and configuration; clients take turns on the one model. Nothing a client leaves in it reaches the
next: every turn begins by writing every entry of the state dict.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fednorm import device as devices
from fednorm.allocation import keep_large_blocks
from fednorm.config import RunConfig, resolve
from fednorm.data import load_federation
from fednorm.data.domain import Client, Federation, pooled
from fednorm.data.moving import moved
from fednorm.data.normalize import normalized
from fednorm.errors import ConfigError
from fednorm.federation.contexts import AT_ONCE, SMALL
from fednorm.federation.contexts import LOCAL_RECORD as LOCAL_RECORD
from fednorm.federation.contexts import STATE_RECORD as STATE_RECORD
from fednorm.federation.contexts import TRAINEE_RECORD as TRAINEE_RECORD
from fednorm.federation.flat import FlatCopy
from fednorm.federation.local import Turn, held
from fednorm.federation.plan import NormPlan
from fednorm.federation.replies import EXTRA
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.federation.untouched import Untouched
from fednorm.federation.wire import FlatRecord, arrays_of, config_of, pack, unpack
from fednorm.memory import require_memory
from fednorm.roles import LEARNED, STATISTICS, Role
from fednorm.spec import Norm
from fednorm.training.footprint import require_footprint
from fednorm.training.trainee import Trainee

if TYPE_CHECKING:
    from fednorm.federation.central import Central
    from fednorm.federation.cohort.engine import Engine
    from fednorm.federation.deployment.kept import Keeping
    from fednorm.federation.deployment.roster import Roster


CLIENTS = "flower-clients"
"""The folder of a record in which clients of Flower's own simulation keep their state while a run is not finished."""

DEPLOYMENT = "deployment"
"""What a run's configuration says as ``runtime`` where its nodes are real: each a site with its own data."""


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
        untouched: Whether the model still is what clients were evaluated on.
        trainee: What trains: the model, its optimizer, the effects around an update.
        schedule: Of the learning rate, over the rounds.
        engine: What carries out its clients' turns, once that is decided.
        lends: Whether a client's turn may return the model's own tensors, which a worker lays into shared memory.
    """

    lends = False
    roster: Roster | None = None
    """Who the nodes are, in a deployed run."""
    keeping: Keeping | None = None
    """How clients keep their state where their processes end before the run does, and no node of theirs does it."""
    central: Central | None = None
    """The images of the server's own, on the server, where it has any."""

    def __init__(self, config: RunConfig, federation: Federation | None = None) -> None:
        """Load the data (unless given) and build the model and the strategy.

        Raises:
            FedNormError: Something in the configuration does not fit the rest.
        """
        self.config = config
        self.engine: Engine | None = None
        self._shared_arrays: tuple[ArrayRecord, Mapping[str, Tensor]] | None = None
        devices.device_of(config)  # before data are read
        self.federation = self._loaded(federation)
        self.norm: Norm = self._made_norm()
        self._require_memory()
        self.trainee = Trainee(
            config, self.norm, num_classes=self.federation.num_classes, image_size=self.federation.image_size
        )
        self._move_data(self.trainee.device)
        self.about_model, self.model = self.trainee.about_model, self.trainee.model
        self.schedule = self.trainee.schedule(self.num_rounds)
        common = Common(
            fraction=config.rounds.fraction,
            weighting=config.rounds.weighting,
            seed=config.seed,
            min_nodes=len(self.federation.clients),
        )
        if limit := config.rounds.max_update_norm:  # a stranger's strategy may not know it
            common["max_update_norm"] = limit
        if frozen := self.trainee.trainable.frozen:
            common["frozen"] = frozen
        # The server is on the CPU, wherever its clients are, and so is what a strategy keeps of the model.
        away = self.trainee.device.type != "cpu"
        model = copy.deepcopy(self.model).cpu() if away else self.model
        self.strategy: NormStrategy = config.strategy.card.made(model, config.strategy.options, **common)
        self.strategy.num_rounds, self.strategy.num_experiences = self.num_rounds, self.num_experiences
        self.plan: NormPlan = self.strategy.plan
        self._state: dict[str, Tensor] = self.model.state_dict(keep_vars=False)
        self.untouched = Untouched(self.model, self._state.values())
        self._initial = {key: tensor.clone() for key, tensor in self._state.items() if key not in self.plan.sent}
        self._learned = {
            key: parameter
            for key, parameter in self.model.named_parameters()
            if self.plan.by_key[key].role is Role.SHARED and self.plan.by_key[key].kind in LEARNED
        }
        self.strategy.local(self.strategy).check(self.trainee)
        if self.private:
            from fednorm.federation.privacy import check_private  # the one run that needs it has an extra installed

            check_private(self)
        counts = self.federation.counts
        self._require_phases()
        self.trainee.require_batches(
            (f"Client {pid} (domain {counts.domains[counts.domain[pid]]!r})", int(counts.train[pid]))
            for pid in counts.trains.nonzero()[0].tolist()
        )
        self._require_memory_of_clients()

    # What a site has in another way ----------------------------------------------------------------------------------

    def before(self, kind: str, content: RecordDict, context: Context) -> None:
        """Prepare for what a client is asked, before anything of it is carried out."""
        if self.keeping:
            self.keeping.before(kind, content, context.state)

    def after(self, kind: str, content: RecordDict, reply: RecordDict, context: Context) -> None:
        """Do what is left when a client has carried out what it was asked."""
        if self.keeping:
            self.keeping.after(kind, content, reply, context.state)

    def failed(self, kind: str, content: RecordDict, error: Exception) -> None:
        """Do what is left when a client could not carry out what it was asked, and an error goes back."""

    def about_node(self) -> dict[str, str | int | bool]:
        """Return what a client says of itself besides, where nobody knows it from elsewhere."""
        return {}

    # What another kind of federation has in another way --------------------------------------------------------------

    trains_on_all = True
    """Whether a client trains on all of its training images in every round."""

    @property
    def num_rounds(self) -> int:
        """Return how many rounds the run has."""
        return self.config.rounds.num_rounds

    @property
    def num_experiences(self) -> int:
        """Return how many experiences the rounds are dealt to, as many to each."""
        return 1

    @property
    def evaluate_every(self) -> int:
        """Return how many rounds there are between two evaluations."""
        return self.config.rounds.evaluate_every

    def takes_part(self, partition_id: int, server_round: int) -> bool:
        """Return whether a client that trains at all may be sampled in a round."""
        del partition_id, server_round
        return True

    def about(self) -> dict[str, Any]:
        """Return what the record says of the run besides."""
        return {}

    def cross_boundary(self, content: RecordDict, context: Context) -> RecordDict:
        """Answer what says that an experience has ended; there are none here."""
        del content, context
        raise ConfigError("This federation has no experiences, and so no boundary between two.")

    def after_round(self, grid: Grid, server_round: int, arrays: ArrayRecord) -> dict[str, Any]:
        """Do what the server does when a round has ended, and return what its line says of it."""
        del grid, server_round, arrays
        return {}

    def measures(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the result says besides, from the lines of all rounds; ``final`` joins the run's own."""
        if not self.private:
            return {}
        from fednorm.federation.privacy import spent

        return {"privacy": spent(self.config.train, self.federation.counts, lines)}

    @property
    def private(self) -> bool:
        """Whether clients train with differential privacy."""
        return self.config.kind == "federated" and self.config.train.private_noise > 0

    def _loaded(self, given: Federation | None) -> Federation:
        """Return who holds what, scaled."""
        config = self.config
        input_size = config.model.card.input_size
        if config.strategy.card.needs_experiences:
            raise ConfigError(
                f"Strategy {config.strategy.name} is about what comes between two experiences, and this federation has "
                "none: it would be FedAvg. Let clients learn on streams (--scenario split_digits), or take strategy "
                "fedavg."
            )
        loaded = given or load_federation(config.data, image_size=input_size, seed=config.seed)
        if config.strategy.card.pooled and config.data.normalize == "domain":
            raise ConfigError(
                f"strategy {config.strategy.name} trains on the images of all domains at once, and data.normalize is "
                "'domain', which scales each domain's in its own way. Take 'global'."
            )
        if config.strategy.card.own_scaling and config.data.normalize != "half":
            raise ConfigError(
                f"strategy {config.strategy.name} scales each client's images by statistics of its own, and "
                f"data.normalize is {config.data.normalize!r}. Leave data.normalize out."
            )
        scaled = normalized(loaded, "client" if config.strategy.card.own_scaling else config.data.normalize)
        return pooled(scaled) if config.strategy.card.pooled else scaled

    def _made_norm(self) -> Norm:
        return self.config.norm.card.made(self.config.norm.options)

    def _made_turn(self, **parts: Any) -> Turn:
        return Turn(**parts)

    def _move_data(self, device: torch.device) -> None:
        self.federation = moved(self.federation, device)

    # -----------------------------------------------------------------------------------------------------------------

    def _require_memory(self) -> None:
        """Refuse a model or a batch that this machine cannot hold, before it is allocated."""
        counts = self.federation.counts
        require_footprint(
            self.config,
            self.norm,
            num_classes=self.federation.num_classes,
            image_size=self.federation.image_size,
            copies=5 + bool(self.config.train.momentum),  # gradients, the initial, the server's, the average's
            train_images=int(counts.train.max(initial=0)),
            test_images=int(counts.test.max(initial=0)),
        )

    def _require_phases(self) -> None:
        """Refuse a strategy whose clients train nothing of what the run trains, or nothing while the head is probed."""
        train, trainable, training = (
            self.config.train,
            self.trainee.trainable,
            self.federation.counts.trains.nonzero()[0],
        )
        if (train.trainable == "all" and not train.linear_probe_rounds) or not len(training):
            return
        if train.linear_probe_rounds >= self.config.rounds.num_rounds:
            raise ConfigError(
                f"train.linear_probe_rounds, the first rounds, in which the head alone is trained, must be less than "
                f"rounds.num_rounds; got {train.linear_probe_rounds} of {self.config.rounds.num_rounds}. A probe "
                "without fine-tuning is train.trainable = 'head'."
            )
        phases = self.strategy.local(self.strategy).phases(self.turn(self.federation.clients[int(training[0])], 1))
        for key, keys in (
            ("trainable", trainable.learned),
            *([("linear_probe_rounds", trainable.learned & trainable.head)] if train.linear_probe_rounds else []),
        ):
            if not any(phase.parameters is None or phase.parameters & keys for phase in phases):
                raise ConfigError(
                    f"Clients of strategy {self.config.strategy.name} train none of the tensors that train.{key} = "
                    f"{getattr(train, key)!r} trains. Train others too, or take strategy 'fedavg'."
                )

    def _require_memory_of_clients(self) -> None:
        """Refuse more clients than this machine can hold the local tensors of; of many it holds a few at a time."""
        count, each = int(self.federation.counts.trains.sum()), self.plan.bytes_by_role()[Role.LOCAL.value]
        count = count if len(self.federation.clients) <= SMALL else AT_ONCE
        each += self.strategy.local(self.strategy).state_bytes(self.plan)
        require_memory(
            2 * count * each,  # and those before the last training, to which a rejected client goes back
            f"The local tensors of {count:,} clients",
            "Lower data.clients_per_domain or model.width, or take a strategy that keeps less on its clients.",
        )

    def client(self, context: Context) -> Client:
        """Return the client that a node's context stands for."""
        clients, number = self.federation.clients, context.node_config.get("partition-id")
        if number is None:
            raise ConfigError(
                "This node's configuration says neither which data it has nor which client it is. Start it with "
                "--node-config 'domain=\"NAME\" data-dir=\"/its/own/folder\"' (a site), or 'partition-id=0' (a client "
                "of the run's benchmark, numbered from 0)."
            )
        if not str(number).isdecimal() or int(number) >= len(clients):
            raise ConfigError(
                f"This node's configuration has partition-id={number}, and the run has the clients 0 to "
                f"{len(clients) - 1}."
            )
        return clients[int(number)]

    def turn(
        self,
        client: Client,
        server_round: int,
        content: RecordDict | None = None,
        context: Context | None = None,
        *,
        evaluating: bool = False,
    ) -> Turn:
        """Return a client's turn at the model, which holds its tensors already.

        Args:
            client: The client.
            server_round: The round.
            content: What the server sent; None for what the strategy would send besides its tensors.
            context: Where the client's state is; None for none.
            evaluating: Whether it is an evaluation and no training: its random streams are the same in every round.
        """
        sent, state = content or RecordDict(), context.state if context else RecordDict()
        own = unpack(arrays_of(state, STATE_RECORD)) if STATE_RECORD in state else {}
        beside = unpack(arrays_of(sent, EXTRA)) if EXTRA in sent else {}
        if content is None:
            beside = dict(self.strategy.extra_to_send())
        of_round = ("evaluation",) if evaluating else ("round", server_round)
        return self._made_turn(
            trainee=self.trainee,
            client=client,
            plan=self.plan,
            server_round=server_round,
            rate=self.schedule.at(max(server_round, 1) - 1, 0, 1),  # some evaluations, and a trial, are of no round
            tensors=self._state,
            shared=self._learned,
            names=("client", client.partition_id, *of_round),
            received=dict(self._unpacked(arrays_of(sent, "arrays"))) if "arrays" in sent else {},
            extra=held(beside, "A strategy sends"),
            config=dict(config_of(sent) if "config" in sent else self.strategy.client_config()),
            state=held(own, "A client keeps"),
        )

    @property
    def initial(self) -> Mapping[str, Tensor]:
        """The initial values of the tensors that the server does not send, by key; not to be written to."""
        return self._initial

    @property
    def learned(self) -> Collection[str]:
        """The keys of the learned parameters that are shared: those that a term of a federated method acts on."""
        return self._learned.keys()

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
            Whether every local running statistic came from the message or the client's state; False for a client that
            has never trained.
        """
        sent = self._unpacked(arrays)
        own = unpack(arrays_of(state, LOCAL_RECORD)) if LOCAL_RECORD in state else {}
        if not self.untouched.ask(arrays, alone=not own):
            self.write(received(self.plan, sent, own, self._initial))
        return all(key in sent or key in own for key in self.plan.local if self.plan.by_key[key].kind in STATISTICS)

    def _unpacked(self, arrays: ArrayRecord) -> Mapping[str, Tensor]:
        """Return what the server sent, which the clients of a round share; not to be written to."""
        if self._shared_arrays is None or self._shared_arrays[0] is not arrays:
            self._shared_arrays = arrays, unpack(arrays)
        return self._shared_arrays[1]

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the model.

        Raises:
            KeyError: An entry of the state dict is missing; that is our own mistake.
        """
        torch._foreach_copy_(list(self._state.values()), [tensors[key] for key in self._state])

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of some of the model's tensors, on the CPU; its own, where the workbench :attr:`lends` them."""
        return {key: self._state[key].to("cpu", copy=not self.lends) for key in keys}

    def read_sent(self) -> ArrayRecord:
        """Return what a client sends of the model: of a small one, copied into one vector, which is averaged whole."""
        if not self.lends and self._copy_sent:
            return FlatRecord(self._copy_sent())
        return pack(self.read(self.plan.sent))

    @cached_property
    def _copy_sent(self) -> FlatCopy | None:
        """What copies what clients send of a small model."""
        return FlatCopy.of({key: self._state[key] for key in self.plan.sent})

    def begin_turn(self, state: RecordDict) -> None:
        """Let the trainee go on from what it remembered after the client's last round; by default it begins anew."""
        self.trainee.begin_turn(unpack(arrays_of(state, TRAINEE_RECORD)) if TRAINEE_RECORD in state else {})

    def keep_local(self, state: RecordDict, own: Mapping[str, Tensor] | None = None) -> None:
        """Store the model's local tensors in a client's ``Context.state``; without any, a client keeps nothing.

        Tensors of a training that diverged are not kept: the server rejects its update, and the client's next round
        starts from what it had before.

        Args:
            state: The client's ``Context.state``.
            own: What the strategy's client side keeps under names of its own.
        """
        kept, own = self.read(self.plan.local), held(own or {}, "turn.state keeps")
        floats = [tensor for tensor in (*kept.values(), *own.values()) if tensor.is_floating_point()]
        if floats and not torch.stack(torch._foreach_norm(floats, math.inf)).isfinite().all():
            return
        if kept:
            state[LOCAL_RECORD] = pack(kept)
        if own or STATE_RECORD in state:
            state[STATE_RECORD] = pack(own)
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


def workbench_of(config: RunConfig) -> Workbench:
    """Return the workbench of a run of either kind of federation.

    Raises:
        FedNormError: Something in the configuration does not fit the rest.
    """
    if config.kind == "federated":
        return Workbench(config)
    from fednorm.federated_continual.workbench import GridWorkbench  # it descends from the one here

    return GridWorkbench(config)


BenchSource = Callable[[Context], Workbench]
"""How an app finds the workbench of the run that a context belongs to."""


@lru_cache(maxsize=2)
def _workbench(config: str, clients: str) -> Workbench:
    bench = workbench_of(resolve(json.loads(config or "{}")))
    if clients:
        from fednorm.federation.deployment.simulation import keeping_in  # it imports what is here

        bench.keeping = keeping_in(clients)
    torch.set_num_threads(bench.config.threads)  # Flower's processes are ours alone
    keep_large_blocks()
    return bench


def process_workbench(context: Context) -> Workbench:
    """Return this process's workbench for a run of Flower's runtimes, made at the first call.

    A node that is configured by its data, or belongs to a deployed run, has a site's, which holds its own data alone.

    Raises:
        FedNormError: The configuration of the run or of the node does not fit.
    """
    if "domain" in context.node_config or context.run_config.get("runtime") == DEPLOYMENT:
        from fednorm.federation.deployment.site import site_workbench  # it descends from the one here

        return site_workbench(context)
    return _workbench(str(context.run_config.get("config", "")), str(context.run_config.get("clients", "")))
