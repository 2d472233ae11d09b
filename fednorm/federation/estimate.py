"""How long a federated run will take: its images counted, a few of its own steps timed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fednorm.adaptation._scoring import work as adapting
from fednorm.config import ALL_CLIENTS, SAMPLED_CLIENTS, RunConfig, TrainConfig
from fednorm.data import load_federation
from fednorm.data.benchmarks import Reader
from fednorm.data.domain import Federation, Split, pooled
from fednorm.federation.client import score
from fednorm.federation.local import Phase
from fednorm.federation.workbench import Workbench
from fednorm.training.work import Work, timed

STEPS = 2
"""Most steps that are timed at once."""

SCORED = 16
"""Most images of the evaluation that is timed."""

COPIES = 4
"""How often a client's turn moves the model: into the workbench, out of it, over the wire, into the average."""


def load(config: RunConfig, reader: type[Reader] = Reader) -> Federation:
    """Return the clients of a run, as a reader finds their images."""
    size = config.model.card.input_size
    return load_federation(config.data, image_size=size, seed=config.seed, reader=reader)


def work(config: RunConfig, federation: Federation) -> Work:
    """Return what a run does: in R rounds, a share f of K clients, each V-th evaluated.

        trained    R f sum_k (n_k, as often as ``train`` says and the strategy adds)  +  fine-tuning before evaluations
        scored     evaluations * test images; what a strategy's clients measure
        turns      COPIES R f K  +  evaluations * K

    An evaluation more is made of each kind that no round has made, and one a domain for ``cross``. Where images held
    back choose the best round, they are scored too.

    Args:
        config: The run's configuration.
        federation: Who holds how many images.
    """
    if config.strategy.card.pooled:
        federation = pooled(federation)
    rounds, evaluate, counts = config.rounds, config.evaluate, federation.counts
    clients, share = int(counts.trains.sum()), _share_evaluated(config, len(counts))
    adds = config.strategy.card.make.local.passes(config.strategy.values)
    held = int(counts.train[counts.trains].sum())
    sizes = zip(*np.unique(counts.train[counts.trains], return_counts=True), strict=True)
    a_round: float = sum(int(many) * images_of_round(config.train, int(count)) for count, many in sizes)
    a_round += adds.in_round * held
    turns = rounds.num_rounds * rounds.fraction
    in_rounds = -(-rounds.num_rounds // rounds.evaluate_every)
    after = sum(len(federation.domains) if kind == "cross" else 1 for kind in evaluate.kinds if kind != "own")
    scored = share * int((counts.validation if evaluate.split == "validation" else counts.test).sum())
    choosing = share * int(counts.validation[counts.trains].sum()) if evaluate.best_round else 0
    learned_on = int((counts.validation if counts.validation.any() else counts.train)[counts.trains].sum())
    unseen = counts.test[counts.held_out]
    adapts = adapting(evaluate, int(unseen.sum()) if len(unseen) else int(scored), learned_on)
    return Work(
        trained=adapts.trained + turns * a_round + in_rounds * share * adds.before_evaluation * held,
        scored=adapts.scored + (in_rounds + after) * scored + in_rounds * choosing + turns * adds.measured * clients,
        turns=COPIES * turns * clients + (in_rounds + after) * share * len(counts),
    )


def _share_evaluated(config: RunConfig, clients: int) -> float:
    """Return the share of the clients that an evaluation is made on."""
    which = config.evaluate.clients
    if which == SAMPLED_CLIENTS:
        return config.rounds.fraction
    return 1.0 if which == ALL_CLIENTS else min(1.0, int(which) / max(clients, 1))


def images_of_round(train: TrainConfig, count: int) -> int:
    """Return how many images a client with ``count`` of them trains on in a round, each time counted."""
    a_pass = -(-count // train.batch_size)
    passes, rest = divmod(Phase().batches(train, a_pass), a_pass)
    return passes * count + min(rest * train.batch_size, count)


def cost(bench: Workbench) -> Work:
    """Time a few steps of a client, an evaluation and a copy of the model; the model's tensors are put back.

    With one thread, what other processes do on the machine does not enter.

    Args:
        bench: A workbench of the run.
    """
    size, device = bench.config.train.batch_size, bench.trainee.device
    counts = bench.federation.counts
    client = bench.federation.clients[int((counts.train * counts.trains).argmax())]
    before, few = bench.read(bench.model.state_dict()), first(client.train, STEPS * size)
    turn, local = bench.turn(replace(client, train=few), 1), bench.strategy.local(bench.strategy)
    phase = Phase(steps=-(-len(few) // size))
    local.begin(turn)
    trained = timed(lambda: turn.train_aside(local, "estimate", phase, lambda: local.adjust(turn)), device)
    local.end(turn)
    scored = first(few, SCORED)
    evaluated = timed(lambda: score(bench, scored), device)
    return Work(trained / len(few), evaluated / len(scored), timed(lambda: bench.write(before), device))


def measure(config: RunConfig, federation: Federation) -> Work:
    """Return what each of a run's work takes, timed on a workbench of its own."""
    return cost(Workbench(config, federation))


def first(split: Split, count: int) -> Split:
    """Return the first ``count`` images of a client's, or all where there are fewer."""
    return replace(split, index=split.index[:count])


def estimate_seconds(bench: Workbench) -> float:
    """Return about how long all rounds will take on this machine, in seconds.

    Args:
        bench: The run's workbench; its model's tensors are put back.
    """
    return work(bench.config, bench.federation).times(cost(bench))
