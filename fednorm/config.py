"""The configuration of a run: frozen records, nested by concern, read from TOML and ``section.key=value``.

Unknown keys are errors that name the nearest valid one. The options of a norm and of a strategy stand beside their
``name`` (``norm.num_groups``, ``strategy.mu``) and are checked by the method itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from fednorm.errors import ConfigError, canonical
from fednorm.limits import INTEGER, MOST_DEPTH, require_float, require_path, require_plain, shown

Scalar = bool | int | float | str

MOST_BYTES = 4 * 2**20
"""Of a configuration's or a study's file."""

_ENDLESS_KEY = re.compile(r"(?:[\w\"'-]+[ \t]*\.[ \t]*){64}")
"""Tables in tables that a reader of TOML takes minutes for: its time grows with the square of them."""

MOST_THREADS = 1024
"""PyTorch threads; beyond some ten thousand the system ends the process that asks for them."""


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and who holds what of it.

    Attributes:
        name: A benchmark (``fednorm list data``), or ``folders`` for any Parquet folders.
        dir: The folder that holds the real data; not needed for ``digits_mini``.
        domains: The domains to use, in this order; empty for all that the benchmark finds.
        image_size: Height and width to resize to, in pixels; 0 for the model's own input size.
        train_per_client: Most training images a client; 0 for all. FedBN's protocol has 743.
        test_per_domain: Most test images a domain; 0 for all.
        clients_per_domain: Clients that share each domain.
        partition: How a domain's training images are dealt to its clients: ``iid``, ``dirichlet`` or ``shards``.
        alpha: Concentration of the Dirichlet distribution of labels; small means skewed.
        shards_per_client: Shards of label-sorted images a client gets.
        held_out: A domain that no client trains on (domain generalisation).
        validation: Share of each client's training images held back for choosing hyper-parameters, in [0, 1).
        merge: Whether each domain's train and test images are merged and split again 80/20, stratified, as FedBN does.
        download: Whether torchvision may download what is missing.
    """

    name: str = "digits_mini"
    dir: str = ""
    domains: tuple[str, ...] = ()
    image_size: int = 0
    train_per_client: int = 0
    test_per_domain: int = 0
    clients_per_domain: int = 1
    partition: str = "iid"
    alpha: float = 0.5
    shards_per_client: int = 2
    held_out: str = ""
    validation: float = 0.0
    merge: bool = False
    download: bool = False

    def __post_init__(self) -> None:
        require(
            self.clients_per_domain >= 1, f"data.clients_per_domain must be at least 1; got {self.clients_per_domain}."
        )
        require(0 <= self.validation < 1, f"data.validation is a share in [0, 1); got {self.validation}.")
        require(self.alpha > 0, f"data.alpha, a Dirichlet concentration, must be positive; got {self.alpha}.")
        require(
            self.shards_per_client >= 1, f"data.shards_per_client must be at least 1; got {self.shards_per_client}."
        )
        for key in ("image_size", "train_per_client", "test_per_domain"):
            require(getattr(self, key) >= 0, f"data.{key} must be 0 (no limit) or more; got {getattr(self, key)}.")
        choose("data.partition", self.partition, ("iid", "dirichlet", "shards"))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which architecture.

    Attributes:
        name: The model (``fednorm list models``).
        width: Channels of the first stage, for models that have it; 0 for the model's own.
        activation: The nonlinearity in place of the model's ReLUs, e.g. ``leaky_relu``; empty for the model's own.
    """

    name: str = "digits_cnn"
    width: int = 0
    activation: str = ""

    def __post_init__(self) -> None:
        require(self.width >= 0, f"model.width must be 0 (the model's own) or a number of channels; got {self.width}.")


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Which normalization method, with its options.

    Attributes:
        name: The method (``fednorm list norms``); ``auto`` for the strategy's own.
        options: The method's options (``fednorm explain NAME``).
    """

    name: str = "auto"
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Which federated strategy, with its options.

    Attributes:
        name: The strategy (``fednorm list strategies``).
        options: The strategy's options (``fednorm explain NAME``).
    """

    name: str = "fedavg"
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A client's local training.

    Attributes:
        learning_rate: Of SGD, per step.
        batch_size: Images a step.
        local_epochs: E, passes over the client's images a round.
        momentum: Of SGD; the buffer starts anew every round.
        weight_decay: Of SGD, added to the gradient.
        agc: Lambda of adaptive gradient clipping; 0 for no clipping.
    """

    learning_rate: float = 0.01
    batch_size: int = 32
    local_epochs: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    agc: float = 0.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"train.learning_rate must be positive; got {self.learning_rate}.")
        require(self.batch_size >= 1, f"train.batch_size must be at least 1; got {self.batch_size}.")
        require(self.local_epochs >= 1, f"train.local_epochs must be at least 1; got {self.local_epochs}.")
        require(0 <= self.momentum < 1, f"train.momentum must be in [0, 1); got {self.momentum}.")
        require(self.weight_decay >= 0, f"train.weight_decay must be 0 or more; got {self.weight_decay}.")
        require(self.agc >= 0, f"train.agc is lambda of adaptive gradient clipping, 0 (off) or more; got {self.agc}.")


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """The rounds of the federation.

    Attributes:
        num_rounds: Rounds of communication.
        fraction: Share of the clients sampled each round, in (0, 1].
        weighting: Weights of the average: ``equal``, or ``examples`` (proportional to each client's images).
        evaluate_every: Evaluate each so many rounds; the last round is always evaluated.
        checkpoint_every: Write a checkpoint each so many rounds; the last round always has one.
        max_update_norm: A client is rejected whose update, ||w_k - w||_2 over every floating-point tensor that travels
            (running statistics included), is longer; 0 for no limit. ``rounds.jsonl`` has the norm of every update.
        min_answered: Share of the clients with images to score that must answer the last evaluation, in [0, 1]; with
            fewer, or with nobody of a whole domain, the run fails. At 0 whatever came is the result. Either way the
            result says who is missing. A run that failed so can be called again with a lower share: its rounds stand.
    """

    num_rounds: int = 10
    fraction: float = 1.0
    weighting: str = "examples"
    evaluate_every: int = 1
    checkpoint_every: int = 1
    max_update_norm: float = 0.0
    min_answered: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.max_update_norm >= 0,
            f"rounds.max_update_norm is the largest norm of a client's update, or 0 for no limit; got "
            f"{self.max_update_norm}.",
        )
        require(0 <= self.min_answered <= 1, f"rounds.min_answered is a share in [0, 1]; got {self.min_answered}.")
        require(self.num_rounds >= 1, f"rounds.num_rounds must be at least 1; got {self.num_rounds}.")
        require(0 < self.fraction <= 1, f"rounds.fraction is a share in (0, 1]; got {self.fraction}.")
        require(self.evaluate_every >= 1, f"rounds.evaluate_every must be at least 1; got {self.evaluate_every}.")
        require(self.checkpoint_every >= 1, f"rounds.checkpoint_every must be at least 1; got {self.checkpoint_every}.")
        choose("rounds.weighting", self.weighting, ("examples", "equal"))


EVALUATIONS = ("own", "cross", "averaged", "pooled", "reestimated", "unseen")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The evaluation matrix, made once after the last round.

    Attributes:
        kinds: Any of ``own``, ``cross``, ``averaged``, ``pooled``, ``reestimated``, ``unseen``.
        images: k, the unlabelled test images a client re-estimates its statistics on.
        fallback: The local tensors with which an unseen domain is evaluated where the strategy leaves the server
            without any: ``refuse``, ``averaged``, ``pooled`` or ``reestimated``.
        split: The images that are scored: ``test``, or ``validation`` for choosing hyper-parameters.
        batch_size: Images a forward pass.
        diagnostics: Whether evaluated rounds tell how clients' running statistics drift and how the weights stand; for
            it, clients that keep their statistics are asked for them.
    """

    kinds: tuple[str, ...] = ("own",)
    images: int = 128
    fallback: str = "refuse"
    split: str = "test"
    batch_size: int = 64
    diagnostics: bool = True

    def __post_init__(self) -> None:
        for kind in self.kinds:
            choose("evaluate.kinds", kind, EVALUATIONS)
        choose("evaluate.fallback", self.fallback, ("refuse", "averaged", "pooled", "reestimated"))
        choose("evaluate.split", self.split, ("test", "validation"))
        require(self.images >= 2, f"evaluate.images must be at least 2 to estimate a variance; got {self.images}.")
        require(self.batch_size >= 1, f"evaluate.batch_size must be at least 1; got {self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a federated run's numbers depend on.

    Attributes:
        kind: ``federated``.
        seed: Of every random stream.
        threads: PyTorch threads; part of the configuration because sums depend on it in the last bits.
        data: Which data, and who holds what.
        model: Which architecture.
        norm: Which normalization method.
        strategy: Which federated strategy.
        train: A client's local training.
        rounds: The rounds.
        evaluate: The evaluation matrix.
    """

    kind: str = "federated"
    seed: int = 1
    threads: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rounds: RoundConfig = field(default_factory=RoundConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        choose("kind", self.kind, ("federated",))
        require(1 <= self.threads <= MOST_THREADS, f"threads is between 1 and {MOST_THREADS}; got {self.threads}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries of plain values, options beside their method's name."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        for section in ("norm", "strategy"):
            plain[section].update(plain[section].pop("options"))
        return typing.cast(dict[str, Any], plain)

    @property
    def hash(self) -> str:
        """Return 12 hexadecimal digits that identify the configuration, seed included.

        Only what differs from the defaults enters, so that a new key leaves the runs of older versions their names;
        and nothing that leaves the numbers alone: the same run on another machine has the same hash.
        """
        return digest(self.to_dict(), RunConfig().to_dict(), IMMATERIAL)

    @property
    def title(self) -> str:
        """Return what the run is called in the names of folders, its hash left out."""
        return f"{self.strategy.name}-{self.norm.name}-{self.data.name}-seed{self.seed}"


IMMATERIAL = (
    ("data", "dir"),
    ("data", "download"),
    ("rounds", "checkpoint_every"),
    ("rounds", "min_answered"),
    ("train", "checkpoint_every"),
)
"""Section and key of what no number depends on."""


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


def choose(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ConfigError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}; got {shown(value)}.{_near(value, choices)}")


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word)[:80], list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


_EXPECTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def _convert(key: str, value: Any, annotation: Any) -> Any:
    """Convert a TOML or command-line value to a field's type, or say what was expected."""
    origin = typing.get_origin(annotation)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        names = isinstance(items, list | tuple) and all(isinstance(item, str) for item in items)
        require(names, f"{key} must be a list of names; got {shown(value)}.")
        return tuple(item.strip() for item in items if item.strip())
    wanted = annotation
    try:
        if wanted is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if wanted is int and not isinstance(value, bool | float):
            whole = int(value)
            require(key == "seed" or -INTEGER <= whole < INTEGER, f"{key} has at most 64 bits; got {shown(whole)}.")
            return whole
        if wanted is float and not isinstance(value, bool) and math.isfinite(number := float(value)):
            return require_float(key, number)
        if wanted is str and isinstance(value, str):
            return value
    except ConfigError:
        raise
    except (KeyError, OverflowError, TypeError, ValueError):
        pass
    raise ConfigError(f"{key} must be {_EXPECTED[wanted]}; got {shown(value)}.")


def scalar(text: str) -> Scalar:
    """Read a command-line value as TOML would: a boolean, an integer, a float, else the text itself."""
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if kind is int or math.isfinite(number) or not any(digit.isdigit() for digit in text):
            return number
    return text  # also digits by the thousand: an error can quote them, and infinity it could not


def build(cls: type[Any], values: Mapping[str, Any], path: str = "") -> Any:
    """Build a frozen record of the configuration, and those within it, from nested dictionaries.

    Args:
        cls: The record's class.
        values: Its keys.
        path: What stands before a key in an error, e.g. ``train.``.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is out of range.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}
    free = "options" in known
    built: dict[str, Any] = {}
    options: dict[str, Scalar] = {}
    for key, value in values.items():
        full = f"{path}{key}"
        if free and key == "options":
            require(isinstance(value, Mapping), f"{full} is a table of options; got {shown(value)}.")
            options.update(value)
        elif key not in known and free:
            options[key] = value
        elif key not in known:
            raise ConfigError(
                f"There is no configuration key {shown(full)}.{_near(key, known)} Known here: {', '.join(known)}."
            )
        elif is_dataclass(known[key]):
            require(isinstance(value, Mapping), f"{full} is a table of keys; got {shown(value)}.")
            built[key] = build(typing.cast(type[Any], known[key]), value, f"{full}.")
        else:
            built[key] = _convert(full, value, known[key])
    if free:
        built["options"] = {key: _option(f"{path}{key}", value) for key, value in sorted(options.items())}
    if "name" in built:
        built["name"] = canonical(built["name"])
    return cls(**built)


def _option(key: str, value: Any) -> Scalar:
    """Return the value of a method's option, as far as it can be checked without the method."""
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(
            f"{shown(key)} is an option of its method: true or false, a number or a text; got {shown(value)}."
        )
    if isinstance(value, int):
        require(-INTEGER <= value < INTEGER, f"{key} is a number of at most 64 bits; got {shown(value)}.")
    return require_float(key, value) if isinstance(value, float) else value


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from nested dictionaries.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is out of range.
    """
    return typing.cast(RunConfig, build(RunConfig, values))


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file into nested dictionaries.

    Raises:
        ConfigError: The file is missing, is not TOML, or holds what no configuration key takes, e.g. a date.
    """
    require_path(path, "The configuration file")
    try:
        _require_regular(path)
        text = path.read_text(encoding="utf-8")
        require(not _ENDLESS_KEY.search(text), f"{path} has a key of more than 64 parts, deeper than any key.")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration file {path}: {error.strerror}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} nests tables or lists deeper than any configuration key does.") from error
    except ConfigError:
        raise
    except ValueError as error:  # not TOML, not UTF-8, an integer of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {str(error)[:300].rstrip('.')}.") from error
    require_plain(values, str(path), lines=True)
    return values


def _require_regular(path: Path) -> None:
    """Refuse a file that would be waited for, or read for minutes; one that is missing is named by its reader."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"The configuration file {path} is a device or a pipe. Give a TOML file.")
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; no configuration has more than {MOST_BYTES:,}.")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``over`` laid over it, table by table."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def override(assignment: str) -> dict[str, Any]:
    """Read one ``section.key=value`` into nested dictionaries.

    Raises:
        ConfigError: There is no ``=``.
    """
    key, equals, text = assignment.partition("=")
    require(bool(equals) and bool(key.strip()), f"--set takes section.key=value; got {shown(assignment)}.")
    parts = key.strip().split(".")
    require(len(parts) <= MOST_DEPTH, f"--set takes section.key=value; {shown(key)} is deeper than any key.")
    nested: Any = scalar(text)
    for part in reversed(parts):
        nested = {part: nested}
    require_plain(nested, "--set")
    return typing.cast(dict[str, Any], nested)
