"""A finished run's result: the very table of ``result.json``, with what all who read it ask for.

    result = fednorm.federated(strategy="fedbn", rounds=10)
    result.score                                # the number that it is told by, here result["final"]["mean"]
    result.steps                                # its rounds, each with its number
    result.frame()                              # every number that was measured, as a polars data frame
    result.plot()                               # its curves, as a matplotlib figure
    result.model(client=3)                      # the trained network
    result                                      # in a notebook: its table and its curves

Two kinds of run differ in what happened, one after another (rounds, experiences), in what is trained (a strategy, a
learner) and in what they are told by. Whoever reads results asks the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fednorm.cards import STRATEGIES
from fednorm.config import DEFAULT_NORM, METHOD_OPTIONS, METHOD_SWITCHES, RunConfig
from fednorm.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    import polars
    from matplotlib.figure import Figure
    from torch import nn


class Result(dict[str, Any]):
    """A result; a dictionary of plain values, equal to the one in ``result.json``.

    Attributes:
        kind: ``federated`` or ``continual``.
        unit: What happened one after another: a ``round`` or an ``experience``.
        actor: The section of the configuration that says what is trained: ``strategy`` or ``learner``.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    actor: ClassVar[str]

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration, as nested tables."""
        config: dict[str, Any] = self["config"]
        return config

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self["config"]["seed"])

    @property
    def final(self) -> dict[str, Any]:
        """The scores at the end."""
        final: dict[str, Any] = self["final"]
        return final

    @property
    def folder(self) -> Path | None:
        """The run's record; None where nothing was written."""
        return Path(self["run"]) if self.get("run") else None

    @property
    def lines(self) -> Sequence[Mapping[str, Any]]:
        """What happened, a table a round or an experience."""
        lines: Sequence[Mapping[str, Any]] = self[f"{self.unit}s"]
        return lines

    @property
    def steps(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The :attr:`lines`, each with the number of its round or experience, from 1."""
        raise NotImplementedError

    @property
    def memorizes(self) -> bool:
        """Whether the run is about memorization: its test images are its training images."""
        return False

    @property
    def subject(self) -> str:
        """What the run is about, by which it is shown and chosen: its kind, or ``memorization``."""
        raise NotImplementedError

    @property
    def curves(self) -> Mapping[str, str]:
        """What is drawn of how the run went, by what it is called: names for :func:`fednorm.report.curves.named`.

        The last tells most.
        """
        raise NotImplementedError

    @property
    def matrix(self) -> Sequence[Sequence[float | None]]:
        """Row i: the accuracy on every experience after experience i; empty where that means nothing."""
        return ()

    @property
    def headline(self) -> str:
        """The key, among :attr:`final`, of the score that the run is told by and chosen by."""
        raise NotImplementedError

    @property
    def score(self) -> float | None:
        """The score under :attr:`headline`; None where it was not measured."""
        value = self.final.get(self.headline)
        return None if value is None or not math.isfinite(value) else float(value)

    @property
    def shown(self) -> float | None:
        """The accuracy that the run is told by in a line of text."""
        return self.score

    @property
    def method_name(self) -> str:
        """How tables call the run's method: what is trained, its norm, and what of both is not at its default."""
        raise NotImplementedError

    @property
    def method(self) -> tuple[Any, ...]:
        """What makes the run's method where hyper-parameters are chosen: runs with equal ones are candidates of it."""
        raise NotImplementedError

    def frame(self) -> polars.DataFrame:
        """Return every number that was measured, a row each, as :func:`fednorm.report.frame.records` has it."""
        from fednorm.report.frame import records

        return records([self])

    def plot(self) -> Figure:
        """Return how the run went, as a matplotlib figure."""
        from fednorm.report.notebook import figure

        return figure(self)

    def model(self, client: int | None = None) -> nn.Module:
        """Return the trained network, in evaluation mode.

        Args:
            client: A client's own network, by its partition id; the server's if None.

        Raises:
            ConfigError: The run was not recorded (``runs=None``), or there is no such client.
        """
        if self.folder is None:
            raise ConfigError(
                "The run was made without a record, so that its network was not kept. Make it with a folder for "
                "records, e.g. runs='runs'."
            )
        from fednorm.export import load_model

        return load_model(self.folder, client=client)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table and a figure."""
        from fednorm.report.notebook import html

        return html(self)


class FederatedResult(Result):
    """The result of a federated run."""

    kind = "federated"
    unit = "round"
    actor = "strategy"

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        """What happened in each round."""
        return self.lines

    def clients(self) -> polars.DataFrame:
        """Return what every client reported in every round: ``round``, ``phase``, ``client``, ``domain``, its metrics.

        Raises:
            ConfigError: The run was not recorded (``runs=None``).
            RecordError: The record cannot be read.
        """
        if self.folder is None:
            raise ConfigError(
                "The run was made without a record, so that what single clients reported was not kept. Make it with a "
                "folder for records, e.g. runs='runs'."
            )
        from fednorm.records.columns import frame_of

        return frame_of(self.folder)

    @property
    def plan(self) -> Mapping[str, Any]:
        """What the federation did with each of the model's tensors."""
        plan: Mapping[str, Any] = self["plan"]
        return plan

    @property
    def steps(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The rounds, by their numbers."""
        return [(line["round"], line) for line in self.lines]

    @property
    def subject(self) -> str:
        """Clients."""
        return "federated"

    @property
    def curves(self) -> Mapping[str, str]:
        """The mean accuracy over domains."""
        return {"mean accuracy": "mean"}

    @property
    def headline(self) -> str:
        """The mean accuracy over domains."""
        return "mean"

    @property
    def method_name(self) -> str:
        """The strategy, and the norm where it is not the strategy's own; their options that are not at the default."""
        strategy, norm = self.config["strategy"], self.config["norm"]
        options = [f"{key}={value}" for section in (strategy, norm) for key, value in section.items() if key != "name"]
        name = strategy["name"] if self._has_own_norm() else f"{strategy['name']} + {norm['name']}"
        return f"{name} ({', '.join(options)})" if options else str(name)

    def _has_own_norm(self) -> bool:
        """Return whether the norm is what the strategy brings along; records of older versions do not say it."""
        if "own_norm" in self:
            return bool(self["own_norm"])
        try:
            own = STRATEGIES[self.config["strategy"]["name"]].own_norm
        except (UnknownNameError, ConfigError):  # a stranger's, which is not here
            own = DEFAULT_NORM
        return bool(self.config["norm"]["name"] == own)

    @property
    def method(self) -> tuple[Any, ...]:
        """Strategy and norm; their options are tuned."""
        return self.config["strategy"]["name"], self.config["norm"]["name"]


class StreamResult(Result):
    """The result of a continual run."""

    kind = "continual"
    unit = "experience"
    actor = "learner"

    @property
    def experiences(self) -> Sequence[Mapping[str, Any]]:
        """What happened in each experience."""
        return self.lines

    @property
    def accuracy_matrix(self) -> Sequence[Sequence[float | None]]:
        """Row i: the accuracy on every experience after experience i."""
        matrix: Sequence[Sequence[float | None]] = self["accuracy_matrix"]
        return matrix

    @property
    def steps(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The experiences, by their numbers from 1."""
        return [(line["experience"] + 1, line) for line in self.lines]

    @property
    def memorizes(self) -> bool:
        """Whether the stream is about memorization."""
        return bool(self["data"]["memorization"])

    @property
    def subject(self) -> str:
        """What comes one after another, or how much can be learned by heart."""
        return "memorization" if self.memorizes else "continual"

    @property
    def curves(self) -> Mapping[str, str]:
        """The accuracy on training images, and the average so far where there is something to forget."""
        return {"training accuracy": "train_accuracy"} | ({} if self.memorizes else {"average accuracy": "average"})

    @property
    def matrix(self) -> Sequence[Sequence[float | None]]:
        """The accuracy matrix; of a stream about memorization its diagonal alone was measured."""
        return () if self.memorizes else self.accuracy_matrix

    @property
    def headline(self) -> str:
        """The average accuracy after the last experience; plasticity where the stream is about memorization."""
        return "plasticity" if self.memorizes else "average_accuracy"

    @property
    def shown(self) -> float | None:
        """The average accuracy, or that on the training images where it was not measured."""
        average: float | None = self.final["average_accuracy"]
        trained: float | None = self.final["train_accuracy"]
        return trained if average is None else average

    @property
    def method_name(self) -> str:
        """Learner and norm, and what is not at its default.

        That is, every option of the learner and of the norm, of the other settings those that make another method
        (:data:`~fednorm.config.METHOD_OPTIONS`), and the learning rate's schedule. An option that is true is called by
        its name alone.
        """
        config = self.config
        told = [_option(key, value) for section in ("learner", "norm") for key, value in _options(config[section])]
        told += [_option(key, value) for key, value in self._other_methods()]
        train = config["train"]
        if train.get("schedule", "constant") != "constant":
            told.append(f"{train['schedule']} over {train['schedule_over']}")
        name = f"{config['learner']['name']} + {config['norm']['name']}"
        return f"{name} ({', '.join(told)})" if told else name

    def _other_methods(self) -> list[tuple[str, Any]]:
        """Return the settings outside learner and norm that a method's name tells, where not at their default.

        Weight decay stands among the settings, as is usual.
        """
        defaults, found = RunConfig.default_values("continual"), list[tuple[str, Any]]()
        for section in ("model", "train", "evaluate"):
            keys = [key for key in defaults[section] if key in METHOD_OPTIONS | METHOD_SWITCHES - {"weight_decay"}]
            values = {key: self.config[section].get(key, defaults[section][key]) for key in keys}
            found += [(key, value) for key, value in values.items() if value != defaults[section][key]]
        return found

    @property
    def method(self) -> tuple[Any, ...]:
        """Learner, norm, :data:`METHOD_OPTIONS` and :data:`METHOD_SWITCHES`, chosen for each stream."""
        defaults, told = RunConfig.default_values("continual"), list[tuple[str, str, Any]]()
        for section, values in self.config.items():
            for key, value in values.items() if isinstance(values, Mapping) else ():
                if key in METHOD_OPTIONS | METHOD_SWITCHES and value != defaults.get(section, {}).get(key):
                    told.append((section, key, value if key in METHOD_OPTIONS else "on"))
        names = self.config["learner"]["name"], self.config["norm"]["name"]
        return self["data"]["title"], *names, tuple(sorted(told))


class GridResult(FederatedResult):
    """The result of a federation whose clients learn on streams of their own."""

    kind = "federated_continual"
    unit = "experience"

    @property
    def lines(self) -> Sequence[Mapping[str, Any]]:
        """What happened in each round."""
        lines: Sequence[Mapping[str, Any]] = self["rounds"]
        return lines

    @property
    def steps(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The rounds in which an experience ended, by its number from 1."""
        return [(line["experience"] + 1, line) for line in self.lines if "experience" in line]

    @property
    def curves(self) -> Mapping[str, str]:
        """What aggregation takes from a client's own network, and the mean accuracy on what clients have met."""
        return {"spatial forgetting": "spatial_forgetting", "average accuracy": "average_accuracy"}

    @property
    def matrix(self) -> Sequence[Sequence[float | None]]:
        """Row i: the mean over clients of the accuracy on every experience after experience i."""
        return [[_mean_of_known(column) for column in zip(*clients, strict=True)] for clients in self.accuracy_tensor]

    @property
    def subject(self) -> str:
        """Clients on what comes one after another."""
        return "federated_continual"

    @property
    def headline(self) -> str:
        """The mean over clients of each one's mean accuracy over the experiences it has met."""
        return "average_accuracy"

    @property
    def accuracy_tensor(self) -> Sequence[Sequence[Sequence[float | None]]]:
        """By time, client and experience: the accuracy of the network that the server sent."""
        tensor: Sequence[Sequence[Sequence[float | None]]] = self["accuracy_tensor"]
        return tensor

    @property
    def own_accuracy_tensor(self) -> Sequence[Sequence[Sequence[float | None]]]:
        """The same of the networks that the clients had just trained."""
        tensor: Sequence[Sequence[Sequence[float | None]]] = self["own_accuracy_tensor"]
        return tensor

    @property
    def method_name(self) -> str:
        """The strategy, the learner and the norm, and their options that are not at the default."""
        sections = [self.config[name] for name in ("strategy", "learner", "norm")]
        options = [f"{key}={value}" for section in sections for key, value in section.items() if key != "name"]
        name = " + ".join(str(section["name"]) for section in sections)
        return f"{name} ({', '.join(options)})" if options else name

    @property
    def method(self) -> tuple[Any, ...]:
        """Strategy, learner and norm, chosen for each grid; their options are tuned."""
        names = (self.config[name]["name"] for name in ("strategy", "learner", "norm"))
        return self["data"]["title"], *names


KINDS: Mapping[str, type[Result]] = {kind.kind: kind for kind in (FederatedResult, StreamResult, GridResult)}


def result_of(document: Mapping[str, Any]) -> Result:
    """Return a result's table as a result of its kind; a result is returned itself.

    Args:
        document: The table.
    """
    if isinstance(document, Result):
        return document
    return KINDS[str(document["config"].get("kind", "federated"))](document)


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _options(section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in section.items() if key != "name"]


def _option(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"{key}=false"
    return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
