"""Data frames of results: every number of a run written by hand is found again, once, where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars
import pytest
from polars.testing import assert_frame_equal

from fednorm.config import resolve
from fednorm.report._common import name_of as method_name
from fednorm.report.frame import LEADING, TIDY, frame, records

Make = Callable[..., dict[str, Any]]


def federated(**values: Any) -> dict[str, Any]:
    config = resolve({"strategy": {"name": "fedprox", "mu": 0.1}, "norm": {"name": "batch_norm"}, **values})
    own = {"per_domain": {"a": 0.5, "b": 0.9}, "mean": 0.7, "worst": 0.5}
    other = {"per_domain": {"a": 0.25, "b": None}, "mean": 0.25, "worst": 0.25}
    line = {"train_loss": None, "bytes_down": 10, "rejected": [{"client": 1}], "sampled": [0, 1], "seconds": 1.5}
    return {
        "kind": "federated",
        "hash": config.hash,
        "config": config.to_dict(),
        "data": {"title": "two domains", "notes": []},
        "rounds": [
            {"round": 1, **line},
            {
                **{"round": 2, **line, **own},
                "diagnostics": {
                    "drift": {"a": {"bn": 0.125}, "b": {"bn": None}},
                    "weight_norm": {"fc": 2.0},
                    "effective_learning_rate": {},
                },
            },
        ],
        "final": {**own, "round": 2, "selection": "last round, test images"},
        "evaluation": {"own": own, "cross": {"under": {"a (client 0)": {**other, "per_domain": {"a": 0.25}}}}},
        "seconds": 3.0,
        "parameters": 7,
        "run": "runs/x",
    }


def told(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return the rows of a run without the columns that say which run it is."""
    return records([result]).select(TIDY[len(LEADING) :]).rows()


def test_every_number_of_a_federated_run_has_one_row() -> None:
    scalars = [("bytes_down", 10.0), ("rejected", 1.0), ("sampled", 2.0), ("seconds", 1.5)]
    assert told(federated()) == [
        *(("round", 1, name, None, None, None, None, value) for name, value in scalars),
        *(("round", 2, name, None, None, None, None, value) for name, value in scalars),
        ("round", 2, "mean", None, None, None, None, 0.7),
        ("round", 2, "worst", None, None, None, None, 0.5),
        ("round", 2, "accuracy", "a", None, None, None, 0.5),
        ("round", 2, "accuracy", "b", None, None, None, 0.9),
        ("round", 2, "drift", "a", None, "bn", None, 0.125),
        ("round", 2, "weight_norm", None, None, "fc", None, 2.0),
        ("run", None, "accuracy", "a", None, None, "own", 0.5),
        ("run", None, "accuracy", "b", None, None, "own", 0.9),
        ("run", None, "accuracy", "a", None, None, "cross, statistics of a (client 0)", 0.25),
        ("run", None, "mean", None, None, None, None, 0.7),
        ("run", None, "worst", None, None, None, None, 0.5),
        ("run", None, "seconds", None, None, None, None, 3.0),
        ("run", None, "parameters", None, None, None, None, 7.0),
    ]


def test_every_number_of_a_stream_has_one_row(stream_result: Make) -> None:
    diagnostics = [{"drift": {"bn": 0.5}, "entropy_rank": 12.5, "dead_units": {"act": None}}, {}]
    final = dict.fromkeys(stream_result()["final"])
    result = stream_result(
        matrix=[[0.9, None], [0.5, 0.25]], diagnostics=diagnostics, final={**final, "average_accuracy": 0.375}
    )
    scalars = [("online_accuracy", 0.5), ("train_accuracy", 0.9), ("train_loss", 0.1), ("steps", 100.0)]
    scalars.append(("seconds", 17.2))
    assert told(result) == [
        *(("experience", 1, name, None, None, None, None, value) for name, value in scalars),
        ("experience", 1, "accuracy", None, 1, None, None, 0.9),
        ("experience", 1, "entropy_rank", None, None, None, None, 12.5),
        ("experience", 1, "drift", None, None, "bn", None, 0.5),
        *(("experience", 2, name, None, None, None, None, value) for name, value in scalars),
        ("experience", 2, "accuracy", None, 1, None, None, 0.5),
        ("experience", 2, "accuracy", None, 2, None, None, 0.25),
        ("run", None, "average_accuracy", None, None, None, None, 0.375),
        ("run", None, "seconds", None, None, None, None, 34.4),
        ("run", None, "parameters", None, None, None, None, 1000.0),
    ]


def test_a_frame_has_a_row_a_run_with_scores_and_settings(stream_result: Make) -> None:
    stream = stream_result(learner={"memory_size": 200})
    runs = frame([federated(), federated(seed=2, data={"domains": ["scans", "photo"]}), stream])
    assert runs.columns[:6] == list(LEADING)
    first, second, third = runs.rows(named=True)
    assert first["method"] == "fedprox (mu=0.1) data.domains []"  # told apart from the second, as in tables
    assert (first["mean"], first["accuracy.b"], first["strategy.mu"], first["folder"]) == (0.7, 0.9, 0.1, "runs/x")
    assert (second["seed"], second["data.domains"]) == (2, "scans, photo")
    assert third["method"] == method_name(stream)
    assert (third["kind"], third["data"], third["split"]) == ("continual", stream["data"]["title"], "test")
    assert (third["average_accuracy"], third["mean"], third["learner.memory_size"]) == (0.541, None, 200)
    assert runs["seconds"].to_list() == [3.0, 3.0, 34.4]
    assert runs.schema["forward_transfer"] == polars.String  # measured by no run
    assert runs.group_by("method").agg(polars.col("mean").mean()).height == 3


def test_options_of_one_name_and_several_types_are_text() -> None:
    configs = [federated(), federated(seed=2), federated(seed=3), federated(seed=4)]
    for result, value in zip(configs, (1, 0.5, "auto", None), strict=True):
        result["config"]["norm"]["momentum"] = value
    assert frame(configs)["norm.momentum"].to_list() == ["1", "0.5", "auto", None]
    assert frame(configs[:2])["norm.momentum"].to_list() == [1.0, 0.5]
    configs[0]["config"]["norm"]["momentum"] = True
    assert frame(configs[:2])["norm.momentum"].to_list() == ["true", "0.5"]


def test_frames_of_nothing_and_of_many() -> None:
    assert records([]).columns == list(TIDY)
    assert frame([]).columns == list(LEADING)
    one = federated()
    assert_frame_equal(records([one, one]), polars.concat([records([one])] * 2))
    assert records([one]).schema == records([]).schema


def test_accuracies_of_a_frame_are_those_of_its_records() -> None:
    one = federated()
    tidy = records([one]).filter(after="round", step=2, metric="accuracy")
    assert dict(tidy.select("domain", "value").iter_rows()) == one["final"]["per_domain"]
    assert tidy["value"].mean() == pytest.approx(frame([one])["mean"][0])
