"""Results as objects: the table of ``result.json`` with attributes, frames, figures, HTML and the trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fednorm
from fednorm.errors import ConfigError
from fednorm.records.result import FederatedResult, GridResult, StreamResult, result_of
from fednorm.records.results import Loaded, load
from fednorm.report.comparison import comparisons
from fednorm.report.figures import drawings
from fednorm.report.page_data import document
from fednorm.report.sections import sections

SMALL: dict[str, Any] = {
    "data": {"train_per_client": 8, "test_per_domain": 5, "domains": ["scans", "photo"]},
    "model": {"width": 4},
}
STREAM: dict[str, Any] = {
    "scenario": {"num_experiences": 2, "train_per_experience": 8, "test_per_experience": 4},
    "model": {"width": 4},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def federated(runs: Path) -> FederatedResult:
    return fednorm.federated(strategy="fedbn", rounds=2, config=SMALL, runs=runs)


@pytest.fixture(scope="module")
def stream() -> StreamResult:
    return fednorm.continual(learner="naive", config=STREAM)


@pytest.fixture(scope="module")
def grid() -> GridResult:
    rounds = {"rounds": {"per_experience": 2}, "train": {"batch_size": 4}}
    return fednorm.federated(
        strategy="fedavg", learner="naive", scenario="split_digits", clients=2, config=STREAM | rounds
    )


def test_a_grid_has_a_page_figures_and_a_table_too(grid: GridResult) -> None:
    """It is shown as a stream is, by experience, in means over its clients."""
    assert (grid.kind, grid.subject, grid.unit) == ("federated_continual", "federated_continual", "experience")
    (comparison,) = comparisons([grid])
    loaded = Loaded([grid], [], [])
    page = document(loaded, sections(loaded))
    (section,) = page["sections"]
    (run,) = section["runs"]
    assert section["kind"] == "federated_continual"
    times = len(grid.accuracy_tensor)
    assert page["grids"][run["series"]["average"][0]] == list(range(1, times + 1))
    assert run["matrix"][0][0] == pytest.approx(sum(row[0] for row in grid.accuracy_tensor[0]) / 2, abs=1e-4)
    assert [drawing.end for drawing in drawings(comparison)] == [
        "comparison",
        "spatial_forgetting_by_experience",
        "average_accuracy_by_experience",
        "accuracy_matrix-fedavg-naive-batch_norm",
    ]
    assert "spatial" in grid._repr_html_()


def test_a_result_is_the_table_that_was_written(federated: FederatedResult) -> None:
    assert federated.folder is not None
    written = json.loads((federated.folder / "result.json").read_text())
    assert {key: written[key] for key in federated} == federated
    assert result_of(dict(federated)) == federated
    assert result_of(federated) is federated


def test_both_kinds_answer_what_readers_ask(federated: FederatedResult, stream: StreamResult) -> None:
    assert (federated.kind, federated.unit, federated.actor, federated.headline) == (
        *("federated", "round", "strategy", "mean"),
    )
    assert [number for number, _ in federated.steps] == [1, 2]
    assert federated.score == federated["final"]["mean"]
    assert federated.rounds is federated["rounds"]
    assert (stream.kind, stream.unit, stream.actor, stream.headline) == (
        *("continual", "experience", "learner", "average_accuracy"),
    )
    assert [number for number, _ in stream.steps] == [1, 2]
    assert stream.score == stream["final"]["average_accuracy"]
    assert stream.accuracy_matrix is stream["accuracy_matrix"]
    assert (federated.seed, stream.seed, stream.folder) == (1, 1, None)
    assert not stream.memorizes


@pytest.mark.parametrize(
    ("strategy", "norm", "name"),
    [
        ("fedavg", "batch_norm", "fedavg"),
        ("fedavg", "group_norm", "fedavg + group_norm"),
        ("fedwon", "sws", "fedwon"),
        ("fedwon", "batch_norm", "fedwon + batch_norm"),
        ("package.mine:Strategy", "batch_norm", "package.mine:Strategy"),
    ],
)
def test_a_record_without_the_word_still_tells_whose_norm_it_is(strategy: str, norm: str, name: str) -> None:
    config = {"kind": "federated", "strategy": {"name": strategy}, "norm": {"name": norm}}
    assert result_of({"config": config}).method_name == name


def test_a_result_says_whether_the_norm_is_the_strategys_own(federated: FederatedResult) -> None:
    assert federated["own_norm"] is True
    assert federated.method_name == "fedbn"
    assert FederatedResult({**federated, "own_norm": False}).method_name == "fedbn + batch_norm"


def test_what_is_read_from_disk_are_results_too(federated: FederatedResult, runs: Path) -> None:
    (read,) = load([runs]).results
    assert isinstance(read, FederatedResult)
    assert read.score == federated.score


def test_frames_figures_and_html(federated: FederatedResult, stream: StreamResult) -> None:
    for result in (federated, stream):
        frame = result.frame()
        assert set(frame["run"]) == {result["hash"]}
        (line,) = result.plot().axes[0].lines
        assert list(line.get_xdata()) == [1, 2]
        page = result._repr_html_()
        assert page.startswith("<table>")
        assert "data:image/png;base64,iVBOR" in page
        assert result.method_name in page
    assert f"{100 * federated['final']['mean']:.1f}" in federated._repr_html_()


def test_the_network_comes_back(federated: FederatedResult, stream: StreamResult) -> None:
    one, other = federated.model(client=0), federated.model(client=1)
    assert not torch.equal(one.norm1.running_mean, other.norm1.running_mean)  # type: ignore[operator,union-attr,arg-type]
    with pytest.raises(ConfigError, match=r"without a record.*runs='runs'"):
        stream.model()
