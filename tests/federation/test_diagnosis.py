"""A round's diagnostics against the formulas written out, on tensors taken from the clients by another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

import fednorm
from fednorm.federation.diagnosis import ClientStatistics, diagnose, drift_by_domain
from fednorm.federation.plan import norm_plan
from fednorm.federation.round_report import RoundReport
from fednorm.federation.wire import unpack
from fednorm.roles import RoleRule

Make = Callable[..., Any]
LAYERS = ("norm1", "norm2", "norm3", "norm4", "norm5")


def run(site: Any, rounds: int = 1, evaluate_every: int = 1) -> list[tuple[RoundReport, ArrayRecord, dict[str, Any]]]:
    """Run rounds, and diagnose those that are evaluated when they end, as the server does."""
    seen: list[tuple[RoundReport, ArrayRecord, dict[str, Any]]] = []

    def on_round(report: RoundReport, arrays: ArrayRecord) -> None:
        seen.append((report, arrays, diagnose(site.bench, site.grid, report, arrays) if report.evaluate else {}))

    arrays = site.strategy.initial_arrays(site.bench.model)
    site.strategy.start(site.grid, arrays, num_rounds=rounds, evaluate_every=evaluate_every, on_round=on_round)
    return seen


def drift(layer: str, clients: list[dict[str, torch.Tensor]], weights: list[int]) -> list[float]:
    """Return each client's drift in one layer, in NumPy."""
    means = np.stack([c[f"{layer}.running_mean"].numpy().astype(float) for c in clients])
    variances = np.stack([c[f"{layer}.running_var"].numpy().astype(float) for c in clients])
    p = np.array(weights)[:, None] / sum(weights)
    m = (p * means).sum(0)
    v = (p * (variances + means**2)).sum(0) - m**2
    s, sigma = np.sqrt(v + 1e-5), np.sqrt(variances + 1e-5)
    drifts: list[float] = np.sqrt((((means - m) ** 2 + (sigma - s) ** 2) / s**2).mean(1)).tolist()
    return drifts


def test_statistics_that_stay_are_asked_for(make_site: Make) -> None:
    site = make_site("fedbn")
    ((_, _, found),) = run(site)
    kept = [site.kept(pid) for pid in range(3)]
    assert list(found["drift"]) == ["domain0", "domain1", "domain2"]
    for layer in LAYERS:
        expected = drift(layer, kept, [9, 8, 5])
        assert [found["drift"][f"domain{k}"][layer] for k in range(3)] == pytest.approx(expected, rel=1e-9)
        assert min(expected) > 0.01  # the domains differ


def test_statistics_that_travel_are_those_before_averaging(make_site: Make) -> None:
    site = make_site("fedavg")
    ((report, _, found),) = run(site)
    sent = [report.statistics[pid] for pid in range(3)]
    alone = make_site("fedavg")
    initial = alone.strategy.initial_arrays(alone.bench.model)
    for pid in range(3):
        trained = alone.train(pid, 1, initial)
        for key, tensor in sent[pid].items():
            assert torch.equal(tensor, trained[key]), key
    for layer in LAYERS:
        expected = drift(layer, sent, [9, 8, 5])
        assert [found["drift"][f"domain{k}"][layer] for k in range(3)] == pytest.approx(expected, rel=1e-9)


def test_weights_are_the_servers(make_site: Make) -> None:
    site = make_site("fedbn", train={"learning_rate": 0.05})
    ((_, arrays, found),) = run(site)
    server = unpack(arrays)
    assert set(found["weight_norm"]) == {"conv1", "conv2", "conv3", "fc1", "fc2", "fc3"}
    for path, norm in found["weight_norm"].items():
        expected = math.sqrt(float((server[f"{path}.weight"].double() ** 2).sum()))
        assert norm == pytest.approx(expected, rel=1e-5)
        assert found["effective_learning_rate"][path] == pytest.approx(0.05 / expected**2, rel=1e-5)


@pytest.mark.parametrize(("strategy", "sections"), [("fedwon", {}), ("fedavg", {"norm": {"name": "group_norm"}})])
def test_without_running_statistics_nothing_drifts(make_site: Make, strategy: str, sections: dict[str, Any]) -> None:
    ((_, _, found),) = run(make_site(strategy, **sections))
    assert found["drift"] == {}
    assert found["weight_norm"]


def test_only_evaluated_rounds_keep_statistics(make_site: Make) -> None:
    first, second, third = run(make_site("fedavg"), rounds=3, evaluate_every=2)
    assert (first[0].statistics, bool(second[0].statistics), bool(third[0].statistics)) == ({}, True, True)


def test_clients_of_one_domain_are_averaged_and_a_missing_one_is_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    plan = norm_plan(model, RoleRule())

    def client(domain: str, mean: float, examples: float = 1.0) -> ClientStatistics:
        tensors = {"1.running_mean": torch.tensor([mean]), "1.running_var": torch.tensor([1.0])}
        return ClientStatistics(domain, examples, tensors)

    # Joint: mean 1, variance 1 + 1 = 2; each client: sqrt((1 + (1 - sqrt 2)^2) / 2), all with eps = 1e-5.
    found = drift_by_domain([client("a", 0), client("a", 2), ClientStatistics("b", 5, {})], plan)
    s, sigma = math.sqrt(2 + 1e-5), math.sqrt(1 + 1e-5)
    assert found == {"a": {"1": pytest.approx(math.sqrt((1 + (sigma - s) ** 2) / s**2))}}
    heavy = drift_by_domain([client("a", 0, 3), client("b", 2)], plan)  # joint mean 0.5, variance 1.75
    assert heavy["a"]["1"] < heavy["b"]["1"]


def test_clients_give_their_statistics_and_nothing_else(make_site: Make) -> None:
    site = make_site("fedbn")
    assert "arrays" not in site.tell(0, "query.statistics").array_records  # it has never trained
    run(site)
    told = unpack(site.tell(0, "query.statistics").array_records["arrays"])
    assert set(told) == {f"{layer}.{name}" for layer in LAYERS for name in ("running_mean", "running_var")}
    assert set(site.kept(0)) > set(told)


def test_diagnosing_changes_no_number(make_site: Make) -> None:
    watched, plain = make_site("silobn"), make_site("silobn")
    arrays = run(watched, rounds=2)[-1][1]
    silent = plain.strategy.start(plain.grid, plain.strategy.initial_arrays(plain.bench.model), num_rounds=2).arrays
    for key, tensor in unpack(silent).items():
        assert torch.equal(tensor, unpack(arrays)[key]), key


@pytest.mark.parametrize("wanted", [True, False])
def test_diagnostics_can_be_left_out(wanted: bool) -> None:
    small = {"data": {"train_per_client": 8, "test_per_domain": 5}, "model": {"width": 4}}
    config = {**small, "evaluate": {"diagnostics": wanted}}
    result = fednorm.federated(strategy="fedbn", rounds=1, config=config)
    assert ("diagnostics" in result["rounds"][0]) is wanted
