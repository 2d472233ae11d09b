"""The configuration of a continual run: a stream, a norm, a learner, and how it trains.

Read from the same TOML files and ``section.key=value`` as a federated one, with ``kind = "continual"``; the sections
``data``, ``model`` and ``norm`` are shared.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fednorm import options
from fednorm.config import (
    IMMATERIAL,
    MOST_THREADS,
    DataConfig,
    ModelConfig,
    NormConfig,
    Scalar,
    build,
    choose,
    digest,
    require,
)

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
AUGMENTATIONS = ("none", "crop", "crop_flip")

ONLINE: Mapping[str, int] = {"epochs": 1, "batch_size": 10}
"""Section ``train`` of online learning: one pass, small batches. See :func:`require_online`."""


@dataclass(frozen=True, kw_only=True)
class ScenarioConfig:
    """Which stream, with its options.

    Attributes:
        name: The scenario (``fednorm list scenarios``).
        options: The scenario's options (``fednorm explain NAME``).
    """

    name: str = "split_digits"
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Which learner, with its options.

    Attributes:
        name: The learner (``fednorm list learners``).
        options: The learner's options (``fednorm explain NAME``).
    """

    name: str = "er_ace"
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StreamTrainConfig:
    """How a learner trains on each experience.

    Attributes:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        learning_rate: Per step, before the schedule.
        batch_size: New images a step; the last batch of an epoch may be smaller.
        epochs: Passes over each experience; 1 is online learning.
        momentum: Of SGD.
        weight_decay: L2 regularization: added to the gradient (``sgd``, ``adam``), or decoupled from it (``adamw``).
        agc: Lambda of adaptive gradient clipping; 0 for no clipping.
        augment: For each image of a batch, those from memory too: ``none``, ``crop`` (random, padding 4) or
            ``crop_flip`` (and mirrored with probability one half).
        schedule: Of the learning rate: ``constant``, ``linear`` or ``cosine``, down to ``final_rate``.
        schedule_over: What the schedule runs over: the whole ``stream``, or each ``experience`` anew.
        warmup_steps: Steps in which the rate first rises linearly.
        final_rate: The learning rate at the end of the schedule, as a share of the first.
        reset_optimizer: Whether moments and momentum start anew with every experience.
        project: Whether every weight that a normalization follows is projected to its initial norm after each update
            (NaP's projection with any norm; norm ``nap`` brings its own).
        l2_init: Factor of the squared distance to the initial parameters in the loss; 0 for none.
        shrink: Factor of the parameters when an experience begins (shrink and perturb); 1 for none.
        perturb: Factor of the freshly initialised parameters that are then added; 0 for none.
        redo_every: Updates between two resets of dormant units (ReDo); 0 for none.
        redo_tau: A unit is dormant where its mean activation is at most this share of its layer's.
        checkpoint_every: Steps between two checkpoints; the end of an experience always has one.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.03
    batch_size: int = 32
    epochs: int = 5
    momentum: float = 0.0
    weight_decay: float = 0.0
    agc: float = 0.0
    augment: str = "none"
    schedule: str = "constant"
    schedule_over: str = "stream"
    warmup_steps: int = 0
    final_rate: float = 0.0
    reset_optimizer: bool = False
    project: bool = False
    l2_init: float = 0.0
    shrink: float = 1.0
    perturb: float = 0.0
    redo_every: int = 0
    redo_tau: float = 0.025
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        choose("train.optimizer", self.optimizer, OPTIMIZERS)
        choose("train.augment", self.augment, AUGMENTATIONS)
        choose("train.schedule", self.schedule, SCHEDULES)
        choose("train.schedule_over", self.schedule_over, ("stream", "experience"))
        for key in ("learning_rate", "weight_decay", "agc", "l2_init", "perturb", "redo_tau"):
            options.number("train", key, getattr(self, key))
        require(self.learning_rate > 0, f"train.learning_rate must be positive; got {self.learning_rate}.")
        for key in ("batch_size", "epochs", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"train.{key} must be at least 1; got {getattr(self, key)}.")
        for key in ("weight_decay", "agc", "warmup_steps", "l2_init", "perturb", "redo_every", "redo_tau"):
            require(getattr(self, key) >= 0, f"train.{key} must be 0 or more; got {getattr(self, key)}.")
        require(0 <= self.momentum < 1, f"train.momentum must be in [0, 1); got {self.momentum}.")
        require(self.optimizer == "sgd" or not self.momentum, "train.momentum is SGD's; Adam has betas of its own.")
        for key in ("shrink", "final_rate"):
            require(0 <= getattr(self, key) <= 1, f"train.{key} must be in [0, 1]; got {getattr(self, key)}.")


@dataclass(frozen=True, kw_only=True)
class StreamEvaluateConfig:
    """What is measured when an experience has ended, and on the way.

    Attributes:
        split: The images that are scored: ``test``, or ``validation`` for choosing hyper-parameters.
        experiences: Which experiences are scored each time: ``all``, those ``seen`` so far, or the ``current`` one.
            ``auto`` is ``current`` for a memorization stream and ``all`` else; transfer to experiences to come is
            measured with ``all`` only.
        batch_size: Images a forward pass.
        train_images: Most training images of the experience for its training accuracy; 0 for all of them.
        probe_images: Training images of all experiences so far, as many of each, on which dead units, rank and drift
            are measured; 0 for none of these.
        online: Whether online accuracy is that of the ``train`` step's own outputs, for which a batch norm takes the
            batch's statistics and images are augmented, or of ``eval``: one more forward pass before the step, in
            evaluation mode, on the images as they are. Norms are comparable in the latter only.
        every_steps: Steps between two evaluations on the experiences seen so far (anytime evaluation); 0 for none.
        every_images: Most images of each experience in those; 0 for all.
        average_last: Evaluations, the last one included, that ``average_late_accuracy`` is the mean of.
    """

    split: str = "test"
    experiences: str = "auto"
    batch_size: int = 256
    train_images: int = 1000
    probe_images: int = 512
    online: str = "train"
    every_steps: int = 0
    every_images: int = 0
    average_last: int = 5

    def __post_init__(self) -> None:
        choose("evaluate.split", self.split, ("test", "validation"))
        choose("evaluate.experiences", self.experiences, ("auto", "all", "seen", "current"))
        require(self.batch_size >= 1, f"evaluate.batch_size must be at least 1; got {self.batch_size}.")
        choose("evaluate.online", self.online, ("train", "eval"))
        for key in ("train_images", "every_steps", "every_images"):
            require(getattr(self, key) >= 0, f"evaluate.{key} must be 0 or more; got {getattr(self, key)}.")
        require(self.average_last >= 1, f"evaluate.average_last must be at least 1; got {self.average_last}.")
        require(
            self.probe_images == 0 or self.probe_images >= 2,
            f"evaluate.probe_images must be 0 or at least 2, to estimate a variance; got {self.probe_images}.",
        )


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """Everything a continual run's numbers depend on.

    Attributes:
        kind: ``continual``.
        seed: Of every random stream.
        threads: PyTorch threads; part of the configuration because sums depend on it in the last bits.
        data: Which data.
        scenario: Which stream is made of it.
        model: Which architecture.
        norm: Which normalization method.
        learner: Which learner.
        train: How it trains.
        evaluate: What is measured.
    """

    kind: str = "continual"
    seed: int = 1
    threads: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    train: StreamTrainConfig = field(default_factory=StreamTrainConfig)
    evaluate: StreamEvaluateConfig = field(default_factory=StreamEvaluateConfig)

    def __post_init__(self) -> None:
        choose("kind", self.kind, ("continual",))
        require(1 <= self.threads <= MOST_THREADS, f"threads is between 1 and {MOST_THREADS}; got {self.threads}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries of plain values, options beside their method's name."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        for section in ("scenario", "norm", "learner"):
            plain[section].update(plain[section].pop("options"))
        return typing.cast(dict[str, Any], plain)

    @property
    def hash(self) -> str:
        """Return 12 hexadecimal digits that identify the configuration, as those of a federated run do."""
        return digest(self.to_dict(), {**ContinualConfig().to_dict(), "kind": ""}, IMMATERIAL)

    @property
    def title(self) -> str:
        """Return what the run is called in the names of folders, its hash left out."""
        return f"{self.learner.name}-{self.norm.name}-{self.scenario.name}-seed{self.seed}"


def require_online(config: ContinualConfig) -> ContinualConfig:
    """Return a configuration that was asked for as online learning, whose ``train`` began as :data:`ONLINE`.

    Raises:
        ConfigError: It makes more than one pass over each experience.
    """
    epochs = config.train.epochs
    require(
        epochs == 1,
        f"online=True / --online is one pass over each experience, and train.epochs is {epochs}. Leave one of the two "
        "out.",
    )
    return config


def continual_config_from_dict(values: Mapping[str, Any]) -> ContinualConfig:
    """Build a configuration from nested dictionaries.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is out of range.
    """
    return typing.cast(ContinualConfig, build(ContinualConfig, values))
