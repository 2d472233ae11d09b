"""What a run shows while it goes: the lines of a log, and a bar that moves a few times a second."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from fednorm.report.progress import RoundProgress, StreamProgress


def bench(*, memorization: bool = False) -> Any:
    config = SimpleNamespace(learner=SimpleNamespace(name="er_ace"), norm=SimpleNamespace(name="adab2n"))
    return cast(Any, SimpleNamespace(config=config, stream=SimpleNamespace(memorization=memorization)))


def line(number: int, accuracy: list[float | None], **other: Any) -> dict[str, Any]:
    return {
        **{"experience": number, "accuracy": accuracy, "online_accuracy": 0.612, "train_accuracy": 0.98},
        **{"train_loss": 0.3, "seconds": 34.4},
        **other,
    }


def log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, highlight=False, width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_a_line_for_each_experience() -> None:
    console = log()
    with StreamProgress(console) as progress:
        progress.begin(bench(), 0, 500)
        for step in range(1, 251):
            progress.step(step)
        progress.experience(line(0, [0.9, 0.0, None]))
        progress.experience(line(1, [0.5, 0.582, 0.1], train_loss=None))
        progress.begin(bench(), 250, 500)
        progress.experience(line(2, [None, None, 0.75], online_accuracy=None))
    assert text(console).splitlines() == [
        "er_ace + adab2n: experience 1/3: average accuracy 90.0 %, online 61.2 %, 34 s",
        "er_ace + adab2n: experience 2/3: average accuracy 54.1 %, online 61.2 %, loss not finite, 34 s",
        "er_ace + adab2n: going on from step 250 of 500",
        "er_ace + adab2n: experience 3/3: accuracy on it 75.0 %, 34 s",
    ]


def test_memorization_is_told_by_training_accuracy() -> None:
    console = log()
    with StreamProgress(console) as progress:
        progress.begin(bench(memorization=True), 0, 2)
        progress.experience(line(0, [0.97, None]))
    assert text(console) == "er_ace + adab2n: experience 1/2: training accuracy 98.0 %, online 61.2 %, 34 s\n"


def test_a_label_that_looks_like_markup_is_shown_as_it_is() -> None:
    for console in (log(), Console(file=io.StringIO(), force_terminal=True, highlight=False, width=120)):
        with StreamProgress(console, "[red]er[/]") as progress:
            progress.begin(bench(), 5, 10)
        assert "[red]er[/]: going on from step 5 of 10" in text(console)


def test_the_bar_moves_a_few_times_a_second_and_ends_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=120)
    clock = iter(number / 64 for number in range(1000))  # a step takes 16 ms; numbers are exact
    moves: list[tuple[float, int]] = []
    with StreamProgress(console) as progress:
        progress.begin(bench(), 100, 500)
        bar = progress._bar
        assert bar.tasks[0].completed == 100
        update = bar.update
        with monkeypatch.context() as patch:
            patch.setattr("fednorm.report.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
            patch.setattr(bar, "update", lambda task, **what: (moves.append(what["completed"]), update(task, **what)))
            for step in range(101, 501):
                progress.step(step)
        assert moves == [*range(101, 500, 13), 500]  # 13 steps are the first to take 0.2 s
        assert bar.tasks[0].completed == 500
        progress.experience(line(1, [0.5, 0.582]))
        assert bar.tasks[0].fields["state"] == "experience 2/2"
        assert bar.tasks[0].completed == 500
    assert "er_ace + adab2n: experience 2/2: average accuracy 54.1 %, online 61.2 %, 34 s" in text(console)


def test_a_log_does_not_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of training may take a millisecond."""
    monkeypatch.setattr("fednorm.report.progress.time", None)
    with StreamProgress(log()) as progress:
        progress.begin(bench(), 0, 2)
        progress.step(1)
        progress.step(2)


def test_rounds_are_told_as_before() -> None:
    config = SimpleNamespace(
        strategy=SimpleNamespace(name="fedbn"), norm=SimpleNamespace(name="none"), rounds=SimpleNamespace(num_rounds=3)
    )
    console = log()
    with RoundProgress(console) as progress:
        progress.begin(cast(Any, SimpleNamespace(config=config, num_rounds=3)), 2)
        progress.round({"round": 2, "train_loss": 0.25, "rejected": [], "seconds": 1.26})
        progress.round({"round": 3, "train_loss": None, "rejected": [4], "seconds": 1.0, "mean": 0.5, "worst": 0.1})
    assert text(console).splitlines() == [
        "fedbn + none: going on from round 1",
        "fedbn + none: round 2/3: loss 0.250 (1.3 s)",
        "fedbn + none: round 3/3: loss not finite, mean accuracy 50.0 %, worst 10.0 %, 1 updates rejected (1.0 s)",
    ]
