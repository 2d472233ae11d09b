"""How long a federated run will take, measured on its own model before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fednorm.config import ALL_CLIENTS, SAMPLED_CLIENTS, RunConfig, TrainConfig
from fednorm.data.domain import Client, Federation, Split
from fednorm.device import seconds
from fednorm.federation.client import fit, score, steps_of_round
from fednorm.federation.workbench import Workbench

QUICK = 0.5
"""Seconds: of shorter batches so many are timed, four at most, and twice: the first ones of a process are slower."""

SCORED = 16
"""Most images of the evaluation that is timed."""

COPIES = 4
"""How often a client's turn moves the model: into the workbench, out of it, over the wire, into the average."""


@dataclass(frozen=True)
class Rates:
    """What the parts of a round cost, in seconds.

    Attributes:
        train: A training image: forward and backward pass, and its share of the update.
        test: An image that is scored.
        copy: Every tensor of the model, copied once.
    """

    train: float
    test: float
    copy: float


def measure(bench: Workbench) -> Rates:
    """Time one client's training and evaluation, after a warm-up; the model's tensors are put back.

    With one thread, what other processes do on the machine does not enter.

    Args:
        bench: A workbench of the run.
    """
    counts = bench.federation.counts
    client = bench.federation.clients[int((counts.train * counts.trains).argmax())]
    before = bench.read(bench.model.state_dict())
    batch = _first(client, max(bench.config.train.batch_size, 2))
    _seconds_to_fit(bench, batch)
    train = _seconds_to_fit(bench, batch)
    if batches := min(int(QUICK / max(train, 1e-6)), 4):
        batch = _first(client, batches * len(batch.train))
        train = min(_seconds_to_fit(bench, batch) for _ in range(2))
    scored = _first(client, SCORED).train
    score(bench, _first(client, 2).train)
    device = bench.trainee.device
    began = seconds(device)
    score(bench, scored)
    test = seconds(device) - began
    began = seconds(device)
    bench.write(before)
    copy = seconds(device) - began
    return Rates(train / len(batch.train), test / len(scored), copy)


def total_seconds(config: RunConfig, federation: Federation, rates: Rates) -> float:
    """Return about how long all rounds will take, in seconds.

        R * f * (n_seen * train + K * COPIES * copy) + V * (n_scored * test + K * copy)

    for R rounds, a share f of K clients, n_seen images that all of them train on in a round (an image counts each
    time), and V evaluations, of which the evaluation matrix makes one a kind that no round has made, and one a domain
    for ``cross``. Where images held back choose the best round, they are scored too.

    Args:
        config: The run's configuration.
        federation: Who holds how many images.
        rates: What the parts cost.
    """
    rounds, counts = config.rounds, federation.counts
    clients = int(counts.trains.sum())
    sizes = zip(*np.unique(counts.train[counts.trains], return_counts=True), strict=True)
    trained = sum(int(many) * images_of_round(config.train, int(count)) for count, many in sizes)
    share = _share_evaluated(config, len(counts))
    scored = share * int((counts.validation if config.evaluate.split == "validation" else counts.test).sum())
    held_back = share * int(counts.validation[counts.trains].sum()) if config.evaluate.best_round else 0
    extra = sum(len(federation.domains) if kind == "cross" else 1 for kind in config.evaluate.kinds if kind != "own")
    evaluations = -(-rounds.num_rounds // rounds.evaluate_every) + extra
    a_round = rounds.fraction * (trained * rates.train + clients * COPIES * rates.copy)
    an_evaluation = scored * rates.test + share * len(counts) * rates.copy
    choosing = -(-rounds.num_rounds // rounds.evaluate_every) * held_back * rates.test
    return rounds.num_rounds * a_round + evaluations * an_evaluation + choosing


def _share_evaluated(config: RunConfig, clients: int) -> float:
    """Return the share of the clients that an evaluation is made on."""
    which = config.evaluate.clients
    if which == SAMPLED_CLIENTS:
        return config.rounds.fraction
    return 1.0 if which == ALL_CLIENTS else min(1.0, int(which) / max(clients, 1))


def images_of_round(train: TrainConfig, count: int) -> int:
    """Return how many images a client with ``count`` of them trains on in a round, each time counted."""
    passes, rest = divmod(steps_of_round(train, count), -(-count // train.batch_size))
    return passes * count + min(rest * train.batch_size, count)


def estimate_seconds(bench: Workbench) -> float:
    """Return about how long all rounds will take on this machine, in seconds.

    Args:
        bench: The run's workbench; its model's tensors are put back.
    """
    return total_seconds(bench.config, bench.federation, measure(bench))


def _seconds_to_fit(bench: Workbench, client: Client) -> float:
    began = seconds(bench.trainee.device)
    fit(bench, client, server_round=1, steps=-(-len(client.train) // bench.config.train.batch_size))
    return seconds(bench.trainee.device) - began


def _first(client: Client, count: int) -> Client:
    def few(split: Split) -> Split:
        return replace(split, index=split.index[: min(count, len(split))].to(torch.int64))

    return Client(client.partition_id, client.domain, few(client.train), client.validation, few(client.test))
