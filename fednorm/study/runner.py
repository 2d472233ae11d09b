"""Running a study: several runs at a time, each resumable; one that fails or is killed stops no other."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from fednorm.config import RunConfig
from fednorm.cores import usable_cores
from fednorm.errors import AggregationError, ConfigError, DivergedError, RecordError
from fednorm.records.record import RunRecord
from fednorm.signals import Terminated, exit_code, raising
from fednorm.study import manifest
from fednorm.study.cases import Study
from fednorm.study.grid import labels
from fednorm.study.worker import Ended, Log, Progress, Worker, attempt, context_for, unlogged

__all__ = [
    "Failure",
    "Outcome",
    "Progress",
    "StudyOutcome",
    "Watcher",
    "default_jobs",
    "execute",
    "run_study",
]

MOST_JOBS, MOST_JOBS_A_CORE = 64, 4
"""Most runs at a time, whatever the machine and for each of its cores; the larger counts."""

log = logging.getLogger("fednorm")


@dataclass(frozen=True)
class Failure:
    """A run without a result.

    Attributes:
        hash: The run's.
        label: What it is called.
        reason: Why it has none.
        error: The class of the error that ended it; ``Killed`` if its process was.
    """

    hash: str
    label: str
    reason: str
    error: str = ""

    @property
    def diverged(self) -> bool:
        """Return whether the run broke down by its own numbers: a stream's loss, or every client's update."""
        return self.error in (AggregationError.__name__, DivergedError.__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of a number of runs.

    Attributes:
        results: Results of those that finished, in the order of the configurations.
        failures: Those that failed, as they did.
        interrupted: Whether the user or a signal stopped it: runs that are in neither list can be gone on with.
        exit_code: What a command that was stopped leaves with: 130 after Ctrl-C, 143 after ``SIGTERM``; 0 else.
    """

    results: list[dict[str, Any]]
    failures: list[Failure]
    interrupted: bool
    exit_code: int = 0


@dataclass(frozen=True)
class StudyOutcome(Outcome):
    """What came of a study; ``results`` are those that are reported.

    Attributes:
        manifest: What stands in its ``study.json``.
        selection_results: Results of the runs that hyper-parameters were chosen by.
        planned: Runs of the study in all.
        finished: Those that have a result.
    """

    manifest: dict[str, Any] = field(default_factory=dict)
    selection_results: list[dict[str, Any]] = field(default_factory=list)
    planned: int = 0
    finished: int = 0


class Watcher(Protocol):
    """What wants to know how a study goes, e.g. a display. Runs are named by their hashes."""

    def begin(self, title: str, runs: Mapping[str, str], jobs: int) -> None:
        """Called before the first of a number of runs.

        Args:
            title: What they are for: ``search`` or ``runs``.
            runs: What each is called.
            jobs: How many go at a time.
        """

    def started(self, run: str) -> None:
        """Called when a run is begun or gone on with."""

    def progress(self, run: str, progress: Progress) -> None:
        """Called as a run goes."""

    def ended(self, run: str, result: Mapping[str, Any], *, before: bool) -> None:
        """Called with the result of a run; ``before`` if it had finished in an earlier call."""

    def failed(self, failure: Failure) -> None:
        """Called when a run has failed."""

    def end(self) -> None:
        """Called after the last run, or when the user has stopped them."""


def default_jobs() -> int:
    """Return how many runs go at a time by default: one for each core that this process may use."""
    return usable_cores()


def execute(
    study: Study, *, runs: Path, jobs: int, watcher: Watcher | None = None, log_to: Log = unlogged
) -> StudyOutcome:
    """Run a whole study: choose hyper-parameters, if it has a search, then make the runs of its grid.

    What has finished before is read back; ``study.json`` in the folder tells of it all the while. A configuration of
    the search that diverges is not chosen and no failure; a method of which another run fails is not chosen for, and
    its runs wait for the next call.

    Args:
        study: The study.
        runs: The folder of records.
        jobs: Runs at a time.
        watcher: Is told how it goes.
        log_to: Who is told of each run, in its process.

    Raises:
        ConfigError: The folder holds another study, or ``jobs`` is less than 1.
        RecordError: The manifest cannot be written.
    """
    _require_jobs(jobs)
    with manifest.taken_back_if_empty(runs):
        return _execute(study, runs, jobs, watcher, log_to)


def _execute(study: Study, runs: Path, jobs: int, watcher: Watcher | None, log_to: Log) -> StudyOutcome:
    planned = len(study.search_configs) + len(study.cases)
    document = manifest.update(runs, study.adaptive.begun(study) if study.adaptive else study, (), study.configs)
    searched, failures, configs = Outcome([], [], interrupted=False), list[Failure](), list(study.configs)
    if study.searches:
        study, searched = _search(study, document, runs, jobs, watcher, log_to)
        diverged = {failure.hash: failure.reason for failure in searched.failures if failure.diverged}
        results = {result["hash"]: result for result in searched.results}
        unfinished = study.adaptive is not None and searched.interrupted  # what is to be tried is not known yet
        choices = [] if unfinished else study.choices(results, diverged)
        failures = _of_consequence(study, {choice.method for choice in choices}, searched.failures)
        configs = study.resolved(choices)
        document = manifest.update(runs, study, choices, configs, diverged)
    outcome = Outcome([], [], interrupted=True, exit_code=searched.exit_code)
    if not searched.interrupted:
        outcome = run_study(configs, runs=runs, jobs=jobs, watcher=watcher, log_to=log_to)
    return StudyOutcome(
        outcome.results,
        [*failures, *outcome.failures],
        outcome.interrupted,
        outcome.exit_code,
        manifest=document,
        selection_results=searched.results,
        planned=planned,
        finished=len(searched.results) + len(outcome.results),
    )


def _search(
    study: Study, document: Mapping[str, Any], runs: Path, jobs: int, watcher: Watcher | None, log_to: Log
) -> tuple[Study, Outcome]:
    """Make the runs that hyper-parameters are chosen by; return the study with what was tried, and what came of it."""

    def run(configs: Sequence[RunConfig]) -> Outcome:
        known = _diverged_before(configs, document)
        pending = [config for config in configs if config.hash not in {failure.hash for failure in known}]
        outcome = run_study(pending, runs=runs, jobs=jobs, watcher=watcher, title="search", log_to=log_to)
        return replace(outcome, failures=[*known, *outcome.failures])

    if study.adaptive is None:
        return study, run(study.search_configs)
    study, outcomes = study.adaptive.run(study, run)
    return study, Outcome(
        [result for outcome in outcomes for result in outcome.results],
        [failure for outcome in outcomes for failure in outcome.failures],
        interrupted=any(outcome.interrupted for outcome in outcomes),
        exit_code=max((outcome.exit_code for outcome in outcomes), default=0),
    )


def _diverged_before(configs: Sequence[RunConfig], document: Mapping[str, Any]) -> list[Failure]:
    """Return the runs of a search that an earlier call has seen diverge: the same numbers would come again."""
    reasons = document["selection"]["diverged"]
    names = zip(configs, labels(configs), strict=True)
    return [
        Failure(config.hash, name, reasons[config.hash], AggregationError.__name__)
        for config, name in names
        if config.hash in reasons
    ]


def _of_consequence(study: Study, chosen: Collection[int], failures: Iterable[Failure]) -> list[Failure]:
    """Return the failures of a search but for diverged configurations of methods that could choose another."""
    settled = {
        config.hash
        for number, search in enumerate(study.searches)
        if number in chosen
        for candidate in search
        for config in candidate.configs
    }
    return [failure for failure in failures if not (failure.diverged and failure.hash in settled)]


def run_study(
    configs: Sequence[RunConfig],
    *,
    runs: Path,
    jobs: int,
    watcher: Watcher | None = None,
    title: str = "runs",
    log_to: Log = unlogged,
) -> Outcome:
    """Run configurations, several at a time; finished ones are read back, cut ones go on.

    With ``jobs`` of 1 they run in this process, else in processes of their own. A KeyboardInterrupt, SIGTERM, SIGHUP or
    SIGQUIT ends the runs that are going, which can be gone on with, and the outcome says so; no process is left behind.

    Args:
        configs: The runs, with different hashes.
        runs: The folder of records.
        jobs: Runs at a time.
        watcher: Is told how they go.
        title: What they are for, told to the watcher.
        log_to: Who is told of each run, in its process.

    Raises:
        ConfigError: ``jobs`` is less than 1.
        FedNormError: No process could be started.
    """
    _require_jobs(jobs)
    queue = _Queue(configs, runs, watcher or _Nobody(), log_to)
    code = 0
    with raising():
        try:
            missing = queue.open(title, jobs)
            if jobs == 1:
                _run_here(queue, missing)
            else:
                _run_apart(queue, missing, jobs)
        except (KeyboardInterrupt, Terminated) as stop:
            code = exit_code(stop)
        finally:
            queue.watcher.end()
    results = [queue.results[config.hash] for config in configs if config.hash in queue.results]
    return Outcome(results, queue.failures, interrupted=code > 0, exit_code=code)


def _require_jobs(jobs: int) -> None:
    """Refuse a number of processes that no machine of this size holds: each has PyTorch in its memory."""
    most = max(MOST_JOBS_A_CORE * default_jobs(), MOST_JOBS)
    if jobs < 1:
        raise ConfigError(f"jobs, the number of runs at a time, must be at least 1 (--jobs); got {jobs}.")
    if jobs > most:
        raise ConfigError(
            f"jobs, the number of runs at a time (--jobs), is at most {most} on this machine, which has "
            f"{default_jobs()} cores to share among them; got {jobs}."
        )


class _Queue:
    """The runs of a study and what has come of them so far."""

    def __init__(self, configs: Sequence[RunConfig], runs: Path, watcher: Watcher, log_to: Log) -> None:
        self.configs, self.runs, self.watcher, self.log_to = configs, runs, watcher, log_to
        self.names = dict(zip([config.hash for config in configs], labels(configs), strict=True))
        self.results: dict[str, dict[str, Any]] = {}
        self.failures: list[Failure] = []

    def open(self, title: str, jobs: int) -> list[RunConfig]:
        """Read finished runs back and return the others."""
        self.watcher.begin(title, self.names, jobs)
        missing = []
        for config in self.configs:
            try:
                result = RunRecord(self.runs, config).result()
            except RecordError as error:
                self.close(config, Ended(None, str(error), type(error).__name__))
                continue
            if result is None:
                missing.append(config)
            else:
                self.results[config.hash] = result
                self.watcher.ended(config.hash, result, before=True)
        return missing

    def close(self, config: RunConfig, ended: Ended) -> None:
        """Take down how a run ended."""
        if ended.result is not None:
            self.results[config.hash] = ended.result
            self.watcher.ended(config.hash, ended.result, before=False)
            return
        if ended.trace:
            log.debug("run %s failed\n%s", config.hash, ended.trace)
        failure = Failure(config.hash, self.names[config.hash], ended.reason, ended.error)
        self.failures.append(failure)
        self.watcher.failed(failure)


def _run_here(queue: _Queue, missing: Sequence[RunConfig]) -> None:
    """Run configurations one after the other in this process."""
    for config in missing:
        queue.watcher.started(config.hash)
        queue.close(config, attempt(config, queue.runs, partial(queue.watcher.progress, config.hash), queue.log_to))


def _run_apart(queue: _Queue, missing: Sequence[RunConfig], jobs: int) -> None:
    """Run configurations in processes; one that is killed is replaced."""
    context, waiting = context_for({config.kind for config in missing}), deque(missing)
    workers: list[Worker] = []
    done = False
    try:
        while waiting or any(worker.config for worker in workers):
            idle = [worker for worker in workers if worker.config is None]
            while waiting and (idle or len(workers) < jobs):
                if not idle:
                    idle.append(Worker(context, queue.runs, jobs, queue.log_to))
                    workers.append(idle[-1])
                _begin(queue, idle.pop(), waiting.popleft())
            for worker in _speaking(workers):
                _listen(queue, worker, workers)
        done = True
    finally:
        _end(workers, at_once=not done)


def _begin(queue: _Queue, worker: Worker, config: RunConfig) -> None:
    worker.run(config)
    queue.watcher.started(config.hash)


def _speaking(workers: Sequence[Worker]) -> list[Worker]:
    """Wait until a worker has something to say."""
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _listen(queue: _Queue, worker: Worker, workers: list[Worker]) -> None:
    """Pass on what a worker says; one that has died is taken off the list."""
    said = worker.hear()
    config = worker.config
    if isinstance(said, Progress) and config is not None:
        queue.watcher.progress(config.hash, said)
    elif isinstance(said, Ended):
        if worker.dead:
            workers.remove(worker)
        worker.config = None
        if config is not None:
            queue.close(config, said)


def _end(workers: Sequence[Worker], *, at_once: bool) -> None:
    """End all workers; a second Ctrl-C does not wait for their files."""
    try:
        for worker in workers:
            worker.ask_to_end(at_once=at_once)
        for worker in workers:
            worker.see_it_end()
    except (KeyboardInterrupt, Terminated):
        for worker in workers:
            worker.kill()
        raise


class _Nobody:
    """Watches nothing."""

    def begin(self, title: str, runs: Mapping[str, str], jobs: int) -> None: ...

    def started(self, run: str) -> None: ...

    def progress(self, run: str, progress: Progress) -> None: ...

    def ended(self, run: str, result: Mapping[str, Any], *, before: bool) -> None: ...

    def failed(self, failure: Failure) -> None: ...

    def end(self) -> None: ...
