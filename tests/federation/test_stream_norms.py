"""Norms made for streams, in a federation: where the strategies put their tensors, and a round with each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fednorm.norms.adab2n import AdaB2NLayer, modified_momentum
from fednorm.roles import STATISTICS, Role

NORMS: dict[str, set[str]] = {
    "adab2n": {"task_weight"},
    "batch_norm_corrected": set(),
    "batch_renorm": {"r_samples", "d_samples"},
    "continual_norm": set(),
    "switch_norm": {"mean_weight", "var_weight"},
    "task_balanced_norm": set(),
}
"""What each method's layer owns beside batch normalization's five tensors."""
OWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def names(plan: Any, role: Role, norm: str) -> set[str]:
    return {e.key.rsplit(".", 1)[-1] for e in plan.entries if e.norm == norm and e.role is role}


@pytest.mark.parametrize("norm", NORMS)
def test_fedbn_keeps_every_tensor_local_and_silobn_the_statistics(make_site: Any, norm: str) -> None:
    fedbn, silobn = (make_site(strategy, norm={"name": norm}).bench.plan for strategy in ("fedbn", "silobn"))
    everything = OWN | set(NORMS[norm])
    assert names(fedbn, Role.LOCAL, norm) == everything
    assert names(fedbn, Role.SHARED, norm) == set()
    counters = {"r_samples", "d_samples"} & everything
    assert names(silobn, Role.LOCAL, norm) == {"running_mean", "running_var", "num_batches_tracked"} | counters
    assert names(silobn, Role.SHARED, norm) == {"weight", "bias"} | (set(NORMS[norm]) - counters)
    assert {e.kind in STATISTICS for e in silobn.entries if e.role is Role.LOCAL} == {True}


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "silobn"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_round_trains_sends_what_is_planned_and_evaluates_with_what_was_kept(
    make_site: Any, norm: str, strategy: str
) -> None:
    site = make_site(strategy, norm={"name": norm})
    plan, initial = site.bench.plan, site.bench.read(site.bench.plan.by_key)
    sent = site.strategy.initial_arrays(site.bench.model)
    replies = [site.train(pid, 1, sent) for pid in (0, 1)]
    for pid, reply in enumerate(replies):
        assert set(reply) == set(plan.sent)
        assert set(site.kept(pid)) >= set(plan.local)
        held = {**reply, **site.kept(pid)}
        moved = {key for key in held if not torch.equal(held[key], initial[key])}
        # psi rests without tasks; everything else trains or counts.
        assert set(initial) - moved == {key for key in initial if key.endswith("task_weight")}
        batches = [held[key] for key in held if key.endswith("num_batches_tracked")]
        assert {int(count) for count in batches} == {2}  # the batch of one image is dropped
    assert all(not torch.equal(a, replies[1][key]) for key, a in replies[0].items() if key.endswith("running_mean"))
    metrics = site.evaluate(0, sent)
    assert metrics["num-examples"] == 5
    assert 0.0 < metrics["loss"] < 10.0
    adapted = site.evaluate(0, sent, mode="reestimated", images=4)
    assert adapted["loss"] != metrics["loss"]


def test_a_clients_own_counter_sets_the_momentum_of_its_next_round(make_site: Any) -> None:
    site = make_site("fedavg", norm={"name": "adab2n", "options": {"kappa": 0.4}})
    site.train(0, 1)
    site.train(0, 2)
    etas = {m.eta for m in site.bench.model.modules() if isinstance(m, AdaB2NLayer)}
    assert etas == {modified_momentum(4, 0.1, 0.4)}
