"""How long a run will take, measured on its own model before it starts."""

from __future__ import annotations

import time

import torch

from fednorm.data.domain import Client, Split
from fednorm.federated.client import fit, score
from fednorm.federated.workbench import Workbench


def estimate_seconds(bench: Workbench) -> float:
    """Return about how long all rounds will take on this machine, in seconds.

    One small client's training and evaluation are timed, after a warm-up; the model's tensors are put back. Other
    load on the machine enters as it does in the run.

    Args:
        bench: The run's workbench.
    """
    config, federation = bench.config, bench.federation
    clients = federation.training_clients
    images = min(4 * config.train.batch_size, *(len(client.train) for client in clients))
    probe = _first(clients[0], max(images, 2))
    before = bench.read(bench.model.state_dict())
    fit(bench, probe, server_round=0)
    began = time.perf_counter()
    fit(bench, probe, server_round=0)
    per_train = (time.perf_counter() - began) / len(probe.train)
    began = time.perf_counter()
    score(bench, probe.test)
    per_test = (time.perf_counter() - began) / max(len(probe.test), 1)
    bench.write(before)
    rounds = config.rounds
    trained = rounds.fraction * config.train.local_epochs * sum(len(client.train) for client in clients)
    tested = sum(len(client.test) for client in clients)
    evaluations = -(-rounds.num_rounds // rounds.evaluate_every)
    return rounds.num_rounds * trained * per_train + evaluations * tested * per_test


def _first(client: Client, count: int) -> Client:
    def few(split: Split) -> Split:
        return Split(split.images, split.labels, split.index[: min(count, len(split))].to(torch.int64))

    return Client(client.partition_id, client.domain, few(client.train), client.validation, few(client.test))
