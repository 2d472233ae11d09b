"""The configuration of a run of either kind: what a researcher chose, checked, and the methods it names.

A run of kind ``federated`` has the sections data, model, norm, strategy, train, rounds and evaluate; one of kind
``continual`` has data, scenario, model, norm, learner, train and evaluate; one of kind ``federated_continual``, in
which each client learns on a stream of its own, has all of them and grid. A section that a kind does not have stays at
its default, and is part neither of the run's hash nor of its record.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fednorm.cards import LEARNERS, MODELS, NORMS, SCENARIOS, STRATEGIES, Card, Family, Scalar, in_process
from fednorm.config.schema import KINDS, Kind, choose
from fednorm.config.sections import DataConfig, EvaluateConfig, GridConfig, RoundConfig, TrainConfig
from fednorm.errors import ConfigError
from fednorm.limits import shown

if TYPE_CHECKING:
    from fednorm.federation.spec import StrategySpec
    from fednorm.models import ModelSpec
    from fednorm.spec import NormSpec
    from fednorm.streams.learner import LearnerSpec
    from fednorm.streams.spec import ScenarioSpec

C = TypeVar("C", bound=Card)

MOST_THREADS = 1024
"""PyTorch threads; beyond some ten thousand the system ends the process that asks for them."""

MOST_COHORT = 100_000
"""Clients of a cohort."""

MOST_WORKERS = 1024
"""Processes of a run, on whatever machine; how many cores there are is asked when a run is made."""

MACHINE: Mapping[str, Any] = {"device": "cpu", "amp": "none", "compile": False, "engine": "client", "cohort_size": 0}
"""What computes a run, with the values that a configuration leaves out: numbers depend on it in their last bits."""

DEVICE = re.compile(r"cpu|mps|cuda(:[0-9]{1,3})?")
AMP = ("none", "bf16")
ENGINES = ("auto", "client", "cohort")


@dataclass(frozen=True)
class Choice(Generic[C]):
    """A method that a configuration names, with its options.

    Attributes:
        name: Its name, or the import path by which it was given.
        family: Where its card is found.
        options: The options that differ from their defaults.
    """

    name: str
    family: Family[C] = field(repr=False)
    options: Mapping[str, Scalar] = field(default_factory=dict)

    @cached_property
    def card(self) -> C:
        """The method's card."""
        return self.family[self.name]

    @property
    def values(self) -> dict[str, Any]:
        """All options, those at their default too."""
        return {**self.card.options, **self.options}

    def to_dict(self) -> dict[str, Any]:
        """Return the name, and beside it the options that differ from their defaults."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class ModelChoice(Choice[C]):
    """An architecture, with what every architecture may be asked for.

    Attributes:
        width: Channels of the first stage, for models that have it; 0 for the model's own.
        activation: The nonlinearity in place of the model's ReLUs, e.g. ``leaky_relu``; empty for the model's own.
        weights: The file of weights to start from, or ``pretrained``; empty for weights drawn from the seed. What the
            file holds is part of a run's identity, where it is is not.
        feature_norm: Whether the features before the head are brought to the length sqrt(d), FN and FedFN: on any
            network whose head can be found, and without a tensor of its own.
    """

    width: int = 0
    activation: str = ""
    weights: str = ""
    feature_norm: bool = False

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 0:
            raise ConfigError(f"model.width must be 0 (the model's own) or a number of channels; got {self.width!r}.")
        if not isinstance(self.activation, str):
            raise ConfigError(f"model.activation must be a string; got {self.activation!r}.")
        if not isinstance(self.weights, str):
            raise ConfigError(f"model.weights must be a file's path, or 'pretrained'; got {self.weights!r}.")
        if not isinstance(self.feature_norm, bool):
            raise ConfigError(f"model.feature_norm must be true or false; got {self.feature_norm!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the name, width and activation, and beside them what else was set, own options among it."""
        given = {key: value for key in ("weights", "feature_norm") if (value := getattr(self, key))}
        return {"name": self.name, "width": self.width, "activation": self.activation, **given, **self.options}


SECTIONS: Mapping[Kind, tuple[str, ...]] = {
    "federated": ("data", "model", "norm", "strategy", "train", "rounds", "evaluate"),
    "continual": ("data", "scenario", "model", "norm", "learner", "train", "evaluate"),
    "federated_continual": (
        "data",
        "scenario",
        "grid",
        "model",
        "norm",
        "strategy",
        "learner",
        "train",
        "rounds",
        "evaluate",
    ),
}
"""The sections of each kind of run, in the order of its record."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run's numbers depend on; :func:`~fednorm.config.resolve.resolve` makes it.

    Attributes:
        kind: ``federated``, ``continual`` or ``federated_continual``.
        seed: Of every random stream.
        threads: PyTorch threads; part of the configuration because sums depend on it in the last bits.
        device: ``cpu``, ``mps``, ``cuda`` or ``cuda:1``: where the model and the data are. Whether this machine has it
            is asked when a run is made, not here: records of other machines can be read.
        amp: ``bf16`` for forward passes under autocast in bfloat16; ``none``.
        compile: Whether forward passes go through ``torch.compile``.
        engine: ``client`` for one client after the other; ``cohort`` for many small clients as one stack of tensors;
            ``auto`` for cohorts where a client's step is so little work that they pay, and the method has a stacked
            form. Part of the configuration because sums depend on it in the last bits.
        cohort_size: The most clients of a cohort; 0 for as many as the model's size suggests.
        workers: How many processes take a federation's clients side by side, or ``auto``. No number depends on it, and
            it is part neither of the hash nor of the record.
        data: Which data, and who holds what.
        scenario: Which stream is made of the data.
        grid: Which client meets which part of the stream when.
        model: Which architecture.
        norm: Which normalization method.
        strategy: Which federated strategy.
        learner: Which learner.
        train: How a client trains in a round, and a learner on an experience.
        rounds: The rounds.
        evaluate: What is measured.
        sources: A digest of the source of every method that is not built in, by section; and of the model's weights,
            where those are given.
    """

    kind: Kind = "federated"
    seed: int = 1
    threads: int = 1
    device: str = "cpu"
    amp: str = "none"
    compile: bool = False
    engine: str = "client"
    cohort_size: int = 0
    workers: int | str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    scenario: Choice[ScenarioSpec] = field(default_factory=lambda: Choice("split_digits", SCENARIOS))
    model: ModelChoice[ModelSpec] = field(default_factory=lambda: ModelChoice("digits_cnn", MODELS))
    norm: Choice[NormSpec] = field(default_factory=lambda: Choice("auto", NORMS))
    strategy: Choice[StrategySpec] = field(default_factory=lambda: Choice("fedavg", STRATEGIES))
    learner: Choice[LearnerSpec] = field(default_factory=lambda: Choice("er_ace", LEARNERS))
    train: TrainConfig = field(default_factory=TrainConfig)
    rounds: RoundConfig = field(default_factory=RoundConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose("kind", self.kind, KINDS)
        for key in ("seed", "threads"):
            if type(getattr(self, key)) is not int:
                raise ConfigError(f"{key} must be an integer; got {getattr(self, key)!r}.")
        if not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"threads is between 1 and {MOST_THREADS}; got {self.threads}.")
        if not isinstance(self.device, str) or not DEVICE.fullmatch(self.device):
            raise ConfigError(f"device is auto, cpu, mps, cuda or one of several, cuda:1; got {shown(self.device)}.")
        choose("amp", self.amp, AMP)
        if type(self.compile) is not bool:
            raise ConfigError(f"compile must be true or false; got {shown(self.compile)}.")
        if self.workers != "auto" and (type(self.workers) is not int or not 1 <= self.workers <= MOST_WORKERS):
            raise ConfigError(
                f"workers, the processes that take a federation's clients side by side, is 'auto' or a number from 1 "
                f"to {MOST_WORKERS}; got {shown(self.workers)}."
            )
        self._require_engine()

    def _require_engine(self) -> None:
        choose("engine", self.engine, ENGINES)
        if type(self.cohort_size) is not int or not 0 <= self.cohort_size <= MOST_COHORT:
            raise ConfigError(
                f"cohort_size is a number of clients, 1 to {MOST_COHORT:,}, or 0 for as many as the model's size "
                f"suggests; got {shown(self.cohort_size)}."
            )
        if self.kind != "federated" and (self.engine, self.cohort_size) != ("client", 0):
            raise ConfigError(
                "engine and cohort_size are of federated runs: learners on streams take their turns one at a time. "
                "Leave them out."
            )
        if self.engine == "client" and self.cohort_size:
            raise ConfigError(
                f"cohort_size is {self.cohort_size}, and engine 'client' takes clients one at a time. Set engine to "
                "'cohort' or 'auto'."
            )

    @classmethod
    def defaults(cls, kind: Kind) -> RunConfig:
        """Return the configuration of a run of which nothing was said but its kind."""
        return cls(kind=kind, train=TrainConfig.for_kind(kind, {}), evaluate=EvaluateConfig.for_kind(kind, {}))

    @classmethod
    def default_values(cls, kind: Kind) -> dict[str, Any]:
        """Return :meth:`defaults` as :meth:`to_dict` gives them, a copy: who reads thousands of records asks often."""
        return {key: dict(value) if isinstance(value, dict) else value for key, value in _default_values(kind).items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries of plain values, options beside their method's name."""
        plain: dict[str, Any] = {"kind": self.kind, "seed": self.seed, "threads": self.threads}
        plain |= {key: own for key, default in MACHINE.items() if (own := getattr(self, key)) != default}
        for name in SECTIONS[self.kind]:
            section = getattr(self, name)
            plain[name] = section.to_dict() if isinstance(section, Choice) else section.to_dict(self.kind)
        return plain | ({"sources": dict(self.sources)} if self.sources else {})

    @cached_property
    def hash(self) -> str:
        """Return 12 hexadecimal digits that identify the configuration, seed included.

        Only what differs from the defaults enters, so that a new key leaves the runs of older versions their names;
        and nothing that leaves the numbers alone: the same run on another machine has the same hash. Of a device its
        kind enters, and not which one of several it is.
        """
        defaults, own = self.default_values(self.kind), self.to_dict()
        own |= {"device": kind_of_device(own["device"])} if "device" in own else {}
        # A federated run is one that says nothing of its kind.
        return digest(own, {**defaults, "kind": "federated"}, IMMATERIAL)

    @property
    def references(self) -> dict[str, str]:
        """Return the name or import path of every method and of the data, by section."""
        return {name: getattr(self, name).name for name in SECTIONS[self.kind] if hasattr(getattr(self, name), "name")}

    def require_importable(self, why: str) -> None:
        """Refuse objects that this process alone knows.

        Args:
            why: What cannot have them, and why; a clause.

        Raises:
            ConfigError: A method or the data was given as an object that has no import path.
        """
        for section, name in self.references.items():
            if in_process(name):
                raise ConfigError(
                    f"{section} {name} is an object of this Python process, and {why}. Put a function that returns it "
                    f"into a module, and give its import path instead: {section} package.module:function."
                )

    @property
    def title(self) -> str:
        """Return what the run is called in the names of folders, its hash left out."""
        parts: dict[str, tuple[Any, ...]] = {
            "federated": (self.strategy, self.norm, self.data),
            "continual": (self.learner, self.norm, self.scenario),
            "federated_continual": (self.strategy, self.learner, self.norm, self.scenario),
        }
        names = (filename(part.name) for part in parts[self.kind])
        return f"{'-'.join(names)}-seed{self.seed}"


@cache
def _default_values(kind: Kind) -> dict[str, Any]:
    return RunConfig.defaults(kind).to_dict()


def kind_of_device(device: str) -> str:
    """Return a device without its number: ``cuda`` of ``cuda:1``."""
    return device.partition(":")[0]


def filename(name: str) -> str:
    """Return a method's name as part of a file's: a stranger's is an import path, with characters that are not."""
    return "".join(c if c.isalnum() or c in "_.+" else "_" for c in name)[:60]


DEFAULT_NORM = "batch_norm"
"""What ``auto`` is where neither the strategy nor the scenario brings a norm along."""

METHOD_OPTIONS = frozenset(
    {
        "passes",
        "statistics",
        "recalibrate",
        "corrected",
        "project",
        "hyperspherical",
        "heads",
        "activation",
        "feature_norm",
        "norms",
        "infer_task",
        "infer_task_per",
    }
)
"""Keys of a continual run, in whatever section they stand, whose value makes another method; all else is tuned."""

METHOD_SWITCHES = frozenset(
    {"l2_init", "l2_scales", "weight_clip", "shrink", "perturb", "redo_every", "cbp_rate", "snr_eta", "weight_decay"}
)
"""Keys that make another method where they are not at their default; how far they are from it is tuned."""

IMMATERIAL = (
    ("data", "dir"),
    ("data", "download"),
    ("evaluate", "central_dir"),
    ("model", "weights"),
    ("rounds", "checkpoint_every"),
    ("rounds", "min_answered"),
    ("rounds", "min_nodes"),
    ("rounds", "wait"),
    ("rounds", "timeout"),
    ("train", "checkpoint_every"),
)
"""Section and key of what no number depends on; of weights the contents count, which have a digest of their own."""


def digest(values: Mapping[str, Any], defaults: Mapping[str, Any], immaterial: Iterable[tuple[str, str]]) -> str:
    """Return 12 hexadecimal digits that identify what differs from the defaults, immaterial keys left out."""
    plain = _without(values, defaults)
    for section, key in immaterial:
        plain.get(section, {}).pop(key, None)
    plain = {key: value for key, value in plain.items() if value != {}}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _without(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``values`` that differ from ``defaults``, table by table."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            kept[key] = _without(value, default)
        elif key not in defaults or value != default:
            kept[key] = value
    return kept
