"""What every learner shares: training on the experiences of a stream, in whole batches, with fednorm's training step.

Batches are cut out of the stream's uint8 arrays and augmented together; the norm is told every sample's task; and
everything that the rest of the training depends on can be taken as plain tensors in the middle of an experience, and
put back. A learner is plain PyTorch; :func:`fednorm.avalanche.strategy_of` makes an Avalanche strategy of any.

Tasks are numbered in the order in which their experiences came first, so that one that comes again is the task that it
was, and the number of tasks seen is counted.

Random numbers are derived from the seed and the number of the step, so that there is no generator to restore.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fednorm.cards import Card
from fednorm.data.augment import Augmentation
from fednorm.data.scaling import HALF, Scaling
from fednorm.device import on_cpu, place_of
from fednorm.norms import spec_of
from fednorm.rng import reseed, stream_seed, torch_seeded, torch_stream
from fednorm.streams.anytime import modes_kept
from fednorm.streams.arguments import require_classes, unexpected
from fednorm.streams.buffer import Samples
from fednorm.streams.passes import BatchChanges, Passes
from fednorm.streams.stream import Experience
from fednorm.training.loop import Tally, batches_of
from fednorm.training.schedule import Schedule
from fednorm.training.step import TrainingStep, batch_coupled

Tensors = dict[str, Tensor]

Effect = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class LearnerOptions:
    """The options of a learner that has none."""

    def batch_ratio(self, batch_size: int) -> int:
        """Return the number of new samples for each memory sample of a batch; 0 for no memory, or no such integer."""
        del batch_size
        return 0


@dataclass(frozen=True, kw_only=True)
class LearnerSpec(Card):
    """The identity card of a learner.

    Attributes:
        make: The :class:`Learner` subclass; the fields of its ``Options`` are the options.
        joint: True where it is given all experiences at once.
    """

    make: type[Learner]
    joint: bool = False

    expects: ClassVar[str] = "A learner is a subclass of Learner, or a LearnerSpec beside it."

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return the card that stands beside a subclass of :class:`Learner`, or one made for it."""
        if not (inspect.isclass(method) and issubclass(method, Learner)):
            return None
        beside = vars(sys.modules[method.__module__]).values()
        own = next((card for card in beside if isinstance(card, cls) and card.make is method), None)
        return own or cls(name=reference, summary=(method.__doc__ or "").strip().partition("\n")[0], make=method)

    @property
    def maker(self) -> type[LearnerOptions]:
        """The record of the learner's options."""
        return self.make.Options

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range."""
        self.made_options(options)

    def made_options(self, options: Mapping[str, Any] | None = None) -> LearnerOptions:
        """Return the record of the learner's options.

        Raises:
            ConfigError: There is no such option, or its value is out of range.
        """
        return self.make.Options(**(options or {}))


@dataclass
class Progress:
    """Where a learner is.

    Attributes:
        step: Batches so far, over all experiences.
        ended: Experiences that have ended.
        begun: Whether one has begun and not ended.
        epoch: Passes over it that are finished.
        batch: Batches of the present pass that are finished.
    """

    step: int = 0
    ended: int = 0
    begun: bool = False
    epoch: int = 0
    batch: int = 0


class Learner(Passes):
    """Trains a network on a stream's experiences, one after another.

    A method overrides :meth:`observe`, and where it remembers something :meth:`begin_experience`,
    :meth:`end_experience`, :meth:`own_tensors` and :meth:`load_own_tensors`.

    Args:
        model: The network.
        optimizer: Of its parameters.
        num_classes: K, the number of the network's outputs.
        options: The method's options; its defaults if None.
        train_mb_size: New samples a step.
        train_epochs: Passes over each experience.
        eval_mb_size: Samples a forward pass without training.
        seed: Of every random stream.
        augment: Names of augmentations, separated by commas (:mod:`fednorm.data.augment`), or an ``Augmentation``.
        scaling: From pixels to what the network is given; of several groups, group k is task k's.
        schedule: Of the learning rate; the optimizer's own, constant, if None.
        begin: Called with the number of every experience that begins, e.g. shrink and perturb.
        adjust: Effects between backward pass and update.
        after: Effects after the update.
        criterion: Takes the cross-entropy's place in every loss: logits and labels to a scalar.
        device: Where the network is; samples are moved there.
        online: Whether those counts are of the ``train`` step's own logits, or of ``eval``: a forward pass in
            evaluation mode before it, on the images without augmentation.

    Attributes:
        met: New samples of the present experience in its first pass, by which online accuracy is measured: in later
            passes they are new no more.
        hits: How many of those the model got right just before it was trained on them, int64.
        tally: What was seen of the present experience's new samples, in all passes so far.
        tasks_seen: The numbers of all experiences so far, each once, in the order in which they came first. A task's
            number is its place here.
        watchers: Called with the learner after every step.
        slow_reading_was_said: Whether its user knows that an experience's samples are read one by one.
        epoch_watchers: Called with the learner before every pass over an experience, or what is left of one.

    Raises:
        ConfigError: An argument is one of an Avalanche strategy's.
        TypeError: There is no such argument.
    """

    Options: ClassVar[type[LearnerOptions]] = LearnerOptions
    trains_at_end: ClassVar[bool] = False
    """Whether it trains the network when an experience has ended, in epochs of its own, and not before."""
    by_cross_entropy: ClassVar[bool] = True
    """Whether the network learns and is used by the softmax over its outputs, so that a task's classes can be alone."""
    _stop_training = False

    def __init__(  # noqa: PLR0913 - by name only
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_classes: int,
        options: LearnerOptions | None = None,
        train_mb_size: int = 32,
        train_epochs: int = 1,
        eval_mb_size: int = 256,
        seed: int = 0,
        augment: str | Augmentation = "none",
        scaling: Scaling = HALF,
        schedule: Schedule | None = None,
        begin: Sequence[Callable[[int], None]] = (),
        adjust: Sequence[Effect] = (),
        after: Sequence[Effect] = (),
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        device: str | torch.device = "cpu",
        online: str = "train",
        **others: Any,
    ) -> None:
        if others:
            raise unexpected(type(self).__name__, others)
        self.model, self.optimizer, self.device = model, optimizer, place_of(model, device)
        self._criterion = criterion or nn.CrossEntropyLoss()
        self.train_mb_size, self.train_epochs, self.eval_mb_size = train_mb_size, train_epochs, eval_mb_size
        self.watchers: list[Callable[[Learner], None]] = []
        self.epoch_watchers: list[Callable[[Learner], None]] = []
        self.options = options or type(self).Options()
        self.num_classes, self.seed, self.scaling = num_classes, seed, scaling
        self.augment = Augmentation.of(augment) if isinstance(augment, str) else augment
        self.schedule, self.begin, self.online = schedule, tuple(begin), online
        self.effects = (*adjust, *after)
        self.step = TrainingStep(
            model, optimizer, adjust=(*adjust, self._backward_done), after=(*after, self._after_update)
        )
        self.progress = Progress()
        self.batch_coupled = batch_coupled(model, spec_of)
        self.source: Experience | None = None
        self.tasks_seen: list[int] = []
        self._task_of_row = torch.empty(0, dtype=torch.int64)
        self._current_task = 0
        self._changes = BatchChanges()
        self.slow_reading_was_said = False
        self.hits, self.met = torch.zeros((), dtype=torch.int64, device=self.device), 0
        self.tally = Tally(self.device)
        self.loss = torch.zeros((), device=self.device)
        self._augmenting = torch.Generator()

    # What a method overrides ------------------------------------------------------------------------------------------

    def observe(self, new: Samples) -> Tensor:
        """Learn from one batch, and return the logits of its samples, shape (n, K), before the update."""
        (logits,) = self.pass_forward(new)
        self.descend(self.loss_of(logits, new))
        return logits

    def begin_experience(self) -> None:
        """Be told that :attr:`source` begins."""

    def end_experience(self) -> None:
        """Be told that :attr:`source` has ended."""

    def train_at_end(self, part: int, parts: int) -> None:
        """Do one of several parts of the training that an experience's end brings; by default there is none."""

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Be told the network's initial tensors, where it has others by now; by default nobody needs them."""

    def own_tensors(self) -> Tensors:
        """Return what the method remembers."""
        return {}

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take back what :meth:`own_tensors` gave."""

    def memory_filled(self) -> float:
        """Return how full the memory is that :meth:`end_experience` takes its time with, above 0; 1 where none does."""
        return 1.0

    @contextmanager
    def for_evaluation(self) -> Iterator[nn.Module]:
        """Give the model to evaluate, in evaluation mode."""
        self.model.eval()
        yield self.model

    # What a method uses -----------------------------------------------------------------------------------------------

    @property
    def experience_number(self) -> int:
        """Return the number of the present experience, from 0."""
        assert self.source is not None
        return self.source.number

    # The loop ---------------------------------------------------------------------------------------------------------

    def train(self, experience: Any) -> None:
        """Train on an experience, or on what is left of it after :meth:`load`.

        Args:
            experience: An :class:`~fednorm.streams.stream.Experience`; or one of Avalanche's, of any benchmark whose
                data sets give samples and labels, or several in order. Avalanche's plugins and evaluation are a
                strategy's: :func:`fednorm.avalanche.strategy_of`.

        Raises:
            DataError: Its labels are not the network's classes, or it has no samples that can be read.
        """
        if isinstance(experience, Experience):
            self.model.train()
            self._take(experience)
            self._learn()
            return
        # It imports Avalanche, which is here already where there are such experiences.
        from fednorm.avalanche.reading import experiences_of, for_training, source_of

        for each in experiences_of(experience):
            self.train(source_of(self, each, for_training(each)))

    def train_passes(self, experience: Experience, passes: int) -> None:
        """Train for some passes over an experience that goes on afterwards; :meth:`end` ends it.

        As a client of a federation does, round by round. :attr:`train_epochs` is the number of passes in all.

        Raises:
            DataError: Its labels are not the network's classes.
        """
        self.model.train()
        self._take(experience)
        with torch_seeded(self.seed, "learner"):
            self._begin_once()
            self._epochs(self.progress.epoch + passes)

    def end(self, experience: Experience, *, trained: bool = False) -> None:
        """End an experience that :meth:`train_passes` has begun; ``trained``: :meth:`train_part` did all its parts."""
        self.model.train()
        self._take(experience)
        with torch_seeded(self.seed, "learner"):
            self._end(trained)

    def train_part(self, experience: Experience, part: int, parts: int) -> None:
        """Do a part of the training that an experience's end brings (:attr:`trains_at_end`), so that rounds can.

        Args:
            experience: The experience, which :meth:`train_passes` has begun.
            part: Which part, from 0; the first begins with what the whole begins with.
            parts: How many there are; all of them are what :meth:`end_experience` does, to the bit.
        """
        self.model.train()
        self._take(experience)
        with torch_seeded(self.seed, "learner"):
            self.train_at_end(part, parts)

    def stop_training(self) -> None:
        """End the present experience after this step, e.g. from a watcher."""
        self._stop_training = True

    def _learn(self, **kwargs: Any) -> None:
        """Train on :attr:`source`; the arguments are for whoever looks on, but for those of :meth:`_pass`."""
        with torch_seeded(self.seed, "learner"):
            self._begin_once()
            self._epochs(self.train_epochs, **kwargs)
            self._stop_training = False
            self._end()

    def _begin_once(self) -> None:
        if not self.progress.begun:
            self._begin()

    def _epochs(self, count: int, **kwargs: Any) -> None:
        """Train until so many passes over :attr:`source` are finished."""
        progress = self.progress
        while progress.epoch < count and not self._stop_training:
            self._before_training_epoch(**kwargs)
            self._pass(**kwargs)
            self._after_training_epoch(**kwargs)
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _end(self, trained: bool = False) -> None:
        if not trained:
            self.end_experience()
        self.step.end_experience()
        self.progress = Progress(step=self.progress.step, ended=self.progress.ended + 1)

    def _take(self, source: Experience) -> None:
        """Begin with an experience, or go on with it, and count its tasks."""
        self.source = source
        if source.train.labels_at_hand:
            require_classes(source.train.targets, self.num_classes, f"Experience {source.number}")
        numbers = source.tasks_of(torch.arange(len(source.train)))
        own = sorted(set(numbers.tolist()))
        self.tasks_seen += [number for number in own if number not in self.tasks_seen]
        places = {number: place for place, number in enumerate(self.tasks_seen)}
        own_places = [places[number] for number in numbers.tolist()]
        self._task_of_row = torch.tensor(own_places, dtype=torch.int64, device=self.device)
        self._current_task = places[own[0]] if len(own) == 1 else len(places) - 1

    def _begin(self) -> None:
        if self.progress.ended:
            for effect in self.begin:
                effect(self.experience_number)
        self.hits.zero_()
        self.met = 0
        self.tally.clear()
        self.begin_experience()
        self.progress.begun = True

    def _pass(self, **kwargs: Any) -> None:
        """Train on what is left of the present pass over the experience.

        Args:
            **kwargs: ``shuffle`` and ``drop_last`` are those of a loader; the others are for whoever looks on.
        """
        assert self.source is not None
        progress, count = self.progress, len(self.source.train)
        names = ("experience", progress.ended, "epoch", progress.epoch, "order")
        order = torch.randperm(count, generator=torch_stream(self.seed, *names))
        if not kwargs.get("shuffle", True):
            order = torch.arange(count)
        size, whole = self.train_mb_size, bool(kwargs.get("drop_last", False))
        in_pass = count // size if whole else -(-count // size)
        for rows in batches_of(order, size, single=not self.batch_coupled, begin=progress.batch, whole=whole):
            if self._stop_training:
                break
            if len(rows):
                self._set_rate(progress.epoch * in_pass + progress.batch, self.train_epochs * in_pass)
                self._train_on(self.source, rows, **kwargs)
            progress.step += 1
            progress.batch += 1
            self._after_training_iteration(**kwargs)

    def _set_rate(self, step: int, steps: int) -> None:
        if self.schedule is not None:
            rate = self.schedule.at(self.progress.step, step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def _train_on(self, source: Experience, rows: Tensor, **kwargs: Any) -> None:
        step = self.progress.step
        guesses = self._guess(source, rows) if self.online == "eval" else None
        reseed(stream_seed(self.seed, "model", step))
        self._augmenting.manual_seed(stream_seed(self.seed, "augment", step))
        images, labels = self._batch(source, rows)
        new = Samples(images, labels, self._task_of_row[rows.to(self.device)], None)
        self._changes.clear()
        self._before_step(new, **kwargs)
        logits = self.observe(new).detach()
        right = ((logits if guesses is None else guesses).argmax(1) == labels).sum()
        self.tally.add(self.loss, right, len(rows))
        if not self.progress.epoch:
            self.hits += right
            self.met += len(rows)

    def _before_step(self, new: Samples, **kwargs: Any) -> None:
        """Called with the samples that come, before every step."""
        del kwargs
        self.mbatch = [new.images, new.labels, torch.zeros_like(new.labels)]

    def _before_training_epoch(self, **kwargs: Any) -> None:
        del kwargs
        for watch in self.epoch_watchers:
            watch(self)

    def _after_training_epoch(self, **kwargs: Any) -> None: ...

    def _after_training_iteration(self, **kwargs: Any) -> None:
        del kwargs
        for watch in self.watchers:
            watch(self)

    def _batch(self, source: Experience, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples and labels of some rows on the learner's device."""
        images, labels = source.train.batch(rows)
        if not source.train.labels_at_hand:
            require_classes(labels, self.num_classes, source.title)
        return images.to(self.device), labels.to(self.device)

    @torch.no_grad()
    def _guess(self, source: Experience, rows: Tensor) -> Tensor:
        """Return the logits of some rows in evaluation mode; nothing that trains is changed by it."""
        with modes_kept(self.model):
            self.model.eval()
            logits: Tensor = self.model(self.as_input(self._batch(source, rows)[0], self._task_of_row[rows]))
        return logits

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Return every tensor that the rest of the training depends on, by a path; all on the CPU."""
        tensors = {f"model/{key}": tensor for key, tensor in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": t for key, t in state.items() if isinstance(t, Tensor)}
        for place, effect in enumerate(self.effects):
            if hasattr(effect, "state_dict"):
                tensors |= {f"effect/{place}/{key}": tensor for key, tensor in effect.state_dict().items()}
        tensors |= {f"own/{key}": tensor for key, tensor in self.own_tensors().items()}
        counts = {"hits": self.hits, "hits_of_all": self.tally.hits, "loss_sum": self.tally.loss_sum.cpu().double()}
        return on_cpu(tensors | {f"count/{key}": tensor for key, tensor in counts.items()})

    def state(self) -> dict[str, Any]:
        """Return what goes with :meth:`tensors`, for JSON."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {
            "progress": asdict(self.progress),
            "seen": self.tally.seen,
            "met": self.met,
            "rates": rates,
            "tasks": list(self.tasks_seen),
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take back what :meth:`tensors` and :meth:`state` gave; the next :meth:`train` goes on from there."""
        self.model.load_state_dict(_below("model", tensors))
        moments: dict[int, Tensors] = {}
        for path, tensor in _below("optimizer", tensors).items():
            number, key = path.split("/", 1)
            moments.setdefault(int(number), {})[key] = tensor.clone()  # PyTorch goes on with the very tensors it gets
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        for place, effect in enumerate(self.effects):
            if hasattr(effect, "load_state_dict"):
                effect.load_state_dict(_below(f"effect/{place}", tensors))
        self.load_own_tensors({key: tensor.to(self.device) for key, tensor in _below("own", tensors).items()})
        self.hits.copy_(tensors["count/hits"])
        self.tally.hits.copy_(tensors["count/hits_of_all"])
        self.tally.loss_sum.copy_(tensors["count/loss_sum"])
        self.progress = Progress(**state["progress"])
        self.tally.seen, self.met = int(state["seen"]), int(state["met"])
        self.tasks_seen = [int(number) for number in state["tasks"]]


def _below(folder: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors whose path begins with a folder, by the rest of their path."""
    start = f"{folder}/"
    return {path.removeprefix(start): tensor for path, tensor in tensors.items() if path.startswith(start)}
