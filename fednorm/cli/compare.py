"""``fednorm compare``: a study's runs, several at a time, and their tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednorm.cli.answer import Depth, answers, say
from fednorm.cli.console import Stopped, err, fail, out, print_json
from fednorm.cli.report import show, tables
from fednorm.cli.standing import say_stopped
from fednorm.config import RunConfig, merge, override
from fednorm.errors import ConfigError, FedNormError, RecordError
from fednorm.limits import require_path
from fednorm.records.record import RunRecord
from fednorm.report._common import Table
from fednorm.report.live import Logged, require_folder, require_tools
from fednorm.report.numbers import percent
from fednorm.report.study_progress import StudyProgress, duration
from fednorm.study import manifest
from fednorm.study.cases import Study
from fednorm.study.grid import labels
from fednorm.study.recipes import find_study
from fednorm.study.runner import StudyOutcome, default_jobs, execute
from fednorm.study.study import read_study
from fednorm.study.worker import unlogged


def run_compare(  # noqa: PLR0913 - one parameter an option
    study: str,
    *,
    data_dir: Path | None,
    runs: Path | None,
    jobs: int | None,
    settings: Sequence[str],
    select_on_test: bool,
    reduce: float | None = None,
    log: Sequence[str] = (),
    log_dir: Path | None = None,
    dry_run: bool,
    markdown: bool,
    depth: Depth | None = None,
    as_json: bool,
) -> None:
    """Run a study and print its tables.

    The exit code is 2 if a run failed, after all others have finished, and 128 + its number if a signal
    stopped it: 130 after Ctrl-C.

    Args:
        study: The study's file, or the name of one that ships.
        data_dir: The folder of the real data.
        runs: The folder of records; ``runs/STUDY`` if None.
        jobs: Runs at a time; one for each core if None.
        settings: ``section.key=value`` each, laid over every run.
        select_on_test: Whether hyper-parameters are chosen on test images.
        reduce: A factor below 1 by which rounds, images and clients are fewer than the study's.
        log: Tools that each run tells its numbers.
        log_dir: The folder of what they write; ``logs`` if None.
        dry_run: Whether to list the runs with their estimated time, and stop.
        markdown: Whether tables are printed in Markdown.
        depth: How much a terminal shows; Markdown has all of it.
        as_json: Whether to print one JSON document instead.

    Raises:
        FedNormError: The study cannot be read, or nothing of it can be run.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be at least 1; got {jobs}.")
    require_folder(log, log_dir)
    log_to = Logged(require_tools(log), log_dir) if log else unlogged
    path = find_study(study)
    overrides: dict[str, Any] = {"data": {"dir": str(data_dir)}} if data_dir is not None else {}
    for setting in settings:
        overrides = merge(overrides, override(setting))
    made = read_study(path, overrides, select_on_test=select_on_test, reduce=reduce)
    less = "" if reduce is None else f"-reduced-{reduce:g}"
    folder, at_a_time = runs or Path("runs") / f"{path.stem}{less}", jobs or default_jobs()
    require_path(folder, "--out")
    if dry_run:
        return _show_plan(made, folder, at_a_time, markdown=markdown, as_json=as_json)
    outcome = execute(made, runs=folder, jobs=at_a_time, watcher=StudyProgress(err()), log_to=log_to)
    _show_outcome(outcome, folder, markdown=markdown, depth=depth or Depth(), as_json=as_json)
    return _leave(outcome)


def _show_outcome(outcome: StudyOutcome, folder: Path, *, markdown: bool, depth: Depth, as_json: bool) -> None:
    if as_json:
        failures = [
            {"run": f"{failure.hash} {failure.label}", "hash": failure.hash, "reason": failure.reason}
            for failure in outcome.failures
        ]
        return print_json(
            {
                "results": outcome.results,
                "failures": failures,
                "interrupted": outcome.interrupted,
                "selection": outcome.manifest["selection"],
                "out": str(folder),
            }
        )
    selection = outcome.manifest["selection"]
    chosen = [_chosen_table(selection)] if selection and selection["chosen"] else []
    if markdown:
        for table in (*chosen, *tables(outcome.results, studies=[outcome.manifest])):
            show(table, style="markdown")
        return None
    say(list(answers(outcome.results, studies=[outcome.manifest])), depth, chosen)
    if not outcome.results:  # while methods still choose, what they have chosen is all there is
        for table in chosen:
            show(table)
    if outcome.results:
        out().print(f"records: {folder}", markup=False, soft_wrap=True)
    return None


def _chosen_table(selection: dict[str, Any]) -> Table:
    """Return the table of the hyper-parameters that each method has chosen."""
    rows = tuple(
        (
            choice["method"],
            ", ".join(f"{key} {value}" for key, value in choice["keys"].items()) or "nothing to choose",
            percent(choice["score"]),
        )
        for choice in selection["chosen"]
    )
    note = f"{selection['rule']} {selection['configurations']} configurations a method"
    note += f"; {len(selection['diverged'])} diverged." if selection["diverged"] else "."
    return Table(
        "Chosen hyper-parameters",
        ("method", "chosen", f"{selection['split']} score (%)"),
        rows,
        (note,),
        texts=("chosen",),
    )


def _leave(outcome: StudyOutcome) -> None:
    """End with the exit code that an outcome asks for, and the sentence for it."""
    console = err()
    if len(outcome.failures) > 1 or (outcome.failures and outcome.interrupted):
        for failure in outcome.failures:
            console.print(f"failed: {failure.hash} {failure.label}: {failure.reason}", markup=False, soft_wrap=True)
    if outcome.interrupted:
        say_stopped(
            f"Finished and whole: {outcome.finished} of the study's {outcome.planned} runs. The same command goes on "
            "with the others, from their checkpoints.",
            outcome.exit_code,
        )
        raise Stopped(outcome.exit_code)
    if outcome.failures:
        fail(
            f"{len(outcome.failures)} of {outcome.planned} runs failed; the first, {outcome.failures[0].label}: "
            f"{outcome.failures[0].reason}"
        )


# The dry run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listed:
    """A run of a dry run.

    Attributes:
        config: Its configuration.
        label: What it is called.
        final: Whether its configuration is final; False while hyper-parameters are to be chosen.
        ended: How it ended in an earlier call: ``finished``, ``diverged``, or empty if it has not.
        seconds: About how long it will take; None if that is not known.
        basis: What the estimate rests on, or why there is none.
    """

    config: RunConfig
    label: str
    final: bool
    ended: str
    seconds: float | None
    basis: str

    def document(self) -> dict[str, Any]:
        """Return the run as JSON has it."""
        return {
            "hash": self.config.hash if self.final else None,
            "label": self.label,
            "finished": self.ended == "finished",
            "diverged": self.ended == "diverged",
            "estimated_seconds": None if self.seconds is None else round(self.seconds, 1),
            "basis": self.basis,
            "config": self.config.to_dict(),
        }


def _show_plan(study: Study, folder: Path, jobs: int, *, markdown: bool, as_json: bool) -> None:
    """Show the runs of a study with the time they will take."""
    diverged = ((manifest.read(folder) or {}).get("selection") or {}).get("diverged", {})
    searched = _listed(study.search_configs, folder, diverged=diverged)
    configs, final = _known(study, folder, diverged)
    listed = _listed(configs, folder, final=final)
    parts = [_total(part, jobs) for part in (searched, listed)]  # the one begins when the other has ended
    total = None if None in parts else sum(part for part in parts if part is not None)
    if as_json:
        return print_json(
            {
                "study": study.name,
                "out": str(folder),
                "jobs": jobs,
                "selection": study.rule or None,
                "runs": [run.document() for run in listed],
                "selection_runs": [run.document() for run in searched],
                "estimated_seconds": None if total is None else round(total, 1),
            }
        )
    about = "not known" if total is None else f"about {duration(total)}"
    notes = [f"Estimated time with {jobs} at a time: {about}.", *_bases([*searched, *listed])]
    style = "markdown" if markdown else "table"
    if searched:
        show(_plan_table(f"{study.title}: search", searched, [study.rule]), style=style)
    return show(_plan_table(study.title, listed, notes), style=style)


def _known(study: Study, folder: Path, diverged: Collection[str]) -> tuple[Sequence[RunConfig], bool]:
    """Return the runs that are reported, and whether their hyper-parameters are chosen already."""
    if not study.searches:
        return study.configs, True
    results = {config.hash: result for config in study.search_configs if (result := _result(config, folder))}
    choices = study.choices(results, diverged)
    return (study.resolved(choices), True) if len(choices) == len(study.searches) else (study.drafts(), False)


def _result(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    try:
        return RunRecord(folder, config).result()
    except RecordError:  # it is damaged, and the run itself will say so
        return None


def _listed(
    configs: Sequence[RunConfig], folder: Path, *, final: bool = True, diverged: Collection[str] = ()
) -> list[_Listed]:
    """Return runs with their estimated time: none where one has finished or diverged before."""
    listed = []
    for config, label in zip(configs, labels(configs), strict=True):
        if config.hash in diverged:
            listed.append(_Listed(config, label, final, "diverged", 0.0, ""))
        elif final and (RunRecord(folder, config).folder / "result.json").exists():
            listed.append(_Listed(config, label, final, "finished", 0.0, ""))
        else:
            listed.append(_estimated(config, label, final))
    return listed


def _estimated(config: RunConfig, label: str, final: bool) -> _Listed:
    from fednorm.study.estimate import estimate_seconds  # times steps of what trains

    try:
        estimate = estimate_seconds(config)
    except FedNormError as error:
        return _Listed(config, label, final, "", None, f"Not known: {error}")
    return _Listed(config, label, final, "", estimate.seconds, estimate.basis)


def _total(runs: Iterable[_Listed], jobs: int) -> float | None:
    """Return about how long runs take, so many at a time; None if that of one is not known."""
    from fednorm.study.estimate import seconds_at_once

    seconds = [run.seconds for run in runs]
    known = [value for value in seconds if value is not None]
    return seconds_at_once(known, jobs) if len(known) == len(seconds) else None


def _bases(runs: Iterable[_Listed]) -> list[str]:
    """Return what the estimates rest on, a sentence each."""
    return list(dict.fromkeys(run.basis.rstrip(".") + "." for run in runs if run.basis))


def _plan_table(title: str, runs: Sequence[_Listed], notes: Sequence[str]) -> Table:
    rows = tuple(
        (
            run.label,
            run.config.hash if run.final else "to be chosen",
            run.ended or ("not known" if run.seconds is None else duration(run.seconds)),
        )
        for run in runs
    )
    return Table(title, (f"{len(runs)} runs", "hash", "estimated time"), rows, tuple(notes), texts=("estimated time",))
