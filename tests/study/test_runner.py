"""Running studies: several at once are one after the other, nothing that finished is lost, nothing is left behind."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fednorm import cores
from fednorm.config import RunConfig, merge, resolve
from fednorm.config.schema import KINDS
from fednorm.errors import ConfigError, FedNormError, RecordError
from fednorm.federation.simulate import simulate
from fednorm.signals import Terminated
from fednorm.study import runner, worker
from fednorm.study.grid import expand
from fednorm.study.runner import Failure, Progress, default_jobs, execute, run_study
from fednorm.study.study import make_study

Small = Callable[..., dict[str, Any]]


class Watch:
    """Keeps what a watcher is told."""

    def __init__(self, on_progress: Callable[[str, Progress], None] | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._on_progress = on_progress

    def begin(self, title: str, runs: Mapping[str, str], jobs: int) -> None:
        self.told.append(("begin", title, dict(runs), jobs))

    def started(self, run: str) -> None:
        self.told.append(("started", run))

    def progress(self, run: str, progress: Progress) -> None:
        self.told.append(("progress", run, progress))
        if self._on_progress:
            self._on_progress(run, progress)

    def ended(self, run: str, result: Mapping[str, Any], *, before: bool) -> None:
        self.told.append(("ended", run, result["hash"], before))

    def failed(self, failure: Failure) -> None:
        self.told.append(("failed", failure.hash))

    def end(self) -> None:
        self.told.append(("end",))

    def of(self, what: str) -> list[tuple[Any, ...]]:
        return [one[1:] for one in self.told if one[0] == what]


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # several processes import what trains
def test_processes_do_what_one_does_and_a_run_that_fails_or_is_killed_stops_no_other(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(rounds={"num_rounds": 3})
    good = expand(base, [{}], {"strategy": {"name": ["fedbn", "fedadam"]}}, {})
    (diverging,) = expand(base, [{"strategy": {"name": "fedavg"}, "train": {"learning_rate": 1e30}}], {}, {})
    (unfit,) = expand(base, [{"norm": {"name": "none"}}], {}, {})
    (victim,) = expand(base, [{"seed": 99, "rounds": {"num_rounds": 10_000}}], {}, {})
    workers: list[worker.Worker] = []

    class Seen(worker.Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            workers.append(self)

    def kill(run: str, progress: Progress) -> None:
        if run == victim.hash and progress.done == 2:
            (at_it,) = [one for one in workers if one.config == victim]
            os.kill(at_it._process.pid or 0, signal.SIGKILL)

    monkeypatch.setattr(runner, "Worker", Seen)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    watch = Watch(kill)
    configs: list[RunConfig] = [victim, diverging, unfit, *good]
    outcome = run_study(configs, runs=tmp_path / "two", jobs=2, watcher=watch)

    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert not outcome.interrupted
    assert len(workers) in (2, 3)  # one more where runs were left when one was killed
    assert not any(one._process.is_alive() for one in workers)
    reasons = {failure.hash: failure for failure in outcome.failures}
    assert reasons.keys() == {victim.hash, diverging.hash, unfit.hash}
    assert (
        "killed by SIGKILL. The system does so when memory runs out: take fewer --jobs" in reasons[victim.hash].reason
    )
    assert (reasons[victim.hash].error, reasons[victim.hash].label.split(", ")[0]) == ("Killed", "fedbn")
    assert "Round 2: none of the 5 sampled clients" in reasons[diverging.hash].reason
    assert "would silently be FedAvg" in reasons[unfit.hash].reason
    assert [reasons[config.hash].diverged for config in (victim, diverging, unfit)] == [False, True, False]

    assert [result["hash"] for result in outcome.results] == [config.hash for config in good]
    for config, result in zip(good, outcome.results, strict=True):
        alone = simulate(config, runs=tmp_path / "one")  # type: ignore[arg-type]
        assert [line["train_loss"] for line in result["rounds"]] == [line["train_loss"] for line in alone["rounds"]]
        models = [load_file(Path(r["run"]) / "model.safetensors") for r in (result, alone)]
        assert models[0].keys() == models[1].keys()
        assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])

    told = [progress for run, progress in watch.of("progress") if run == good[0].hash]
    assert [(one.done, one.total, one.unit) for one in told] == [(done, 3, "round") for done in range(4)]
    assert [one.accuracy for one in told] == [None, *(line["mean"] for line in outcome.results[0]["rounds"])]
    assert {run for (run,) in watch.of("started")} == {config.hash for config in configs}
    assert watch.told[0][:2] == ("begin", "runs")
    assert watch.told[-1] == ("end",)


def test_workers_are_forked_off_a_process_that_has_imported_what_they_need_where_that_is_safe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lists: list[list[str]] = []
    context = worker.get_context("forkserver")
    monkeypatch.setattr(context, "set_forkserver_preload", lists.append)
    monkeypatch.setattr(worker, "get_context", lambda method: context if method == "forkserver" else method)
    monkeypatch.setattr(sys, "platform", "linux")
    assert worker.context_for({"federated"}) is context
    assert lists[0][0] == "fednorm.federation.simulate"
    assert "fednorm.norms.batch_norm" in lists[0]
    assert "fednorm.streams.simulate" not in lists[0]
    for module in lists[0]:
        importlib.import_module(module)
    for kind in KINDS:
        assert worker.context_for({kind}) is context
        for module in lists[-1]:
            importlib.import_module(module)
    worker.context_for(KINDS)
    assert len(set(lists[-1])) == len(lists[-1])
    monkeypatch.setattr(sys, "platform", "darwin")
    assert worker.context_for({"federated"}) == "spawn"


@pytest.mark.slow
def test_a_worker_has_the_environment_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tells.py").write_text("import os\ndef data():\n    raise RuntimeError(os.environ['WORD'])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for word in ("first", "second"):
        monkeypatch.setenv("WORD", word)
        configs = [resolve({"data": {"name": "tells:data"}, "seed": seed}) for seed in (1, 2)]
        outcome = run_study(configs, runs=tmp_path / word, jobs=2)
        assert [word in failure.reason for failure in outcome.failures] == [True, True]


COMMAND = """
import sys
from fednorm.cli.app import main
if __name__ == "__main__":
    sys.argv = ["fednorm", "compare", "study.toml", "--out", "out", "--jobs", "2"]
    main()
"""

STUDY = """
[base]
model = { width = 4 }
data = { train_per_client = 24, test_per_domain = 10 }
strategy.name = "fedbn"
[[points]]
rounds.num_rounds = 1
[[points]]
LONG
[grid]
seed = [1, 2]
"""


def started(folder: Path, long: str, trace: str) -> subprocess.Popen[str]:
    """Return a study's process, in a session of its own, when two runs have finished and two are going.

    Args:
        folder: Where it works.
        long: What makes the latter two long.
        trace: A file that runs have once they are going.
    """
    (folder / "study.toml").write_text(STUDY.replace("LONG", long))
    (folder / "run.py").write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, "run.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        finished = {path.parent for path in folder.glob("out/*/result.json")}
        if len(finished) == 2 and len({path.parent for path in folder.glob(f"out/*/{trace}")} - finished) == 2:
            return process
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"the study did not come as far: {process.communicate()}")


def nobody_is_left(group: int) -> bool:
    """Return whether all processes of a group end within ten seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return False


@pytest.mark.slow
def test_ctrl_c_leaves_finished_runs_whole_and_no_process(tmp_path: Path) -> None:
    process = started(tmp_path, "rounds.num_rounds = 100000", "checkpoint.safetensors")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and all workers
    _, err = process.communicate(timeout=60)
    assert nobody_is_left(process.pid)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Finished and whole: 2 of the study's 4 runs. The same command goes on with the others" in err
    assert not list(tmp_path.glob("out/*/*.part"))
    for path in tmp_path.glob("out/*/result.json"):
        assert json.loads(path.read_text())["final"]["round"] == 1
    rounds = sorted(path.read_text().count("\n") for path in tmp_path.glob("out/*/rounds.jsonl"))
    assert rounds[:2] == [1, 1]
    assert min(rounds[2:]) >= 1  # and their checkpoints are there to go on from: test_resume.py


@pytest.mark.slow
def test_workers_do_not_outlive_a_parent_that_is_killed_though_their_round_is_long(tmp_path: Path) -> None:
    process = started(tmp_path, "train.local_epochs = 1000000", "run.json")
    process.kill()
    process.communicate(timeout=60)
    assert nobody_is_left(process.pid)


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from fednorm.study.runner import execute\n"
        "from fednorm.study.study import make_study\n"
        f"execute(make_study({{'base': {{}}}}), runs=Path({str(tmp_path / 'out')!r}), jobs=2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "FedNormError: A process for the study's runs ended before it could begin (exit code 1)" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr


# In this process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Let federations be over at once, with an accuracy that is their learning rate; what is run is taken down.

    A rate of 9 diverges; a rate of 8 is a mistake of ours.
    """
    from fednorm.errors import AggregationError
    from fednorm.records.record import RunRecord

    ran: list[RunConfig] = []

    def run(config: Any, *, runs: Path, observer: Any) -> dict[str, Any]:
        ran.append(config)
        rate = config.train.learning_rate
        if rate == 9:
            raise AggregationError("Round 1: no update was finite.")
        if rate == 8:
            raise ZeroDivisionError("ours")
        observer.round({"round": 1, "mean": rate})
        scores = {"per_domain": {"none": rate}, "mean": rate, "worst": rate}
        result = {
            **{"kind": "federated", "hash": config.hash, "config": config.to_dict(), "seconds": 1.0},
            **{"data": {"title": "none", "notes": []}, "rounds": [{"round": 1, "bytes_down": 0, "bytes_up": 0}]},
            **{"evaluation": {"own": scores}, "final": {**scores, "round": 1, "selection": "test images"}},
        }
        record = RunRecord(runs, config)
        record.prepare()
        record.finish(result, {})
        return {**result, "run": str(record.folder)}

    monkeypatch.setattr("fednorm.federation.simulate.simulate", run)
    return ran


def searching(rates: Sequence[float], **over: Any) -> Any:
    return make_study(
        {
            "base": {},
            "grid": {"seed": [1, 2]},
            "search": {"train": {"learning_rate": list(rates)}},
            "select": {"data": {"validation": 0.2}},
        },
        overrides=over,
    )


def test_a_study_searches_then_reports_and_does_only_what_is_missing(tmp_path: Path, pretend: list[RunConfig]) -> None:
    watch = Watch()
    outcome = execute(searching([0.1, 0.3, 9.0, 0.2]), runs=tmp_path, jobs=1, watcher=watch)
    assert [(c.train.learning_rate, c.evaluate.split, c.seed) for c in pretend] == [
        *((rate, "validation", 1) for rate in (0.1, 0.3, 9.0, 0.2)),
        *((0.3, "test", seed) for seed in (1, 2)),
    ]
    assert (outcome.failures, outcome.interrupted) == ([], False)
    assert [result["final"]["mean"] for result in outcome.results] == [0.3, 0.3]
    assert (outcome.planned, outcome.finished) == (6, 5)
    assert outcome.manifest["selection"]["chosen"][0]["keys"] == {"train.learning_rate": 0.3}
    assert outcome.manifest["selection"]["diverged"] == {pretend[2].hash: "Round 1: no update was finite."}
    assert [title for title, *_ in watch.of("begin")] == ["search", "runs"]
    assert [before for *_, before in watch.of("ended")] == [False] * 5

    watch, done = Watch(), len(pretend)
    again = execute(searching([0.1, 0.3, 9.0, 0.2]), runs=tmp_path, jobs=1, watcher=watch)
    assert len(pretend) == done
    assert again.results == outcome.results
    assert [before for *_, before in watch.of("ended")] == [True] * 5
    assert watch.of("started") == []
    more = execute(searching([0.1, 0.3, 9.0, 0.2], seed=3), runs=tmp_path, jobs=1)
    assert [c.seed for c in pretend[done:]] == [3]
    assert more.manifest["runs"] == [*outcome.manifest["runs"], pretend[-1].hash]


def test_a_method_all_of_whose_configurations_diverge_is_a_failure_each_time(
    tmp_path: Path, pretend: list[RunConfig]
) -> None:
    for _ in range(2):
        outcome = execute(searching([9.0]), runs=tmp_path, jobs=1)
        assert [(failure.label, failure.diverged) for failure in outcome.failures] == [("fedavg, seed 1", True)]
        assert outcome.results == []
    assert len(pretend) == 1


def test_a_mistake_of_ours_is_a_reason_and_the_choice_waits_for_it(tmp_path: Path, pretend: list[RunConfig]) -> None:
    outcome = execute(searching([0.1, 8.0, 0.2]), runs=tmp_path, jobs=1)
    assert [failure.reason for failure in outcome.failures] == ["ZeroDivisionError: ours"]
    assert outcome.results == []
    assert len(outcome.selection_results) == 2
    assert len(pretend) == 3


def test_a_damaged_result_fails_its_run_alone(tmp_path: Path, pretend: list[RunConfig]) -> None:
    study = make_study({"base": {}, "grid": {"seed": [1, 2]}})
    (broken, _) = execute(study, runs=tmp_path, jobs=1).results
    Path(broken["run"], "result.json").write_text("{")
    outcome = execute(study, runs=tmp_path, jobs=1)
    assert [failure.hash for failure in outcome.failures] == [broken["hash"]]
    assert "is not a result" in outcome.failures[0].reason
    assert len(outcome.results) == 1
    assert len(pretend) == 2


def test_ctrl_c_in_this_process_keeps_what_has_finished(tmp_path: Path, pretend: list[RunConfig]) -> None:
    def stop(run: str, _: Progress) -> None:
        if run == study.configs[1].hash:
            os.kill(os.getpid(), signal.SIGTERM)  # is heard as Ctrl-C

    study, watch = make_study({"base": {}, "grid": {"seed": [1, 2, 3]}}), Watch(stop)
    outcome = execute(study, runs=tmp_path, jobs=1, watcher=watch)
    assert outcome.interrupted
    assert [result["hash"] for result in outcome.results] == [study.configs[0].hash]
    assert outcome.failures == []
    assert watch.told[-1] == ("end",)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(pretend) == 2


def test_a_search_that_is_stopped_reports_nothing(tmp_path: Path, pretend: list[RunConfig]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    outcome = execute(searching([0.1, 0.2]), runs=tmp_path, jobs=1, watcher=Watch(stop))
    assert (outcome.interrupted, outcome.results, len(pretend)) == (True, [], 1)
    assert outcome.manifest["selection"]["chosen"] == []


def test_no_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be at least 1 \(--jobs\); got 0"):
        run_study([], runs=tmp_path, jobs=0)


def test_jobs_are_as_many_as_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr("fednorm.cores.CPU_LIMIT", limit := tmp_path / "cpu.max")
    assert default_jobs() == 6
    for text, jobs in (("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6)):
        limit.write_text(text)
        assert default_jobs() == jobs


def test_runs_at_the_same_time_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fednorm.cores.usable_cores", lambda: 4)
    told: list[Any] = []

    class Link:
        def send(self, said: Any) -> None:
            told.append(said)

        def recv(self) -> Any:
            told.append(cores.cores_of_a_run())
            raise EOFError

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker.signal, "pthread_sigmask", lambda *_: set())
    monkeypatch.setattr(worker, "_outlive_no_parent", lambda: None)
    try:
        with pytest.raises(SystemExit):
            worker.serve(Link(), tmp_path, 2, dict(os.environ))  # type: ignore[arg-type]
    finally:
        cores.share_cores(1)
    assert told[1:] == [cores.Cores(4, 2)]


# What runs tell -------------------------------------------------------------------------------------------------------


def test_a_stream_tells_steps_twice_a_second_and_its_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    clock = iter(number / 8 for number in range(1000))
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    told: list[Progress] = []
    steps = worker._Steps(told.append)
    steps.begin(SimpleNamespace(stream=SimpleNamespace(memorization=False)), 10, 100)  # type: ignore[arg-type]
    for step in range(11, 20):
        steps.step(step)
    steps.experience({"experience": 1, "accuracy": [0.4, 0.8, None], "train_accuracy": 1.0})
    assert told == [Progress(step, 100, "step", None) for step in (10, 14, 18)] + [
        Progress(19, 100, "step", 0.6000000000000001)
    ]
    steps.begin(SimpleNamespace(stream=SimpleNamespace(memorization=True)), 0, 100)  # type: ignore[arg-type]
    steps.experience({"experience": 0, "accuracy": [None], "train_accuracy": 0.9})
    assert told[-1].accuracy == 0.9


def test_a_stream_is_run_and_told_like_a_federation(tmp_path: Path) -> None:
    values = {
        **{"kind": "continual", "scenario": {"name": "split_digits", "train_per_experience": 20}},
        **{"model": {"width": 4}, "evaluate": {"probe_images": 0}, "learner": {"name": "naive"}},
    }
    (config,) = expand(values, [{}], {}, {})
    told: list[Progress] = []
    ended = worker.attempt(config, tmp_path, told.append)
    assert ended.result is not None, ended
    assert ended.result["hash"] == config.hash
    assert (told[-1].done, told[-1].unit) == (told[-1].total, "step")
    assert told[-1].accuracy == pytest.approx(ended.result["final"]["average_accuracy"])


def test_an_end_is_told_by_its_signal() -> None:
    assert "SIGSEGV" in worker.how_it_died(-signal.SIGSEGV)
    assert "memory" not in worker.how_it_died(-signal.SIGSEGV)
    assert "killed by signal 60" in worker.how_it_died(-60)
    assert "exit code 3" in worker.how_it_died(3)


def test_a_failure_of_the_user_s_making_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FedNormError("because")

    monkeypatch.setattr("fednorm.federation.simulate.simulate", fail)
    config = resolve(merge({}, {}))
    assert worker.attempt(config, tmp_path, lambda _: None) == worker.Ended(None, "because", "FedNormError")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Terminated(signal.SIGTERM)])
def test_a_run_that_fails_while_it_is_stopped_is_stopped(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written when a run is stopped finds no disk: the study is stopped all the same."""

    def simulate(*_: object) -> None:
        try:
            raise stop
        finally:
            raise RecordError("Cannot write checkpoint.safetensors")

    monkeypatch.setattr(worker, "_simulate", simulate)
    with pytest.raises(type(stop)) as caught:
        worker.attempt(resolve({}), tmp_path, lambda _: None)
    assert caught.value is stop
