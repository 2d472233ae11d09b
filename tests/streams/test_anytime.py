"""Evaluation on the way, and online accuracy in either mode: against copies of the network, and without a trace."""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednorm.data.domain import Split, pixels
from fednorm.errors import ConfigError, DataError
from fednorm.report.stream_table import stream_table
from fednorm.streams import metrics
from fednorm.streams.anytime import AnytimePoints
from fednorm.streams.metrics import Point
from fednorm.streams.simulate import simulate

LONG: dict[str, Any] = {
    "scenario": {"num_experiences": 3, "train_per_experience": 16, "test_per_experience": 9},
    "train": {"batch_size": 4, "epochs": 2, "momentum": 0.9, "augment": "crop_flip", "checkpoint_every": 5},
    "evaluate": {"every_steps": 3},
}
"""Three experiences of 8 steps: points after steps 3, 6, 8; 9, 12, 15, 16; 18, 21, 24."""
STEPS = [[3, 6, 8], [9, 12, 15, 16], [18, 21, 24]]


def slow(*cases: tuple[Any, ...]) -> list[Any]:
    """Leave cases to the slow tier, which are like others of the default tier."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@torch.no_grad()
def share(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((copy.deepcopy(model).eval()(pixels(images)).argmax(1) == labels).double().mean())


def everything(split: Split) -> tuple[Tensor, Tensor]:
    return split.batch(torch.arange(len(split)))


class Copies:
    """An observer that scores a copy of the network after every step, on every experience."""

    def __init__(self) -> None:
        self.scores: dict[int, list[float]] = {}

    def begin(self, bench: Any, first_step: int, total_steps: int) -> None:
        assert (first_step, total_steps) == (0, 24)
        self.bench = bench

    def step(self, steps_done: int) -> None:
        self.scores[steps_done] = [share(self.bench.model, *everything(e.test)) for e in self.bench.stream]

    def experience(self, line: Any) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "norm"), [("er", "adab2n"), *slow(("naive", "none"), ("er_ace", "batch_norm"))])
def test_points_are_those_of_a_copy_of_the_network(learner: str, norm: str, toy: Any) -> None:
    config, copies = toy.config("split_digits", learner, norm, **LONG), Copies()
    document = simulate(config, runs=None, observer=copies, bench=toy.bench(config))
    lines = document["experiences"]
    assert [[point["step"] for point in line["anytime"]] for line in lines] == STEPS
    for number, line in enumerate(lines):
        for point in line["anytime"]:
            assert point["accuracy"] == pytest.approx(copies.scores[point["step"]][: number + 1])
        assert line["anytime"][-1]["accuracy"] == document["accuracy_matrix"][number][: number + 1]
    final = document["final"]
    after = [[copies.scores[step][i] for step in functools.reduce(operator.iadd, STEPS[i + 1 :], [])] for i in range(2)]
    lowest = mean(min(scores) for scores in after)
    assert final["average_minimum_accuracy"] == pytest.approx(lowest)
    assert final["worst_case_accuracy"] == pytest.approx((copies.scores[24][2] + 2 * lowest) / 3)
    assert final["average_late_accuracy"] == pytest.approx(mean(mean(copies.scores[step]) for step in STEPS[2]))
    assert final["average_accuracy"] == pytest.approx(mean(copies.scores[24]))
    json.dumps(document, allow_nan=False)


def test_the_mean_of_the_last_evaluations_is_of_as_many_as_asked_for(toy: Any) -> None:
    document, _ = toy.run(toy.config(**LONG | {"evaluate": {"every_steps": 1, "average_last": 2}}))
    last = [mean(point["accuracy"]) for point in document["experiences"][-1]["anytime"]]
    assert len(last) == 8
    assert document["final"]["average_late_accuracy"] == pytest.approx(mean(last[-2:]))


def test_fewer_images_are_the_same_ones_at_every_point(toy: Any) -> None:
    config = toy.config(**LONG | {"evaluate": {"every_steps": 4, "every_images": 4}})
    document, bench = toy.run(config)
    for line in document["experiences"]:
        for point in line["anytime"]:
            assert {share * 4 for share in point["accuracy"]} <= {0, 1, 2, 3, 4}
    assert len(bench.stream.experiences[0].test) == 9


def test_without_it_nothing_is_said_of_it(toy: Any) -> None:
    document, _ = toy.run(toy.config())
    assert all("anytime" not in line for line in document["experiences"])
    assert not {"worst_case_accuracy", "average_late_accuracy", "average_minimum_accuracy"} & document["final"].keys()


@pytest.mark.parametrize("learner", ["er", *slow(("lwf",), ("derpp",))])
def test_no_learner_s_training_depends_on_it(learner: str, toy: Any) -> None:
    changes = {"train": LONG["train"], "learner": {"recalibrate": True} if learner == "er" else {}}
    plain, one = toy.run(toy.config("split_digits", learner, "adab2n", **changes | {"evaluate": {}}))
    watched, other = toy.run(
        toy.config("split_digits", learner, "adab2n", **changes | {"evaluate": {"every_steps": 1, "online": "eval"}})
    )
    assert not toy.differing(one.model.state_dict(), other.model.state_dict())
    for key in ("accuracy", "train_accuracy", "train_loss", "steps"):
        assert [line[key] for line in plain["experiences"]] == [line[key] for line in watched["experiences"]]


def test_neither_do_effects_that_watch_the_forward_passes(toy: Any) -> None:
    changes = {**LONG, "train": {**LONG["train"], "redo_every": 2, "redo_tau": 0.9}}
    states = [
        toy.run(toy.config("split_digits", "er", "batch_renorm", **changes | {"evaluate": evaluate}))[1]
        for evaluate in ({}, {"every_steps": 2, "online": "eval"})
    ]
    assert not toy.differing(*(bench.model.state_dict() for bench in states))


def test_a_run_that_was_cut_has_every_point_once(toy: Any, tmp_path: Path, written: Any) -> None:
    """Cut again and again: before a checkpoint and after it, after a point, at an end, and in a second pass."""
    config = toy.config("split_digits", "er", "adab2n", **LONG | {"evaluate": {"every_steps": 3, "online": "eval"}})

    class Stop(Copies):
        def begin(self, bench: Any, first_step: int, total_steps: int) -> None: ...

        def step(self, steps_done: int) -> None:
            if steps_done in cuts:
                cuts.remove(steps_done)
                raise KeyboardInterrupt

    cuts = {4, 6, 8, 13, 16, 17, 23}
    while cuts:
        with pytest.raises(KeyboardInterrupt):
            simulate(config, runs=tmp_path / "cut", observer=Stop(), bench=toy.bench(config))
    simulate(config, runs=tmp_path / "cut", bench=toy.bench(config))
    simulate(config, runs=tmp_path / "whole", bench=toy.bench(config))
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in ("cut", "whole"))
    assert written(one) == written(other)


def test_what_is_not_scored_has_no_point_and_no_number(toy: Any) -> None:
    current, _ = toy.run(toy.config(**LONG | {"evaluate": {"every_steps": 3, "experiences": "current"}}))
    for number, line in enumerate(current["experiences"]):
        for point in line["anytime"]:
            assert [share is None for share in point["accuracy"]] == [True] * number + [False]
    names = ("worst_case_accuracy", "average_late_accuracy", "average_minimum_accuracy")
    assert [current["final"][name] for name in names] == [None] * 3
    joint, _ = toy.run(toy.config("split_digits", "joint", **LONG))
    assert [len(point["accuracy"]) for point in joint["experiences"][0]["anytime"]] == [3] * 8
    assert joint["final"]["worst_case_accuracy"] is None
    assert joint["final"]["average_late_accuracy"] is not None
    single, _ = toy.run(toy.config(**LONG | {"scenario": {"num_experiences": 1, "train_per_experience": 16}}))
    assert single["final"]["average_minimum_accuracy"] is None
    assert single["final"]["worst_case_accuracy"] == single["final"]["average_accuracy"]
    assert single["final"]["forgetting_max_minus_last"] == 0
    memorized, _ = toy.run(toy.config("random_labels", evaluate={"every_steps": 2}))
    json.dumps([current, joint, single, memorized], allow_nan=False)


def test_the_table_shows_it_and_says_what_it_is(toy: Any) -> None:
    plain, _ = toy.run(toy.config(evaluate={"online": "eval"}))
    document, _ = toy.run(toy.config(evaluate={"every_steps": 2}))
    table = stream_table([document])
    assert {"late average", "worst case"} <= set(table.columns)
    assert "worst case: WC-ACC" in table.notes[1]
    assert "Online accuracy is measured in training mode." in table.notes[1]
    table = stream_table([plain])
    assert not {"late average", "worst case"} & set(table.columns)
    assert "Online accuracy is measured in evaluation mode." in table.notes[1]


# Online accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "norm"), [("er", "adab2n"), *slow(("naive", "batch_norm"), ("joint", "batch_renorm"))]
)
def test_online_accuracy_in_evaluation_mode_is_a_copy_s(learner: str, norm: str, toy: Any) -> None:
    config = toy.config("split_digits", learner, norm, **LONG | {"evaluate": {"online": "eval"}})
    bench = toy.bench(config)
    train_on, right = bench.learner._train_on, dict[tuple[int, int], list[Tensor]]()

    def watch(source: Any, rows: Tensor, **kwargs: Any) -> None:
        images, labels = source.train.batch(rows)
        with torch.no_grad():
            hits = copy.deepcopy(bench.model).eval()(pixels(images)).argmax(1) == labels
        right.setdefault((bench.learner.progress.ended, bench.learner.progress.epoch), []).append(hits)
        train_on(source, rows, **kwargs)

    bench.learner._train_on = watch
    document = simulate(config, runs=None, bench=bench)
    for number, line in enumerate(document["experiences"]):
        first, second = (torch.cat(right[number, epoch]).double() for epoch in (0, 1))
        assert line["online_accuracy"] == pytest.approx(float(first.mean()))
        assert line["average_online_accuracy"] == pytest.approx(float(torch.cat((first, second)).mean()))
    for key in ("online_accuracy", "average_online_accuracy"):
        assert document["final"][key] == pytest.approx(mean(line[key] for line in document["experiences"]))


def test_one_pass_has_one_online_accuracy_and_more_have_two(toy: Any) -> None:
    once, _ = toy.run(toy.config("random_labels"))
    assert once["final"]["average_online_accuracy"] == once["final"]["online_accuracy"]
    often, _ = toy.run(toy.config("random_labels", train={"epochs": 20, "optimizer": "adam", "learning_rate": 0.01}))
    assert often["final"]["average_online_accuracy"] > often["final"]["online_accuracy"] + 0.2


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("online", "test", "evaluate.online must be one of train, eval; got 'test'"),
        ("every_steps", -1, "evaluate.every_steps must be 0 or more; got -1"),
        ("every_images", -1, "evaluate.every_images must be 0 or more; got -1"),
        ("average_last", 0, "evaluate.average_last must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: Any, words: str, toy: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        toy.config(evaluate={key: value})


# The formulas ---------------------------------------------------------------------------------------------------------


def test_the_formulas_by_hand() -> None:
    points = [Point(0, (0.9,)), Point(1, (0.2, 0.5)), Point(1, (0.6, 0.8)), Point(2, (0.5, 0.1, 0.4)),
              Point(2, (0.7, 0.6, 0.8))]  # fmt: skip
    assert metrics.average_minimum_accuracy(points) == pytest.approx((0.2 + 0.1) / 2)
    assert metrics.worst_case_accuracy(points) == pytest.approx(0.8 / 3 + 2 / 3 * 0.15)
    assert metrics.average_late_accuracy(points, last=1) == pytest.approx(0.7)
    assert metrics.average_late_accuracy(points, last=9) == pytest.approx((1.0 / 3 + 2.1 / 3) / 2)
    for formula in (metrics.average_minimum_accuracy, metrics.worst_case_accuracy):
        with pytest.raises(DataError, match="one evaluation or more"):
            formula([])
        with pytest.raises(DataError):
            formula([Point(0, (0.5,)), Point(1, (math.nan, 0.5))])
    assert metrics.worst_case_accuracy(points[:1]) == 0.9
    with pytest.raises(DataError, match="after the end of each"):
        metrics.average_minimum_accuracy(points[:1])


@st.composite
def runs(draw: st.DrawFn) -> list[Point]:
    count = draw(st.integers(1, 5))
    unit = st.floats(0, 1, width=32)
    return [
        Point(k, tuple(draw(st.lists(unit, min_size=k + 1, max_size=k + 1))))
        for k in range(count)
        for _ in range(draw(st.integers(1, 4)))
    ]


@given(runs(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_the_formulas_are_brute_force_s(points: list[Point], last: int) -> None:
    k = points[-1].experience
    late = [sum(p.accuracy) / (k + 1) for p in points if p.experience == k][-last:]
    assert metrics.average_late_accuracy(points, last=last) == pytest.approx(sum(late) / len(late))
    if k:
        lowest = 0.0
        for i in range(k):
            worst = 1.0
            for p in points:
                if p.experience > i and p.accuracy[i] < worst:
                    worst = p.accuracy[i]
            lowest += worst / k
        assert metrics.average_minimum_accuracy(points) == pytest.approx(lowest)
        expected = (points[-1].accuracy[k] + k * lowest) / (k + 1)
        assert metrics.worst_case_accuracy(points) == pytest.approx(expected)


@given(st.integers(0, 7), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_every_step_that_is_due_has_one_point(every: int, steps: list[int]) -> None:
    points, step, found = AnytimePoints(every, steps), 0, []
    for count in steps:
        for _ in range(count):
            step += 1
            points.take(step, lambda: [0.5])
        found += points.close(step, lambda: [0.5]).get("anytime", [])
    ends = {sum(steps[: n + 1]) for n in range(len(steps))}
    due = {n for n in range(1, step + 1) if n % every == 0} | ends if every else set()
    assert [point["step"] for point in found] == sorted(due)
