"""A search in which what was measured says what is tried next: Optuna's, with the same budget for every method.

Akiba et al. Optuna: A Next-generation Hyperparameter Optimization Framework. KDD 2019. https://arxiv.org/abs/1907.10902.
Its TPE (tree-structured Parzen estimator) proposes one configuration of each method at a time, after a third of the
budget has been drawn at random; methods go side by side. Nothing is kept but the runs' records: proposals follow from
the seed and the scores, so that a study that was cut short proposes the same ones again and reads their runs back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from fednorm.config import KeyPath, RunConfig
from fednorm.errors import ConfigError
from fednorm.rng import stream_seed
from fednorm.study.cases import Candidate, Study
from fednorm.study.grid import Axis
from fednorm.study.search import How, Span, require_enough
from fednorm.study.select import mean_score

_REPEATS = 20
"""Proposals of a configuration that was tried already, after which one is drawn at random instead."""


class _Outcome(Protocol):
    """What came of a number of runs: :class:`fednorm.study.runner.Outcome`."""

    @property
    def results(self) -> list[dict[str, Any]]: ...

    @property
    def failures(self) -> list[Any]: ...

    @property
    def interrupted(self) -> bool: ...


Came = TypeVar("Came", bound=_Outcome)


@dataclass(frozen=True)
class Adaptive:
    """The search of a study whose configurations are proposed one after another.

    Attributes:
        how: The method, the budget and the seed.
        spaces: What each method may choose from.
        make: Makes the candidate of a method, by its number, with some hyper-parameters.
        where: What the study is called in an error.
    """

    how: How
    spaces: tuple[tuple[Axis, ...], ...]
    make: Callable[[int, Mapping[KeyPath, Any]], Candidate]
    where: str

    def begun(self, study: Study) -> Study:
        """Return the study with the candidates that will be tried whatever comes."""
        return replace(study, searches=tuple(search[:1] for search in study.searches))

    def run(self, study: Study, run: Callable[[Sequence[RunConfig]], Came]) -> tuple[Study, list[Came]]:
        """Try as many configurations of each method as the budget allows.

        Args:
            study: The study.
            run: Makes runs; those that have finished before are read back.

        Returns:
            The study with what was tried, and what came of it. A method of which a run fails other than by its own
            numbers proposes no more: it waits for the next call, and so do all if the user stops them.
        """
        proposers = [Proposer(self.how, space, self.where) for space in self.spaces]
        tried: list[list[Candidate]] = [[] for _ in proposers]
        waiting: set[int] = set()
        outcomes: list[Came] = []
        for _ in range(self.how.budget):
            asked = {}
            for number, proposer in enumerate(proposers):
                if number not in waiting and (proposer.space or not tried[number]):
                    asked[number] = self.make(number, proposer.ask())
                    tried[number].append(asked[number])
            if not asked:
                break
            outcome = run([config for candidate in asked.values() for config in candidate.configs])
            outcomes.append(outcome)
            diverged = {failure.hash for failure in outcome.failures if failure.diverged}
            if outcome.interrupted:
                break
            results = {result["hash"]: result for result in outcome.results}
            for number, candidate in asked.items():
                hashes = [config.hash for config in candidate.configs]
                if all(run in results for run in hashes):
                    proposers[number].tell(mean_score([results[run] for run in hashes]))
                elif diverged.intersection(hashes):
                    proposers[number].tell(None)
                else:
                    waiting.add(number)
        return replace(study, searches=tuple(map(tuple, tried))), outcomes


class Proposer:
    """What proposes the configurations of one method.

    Args:
        how: The budget and the seed.
        space: What may be chosen from.
        where: What the study is called in an error.

    Raises:
        ConfigError: Optuna is not installed, or there are fewer configurations than the budget asks for.
    """

    def __init__(self, how: How, space: Sequence[Axis], where: str) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                f'{where}: search.method = "optuna" needs the package optuna, which is not installed: pip install '
                '"fednorm[optuna]". Without it there is search.method = "random".'
            ) from error
        if space:
            require_enough(how, space, where)
        self.space = tuple(space)
        self._optuna, self._seen = optuna, set[str]()
        self._trial: Any = None
        self._fallback = optuna.samplers.RandomSampler(seed=stream_seed(how.seed, "search", "optuna") % 2**32)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(
                seed=stream_seed(how.seed, "search", "optuna") % 2**32, n_startup_trials=max(2, how.budget // 3)
            ),
        )

    def ask(self) -> dict[KeyPath, Any]:
        """Return the next configuration, none twice."""
        usual = self._study.sampler
        for repeat in range(10_000):
            if repeat == _REPEATS:
                self._study.sampler = self._fallback
            trial: Any = self._study.ask()
            keys = {axis.path: _suggested(trial, axis) for axis in self.space}
            if repr(keys) not in self._seen:
                break
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self._study.sampler = usual
        self._seen.add(repr(keys))
        self._trial = trial
        return keys

    def tell(self, score: float | None) -> None:
        """Tell the score of the last configuration, in [0, 1]; None where it diverged, which counts as 0."""
        self._study.tell(self._trial, 0.0 if score is None else score)


def _suggested(trial: Any, axis: Axis) -> Any:
    name = ".".join(axis.path)
    if not isinstance(axis, Span):
        place: int = trial.suggest_categorical(name, list(range(len(axis.values))))
        return axis.values[place]
    if axis.range.whole:
        return trial.suggest_int(name, int(axis.range.low), int(axis.range.high), log=axis.range.log)
    value = trial.suggest_float(name, axis.range.low, axis.range.high, log=axis.range.log)
    return min(max(float(f"{value:.4g}"), axis.range.low), axis.range.high)
