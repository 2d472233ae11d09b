"""What a continual run is made of: the stream, the model with its norm, the optimizer with its effects, the learner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from statistics import mean
from typing import Any

import torch

from fednorm.cards import OPTIMIZERS
from fednorm.config import ModelChoice, RunConfig
from fednorm.continual.avalanche_benchmark import joint_to_avalanche, to_avalanche
from fednorm.continual.evaluation import split_of
from fednorm.continual.learner import Effect, Learner
from fednorm.continual.schedule import Schedule
from fednorm.continual.stream import Experience, Stream
from fednorm.errors import ConfigError
from fednorm.models import Built, ModelSpec, chosen_model, describe_model
from fednorm.norms import spec_of
from fednorm.optim.agc import AdaptiveGradientClipping
from fednorm.optim.l2_init import L2Init
from fednorm.optim.projection import WeightProjection
from fednorm.optim.redo import ReDo
from fednorm.optim.shrink_and_perturb import shrink_and_perturb
from fednorm.rng import stream_seed
from fednorm.spec import Norm
from fednorm.step import batch_coupled


class ContinualWorkbench:
    """Everything of a run but what it writes down.

    Attributes:
        config: The run's configuration.
        stream: The stream.
        norm: The normalization method, fitted to the stream and the learner.
        about_model: What the record says of the network.
        model: The network.
        learner: The learner.
        joint: Whether the learner is given all experiences at once.
        training: The Avalanche experiences that it is trained on, in order.
        steps: Batches of each of them.
        schedule: Of the learning rate.
    """

    def __init__(self, config: RunConfig, stream: Stream | None = None) -> None:
        """Build the stream (unless given), the model and the learner.

        Raises:
            FedNormError: Something in the configuration does not fit the rest.
        """
        self.config = config
        self.stream = stream or config.scenario.card.stream(
            config.data,
            image_size=config.model.card.input_size,
            seed=config.seed,
            options=config.scenario.options,
        )
        spec = config.learner.card
        options = spec.made_options(config.learner.options)
        ratio = options.batch_ratio(config.train.batch_size)
        norm = config.norm.card.made(config.norm.options)
        self.norm: Norm = norm.for_stream(num_tasks=len(self.stream), batch_ratio=ratio)
        built = self._built(config.model, config.seed)
        self.about_model = describe_model(config.model, built, self.stream.num_classes, self.stream.image_size)
        self.model = built.model
        self.joint = spec.joint
        make = joint_to_avalanche if spec.joint else to_avalanche
        self.training: list[Any] = list(make(self.stream).train_stream)
        self._check(sources := [self.source(experience) for experience in self.training])
        train = config.train
        self.steps = [train.epochs * -(-len(source.train) // train.batch_size) for source in sources]
        self.schedule = self._schedule()
        optimizer = self._make_optimizer()
        adjust, after = self._effects(optimizer)
        self.learner: Learner = spec.make(
            model=self.model,
            optimizer=optimizer,
            num_classes=self.stream.num_classes,
            options=options,
            train_mb_size=train.batch_size,
            train_epochs=train.epochs,
            eval_mb_size=config.evaluate.batch_size,
            seed=config.seed,
            augment=train.augment,
            schedule=self.schedule,
            begin=self._at_the_beginning(optimizer),
            adjust=adjust,
            after=after,
        )

    @staticmethod
    def source(experience: Any) -> Experience:
        """Return what one of :attr:`training` was made of."""
        source: Experience = experience.dataset.source
        return source

    def mean_rate(self, place: int) -> float:
        """Return the mean learning rate over the steps of one of :attr:`training`, as the schedule has it.

        Exact before it is rounded, so that it is the rate itself where that is constant. The rate of the last step
        would tell of the schedule's end alone.

        Args:
            place: Which of :attr:`training`, from 0.
        """
        before, steps = sum(self.steps[:place]), self.steps[place]
        return mean(self.schedule.at(before + step, step, steps) for step in range(steps))

    def _built(self, choice: ModelChoice[ModelSpec], seed: int) -> Built:
        built = chosen_model(choice, self.norm, self.stream.num_classes, self.stream.image_size, seed)
        # Convolutions on CPUs are faster in this layout.
        return dataclasses.replace(built, model=built.model.to(memory_format=torch.channels_last))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        train = self.config.train
        return OPTIMIZERS[train.optimizer].make(
            self.model.parameters(), lr=train.learning_rate, momentum=train.momentum, weight_decay=train.weight_decay
        )

    def _schedule(self) -> Schedule:
        train = self.config.train
        return Schedule(
            rate=train.learning_rate,
            kind=train.schedule,
            over=train.schedule_over,
            warmup=train.warmup_steps,
            final=train.final_rate,
            total=sum(self.steps),
        )

    def _effects(self, optimizer: torch.optim.Optimizer) -> tuple[list[Effect], list[Effect]]:
        """Return what happens between backward and update, and after it, in that order."""
        train, adjust, after = self.config.train, list[Effect](), list[Effect]()
        if train.l2_init:
            adjust.append(L2Init(self.model.parameters(), train.l2_init))
        if train.agc:
            adjust.append(AdaptiveGradientClipping(self.model, train.agc))
        if train.redo_every:
            after.append(ReDo(self.model, optimizer, every=train.redo_every, tau=train.redo_tau, seed=self.config.seed))
        projection = self.norm.after_update(self.model)
        if projection is not None:
            after.append(projection)
        elif train.project:
            after.append(WeightProjection(self.model))
        return adjust, after

    def _at_the_beginning(self, optimizer: torch.optim.Optimizer) -> list[Callable[[int], None]]:
        """Return what happens when an experience but the first begins."""
        train, effects = self.config.train, list[Callable[[int], None]]()
        if train.shrink != 1 or train.perturb:

            def perturb(number: int) -> None:
                drawn = dataclasses.replace(self.config.model, weights="")  # noise is drawn, never read from a file
                fresh = self._built(drawn, stream_seed(self.config.seed, "perturb", number)).model
                shrink_and_perturb(self.model, fresh, shrink=train.shrink, perturb=train.perturb)

            effects.append(perturb)
        if train.reset_optimizer:
            effects.append(lambda _: optimizer.state.clear())
        return effects

    def _check(self, sources: list[Experience]) -> None:
        """Refuse what could only fail after training."""
        config = self.config
        for experience in self.stream:
            split_of(experience, config.evaluate.split)
        if not batch_coupled(self.model, spec_of):
            return
        why = f"norm {config.norm.name!r} estimates a variance from each batch"
        remedy = "or a norm that works on single images: group_norm, layer_norm, rms_norm, nap, none"
        if config.train.batch_size == 1:
            raise ConfigError(f"{why}, and train.batch_size is 1. Use a batch size of at least 2, {remedy}.")
        for source in sources:
            if len(source.train) == 1:
                raise ConfigError(
                    f"{why}, and experience {source.number} has one training image. Use more images, {remedy}."
                )

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
            "data": {
                "title": self.stream.title,
                "notes": list(self.stream.notes),
                "memorization": self.stream.memorization,
                "digest": self.stream.digest(),
                "experiences": experiences,
            },
        }
