"""What a round did to the network: how far clients' statistics are from the joint ones, and how its weights stand.

Made in rounds that are evaluated. Statistics that travel are taken from the clients' replies; those that stay on the
clients are asked for (``query.statistics``), for the record and not for training: the bytes of it are in no count.
``evaluate.diagnostics = false`` leaves all of it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fednorm.cards import OPTIMIZERS
from fednorm.federation.nodes import Node, asked
from fednorm.federation.plan import NormPlan
from fednorm.federation.pooling import pool_moments
from fednorm.federation.replies import read_statistics
from fednorm.federation.round_report import RoundReport
from fednorm.federation.stack import Gathered
from fednorm.federation.wire import unpack
from fednorm.roles import Role
from fednorm.training.diagnostics import Moments, Optimizer, rates_of_norms, wasserstein_drifts, weight_layers

if TYPE_CHECKING:
    from fednorm.federation.workbench import Workbench


@dataclass(frozen=True)
class ClientStatistics:
    """One client's running statistics after its training.

    Attributes:
        domain: The client's domain.
        examples: Its training images, which weigh it among the joint statistics.
        tensors: Running means and variances by their keys in the state dict.
    """

    domain: str
    examples: float
    tensors: Mapping[str, Tensor]


def diagnose(bench: Workbench, grid: Grid, report: RoundReport, arrays: ArrayRecord) -> dict[str, Any]:
    """Return the diagnostics of one round.

    Args:
        bench: The run's workbench.
        grid: The way to the clients.
        report: The round, with the statistics that travelled; clients whose statistics do not fit are taken down in it.
        arrays: The server's tensors after it.

    Returns:
        ``drift`` (:func:`drift_by_domain`), ``weight_norm`` and ``effective_learning_rate`` of the server's weights,
        by layer.
    """
    norms = server_weight_norms(bench, unpack(arrays))
    train = bench.config.train
    optimizer: Optimizer = "adam" if OPTIMIZERS[train.optimizer].adaptive else "sgd"
    return {
        "drift": drift_by_domain(statistics_of(bench, grid, report), bench.plan),
        "weight_norm": norms,
        "effective_learning_rate": rates_of_norms(norms, train.learning_rate, optimizer=optimizer),
    }


def drift_by_domain(clients: Iterable[ClientStatistics], plan: NormPlan) -> dict[str, dict[str, float]]:
    """Return how far the statistics of each domain's clients are from the joint ones, by domain and layer.

    The joint statistics of a layer are those of all the clients pooled by the law of total variance, weighted by
    training images (:func:`~fednorm.federation.pooling.pool_moments`); the distance is
    :func:`~fednorm.training.diagnostics.wasserstein_drift`, in the joint standard deviations, averaged over a domain's
    clients.

    Args:
        clients: Their statistics. Clients without those of a layer are left out of it.
        plan: Which tensors are a layer's mean and variance.

    Returns:
        An empty dictionary where there are no running statistics.
    """
    clients = list(clients)
    everyone = Gathered([client.tensors for client in clients])
    drifts: dict[str, dict[str, list[float]]] = {}
    for mean_key, var_key in plan.moments():
        having, gathered = clients, everyone
        if not (everyone.have(mean_key) and everyone.have(var_key)):
            having = [client for client in clients if mean_key in client.tensors and var_key in client.tensors]
            gathered = Gathered([client.tensors for client in having])
        if not having:
            continue
        moments = Moments(gathered.of_each(mean_key), gathered.of_each(var_key))
        joint = pool_moments(moments.mean, moments.var, [client.examples for client in having])
        layer = plan.by_key[mean_key].layer
        for client, drift in zip(having, wasserstein_drifts(moments, Moments(*joint)), strict=True):
            drifts.setdefault(client.domain, {}).setdefault(layer, []).append(drift)
    return {
        domain: {layer: mean(values) for layer, values in layers.items()} for domain, layers in sorted(drifts.items())
    }


def server_weight_norms(bench: Workbench, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the Frobenius norm of each layer's weight among the server's tensors, by the layer's path."""
    held = {
        path: tensors[f"{path}.weight"].contiguous()  # sums depend on the order, which a checkpoint does not keep
        for path in weight_layers(bench.model)
        if f"{path}.weight" in tensors
    }
    norms = torch._foreach_norm(list(held.values())) if held else ()
    return {path: norm.item() for path, norm in zip(held, norms, strict=True)}


def statistics_of(bench: Workbench, grid: Grid, report: RoundReport) -> list[ClientStatistics]:
    """Return the running statistics of the clients that trained in a round, asked for where they stay on a client.

    Args:
        bench: The run's workbench.
        grid: The way to the clients.
        report: The round, with the statistics that travelled; clients whose statistics do not fit are taken down in it.
    """
    plan = bench.plan
    keys = [key for pair in plan.moments() for key in pair]
    local = any(plan.by_key[key].role is Role.LOCAL for key in keys)
    trained = {client.partition_id for client in report.train} if local else set()
    nodes = {node.partition_id: node for node in bench.strategy.nodes if node.partition_id in trained}
    asked = [nodes[client.partition_id] for client in report.train] if local else []
    asked = [node for node in asked if node.shows]
    kept = _ask(grid, asked, plan, report)
    return [
        ClientStatistics(
            client.domain,
            client.metrics["num-examples"],
            _both(kept.get(client.partition_id, {}), report.statistics[client.partition_id]),
        )
        for client in report.train
    ]


def _both(kept: Mapping[str, Tensor], travelled: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {**kept, **travelled} if kept and travelled else kept or travelled


def _ask(grid: Grid, nodes: Sequence[Node], plan: NormPlan, report: RoundReport) -> dict[int, Mapping[str, Tensor]]:
    """Return the statistics that each client keeps, by partition id; a client without good ones is left out."""
    ask = "query.statistics"
    reject = partial(report.reject, during=ask)
    found = asked(grid, RecordDict(), ask, nodes, lambda _, reply: read_statistics(reply, plan), reject)
    return {node.partition_id: kept for node, kept in found}
