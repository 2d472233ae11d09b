"""What a continual run is made of: the stream, the model with its norm, the optimizer with its effects, the learner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import mean
from typing import Any

from torch import Tensor

from fednorm import device as devices
from fednorm.adaptation._scoring import require_adaptable
from fednorm.cards import OPTIMIZERS
from fednorm.config import RunConfig
from fednorm.data.benchmarks import Reader
from fednorm.data.moving import moved
from fednorm.data.scaling import Scaling
from fednorm.errors import ConfigError
from fednorm.spec import Norm
from fednorm.streams.evaluation import split_of
from fednorm.streams.heads import TaskHeads
from fednorm.streams.learner import Learner, LearnerOptions
from fednorm.streams.normalize import normalized_stream
from fednorm.streams.own_norms import StreamNorms
from fednorm.streams.stream import Experience, Stream
from fednorm.training.footprint import require_footprint
from fednorm.training.schedule import Schedule
from fednorm.training.trainable import Trainable
from fednorm.training.trainee import Trainee


def stream_of(config: RunConfig, reader: type[Reader] = Reader) -> Stream:
    """Return the experiences of a run, as a reader finds their images."""
    size, scenario = config.model.card.input_size, config.scenario
    stream: Stream = scenario.card.stream(
        config.data, image_size=size, seed=config.seed, options=scenario.options, reader=reader
    )
    return stream


def learner_of(
    trainee: Trainee,
    stream: Stream,
    options: LearnerOptions,
    *,
    epochs: int,
    seed: int,
    schedule: Schedule | None = None,
    begin: Sequence[Callable[[int], None]],
    adjust: Sequence[Callable[[], None]],
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Learner:
    """Return a run's learner, on its trainee's network and optimizer.

    Args:
        trainee: What trains.
        stream: Whose images come.
        options: The learner's.
        epochs: Passes over each experience.
        seed: Of its random streams.
        schedule: Of the learning rate, where the learner sets it.
        begin: What is done when an experience begins that is not the first.
        adjust: Effects between backward pass and update.
        criterion: Takes the cross-entropy's place; the run's own if None.
    """
    config = trainee.config
    learner: Learner = config.learner.card.make(
        model=trainee.model,
        optimizer=trainee.optimizer,
        num_classes=stream.num_classes,
        options=options,
        train_mb_size=config.train.batch_size,
        train_epochs=epochs,
        eval_mb_size=config.evaluate.batch_size,
        seed=seed,
        augment=trainee.augmentation,
        scaling=Scaling.stack(experience.train.scaling for experience in stream),
        schedule=schedule,
        begin=begin,
        adjust=adjust,
        after=trainee.after,
        online=config.evaluate.online,
        device=trainee.device,
        criterion=criterion or _criterion(trainee, stream),
    )
    return learner


def require_parts(config: RunConfig, norm: Norm, options: LearnerOptions) -> None:
    """Refuse a norm that divides batches into new and memory samples where a replaying learner's cannot be divided.

    Args:
        config: The run's configuration.
        norm: Its norm, not fitted to the stream.
        options: The learner's.

    Raises:
        ConfigError: It would be batch normalization bit for bit, under its own name.
    """
    batch = config.train.batch_size

    def fits(changed: LearnerOptions, size: int) -> bool:
        ratio = changed.batch_ratio(size)
        return norm.divides(size, size // ratio if ratio else 0)

    if not hasattr(options, "memory_batch") or not hasattr(options, "passes") or fits(options, batch):
        return
    for size in range(batch, 2 * batch + 5):
        given = {"memory_batch": 1, "passes": "joint"}
        fitting = [
            n for n in range(1, size + 1) if fits(dataclasses.replace(options, **given | {"memory_batch": n}), size)
        ]
        if fitting:
            break
    remedy = f"learner.memory_batch to one of {', '.join(map(str, fitting))}"
    remedy = remedy if size == batch else f"train.batch_size to {size} and {remedy}"
    raise ConfigError(
        f"norm {config.norm.name} puts the memory's samples beside parts of the new ones: it takes one pass over "
        "both, and a whole multiple of the memory's samples, two or more, that are new. Learner "
        f"{config.learner.name} with passes {options.passes!r}, {batch} new samples "
        f"(train.batch_size) and memory_batch {options.memory_batch} makes no such batch, so that each would be "
        f"normalized as batch_norm does, under another name. Set {remedy}"
        f"{'' if options.passes == 'joint' else ', and learner.passes to joint'}."
    )


def _criterion(trainee: Trainee, stream: Stream) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return what takes the place of a learner's cross-entropy, or nothing.

    Raises:
        ConfigError: The learner's loss is no cross-entropy, or the stream's labels do not tell their tasks.
    """
    config = trainee.config
    if config.train.heads == "task":
        if not config.learner.card.make.by_cross_entropy:
            raise ConfigError(
                f"train.heads = 'task' is a matter of cross-entropy, and learner {config.learner.name} trains and "
                "classifies by something else. Leave it at 'one', or take another learner."
            )
        return TaskHeads(stream)
    return trainee.loss if config.train.label_smoothing else None


class ContinualWorkbench:
    """Everything of a run but what it writes down.

    Attributes:
        config: The run's configuration.
        stream: The stream.
        norm: The normalization method, fitted to the stream and the learner.
        trainee: What trains: the network, its optimizer, the effects around an update.
        about_model: What the record says of the network.
        model: The network.
        learner: The learner.
        joint: Whether the learner is given all experiences at once.
        training: The experiences that it is trained on, in order.
        steps: Batches of each of them.
        schedule: Of the learning rate.
        norms: The normalization layers at the boundaries of experiences.
    """

    def __init__(self, config: RunConfig, stream: Stream | None = None) -> None:
        """Build the stream (unless given), the model and the learner.

        Raises:
            FedNormError: Something in the configuration does not fit the rest.
        """
        self.config = config
        devices.device_of(config)  # before data are read
        self.stream = normalized_stream(stream or stream_of(config), config.data.normalize)
        spec = config.learner.card
        options = spec.made_options(config.learner.options)
        ratio = options.batch_ratio(config.train.batch_size)
        norm = config.norm.card.made(config.norm.options)
        self.norm: Norm = norm.for_stream(num_tasks=len(self.stream), batch_ratio=ratio)
        self._require_memory()
        self.trainee = Trainee(
            config, self.norm, num_classes=self.stream.num_classes, image_size=self.stream.image_size
        )
        self.model = self.trainee.model
        self.about_model = self.trainee.about_model
        self.stream = moved(self.stream, self.trainee.device)
        self.joint = spec.joint
        self.training: list[Experience] = [self.stream.joint()] if spec.joint else list(self.stream)
        self._check(self.training)
        train = config.train
        self.steps = [train.epochs * -(-len(source.train) // train.batch_size) for source in self.training]
        self.schedule = self.trainee.schedule(sum(self.steps))
        self.norms = StreamNorms(config, self.model, self.stream)
        self.learner = learner_of(
            self.trainee,
            self.stream,
            options,
            epochs=train.epochs,
            seed=config.seed,
            schedule=self.schedule,
            begin=[self.trainee.begin_anew, self.norms.boundary.begin],
            adjust=self.trainee.adjust,
        )
        self.learner.epoch_watchers.append(self.norms.rest)
        if train.trainable != "all" or train.linear_probe_epochs:
            self.learner.epoch_watchers.append(Stages(self.trainee.trainable, train.linear_probe_epochs))
            self._require_stages()
        require_parts(config, norm, options)

    def _require_stages(self) -> None:
        """Refuse a linear probe without epochs after it, and a learner whose epochs are not the run's.

        Raises:
            ConfigError: The head alone would be trained, or the probe would be none.
        """
        train, name = self.config.train, self.config.learner.name
        if train.linear_probe_epochs >= train.epochs:
            raise ConfigError(
                f"train.linear_probe_epochs, the first epochs of each experience, in which the head alone is trained, "
                f"must be less than train.epochs; got {train.linear_probe_epochs} of {train.epochs}. A probe without "
                "fine-tuning is train.trainable = 'head'."
            )
        if self.learner.trains_at_end and (train.linear_probe_epochs or train.trainable == "head"):
            raise ConfigError(
                f"Learner {name} trains on its memory when an experience has ended, in epochs of its own, in which "
                "all layers are in training mode: there is no linear probe. Take another learner, or train.trainable = "
                "'norm' or 'norm,head'."
            )

    def mean_rate(self, place: int) -> float:
        """Return the mean learning rate over the steps of one of :attr:`training`, as the schedule has it.

        Exact before it is rounded, so that it is the rate itself where that is constant. The rate of the last step
        would tell of the schedule's end alone.

        Args:
            place: Which of :attr:`training`, from 0.
        """
        before, steps = sum(self.steps[:place]), self.steps[place]
        return mean(self.schedule.at(before + step, step, steps) for step in range(steps))

    def _require_memory(self) -> None:
        """Refuse a model or a batch that this machine cannot hold, before it is allocated."""
        train = self.config.train
        require_footprint(
            self.config,
            self.norm,
            num_classes=self.stream.num_classes,
            image_size=self.stream.image_size,
            copies=3
            + (bool(train.momentum) if OPTIMIZERS[train.optimizer].has_momentum else 2),  # gradients, a checkpoint
            train_images=sum(len(experience.train) for experience in self.stream),
            test_images=max((len(experience.test) for experience in self.stream), default=0),
        )

    def _check(self, sources: list[Experience]) -> None:
        """Refuse what could only fail after training."""
        config = self.config
        for experience in self.stream:
            split_of(experience, config.evaluate.split)
        require_adaptable(config.evaluate, self.model)
        self.trainee.require_batches((f"Experience {source.number}", len(source.train)) for source in sources)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What is known before training, for the record; made once, because the digest reads every row's label."""
        config = self.config
        experiences = [
            {
                "experience": experience.number,
                "title": experience.title,
                "classes": list(experience.classes),
                **{name: len(split) for name, split in (("train", experience.train), ("test", experience.test))},
                "validation": len(experience.validation),
            }
            for experience in self.stream
        ]
        return {
            "model": self.about_model,
            "norm": {"name": config.norm.name, **dataclasses.asdict(self.norm)},
            "learner": {"name": config.learner.name, **dataclasses.asdict(self.learner.options)},
            "scenario": {"name": config.scenario.name, **config.scenario.values},
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": sum(self.steps),
            **devices.described(config, self.trainee.device),
            "data": {
                "title": self.stream.title,
                "notes": list(self.stream.notes),
                "memorization": self.stream.memorization,
                "digest": self.stream.digest(),
                "experiences": experiences,
            },
        }


class Stages:
    """What a run's learner trains in each epoch, and which of its layers are in training mode.

    Args:
        trainable: Of the run.
        probe_epochs: First epochs of each experience in which the head alone is trained.
    """

    def __init__(self, trainable: Trainable, probe_epochs: int) -> None:
        self._trainable, self._probe_epochs = trainable, probe_epochs

    def __call__(self, learner: Learner) -> None:
        """Begin an epoch, or go on with one after a checkpoint."""
        self._trainable.set_probing(learner.progress.epoch < self._probe_epochs)
