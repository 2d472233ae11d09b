"""At an experience's end: tensors kept per experience, clients that do not answer, drift, learners that train then."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.config import resolve
from fednorm.errors import DataError
from fednorm.federated_continual import measures
from fednorm.federated_continual.measures import Course
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.federation.simulate import simulate
from fednorm.federation.wire import unpack
from fednorm.federation.workbench import STATE_RECORD
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord
from fednorm.records.results import load
from fednorm.report.comparison import comparisons
from fednorm.report.grid_table import cells_table, grid_table, tensor_table

GRID: dict[str, Any] = {
    "kind": "federated_continual",
    "scenario": {"name": "split_digits", "num_experiences": 2, "train_per_experience": 40, "test_per_experience": 30},
    "model": {"width": 4},
    "norm": {"name": "batch_norm"},
    "grid": {"clients": 2},
    "rounds": {"per_experience": 2},
    "train": {"batch_size": 8, "learning_rate": 0.05},
}
OWN_TENSORS: dict[str, Any] = {**GRID, "evaluate": {"task_identity": True}}


def per_experience(**values: Any) -> dict[str, Any]:
    grid = {**GRID["grid"], "norms": "per_experience", **values.pop("grid", {})}
    return {**OWN_TENSORS, "grid": grid, **values}


def run(folder: Any, values: Mapping[str, Any], **more: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = resolve(values)
    result = simulate(config, runs=folder, **more)
    tensors, _ = read_tensors(RunRecord(folder, config).folder / "model.safetensors", config.hash)
    return tensors, result


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """The server's tensors after each round."""
    tensors: dict[int, dict[str, Tensor]] = {}
    after = GridWorkbench.after_round

    def taken(self: GridWorkbench, grid: Any, server_round: int, arrays: Any) -> Any:
        tensors[server_round] = {key: tensor.clone() for key, tensor in unpack(arrays).items()}
        return after(self, grid, server_round, arrays)

    monkeypatch.setattr(GridWorkbench, "after_round", taken)
    return tensors


def test_an_experience_is_tested_under_its_own_tensors(tmp_path: Any, sent: dict[int, dict[str, Tensor]]) -> None:
    """The network of today with the normalization of the experience's end, among the experience's own classes."""
    tensors, result = run(tmp_path / "own", per_experience())
    bench = GridWorkbench(resolve(per_experience()))
    keys = bench.norms.keys
    assert sum(key.endswith(("running_mean", "weight")) for key in keys) > 4
    experience = bench.grid.stream.experiences[0]
    images, labels = experience.test.inputs(torch.arange(len(experience.test)))

    def accuracy(norms: Mapping[str, Tensor]) -> float:
        bench.model.load_state_dict({**sent[4], **{key: norms[key] for key in keys}})
        logits = bench.model.eval()(images)[:, list(experience.classes)]
        guesses = torch.tensor(experience.classes)[logits.argmax(1)]
        return float((guesses == labels).double().mean())

    assert any(not torch.equal(sent[2][key], sent[4][key]) for key in keys)
    assert result["accuracy_tensor"][1][0][0] == pytest.approx(accuracy(sent[2]), abs=1e-9)
    kept, keep = run(tmp_path / "keep", OWN_TENSORS)
    assert keep["accuracy_tensor"][1][0][0] == pytest.approx(accuracy(sent[4]), abs=1e-9)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in tensors.items()), "training is the same"
    assert result["accuracy_tensor"][1][0][1] == keep["accuracy_tensor"][1][0][1], "of the present one they are too"


def test_the_plan_says_both_axes() -> None:
    rows = GridWorkbench(resolve(per_experience(strategy={"name": "fedbn"}))).about()["grid"]["boundaries"]
    told = {(row["kind"], row["round"], row["experience"]) for row in rows}
    assert {("mean", "local", "per_experience"), ("scale", "local", "per_experience")} <= told
    assert ("weight", "shared", "keep") in told


class Cut:
    def __init__(self, after: int) -> None:
        self.after = after

    def begin(self, bench: Any, first_round: int) -> None: ...

    def round(self, line: Any) -> None:
        if line["round"] == self.after:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_own_orders_with_local_tensors_and_gdumb_go_on_to_the_same_bits(tmp_path: Any) -> None:
    values = per_experience(
        strategy={"name": "fedbn"},
        learner={"name": "gdumb", "memory_size": 10, "memory_epochs": 3},
        grid={"order": "rotated"},
    )
    whole, result = run(tmp_path / "whole", values)
    for after in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            simulate(resolve(values), runs=tmp_path / "cut", observer=Cut(after))
    tensors, again = run(tmp_path / "cut", values)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in whole.items())
    assert again["accuracy_tensor"] == result["accuracy_tensor"]
    assert result["accuracy_tensor"][0][0][1] is None
    assert result["accuracy_tensor"][0][1][1] is not None, "client 1 begins with experience 1"


# Clients that do not answer.


def deaf(monkeypatch: pytest.MonkeyPatch, client: int | None, time: int) -> dict[int, dict[str, Tensor]]:
    """Let a client (None: all) fail at a boundary; return what each has kept after the last that it answered."""
    kept: dict[int, dict[str, Tensor]] = {}
    cross = GridWorkbench.cross_boundary

    def crossed(self: GridWorkbench, content: Any, context: Any) -> Any:
        number = self.client(context).partition_id
        if int(str(content.config_records["config"]["time"])) == time and client in (None, number):
            raise RuntimeError("the line is dead")
        reply = cross(self, content, context)
        kept[number] = unpack(context.state.array_records[STATE_RECORD])
        return reply

    monkeypatch.setattr(GridWorkbench, "cross_boundary", crossed)
    return kept


@pytest.mark.parametrize("learner", ["gdumb", pytest.param("naive", marks=pytest.mark.slow)])
def test_a_client_that_missed_a_boundary_ends_the_experience_later(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, learner: str
) -> None:
    kept = deaf(monkeypatch, 1, 0)
    options = {"memory_size": 10, "memory_epochs": 2} if learner == "gdumb" else {}
    _, result = run(tmp_path, per_experience(learner={"name": learner, **options}))
    assert result["accuracy_tensor"][0][1] == [None, None]
    assert None not in result["accuracy_tensor"][1][1]
    final = result["final"]
    assert final["unheard"] == [{"experience": 0, "client": 1}]
    first = result["accuracy_tensor"]
    assert final["forgetting_max_minus_last"] == pytest.approx(max(first[0][0][0], first[1][0][0]) - first[1][0][0]), (
        "of the client whose matrix is whole"
    )
    ended = {client: int(state["learner/counts"][1]) for client, state in kept.items()}
    assert ended == {0: 2, 1: 2}
    assert {key.split("/")[2] for key in kept[1] if key.startswith("learner/norms/")} == {"0", "1"}
    assert any("the line is dead" in each["reason"] for line in result["rounds"] for each in line["rejected"])


def test_nobody_answers_after_the_last_experience(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf(monkeypatch, None, 1)
    _, result = run(tmp_path, GRID)
    final = result["final"]
    assert final["average_accuracy"] is None
    assert final["worst_client"] is None
    assert final["unheard"] == [{"experience": 1, "client": 0}, {"experience": 1, "client": 1}]
    table = grid_table([result])
    assert table.rows[0][1] == "–"
    assert any("Clients 0, 1 gave no accuracies after experience 2" in note for note in table.notes)
    assert tensor_table(result).rows[1][1] == "–"
    (read,) = load([tmp_path]).results  # the record can be read, and stand beside others
    (comparison,) = comparisons([read])
    assert comparison.methods[0].label


# Drift, and forgetting over time.


def test_drift_is_from_the_pooled_statistics_of_a_round(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics: dict[int, dict[int, dict[str, Tensor]]] = {}
    after = GridWorkbench.after_round

    def taken(self: GridWorkbench, grid: Any, server_round: int, arrays: Any) -> Any:
        statistics[server_round] = {k: dict(own) for k, own in self.strategy.report.statistics.items()}
        return after(self, grid, server_round, arrays)

    monkeypatch.setattr(GridWorkbench, "after_round", taken)
    _, result = run(tmp_path, GRID)
    counts = [[cell["train"] for cell in row] for row in result["grid"]["cells"]]
    assert not statistics[1]
    assert not statistics[3]
    for time, server_round in enumerate((2, 4)):
        one, two = (statistics[server_round][client] for client in range(2))
        n, m = counts[0][time], counts[1][time]
        drifts = []
        for key in (key for key in one if key.endswith("running_mean")):
            var = key.replace("running_mean", "running_var")
            means, variances = (torch.stack([one[k], two[k]]).double() for k in (key, var))
            p = torch.tensor([[n], [m]], dtype=torch.float64) / (n + m)
            joint = (p * means).sum(0)
            spread = (p * (variances + (means - joint) ** 2)).sum(0)
            s, sigma = (spread + 1e-5).sqrt(), (variances + 1e-5).sqrt()
            drifts.append((((means - joint) ** 2 + (sigma - s) ** 2) / s**2).mean(1).sqrt())
        expected = torch.stack(drifts).mean(0).tolist()
        assert result["drift_tensor"][time] == pytest.approx(expected, rel=1e-9)
        assert min(expected) > 0
    everything = [value for row in result["drift_tensor"] for value in row]
    assert result["final"]["drift"] == pytest.approx(math.fsum(everything) / 4)
    table = grid_table([result])
    assert float(dict(zip(table.columns, table.rows[0], strict=True))["drift"]) == pytest.approx(
        result["final"]["drift"], rel=5e-3
    )


def test_drift_of_local_statistics_is_asked_for(tmp_path: Any) -> None:
    _, result = run(tmp_path, {**GRID, "strategy": {"name": "silobn"}, "learner": {"name": "naive"}})
    assert all(value > 0 for row in result["drift_tensor"] for value in row)
    _, without = run(tmp_path, {**GRID, "norm": {"name": "group_norm"}})
    assert "drift_tensor" not in without
    assert "drift" not in without["final"]


def test_forgetting_over_time_by_hand() -> None:
    tensor = [
        [[0.8, None, None], [None, 0.6, None]],
        [[0.5, 0.7, None], [0.9, 0.4, None]],
        [[0.6, 0.6, 0.9], [0.5, 0.6, 0.8]],
    ]
    courses = [Course(((0, 0), (1, 1), (2, 2)), 2), Course(((0, 1), (1, 0), (2, 2)), 2)]
    assert measures.temporal_forgetting(tensor, courses, 0) is None
    assert measures.temporal_forgetting(tensor, courses, 1) == pytest.approx((0.3 + 0.2) / 2)
    # Client 0: 0.8 - 0.6 and 0.7 - 0.6; client 1: 0.6 - 0.6 and 0.9 - 0.5.
    last = measures.temporal_forgetting(tensor, courses, 2)
    assert last == pytest.approx(((0.2 + 0.1) / 2 + (0 + 0.4) / 2) / 2)
    assert last == pytest.approx(measures.final(tensor, tensor, courses)["forgetting_max_minus_last"])
    silent = [tensor[0], [[None] * 3, tensor[1][1]], tensor[2]]
    assert measures.temporal_forgetting(silent, courses, 1) == pytest.approx(0.2)


# What the plan says, and what is refused.


def test_a_client_without_images_skips_the_experience_and_the_plan_says_so() -> None:
    values = {**GRID, "grid": {"clients": 3, "partition": "dirichlet", "alpha": 0.3, "min_images": 8}}
    bench = GridWorkbench(resolve(values))
    table = cells_table(bench.about()["grid"])
    told = [cell for row in table.rows for cell in row[1:]]
    assert "nothing, skipped" in told
    client, time = next((k, t) for k in range(3) for t in range(2) if table.rows[k][t + 1] == "nothing, skipped")
    assert not bench.takes_part(client, 2 * time + 1)


def test_a_client_s_stream_that_is_longer_than_another_s_is_refused() -> None:
    grid = GridWorkbench(resolve(GRID)).grid
    with pytest.raises(DataError, match=r"client 1 has a stream of 1\. Put None"):
        dataclasses.replace(grid, cells=(grid.cells[0], grid.cells[1][:1]), present=(grid.present[0], (True,)))


@pytest.mark.slow
def test_workers_give_the_same_bits(tmp_path: Any) -> None:
    adab2n = {"norm": {"name": "adab2n"}, "strategy": {"name": "fedavg", "moments": "pool_tasks"}}
    gdumb = {"strategy": {"name": "fedbn"}, "learner": {"name": "gdumb", "memory_size": 10, "memory_epochs": 2}}
    for number, values in enumerate((per_experience(**adab2n), per_experience(**gdumb, grid={"order": "rotated"}))):
        one, first = run(tmp_path / f"{number}-1", {**values, "workers": 1})
        two, second = run(tmp_path / f"{number}-2", {**values, "workers": 2})
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
        for name in ("accuracy_tensor", "own_accuracy_tensor", "drift_tensor"):
            assert first[name] == second[name]
