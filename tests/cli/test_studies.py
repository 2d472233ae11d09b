"""Studies, their tables, and the demo: numbers in a table are those of the records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fednorm.cli import demo
from fednorm.config import merge

Values = dict[str, Any]
Call = Callable[..., Any]
Refused = Callable[..., None]
Small = tuple[str, ...]


# Studies and tables ---------------------------------------------------------------------------------------------------

STUDY = """
[base]
model = { width = 4 }
data = { train_per_client = 16, test_per_domain = 10, validation = 0.25 }
rounds = { num_rounds = 1 }
evaluate = { split = "validation", kinds = ["own", "cross"] }
[[points]]
strategy.name = "fedbn"
[[points]]
strategy.name = "fedavg"
[grid]
seed = [1, 2]
"""


def markdown(text: str) -> list[dict[str, str]]:
    """Read the tables of a Markdown text back, a dictionary a row."""
    rows, head = [], []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif set(cells[0]) != {"-"}:
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


@pytest.mark.slow
def test_compare_runs_a_grid_reads_it_back_and_report_makes_its_tables(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY)
    dry = call("compare", study, "--dry-run", "--json").document["runs"]
    first = call("compare", study, "--jobs", "1", "--out", tmp_path / "out", "--json")
    assert first.code == 0
    assert [run["hash"] for run in dry] == [result["hash"] for result in first.document["results"]]
    assert first.document["failures"] == []

    monkeypatch.setattr("fednorm.federation.server._serve", lambda *_: pytest.fail("a run was run again"))
    again = call("compare", study, "--jobs", "1", "--out", tmp_path / "out", "--json")
    assert again.document == first.document
    results = first.document["results"]

    report = call("report", tmp_path / "out", tmp_path / "out", "--markdown")  # naming it twice counts once
    rows = {row["method"]: row for row in markdown(report.out) if "MB a round" in row}
    assert set(rows) == {"fedbn", "fedavg"}
    for name, row in rows.items():
        group = [r for r in results if r["config"]["strategy"]["name"] == name]
        assert len(group) == 2
        for column in ("mean", "worst", *results[0]["final"]["per_domain"]):
            final = [{**r["final"], **r["final"]["per_domain"]}[column] for r in group]
            m, s = 100 * np.mean(final), 100 * np.std(final, ddof=1)
            assert row[column] == f"{m:.1f} ± {s:.1f}"
        sent = {line["bytes_down"] + line["bytes_up"] for r in group for line in r["rounds"]}
        assert row["MB a round"] == f"{sent.pop() / 1e6:.2f}"
    assert "n = 2 seeds" in report.out
    assert "last round, validation images" in report.out
    matrix = [row["evaluated under"] for row in markdown(report.out) if "evaluated under" in row]
    assert len(matrix) == len(set(matrix)) == 2 * (1 + 5) + 2 * (1 + 1)

    assert call("report", tmp_path / "out", "--json").document["results"] != []
    summary = call("report", tmp_path / "out", "--markdown", "--summary", tmp_path / "small" / "results.json")
    assert summary.out == report.out
    assert call("report", tmp_path / "small" / "results.json", "--markdown").out == report.out
    assert "clients" not in json.loads((tmp_path / "small" / "results.json").read_text())["results"][0]["rounds"][0]

    best = call("report", tmp_path / "out", "--select", "--json").document["results"]
    assert {r["hash"] for r in best} == {r["hash"] for r in results}  # seeds are no hyper-parameters


@pytest.mark.slow
def test_methods_that_share_a_name_are_told_apart_and_none_is_lost(
    call: Call, tmp_path: Path, refused: Refused
) -> None:
    study = tmp_path / "study.toml"
    base = STUDY.replace("seed = [1, 2]", "rounds.fraction = [0.5, 1.0]\nevaluate.split = ['test', 'validation']")
    study.write_text(base)
    results = call("compare", study, "--jobs", "1", "--out", tmp_path / "out", "--json").document["results"]
    assert len(results) == 8
    report = call("report", tmp_path / "out", "--markdown").out
    rows = [row for row in markdown(report) if "MB a round" in row]
    assert sorted(row["method"] for row in rows) == sorted(
        2 * [f"{name} rounds.fraction {fraction}" for name in ("fedavg", "fedbn") for fraction in (0.5, 1.0)]
    )
    assert sorted(row["mean"] for row in rows) == sorted(f"{100 * r['final']['mean']:.1f}" for r in results)
    assert "last round, validation images" in report
    assert "last round, test images" in report  # and never in one table
    refused(call("report", tmp_path / "out", "--select"), "scored on test images", "evaluate.split = 'validation'")


def test_compare_goes_on_after_a_failure_and_says_so(call: Call, tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY + "norm.name = ['none', 'batch_norm']")
    outcome = call("compare", study, "--jobs", "1", "--out", tmp_path / "out", "--json")
    assert outcome.code == 2
    assert len(outcome.document["results"]) == 6
    assert len(outcome.document["failures"]) == 2  # FedBN without normalization, of either seed
    assert "2 of 8 runs failed" in outcome.err
    assert "FedBN keeps normalization layers local" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_study_that_is_not_there_is_named(call: Call, tmp_path: Path, refused: Refused) -> None:
    refused(call("compare", "nowhere.toml"), "There is no study file nowhere.toml", "digits_tuning")
    refused(call("compare", "digit-tuning"), "no study named 'digit-tuning'", "Did you mean 'digits_tuning'")
    refused(call("compare", "digits-tuning", "--jobs", "0"), "--jobs must be at least 1; got 0")
    (tmp_path / "s.toml").write_text("[base]\n[grid]\nseed = []")
    refused(call("compare", "s.toml"), "grid.seed must be a list of one value or more")


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "{}", '{"results": 3}', '{"results": [{}]}', "\xff"])
def test_what_is_no_result_is_named(content: str | None, call: Call, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    refused(call("report", path), "x.json")


def test_a_folder_without_results_is_named(call: Call, tmp_path: Path, refused: Refused) -> None:
    refused(call("report", tmp_path), "There is no finished run", str(tmp_path))


def smaller(make: Callable[..., Values]) -> Callable[..., Values]:
    """Make a demo's values of fewer images, channels and passes."""

    def values(*args: Any, **kwargs: Any) -> Values:
        less = {"model": {"width": 4}, "train": {"epochs": 1}}
        if (whole := make(*args, **kwargs)).get("kind") != "continual":
            less = {"model": {"width": 4}, "data": {"train_per_client": 16, "test_per_domain": 10}}
        return merge(whole, less)

    return values


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_demo_ends_in_a_short_table_a_world_and_the_path_of_the_page(
    whole: bool, call: Call, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("demo", "--rounds", "1", "--images", "40" if whole else "10")
    for name in () if whole else ("demo_values", "stream_values", "memorization_values"):
        monkeypatch.setattr(demo, name, smaller(getattr(demo, name)))
    result = call(*small, "--json")
    assert result.code == 0
    results, streams = result.document["results"][:3], result.document["results"][3:]
    assert [r["config"]["strategy"]["name"] for r in results] == ["fedavg", "fedbn", "fedwon"]
    norms = ["batch_norm", "adab2n", "continual_norm", "group_norm", "none", "layer_norm", "nap"]
    assert [r["config"]["norm"]["name"] for r in streams] == norms
    outcome = call(*small)
    lines = [line.split() for line in outcome.out.splitlines()]
    for r in results:
        assert [r["config"]["strategy"]["name"], f"{100 * r['final']['mean']:.1f}"] in [line[:2] for line in lines]
    for r in streams:
        score = r["final"]["plasticity" if r["data"]["memorization"] else "average_accuracy"]
        assert [r["config"]["norm"]["name"], f"{100 * score:.1f}"] in [line[:2] for line in lines]
    assert len(lines) < 35, "a short table a world; the rest is on the page"
    folder = tmp_path / "runs" / "demo"
    assert outcome.out.splitlines()[-1].endswith(f": {folder / 'page.html'}")
    assert all(r["hash"] in (folder / "page.html").read_text() for r in (*results, *streams))
    refused(call("demo", "--rounds", "0"), "rounds.num_rounds must be at least 1; got 0")
