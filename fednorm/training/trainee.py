"""The trainee: from a run's configuration to what trains, made once, for a client and for a learner alike.

A trainee is a model with its norm, an optimizer, the effects around its update, the schedule of its learning rate, and
where new weights come from. Who trains it with which images is a client's or a learner's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm import device as devices
from fednorm.cards import NORMS, OPTIMIZERS
from fednorm.config import ModelChoice, RunConfig
from fednorm.data.augment import Augmentation
from fednorm.errors import ConfigError, DataError
from fednorm.models import Built, ModelSpec, chosen_model, describe_model
from fednorm.norms import spec_of
from fednorm.optim.shrink_and_perturb import shrink_and_perturb
from fednorm.rng import stream_seed
from fednorm.spec import HookedLayer, Norm
from fednorm.training.boundary import Boundary
from fednorm.training.effects import Effect, adjusting, following
from fednorm.training.precision import bf16_advice
from fednorm.training.scale_init import draw_scales
from fednorm.training.schedule import Schedule
from fednorm.training.step import batch_coupled, hooked_layers
from fednorm.training.trainable import Trainable


class Trainee:
    """What trains: a model with its norm, its optimizer, and the effects around an update.

    Args:
        config: The run's configuration.
        norm: Its norm, fitted to the stream where there is one.
        num_classes: K, the number of logits.
        image_size: Height and width of the images, in pixels.

    Attributes:
        num_classes: K.
        device: Where all of it is.
        model: The network, in training mode, with the initial weights of the run's seed, or of ``model.weights``.
        about_model: What the record says of it.
        trainable: Which of its parameters are trained, and when.
        optimizer: Of all its parameters; those that are not trained have no gradient, and stay as they are.
        adjust: Effects between backward pass and update, in order (:mod:`fednorm.training.effects`).
        after: Effects after the update, in order.
        augmentation: What is done to the images of a training batch, before they are scaled.
        batch_coupled: Whether a batch of one cannot be trained on.

    Raises:
        ConfigError: An effect does not fit the network, or this machine does not have the run's device.
    """

    def __init__(self, config: RunConfig, norm: Norm, *, num_classes: int, image_size: int) -> None:
        self.config, self.norm = config, norm
        self.num_classes, self._image_size = num_classes, image_size
        self.device = devices.device_of(config)
        built = self._built(config.model, config.seed)
        self.model = built.model
        self.about_model = describe_model(config.model, built, num_classes, image_size)
        if config.amp == "bf16" and self.device.type == "cpu":
            advice = bf16_advice(self.model, image_size=image_size, batch_size=config.train.batch_size)
            self.about_model["notes"] += [advice] * bool(advice)
        self.batch_coupled = batch_coupled(self.model, spec_of)
        train = config.train
        self.trainable = Trainable(self.model, train, num_classes)
        self.augmentation = Augmentation.of(train.augment, degrees=train.rotate_degrees, jitter=train.jitter)
        self.optimizer = OPTIMIZERS[train.optimizer].make(
            self.model.parameters(),
            lr=train.learning_rate,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            **train.of_optimizer(),
        )
        # Made on the initial weights, once: averaging shortens weights, and no round may take that for its measure.
        self.adjust = adjusting(config, self.model)
        self.after = following(config, norm, self.model, self.optimizer)
        devices.prepare(self.model, config)
        self.boundary = Boundary(self.model)
        # Every client counts its own updates: where the number decides what is done, no other client's may count.
        self._counting: dict[int, Any] = {i: e for i, e in enumerate(self.effects) if getattr(e, "counts", False)}
        self._first = {i: {k: t.clone() for k, t in e.state_dict().items()} for i, e in self._counting.items()}

    def fresh(self, seed: int) -> nn.Module:
        """Return the network with initial weights drawn from a seed, the same on every device, never from a file."""
        return self._built(replace(self.config.model, weights=""), seed).model

    def _built(self, choice: ModelChoice[ModelSpec], seed: int) -> Built:
        built = chosen_model(choice, self.norm, self.num_classes, self._image_size, seed)
        if self.config.train.scale_init == "uniform":
            if choice.weights:
                raise ConfigError(
                    "train.scale_init = 'uniform' draws initial scales, and model.weights brings a trained network's. "
                    "Leave one of the two out."
                )
            draw_scales(built.model, seed)
        # oneDNN's convolutions are a tenth to a third faster in this layout.
        return replace(built, model=built.model.to(self.device).to(memory_format=torch.channels_last))

    @cached_property
    def hooked(self) -> tuple[HookedLayer, ...]:
        """The model's layers that take part in a training step, looked for once: every turn of a client asks."""
        return hooked_layers(self.model)

    @property
    def effects(self) -> tuple[Effect, ...]:
        """All effects, in order; one that remembers something has ``state_dict`` and ``load_state_dict``."""
        return (*self.adjust, *self.after)

    def schedule(self, total: int) -> Schedule:
        """Return the learning rate's course over ``total`` steps, or rounds."""
        train = self.config.train
        return Schedule(
            rate=train.learning_rate,
            kind=train.schedule,
            over=train.schedule_over,
            warmup=train.warmup_steps,
            final=train.final_rate,
            decay=train.decay,
            every=train.decay_every,
            total=total,
        )

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the coming steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy, with the run's label smoothing, a scalar."""
        return functional.cross_entropy(logits, labels, label_smoothing=self.config.train.label_smoothing)

    def begin_anew(self, number: int) -> None:
        """Do what is done to a trained network when an experience begins.

        Its tensors are kept or set back as their norms' cards say; shrink, perturb and a new optimizer are the run's.

        Args:
            number: The experience's.
        """
        self.boundary.cross()
        train = self.config.train
        if train.shrink != 1 or train.perturb:
            fresh = self.fresh(stream_seed(self.config.seed, "perturb", number))
            shrink_and_perturb(self.model, fresh, shrink=train.shrink, perturb=train.perturb)
        if train.reset_optimizer:
            self.optimizer.state.clear()

    def require_batches(self, counts: Iterable[tuple[str, int]]) -> None:
        """Refuse what would leave a batch-coupled layer with a batch of one, and nothing to train on.

        Args:
            counts: Who trains, in words, and on how many images.

        Raises:
            ConfigError: The batch size is 1.
            DataError: Somebody has one image.
        """
        if not self.batch_coupled:
            return
        why = f"norm {self.config.norm.name!r} estimates a variance from each batch"
        if self.config.train.batch_size == 1:
            raise ConfigError(
                f"{why}, and train.batch_size is 1. Use a batch size of at least 2, or a norm that works on single "
                f"images: {_single()}."
            )
        for who, count in counts:
            if count == 1:
                raise DataError(
                    f"{who} has one training image, and {why}. Use more images (fewer clients, a larger data.alpha), "
                    f"or a norm that works on single images: {_single()}."
                )

    # What a client's training remembers between its rounds ----------------------------------------------------------

    def begin_turn(self, kept: Mapping[str, Tensor]) -> None:
        """Begin a client's round: the optimizer and the effects go on from what the client kept, or begin anew.

        Args:
            kept: What :meth:`end_turn` gave after the client's last round; empty before its first.
        """
        self.optimizer.state.clear()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for path, tensor in kept.items():
            what, number, name = path.split("/", 2)
            if what == "optimizer":
                parameter = parameters[int(number)]
                # Adam counts its steps on the CPU, wherever the parameters are.
                device = tensor.device if name == "step" else parameter.device
                self.optimizer.state[parameter][name] = tensor.to(device, copy=True)
        for place, effect in self._counting.items():
            own = {path.split("/", 2)[2]: t for path, t in kept.items() if path.startswith(f"effect/{place}/")}
            effect.load_state_dict(own or self._first[place])

    def end_turn(self) -> dict[str, Tensor]:
        """Return what the client is to keep until its next round, as tensors by a path; by default nothing."""
        kept: dict[str, Tensor] = {}
        if not self.config.train.reset_optimizer:
            parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
            for number, parameter in enumerate(parameters):
                state = self.optimizer.state.get(parameter, {})
                kept |= {f"optimizer/{number}/{name}": t.clone() for name, t in state.items() if isinstance(t, Tensor)}
        for place, effect in self._counting.items():
            kept |= {f"effect/{place}/{name}": tensor.clone() for name, tensor in effect.state_dict().items()}
        return kept


def _single() -> str:
    """Return the names of the norms that work on single images, for the remedy of an error."""
    return ", ".join(card.name for card in NORMS if not card.batch_coupled)
