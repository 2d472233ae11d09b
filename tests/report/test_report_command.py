"""``fednorm report`` over records of both kinds: the same tables from records and from their small summaries."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fednorm.commands.report import run_report
from fednorm.errors import ConfigError
from fednorm.report.stream_table import average_table, drift_table, matrix_table, plasticity_table, stream_table
from fednorm.report.table import accuracy_table

Make = Callable[..., dict[str, Any]]
Report = Callable[..., str]

FEDERATED = Path(__file__).resolve().parents[2] / ".records" / "digits.json"


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Return a function that gives the standard output of a report."""

    def call(*paths: Path, **options: Any) -> str:
        defaults = {"markdown": True, "select": False, "summary": None, "as_json": False}
        capsys.readouterr()
        run_report(paths, **{**defaults, **options})
        return capsys.readouterr().out

    return call


def record(folder: Path, results: Sequence[dict[str, Any]]) -> Path:
    for result in results:
        path = folder / result["hash"] / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return folder


def printed(*tables: Any) -> str:
    return "".join(f"{table.markdown()}\n" for table in tables)


DIAGNOSTICS = [
    {"weight_norm": {"0": n, "1": 1.0}, "effective_learning_rate": {"0": 1 / n, "1": 1.0}, "drift": {"bn": n / 10}}
    for n in (2.0, 3.0, 5.0)
]


def test_both_kinds_stand_in_tables_of_their_own(
    stream_result: Make, memorized: Make, report: Report, tmp_path: Path
) -> None:
    pair = [stream_result(config={"seed": seed}) for seed in (1, 2)]
    other = stream_result(title="Split CIFAR-100 (10×10)", norm={"name": "group_norm"}, final={"drift": None})
    chosen = stream_result(config={"evaluate": {"split": "validation"}}, final={"average_accuracy": 0.3, "drift": None})
    labels = memorized([0.9, 0.8, 0.7], diagnostics=DIAGNOSTICS)
    runs = record(tmp_path, [labels, other, *pair, chosen])
    federated = sorted(json.loads(FEDERATED.read_text())["results"], key=lambda r: str(r["config"]["strategy"]["name"]))
    assert report(runs, FEDERATED) == printed(
        accuracy_table(federated),
        stream_table(pair),
        stream_table([chosen]),
        matrix_table(chosen),
        stream_table([other]),
        matrix_table(other),
        stream_table([labels]),
        plasticity_table([labels]),
    )


def test_a_single_run_shows_its_matrix_and_its_drift(stream_result: Make, report: Report, tmp_path: Path) -> None:
    result = stream_result(diagnostics=DIAGNOSTICS[:2])
    runs = record(tmp_path, [result])
    assert report(runs) == printed(stream_table([result]), matrix_table(result), drift_table([result]))
    assert report(runs, curve=True) == printed(
        stream_table([result]), average_table([result]), matrix_table(result), drift_table([result])
    )


def test_methods_are_in_order_whatever_the_folders(stream_result: Make, report: Report, tmp_path: Path) -> None:
    results = [
        stream_result(learner={"name": learner}, norm={"name": norm}, config={"train": {"learning_rate": rate}})
        for learner in ("er_ace", "naive")
        for norm in ("adab2n", "batch_norm")
        for rate in (0.03, 0.1)
    ]
    assert report(record(tmp_path, results[::-1])) == printed(stream_table(results))


def test_summaries_are_small_and_give_the_same_tables(
    stream_result: Make, memorized: Make, report: Report, tmp_path: Path
) -> None:
    single = stream_result(matrix=[[0.9, 0.1, None], [0.5, 0.6, 0.1], [0.3, 0.3, 0.6]], diagnostics=DIAGNOSTICS)
    many = [i / 200 for i in range(200)]
    middle = [{"dead_units": dict.fromkeys(map(str, range(20)), 0.123456789)}]
    labels = memorized(many, diagnostics=[DIAGNOSTICS[0], *(198 * middle), DIAGNOSTICS[2]])
    single["config"]["data"]["dir"] = "/somewhere/of/mine"
    runs, small = record(tmp_path / "runs", [single, labels]), tmp_path / "small" / "results.json"
    for options in ({}, {"curve": True}, {"markdown": False}):
        shown = report(runs, FEDERATED, summary=small, **options)
        assert report(small, **options) == shown
    assert report(small, summary=tmp_path / "again.json", as_json=True) == report(small, as_json=True)
    assert (tmp_path / "again.json").read_text() == small.read_text()

    kept = {result["data"]["title"]: result for result in json.loads(small.read_text())["results"]}
    ours, long = kept[single["data"]["title"]], kept[labels["data"]["title"]]
    for key in ("kind", "hash", "norm", "learner", "scenario", "final", "accuracy_matrix", "seconds", "parameters"):
        assert ours[key] == single[key]
    assert ours["config"] == {**single["config"], "data": {**single["config"]["data"], "dir": ""}}
    assert ours["data"] == {key: single["data"][key] for key in ("title", "notes", "memorization")}
    assert [line.get("diagnostics") for line in ours["experiences"]] == [DIAGNOSTICS[0], None, DIAGNOSTICS[2]]
    assert [line["train_accuracy"] for line in long["experiences"]] == many
    assert [line["online_accuracy"] for line in long["experiences"]] == [0.5] * 200
    assert len(json.dumps(long)) < 25_000 < 200_000 < len(json.dumps(labels))


def test_a_joint_learner_stands_beside_the_others(stream_result: Make, report: Report, tmp_path: Path) -> None:
    joint = stream_result(learner={"name": "joint"}, matrix=[[0.9, 0.8]] * 2, diagnostics=DIAGNOSTICS[:1])
    results = [stream_result(), joint]
    runs, small = record(tmp_path / "runs", results), tmp_path / "small.json"
    shown = report(runs, curve=True, summary=small)
    assert shown == printed(stream_table(results), average_table(results))
    assert report(small, curve=True) == shown
    assert "| joint + batch_norm | – | 85.0 |" in shown


def test_the_best_of_each_method_is_chosen_by_a_rule_that_is_said(
    stream_result: Make, memorized: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"evaluate": {"split": "validation"}}
    rates = [
        stream_result(config={**held, "train": {"learning_rate": rate}}, final={"average_accuracy": score})
        for rate, score in ((0.01, 0.4), (0.03, 0.6), (0.1, 0.5))
    ]
    labels = [
        memorized([0.5, plasticity], config={"train": {"learning_rate": rate}}, final={"plasticity": plasticity})
        for rate, plasticity in ((0.01, 0.9), (0.1, 0.2))
    ]
    runs = record(tmp_path, [*rates, *labels])
    run_report([runs], markdown=True, select=True, summary=None, as_json=True)
    captured = capsys.readouterr()
    chosen = [result["hash"] for result in json.loads(captured.out)["results"]]
    assert chosen == [rates[1]["hash"], labels[0]["hash"]]
    assert captured.err == (
        "Chosen by the average accuracy on validation images after the last experience. Chosen by plasticity, the "
        "training accuracy in the last tenth of the experiences: a memorization stream has no images to hold out.\n"
    )
    with pytest.raises(ConfigError, match="was scored on test images"):
        run_report([record(tmp_path, [stream_result()])], markdown=True, select=True, summary=None, as_json=True)
