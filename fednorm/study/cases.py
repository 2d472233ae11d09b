"""What a study runs: the cases of its grid, and the candidates that each method chooses its hyper-parameters from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fednorm.config import IMMATERIAL, MACHINE, KeyPath, RunConfig, flatten, nest
from fednorm.study.grid import Planned, checked, labels, require_different
from fednorm.study.reduction import departures, reduction
from fednorm.study.select import best_of, kind_of, mean_score, rule

if TYPE_CHECKING:
    from fednorm.study.adaptive import Adaptive

Result = Mapping[str, Any]
Table = Mapping[str, Any]


OF_NO_CONCERN = (*IMMATERIAL, ("seed",), ("threads",), *((key,) for key in MACHINE))
"""Keys in which a run may differ from its study without being another experiment."""


def smaller(layers: Sequence[Table], factor: float | None, varied: Collection[KeyPath]) -> RunConfig:
    """Return the configuration of keys laid over each other, reduced by a factor where there is one.

    Args:
        layers: Nested keys, each laid over those before it; what the last one sets is not reduced.
        factor: In (0, 1), or None.
        varied: Further keys that are not reduced.
    """
    config = checked(*layers)
    if factor is None:
        return config
    return checked(*layers, reduction(config, factor, {*varied, *flatten(layers[-1])}))


@dataclass(frozen=True)
class Candidate:
    """A configuration that a method may choose.

    Attributes:
        keys: Its hyper-parameters.
        configs: The runs it is judged by, one a seed.
    """

    keys: Mapping[KeyPath, Any]
    configs: tuple[RunConfig, ...]


@dataclass(frozen=True)
class Case:
    """A run of the grid, before hyper-parameters are chosen.

    Attributes:
        values: Its keys, what was set for all runs left out.
        origin: Where the study names it.
        method: The number of the method it belongs to.
    """

    values: Table
    origin: str
    method: int


@dataclass(frozen=True)
class Choice:
    """What a method has chosen.

    Attributes:
        method: The method's number.
        label: What it is called.
        keys: The hyper-parameters chosen.
        score: What they were chosen by, the mean over the seeds of the search, in [0, 1].
        run: The hash of the run they were chosen by; with several seeds, that of the first.
    """

    method: int
    label: str
    keys: Mapping[KeyPath, Any]
    score: float
    run: str


@dataclass(frozen=True)
class Study:
    """A study's runs; made by :func:`fednorm.study.study.read_study`.

    Attributes:
        name: The name of its file.
        title: What it is called on a page.
        about: What it is about.
        baseline: Part of the configuration of the method that others are compared with, or None.
        paper: Numbers of a paper, as in the file.
        cases: The runs of the grid, before hyper-parameters are chosen.
        overrides: Keys laid over all runs.
        searches: What each method may choose; empty where nothing is chosen.
        on_test: Whether hyper-parameters are chosen on test images.
        reduced: The factor by which rounds, images and clients are fewer than the file says; None for the whole study.
        varied: Keys that the grid or a search varies, which are not reduced.
        drawn: How configurations were drawn, a sentence; empty for every combination of lists.
        adaptive: What proposes configurations as results come in; ``searches`` are then what it has proposed so far,
            or would propose if it learned nothing.
    """

    name: str
    title: str
    about: str
    baseline: dict[str, Any] | None
    paper: tuple[dict[str, Any], ...]
    cases: tuple[Case, ...]
    overrides: Table
    searches: tuple[tuple[Candidate, ...], ...] = ()
    on_test: bool = False
    reduced: float | None = None
    varied: frozenset[KeyPath] = frozenset()
    drawn: str = ""
    adaptive: Adaptive | None = field(default=None, compare=False)
    configs: tuple[RunConfig, ...] = field(init=False)
    """The runs that are reported; empty while hyper-parameters are to be chosen."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "configs", () if self.searches else tuple(self.resolved(())))

    @property
    def search_configs(self) -> tuple[RunConfig, ...]:
        """Return the runs that hyper-parameters are chosen by."""
        return tuple(config for search in self.searches for candidate in search for config in candidate.configs)

    @property
    def rule(self) -> str:
        """Return by what hyper-parameters are chosen; empty where nothing is."""
        kinds = dict.fromkeys(kind_of(config) for config in self.search_configs)
        return " ".join(rule(kind, on_test=self.on_test) for kind in kinds) + self.drawn

    @property
    def split(self) -> str:
        """Return the images that hyper-parameters are chosen on: ``validation``, ``test`` or ``training``."""
        if all(kind_of(config) == "memorization" for config in self.search_configs):
            return "training"
        return "test" if self.on_test else "validation"

    def drafts(self) -> list[RunConfig]:
        """Return the runs of the grid with the first hyper-parameters in place of the chosen ones."""
        return list(self._drafts)

    @cached_property
    def _drafts(self) -> tuple[RunConfig, ...]:
        first = {number: search[0].keys for number, search in enumerate(self.searches)}
        return tuple(self._made(case, first.get(case.method, {})) for case in self.cases)

    def _made(self, case: Case, keys: Mapping[KeyPath, Any]) -> RunConfig:
        return smaller((case.values, nest(keys), self.overrides), self.reduced, self.varied)

    def departures(self, choices: Iterable[Choice]) -> dict[str, dict[str, list[Any]]]:
        """Return in which keys runs are not what the file says: by hash and key, the run's value and the file's.

        What is set for this call alone makes them differ (``--set``), and a reduction. The seed, where data are, and
        what computes a run do not count.

        Args:
            choices: What the methods have chosen; runs of others are left out.
        """
        if self.reduced is None and not self.overrides:
            return {}
        chosen = {choice.method: choice.keys for choice in choices}
        found = {}
        for case in self.cases:
            if case.method in chosen or not self.searches:
                keys = chosen.get(case.method, {})
                own, original = self._made(case, keys), checked(case.values, nest(keys))
                found[own.hash] = departures(own, original, OF_NO_CONCERN)
        return {run: keys for run, keys in found.items() if keys}

    def choices(self, results: Mapping[str, Result], hopeless: Collection[str] = ()) -> list[Choice]:
        """Return what each method has chosen; a method that cannot choose yet is left out.

        Args:
            results: Results of :attr:`search_configs` by hash.
            hopeless: Hashes of runs that broke down by their own numbers; a configuration with one of them is not
                chosen. One without a result for another reason makes its method wait.

        Raises:
            ConfigError: A score was not measured.
        """
        names = self._method_names()
        chosen = []
        for number, search in enumerate(self.searches):
            standing = [
                candidate for candidate in search if not any(config.hash in hopeless for config in candidate.configs)
            ]
            if not standing or not all(config.hash in results for c in standing for config in c.configs):
                continue
            scored = [[results[config.hash] for config in candidate.configs] for candidate in standing]
            best = best_of(scored)
            run = standing[best].configs[0].hash
            chosen.append(Choice(number, names[number], standing[best].keys, mean_score(scored[best]), run))
        return chosen

    def resolved(self, choices: Iterable[Choice]) -> list[RunConfig]:
        """Return the runs that are reported, with the chosen hyper-parameters.

        Args:
            choices: What the methods have chosen; runs of others are left out.

        Raises:
            ConfigError: Two runs are the same.
        """
        chosen = {choice.method: choice.keys for choice in choices}
        planned = [
            Planned(self._made(case, chosen.get(case.method, {})), case.origin)
            for case in self.cases
            if case.method in chosen or not self.searches
        ]
        require_different(planned, self.overrides)
        return [plan.config for plan in planned]

    def superseded(self, choices: Iterable[Choice]) -> set[str]:
        """Return the hashes of runs with what was not chosen: a search that was widened may choose another way.

        Args:
            choices: What the methods have chosen.
        """
        chosen = {choice.method: choice.keys for choice in choices}
        return {
            self._made(case, candidate.keys).hash
            for case in self.cases
            if case.method in chosen
            for candidate in self.searches[case.method]
            if candidate.keys != chosen[case.method]
        }

    def first_choices(self) -> list[Choice]:
        """Return what methods would choose that take the first of their hyper-parameters, as :meth:`drafts` do."""
        return [Choice(number, "", search[0].keys, 0.0, "") for number, search in enumerate(self.searches)]

    def _method_names(self) -> list[str]:
        """Return what each method is called, its hyper-parameters left out."""
        by_method = {case.method: draft for case, draft in zip(self.cases, self.drafts(), strict=True)}
        tuned = {path for search in self.searches for candidate in search for path in candidate.keys}
        return labels([by_method[number] for number in range(len(self.searches))], seed=False, apart_from=tuned)
