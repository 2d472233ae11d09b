"""What a study shows while it goes: lines of a log, rows on a terminal, and an honest guess of the time left."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fednorm.report import study_progress
from fednorm.report.study_progress import Going, StudyProgress, duration, headline, seconds_left
from fednorm.study.runner import Failure, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(study_progress, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def result(mean: float, seconds: float = 60.0) -> dict[str, Any]:
    return {"config": {"kind": "federated"}, "final": {"mean": mean}, "seconds": seconds}


def at(done: int, accuracy: float | None = None) -> Progress:
    return Progress(done, 10, "round", accuracy)


def test_a_log_gets_a_line_a_run_and_now_and_then_one_for_those_that_go(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, highlight=False, width=200)
    shown = StudyProgress(console, every=30)
    shown.begin("search", {"a": "fedbn, seed 1", "b": "[red]fedavg[/]", "c": "fedwon", "d": "silobn"}, 2)
    shown.ended("d", result(0.2), before=True)
    shown.started("a")
    shown.started("b")
    clock.now += 20  # starting is not counted
    shown.progress("a", at(0))
    clock.now += 20
    shown.progress("a", at(1, 0.25))  # the first after half a minute
    clock.now += 20
    shown.progress("a", at(2, 0.5))
    shown.ended("a", result(0.812, 34.4), before=False)
    shown.failed(Failure("b", "[red]fedavg[/]", "because"))
    shown.failed(Failure("c", "fedwon", "NaN", "AggregationError"))
    shown.end()
    assert text(console).splitlines() == [
        "search for hyper-parameters: 4 runs, 1 of them finished before; 2 at a time",
        # a: 9 rounds of 20 s, 200 s in all; d took 60 s; c takes their mean, b too, less the 40 s since it began:
        # (180 + 90 + 130) / 2 = 200 s
        "1/4 runs; about 3 min left: fedbn, seed 1 at round 1/10, accuracy 25.0 %",
        "[2/4] fedbn, seed 1: 81.2 % (34 s)",
        "[3/4] [red]fedavg[/]: failed: because",
        "[4/4] fedwon: diverged: NaN",
    ]


def test_a_log_of_a_study_that_was_finished_says_so() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, highlight=False, width=200)
    shown = StudyProgress(console)
    shown.begin("runs", {"a": "fedbn"}, 2)
    shown.ended("a", result(0.5), before=True)
    shown.end()
    assert text(console) == "study: all 1 runs had finished before; their records are read back\n"


def test_a_terminal_has_a_row_for_each_run_that_goes_and_one_for_the_whole(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=100, _environ={})
    shown = StudyProgress(console)
    rows = lambda: {task.description.strip(): task for task in shown._bars.tasks}  # noqa: E731
    for _ in range(2):  # one display shows the search and then the runs
        shown.begin("runs", {"a": "fedbn, seed 1", "b": "fedavg", "c": "fedwon"}, 2)
        shown.started("a")
        shown.started("b")
        assert rows().keys() == {"study", "fedbn, seed 1", "fedavg"}
        shown.progress("a", at(0))
        clock.now += 5
        shown.progress("a", at(5, 0.5))
        row = rows()["fedbn, seed 1"]
        assert (row.completed, row.total, row.fields["state"]) == (5, 10, "round 5/10, accuracy 50.0 %")
        assert row.fields["ends"] == clock.now + 5
        whole = rows()["study"]
        assert (whole.completed, whole.total, whole.fields["state"]) == (0.5, 3, "0/3 runs")
        assert whole.fields["ends"] == clock.now + (5 + 5 + 10) / 2
        shown.ended("a", result(0.812), before=False)
        assert rows().keys() == {"study", "fedavg"}
        assert rows()["study"].completed == 1
        shown.end()
        assert rows() == {}
    assert "[1/3] fedbn, seed 1: 81.2 % (1 min)" in text(console)


def test_time_left_is_work_over_jobs_and_no_less_than_the_longest_run() -> None:
    def going(done: int, seconds: float) -> Going:
        run = Going(0.0)
        run.tell(at(0), 100.0 - seconds)
        run.tell(at(done), 100.0)
        return run

    assert seconds_left(100.0, [], [], 3, 2) is None
    assert seconds_left(100.0, [], [], 0, 2) == 0
    assert seconds_left(100.0, [Going(90.0)], [], 0, 1) is None
    assert seconds_left(100.0, [Going(90.0)], [30.0], 0, 1) == 20.0
    assert seconds_left(100.0, [Going(10.0)], [30.0], 0, 1) == 0.0  # longer than usual: any moment now
    assert seconds_left(100.0, [going(5, 50.0)], [], 0, 1) == 50.0
    assert seconds_left(110.0, [going(5, 50.0)], [], 0, 1) == 40.0  # in the middle of a round
    assert seconds_left(100.0, [going(5, 50.0)], [], 4, 1) == 50.0 + 4 * 100.0
    assert seconds_left(100.0, [going(5, 50.0), going(9, 90.0)], [], 2, 2) == (50.0 + 10.0 + 2 * 100.0) / 2
    assert seconds_left(100.0, [going(1, 50.0), going(9, 9.0)], [], 0, 2) == 450.0
    resumed = Going(0.0)
    resumed.tell(at(8), 90.0)
    resumed.tell(at(9), 100.0)
    assert resumed.left(100.0, None) == 10.0  # rounds of an earlier call are not its pace


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (750, "12 min"),
        (3590, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (86_399, "1 d 0 h"),
        (190_800, "2 d 5 h"),
    ],
)
def test_a_length_of_time_is_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_run_is_told_by_the_accuracy_it_is_about() -> None:
    stream = {"config": {"kind": "continual"}, "final": {"average_accuracy": 0.5, "train_accuracy": 0.9}}
    assert headline(stream) == "50.0 %"
    assert headline({**stream, "final": {"average_accuracy": None, "train_accuracy": 0.9}}) == "90.0 %"
    assert headline(result(0.25)) == "25.0 %"
    assert headline({"config": {}, "final": {"mean": None}}) == "not measured"
