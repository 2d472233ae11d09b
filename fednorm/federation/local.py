"""``Local``: what a strategy adds to a client's training, in the strategy's own file.

A strategy class names its client side, ``local = MyLocal``; every turn of a client makes one anew, of the strategy:

    class Damped(Local):
        def begin(self, turn):                       # the server's tensors are in the model
            self.anchors = {key: p.detach().clone() for key, p in turn.shared.items()}

        def adjust(self, turn):                      # gradients are there, the update is not yet done
            for key, parameter in turn.shared.items():
                parameter.grad.add_(parameter.detach() - self.anchors[key], alpha=self.strategy.mu)

    class MyStrategy(NormStrategy):
        local = Damped

        def __init__(self, model, *, mu: float = 0.1, **common):
            self.mu = mu
            super().__init__(model, **common)

What a client is to remember until its next turn goes into ``turn.state``, named tensors that live in the client's
``Context.state`` and in every checkpoint, and never leave it. What it sends besides the tensors of the plan is what
:meth:`Local.end` returns, which the strategy has declared (``NormStrategy.extra_expected``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fednorm.data.domain import Client
from fednorm.errors import ConfigError
from fednorm.federation.plan import NormPlan
from fednorm.rng import stream_seed, torch_seeded, torch_stream
from fednorm.training.loop import Tally, batches_of
from fednorm.training.step import TrainingStep

if TYPE_CHECKING:
    from fednorm.config import TrainConfig
    from fednorm.training.trainee import Trainee

Effect = Callable[[], None]


@dataclass(frozen=True)
class Phase:
    """A part of a client's training.

    Attributes:
        parameters: Keys of the parameters that are trained; None for all. The others get no gradient, and running
            statistics move in every phase.
        epochs: Passes over the client's images; None for as many as the run's ``train`` section says.
        steps: Updates, in place of epochs; None for as many as the run's ``train`` section says.
    """

    parameters: frozenset[str] | None = None
    epochs: float | None = None
    steps: int | None = None

    def batches(self, train: TrainConfig, a_pass: int) -> int:
        """Return how many batches the phase draws, of which one pass over the images has ``a_pass``."""
        if self.epochs is None:
            steps = train.local_steps if self.steps is None else self.steps
            return steps or max(1, round(train.local_epochs * a_pass))
        return max(1, round(self.epochs * a_pass)) if self.epochs else 0


@dataclass(frozen=True)
class Passes:
    """What a strategy's client side adds to the training of a run's ``train`` section, for an estimate of its time.

    Attributes:
        in_round: Passes over a client's images in each round.
        before_evaluation: Passes over them before each evaluation.
        measured: Images of a client that go through the network untrained in each round.
        between: Images that the server trains on between two experiences, each time counted.
    """

    in_round: float = 0.0
    before_evaluation: float = 0.0
    measured: int = 0
    between: int = 0


@dataclass
class Turn:
    """One client's turn at the workbench's model: what its :class:`Local` may see and change.

    Attributes:
        trainee: What trains; ``trainee.model`` holds the client's tensors.
        client: Whose turn it is, with its images.
        plan: What the federation does with each tensor.
        server_round: The round, from 1.
        rate: The learning rate of this round.
        tensors: The model's state dict itself; :meth:`read` gives copies.
        shared: The learned parameters that are shared, by key: those a term of a federated method acts on.
        names: Of the turn's random streams.
        received: The tensors that the server sent, not to be written to.
        extra: What the strategy sent besides (``extra_to_send``).
        config: The message's settings, ``client_config`` among them.
        state: The client's named tensors, to be changed at will; kept after training, dropped after an evaluation.
        reply: What :meth:`Local.end` gave to be sent.
        steps: Updates so far, those of :meth:`train_aside` not counted.
    """

    trainee: Trainee
    client: Client
    plan: NormPlan
    server_round: int
    rate: float
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    names: tuple[str | int, ...]
    received: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    reply: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.trainee.model

    @property
    def probing(self) -> bool:
        """Whether this is one of the first rounds, in which the head alone is trained."""
        return self.server_round <= self.trainee.config.train.linear_probe_rounds

    def task_numbers(self) -> list[int]:
        """Return the experience of each task that the client has seen; empty where nobody tells tasks apart."""
        return []

    def read(self) -> dict[str, Tensor]:
        """Return a copy of every tensor of the model."""
        return {key: tensor.clone() for key, tensor in self.tensors.items()}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the model; those that are not given stay as they are."""
        for key, tensor in tensors.items():
            self.tensors[key].copy_(tensor)

    def fit(self, local: Local) -> dict[str, float]:
        """Train as a strategy's client does.

        Returns:
            The mean ``loss`` and ``accuracy`` over the training images as they were seen.
        """
        trainee, seed = self.trainee, self.trainee.config.seed
        trainee.set_rate(self.rate)
        local.begin(self)
        batches = _Batches(self, self.names)
        step = self._step(local, lambda: local.adjust(self), private=trainee.config.train.private_noise > 0)
        with trainee.trainable.stage(self.probing), torch_seeded(seed, *self.names, "model"):
            for phase in local.phases(self):
                if phase.parameters is not None and not phase.parameters & trainee.trainable.active:
                    continue  # of two phases, the one whose tensors are frozen
                with _only(trainee.model, phase.parameters):
                    self.steps += batches.train(step, phase)
        trainee.optimizer.zero_grad(set_to_none=True)
        self.reply = held(local.end(self), "Local.end sends")
        return batches.tally.means()

    def train_aside(self, local: Local, name: str, phase: Phase, adjust: Effect | None = None) -> None:
        """Train the tensors that are in the model now, beside the turn's own training.

        The optimizer and what counts updates begin anew, and are put back. Random streams are the turn's, and of
        ``name``.

        Args:
            local: Whose loss is used; its ``adjust`` is not.
            name: What the training is for, e.g. ``finetune``.
            phase: Which parameters are trained, and for how long.
            adjust: Called between backward and update.
        """
        trainee, seed, names = self.trainee, self.trainee.config.seed, (*self.names, name)
        kept = trainee.end_turn()
        trainee.begin_turn({})
        trainee.set_rate(self.rate)
        batches = _Batches(self, names)
        step = self._step(local, adjust)
        trainee.trainable.train_mode()
        try:
            with torch_seeded(seed, *names, "model"), _only(trainee.model, phase.parameters):
                batches.train(step, phase)
        finally:
            trainee.optimizer.zero_grad(set_to_none=True)
            trainee.begin_turn(kept)

    def _step(self, local: Local, adjust: Effect | None, *, private: bool = False) -> TrainingStep:
        trainee = self.trainee
        effects: dict[str, Any] = {
            "adjust": [*([adjust] if adjust else []), *trainee.adjust],
            "after": trainee.after,
            "loss": lambda logits, labels: local.loss(self, logits, labels),
        }
        if not private:
            return TrainingStep(trainee.model, trainee.optimizer, hooked=trainee.hooked, **effects)
        from fednorm.training.private import PrivateStep  # the one run that needs it has an extra installed

        noise = torch.Generator(trainee.device).manual_seed(stream_seed(trainee.config.seed, *self.names, "private"))
        return PrivateStep(trainee, len(self.client.train), noise, **effects)


class StackedLocal:
    """What a strategy's clients do to their gradients, for K clients at once: tensors have an axis of them in front."""

    def __init__(self, strategy: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Begin a round's training.

        Args:
            strategy: The strategy, for its options.
            config: The message's settings.
            tensors: The learned parameters that are shared, by key, shape (K, ...), as the server sent them; not to be
                written to, and changed by the training.
        """

    def adjust(self, tensors: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Change gradients in place; those of parameters that are not trained now are not there.

        Args:
            tensors: The parameters, by key, shape (K, ...).
            gradients: Likewise.
        """


class Local:
    """What a strategy adds to a client's training; the base adds nothing, as FedAvg's clients do.

    Attributes:
        strategy: The strategy, for its options. The client's process has a strategy of its own, of the same
            configuration: what the server's changes from round to round travels, or is not known here.
        stacked: What makes of the strategy what ``begin`` and ``adjust`` do for several clients at once
            (:class:`StackedLocal`); None where nothing does, and for a class that has its own ``begin``, ``loss``,
            ``adjust`` or ``end`` below the class that says this.
    """

    stacked: ClassVar[type[StackedLocal] | None] = None

    def __init__(self, strategy: Any) -> None:
        """Make the client side of one turn."""
        self.strategy = strategy

    @classmethod
    def passes(cls, options: Mapping[str, Any]) -> Passes:
        """Return what it adds to a run's training, by the strategy's options; by default nothing."""
        del options
        return Passes()

    def check(self, trainee: Trainee) -> None:
        """Raise a ConfigError if the method's formula does not hold for this training; asked once, before a run."""

    def state_bytes(self, plan: NormPlan) -> int:
        """Return about how many bytes of ``turn.state`` a client keeps, to refuse what a machine cannot hold."""
        del plan
        return 0

    def begin(self, turn: Turn) -> None:
        """Called before the training; the model holds what the server sent and what the client keeps."""

    def loss(self, turn: Turn, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a batch's loss, a scalar, for logits of shape (B, K) and labels of shape (B,)."""
        return turn.trainee.loss(logits, labels)

    def criterion(self, turn: Turn, classes: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return what takes the cross-entropy's place in what a client learns on a stream; None for the run's own.

        Asked after :meth:`begin`, where there are experiences; elsewhere there is :meth:`loss`.

        Args:
            turn: The client's.
            classes: Those that the experience is about.
        """
        del turn, classes
        return None

    def adjust(self, turn: Turn) -> None:
        """Called between backward pass and update, before any clipping; may change the gradients in place."""

    def phases(self, turn: Turn) -> Sequence[Phase]:
        """Return the parts of the training, in order: by default one, of every parameter."""
        del turn
        return (Phase(),)

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Called after the training; what the model holds then is sent.

        Returns:
            What is sent besides, as ``extra_expected`` of the strategy declares it; by default nothing.
        """
        del turn
        return {}

    def measure(self, turn: Turn) -> Mapping[str, Tensor]:
        """Called where the strategy asks between rounds (``query.measure``); the model holds what the server sent.

        Returns:
            What is sent, as ``extra_expected`` of the strategy declares it. Nothing that is changed here is kept.
        """
        del turn
        return {}

    def before_evaluation(self, turn: Turn) -> None:
        """Called before a client of the federation is evaluated as it is; may change the model, and keeps nothing.

        An evaluation under given or re-estimated statistics, or of a client that was held out, does not ask.
        """


def held(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return copies of tensors, which may be the model's own and would be the next client's otherwise.

    Raises:
        ConfigError: Something is no tensor.
    """
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{what} tensors, and {key!r} is a {type(value).__name__}; wrap it: torch.tensor(value).")
    return {str(key): tensor.detach().clone() for key, tensor in tensors.items()}


def learned_keys(turn: Turn) -> frozenset[str]:
    """Return the keys of the model's parameters."""
    return frozenset(key for key, _ in turn.model.named_parameters())


class _Batches:
    """A turn's batches, drawn from the random streams of some names, and what was seen of them."""

    def __init__(self, turn: Turn, names: tuple[str | int, ...]) -> None:
        trainee = turn.trainee
        self._turn, self._generator = turn, torch_stream(trainee.config.seed, *names, "batches")
        # A stream that nothing is drawn from takes as long to make as any.
        self._augmenting = torch_stream(trainee.config.seed, *names, "augment") if trainee.augmentation else None
        self.tally = Tally(trainee.device)

    def train(self, step: TrainingStep, phase: Phase) -> int:
        """Train on a phase's batches; return the number of updates."""
        augment, split, updates = self._turn.trainee.augmentation, self._turn.client.train, 0
        for rows in self._rows(phase):
            images, labels = split.batch(rows)
            if self._augmenting is not None and len(rows):  # in private training a batch may be empty
                images = augment(images, self._augmenting)
            loss, logits = step(split.scaling(images), labels)
            self.tally.add(loss, (logits.argmax(1) == labels).sum(), len(rows))
            updates += 1
        return updates

    def _rows(self, phase: Phase) -> Iterator[Tensor]:
        trainee, count = self._turn.trainee, len(self._turn.client.train)
        train, single = trainee.config.train, not trainee.batch_coupled
        if train.private_noise:
            return drawn_rows(self._generator, count, train, phase)
        return rows_of_phase(self._generator, count, train, phase, single=single)


def rows_of_phase(
    generator: torch.Generator, count: int, train: TrainConfig, phase: Phase, *, single: bool
) -> Iterator[Tensor]:
    """Yield the rows of a phase's batches; a part of a pass is made of whole batches, one at least.

    Args:
        generator: Of the turn's stream of batches; a pass draws one permutation.
        count: The client's training images.
        train: Section ``train`` of the run.
        phase: The phase.
        single: Whether a batch of one image is trained on; else it is left out.
    """
    size = train.batch_size
    wanted = phase.batches(train, -(-count // size)) if count else 0
    while wanted > 0:
        order = torch.randperm(count, generator=generator)
        for rows in islice(batches_of(order, size, single=single), wanted):
            if len(rows):
                yield rows
        wanted -= -(-count // size)


def rate_of(train: TrainConfig, count: int) -> float:
    """Return the probability with which a private step draws an image of a client that has ``count``."""
    return min(1.0, train.batch_size / count) if count else 0.0


def drawn_rows(generator: torch.Generator, count: int, train: TrainConfig, phase: Phase) -> Iterator[Tensor]:
    """Yield the rows of a private phase's batches, each image in each with one probability (Poisson sampling)."""
    for _ in range(phase.batches(train, -(-count // train.batch_size)) if count else 0):
        yield (torch.rand(count, generator=generator) < rate_of(train, count)).nonzero().flatten()


@contextmanager
def _only(model: nn.Module, keys: frozenset[str] | None) -> Iterator[None]:
    """Let gradients reach some parameters alone."""
    named = model.named_parameters() if keys is not None else ()
    frozen = [p for key, p in named if keys is not None and key not in keys and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
