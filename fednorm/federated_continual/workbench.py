"""What a process needs to act as any client of a grid: a federation's workbench whose clients are learners.

Rounds are counted through: experience t of every client lasts for the rounds ``t * R + 1`` to ``(t + 1) * R``, R being
``rounds.per_experience``, and a round is ``train.local_epochs`` passes over what the client holds of it. Between the
last of them and the next experience the server tells every client that the experience has ended
(``query.boundary``): its learner does then, under the network that the server sends, what it does at an experience's
end (a teacher, a Fisher information), and reports the client's accuracy on every experience it has met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid as FlowerGrid
from torch import Tensor, nn

from fednorm.config import RunConfig
from fednorm.data.domain import Client, Federation
from fednorm.data.moving import moved
from fednorm.data.scaling import Scaling
from fednorm.federated_continual import measures
from fednorm.federated_continual.between import BetweenExperiences, Boundary, Images, local_of
from fednorm.federated_continual.cells import Grid, make_grid
from fednorm.federated_continual.refusals import require_fit, require_norms, require_plain_training
from fednorm.federated_continual.turn import (
    GridTurn,
    Norms,
    begun,
    named_norms,
    norms_of,
    recall,
    remembered,
    split_state,
)
from fednorm.federation import undo
from fednorm.federation.diagnosis import drift_by_domain, statistics_of
from fednorm.federation.local import Turn
from fednorm.federation.nodes import asked
from fednorm.federation.replies import read_scores
from fednorm.federation.wire import pack, unpack
from fednorm.federation.workbench import STATE_RECORD, Workbench
from fednorm.rng import stream_seed
from fednorm.spec import Norm
from fednorm.streams.evaluation import accuracy, split_of
from fednorm.streams.learner import Learner
from fednorm.streams.norm_boundary import NormBoundary
from fednorm.streams.normalize import normalized_stream
from fednorm.streams.stream import Experience, Stream
from fednorm.streams.task_inference import Candidate, TaskInference
from fednorm.streams.workbench import learner_of, require_parts, stream_of

INFERRED = "inferred"
"""What the share of images is called whose experience is inferred right."""


class GridWorkbench(Workbench):
    """The grid, the model, the learner and the strategy of a run, in this process.

    Attributes:
        grid: Which client meets what when.
    """

    grid: Grid
    trains_on_all = False

    def __init__(self, config: RunConfig, stream: Stream | None = None) -> None:
        """Make the stream (unless given), deal it, and build the rest.

        Raises:
            FedNormError: Something in the configuration does not fit the rest.
        """
        self._given = stream
        self._options = config.learner.card.made_options(config.learner.options)
        require_fit(config)
        super().__init__(config)
        self.norms = NormBoundary(self.model, config.grid.norms)
        fresh = self.model.state_dict() if config.learner.card.make.trains_at_end else {}
        self._first = {key: tensor.clone() for key, tensor in fresh.items()}
        require_plain_training(self.strategy, config)
        require_norms(self.norms, self.plan, self.grid, config)
        self._inference = TaskInference.of(config, self.model, self.grid.stream, self.norms.wearing)
        self.trainee.require_batches(
            (f"Client {client} in experience {cell.number + 1}", len(cell.train))
            for client in range(len(self.grid.cells))
            for _, cell in self.grid.row(client)
        )
        self.learner(0)  # what the learner refuses is refused before training
        require_parts(config, config.norm.card.made(config.norm.options), self._options)
        if isinstance(self.strategy, BetweenExperiences):
            first = self.grid.stream.experiences[0].train
            channels, height, width = first.images.shape[1:]
            scaling = Scaling.stack(experience.train.scaling for experience in self.grid.stream)
            self.strategy.meet(Images((channels, height, width), self.grid.stream.num_classes, scaling))

    # What a federation's workbench asks -------------------------------------------------------------------------------

    @property
    def num_rounds(self) -> int:
        """Return the rounds of all experiences."""
        return self.config.rounds.per_experience * self.grid.num_times

    @property
    def num_experiences(self) -> int:
        """Return how many experiences come one after another."""
        return self.grid.num_times

    @property
    def evaluate_every(self) -> int:
        """Return that every client is scored as in a plain federation once, after the last round."""
        return self.num_rounds

    def takes_part(self, partition_id: int, server_round: int) -> bool:
        """Return whether a client holds anything of the experience that it is at."""
        return self.grid.cells[partition_id][self.time_of(server_round)] is not None

    def about(self) -> dict[str, Any]:
        """Return the grid: the images in each cell."""
        grid, options = self.grid, dataclasses.asdict(self._options)
        return {
            "learner": {"name": self.config.learner.name, **options},
            "scenario": {"name": self.config.scenario.name, **self.config.scenario.values},
            **({"between": self.strategy.about_between()} if isinstance(self.strategy, BetweenExperiences) else {}),
            "grid": {
                "experiences": [experience.title for experience in grid.stream],
                "rounds_per_experience": self.config.rounds.per_experience,
                "cells": [
                    [None if cell is None else {"experience": cell.number, "train": len(cell.train)} for cell in row]
                    for row in grid.cells
                ],
                "present": [list(row) for row in grid.present],
                "boundaries": self._boundaries(),
            },
        }

    def _boundaries(self) -> list[dict[str, Any]]:
        """Return what each kind of tensor is subject to at a round's boundary, and at an experience's."""
        crossing = dict.fromkeys(self.norms.keys, self.config.grid.norms)
        crossing |= dict.fromkeys(self.trainee.boundary.reset, "reset")
        told = [
            (entry.norm or "", entry.kind.value, entry.role.value, crossing.get(entry.key, "keep"))
            for entry in self.plan.entries
        ]
        names = ("norm", "kind", "round", "experience")
        return [{**dict(zip(names, row, strict=True)), "tensors": told.count(row)} for row in dict.fromkeys(told)]

    def turn(self, client: Client, server_round: int, *args: Any, **kwargs: Any) -> Turn:
        """Return a client's turn, with the images that it holds of the experience it is at."""
        cell = self.grid.cells[client.partition_id][self.time_of(max(server_round, 1))]
        here = client if cell is None else dataclasses.replace(client, train=cell.train)
        return super().turn(here, server_round, *args, **kwargs)

    def _loaded(self, given: Federation | None) -> Federation:
        del given
        config = self.config
        stream = normalized_stream(self._given or stream_of(config), config.data.normalize)
        for experience in stream:
            split_of(experience, config.evaluate.split)
        self.grid = make_grid(stream, config.grid, config.data.split_seed or config.seed)
        return self.grid.federation()

    def _made_norm(self) -> Norm:
        ratio = self._options.batch_ratio(self.config.train.batch_size)
        norm: Norm = self.config.norm.card.made(self.config.norm.options)
        return norm.for_stream(num_tasks=self.grid.num_times, batch_ratio=ratio)

    def _made_turn(self, **parts: Any) -> Turn:
        return GridTurn(bench=self, **parts)

    def _move_data(self, device: torch.device) -> None:
        self.grid, self.federation = moved((self.grid, self.federation), device)

    # The rounds -------------------------------------------------------------------------------------------------------

    def time_of(self, server_round: int) -> int:
        """Return how many experiences have ended before a round."""
        return min((server_round - 1) // self.config.rounds.per_experience, self.grid.num_times - 1)

    def ends_experience(self, server_round: int) -> bool:
        """Return whether a round is the last of an experience."""
        return server_round % self.config.rounds.per_experience == 0

    def part_of(self, server_round: int) -> tuple[int, int]:
        """Return which round of its experience a round is, from 0, and how many there are."""
        rounds = self.config.rounds.per_experience
        return (server_round - 1) % rounds, rounds

    @property
    def passes(self) -> int:
        """Return the passes of a round."""
        return int(self.config.train.local_epochs)

    def learner(
        self,
        client: int,
        adjust: Callable[[], None] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Learner:
        """Return a client's learner on the workbench's model, remembering nothing yet.

        Its random streams are those of a stream's learner with the run's seed for client 0, and of seeds derived from
        it for the others, so that a federation of one client is the stream.
        """
        config, trainee = self.config, self.trainee
        learner = learner_of(
            trainee,
            self.grid.stream,
            self._options,
            epochs=self.passes * config.rounds.per_experience,
            seed=stream_seed(config.seed, "client", client) if client else config.seed,
            begin=[trainee.begin_anew, self.norms.begin],
            adjust=[*([adjust] if adjust else []), *trainee.adjust],
            criterion=criterion,
        )
        if self._first:
            learner.start_from(self._first)
        return learner

    def scores(self, learner: Learner, client: int, time: int, name: str, norms: Norms) -> dict[str, float]:
        """Return the accuracy of the model on each experience that a client has met by a time, as ``NAME-I``.

        Where the experience of a test image is inferred, ``inferred-I`` is the share of images for which it is right.

        Args:
            learner: The client's learner.
            client: The client.
            time: The time.
            name: Of the numbers.
            norms: The normalization tensors of experiences that have tensors of their own.
        """
        evaluate, numbers = self.config.evaluate, dict[str, float]()
        met = [self.grid.stream.experiences[number] for number in self.grid.scored(client, time)]
        candidates = [Candidate(each.number, each.classes, norms.get(each.number)) for each in met]
        with learner.for_evaluation() as model:
            for experience in met:
                number, split = experience.number, split_of(experience, evaluate.split)
                if self._inference:
                    found = self._inference.score(model, split, number, candidates)
                    numbers |= {f"{name}-{number}": found.accuracy, f"{INFERRED}-{number}": found.inferred}
                    continue
                with self.norms.wearing(norms.get(number)):
                    measured = accuracy(model, split, experience.classes, batch_size=evaluate.batch_size)
                numbers[f"{name}-{number}"] = measured.among_own if evaluate.task_identity else measured.overall
        self.model.train()
        return numbers

    # An experience's end ----------------------------------------------------------------------------------------------

    def cross_boundary(self, content: RecordDict, context: Context) -> RecordDict:
        """End a client's experience under the network that the server sent, and score it."""
        client, config = self.client(context).partition_id, content.config_records["config"]
        time = int(str(config["time"]))
        self.receive(content.array_records["arrays"], context.state)
        kept = unpack(context.state.array_records[STATE_RECORD]) if STATE_RECORD in context.state else {}
        own, kept = split_state(kept)
        learner = self.learner(client)
        recall(learner, kept)
        undo.forget(context.state)
        before = set(norms_of(kept))
        norms = self.end_late(learner, client, kept, None)
        cell = self.grid.cells[client][time]
        if self.norms.per_experience and cell is not None and cell.number not in norms:
            norms[cell.number] = self.norms.read()
        if begun(kept) is not None:
            self.keep_local(context.state, own | remembered(learner) | named_norms(norms))
        elif set(norms) != before:
            context.state[STATE_RECORD] = pack(own | kept | named_norms(norms))
        scores = self.scores(learner, client, time, "accuracy", norms)
        return RecordDict({"metrics": MetricRecord({"num-examples": len(scores), **scores})})

    def end_late(self, learner: Learner, client: int, kept: Mapping[str, Tensor], now: Experience | None) -> Norms:
        """End the experience that a client's learner has begun, if that is not the present one.

        At a boundary there is no present one. A client that missed the boundary does at its next turn, under the
        network that it is sent then, what it would have done there.

        Returns:
            The normalization tensors that the client keeps, where they are kept per experience.
        """
        norms, number = norms_of(kept), begun(kept)
        if number is None or (now is not None and now.number == number):
            return norms
        cell = next(cell for _, cell in self.grid.row(client) if cell.number == number)
        learner.end(cell, trained=learner.trains_at_end)
        if self.norms.per_experience:
            norms.setdefault(number, self.norms.read())
        return norms

    def after_round(self, grid: FlowerGrid, server_round: int, arrays: ArrayRecord) -> dict[str, Any]:
        """Tell every client where an experience has ended, and return the accuracies."""
        if not self.ends_experience(server_round):
            return {}
        time, strategy = self.time_of(server_round), self.strategy
        strategy.discover(grid)
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"time": time})})
        aggregated, inferred, kind = self._no_scores(), self._no_scores(), "query.boundary"
        reject = partial(strategy.report.reject, during=kind)
        for node, scores in asked(grid, content, kind, strategy.nodes, lambda _, reply: _scores(reply), reject):
            _fill(aggregated[node.partition_id], scores, "accuracy")
            _fill(inferred[node.partition_id], scores, INFERRED)
        own = self._no_scores()
        for told in strategy.report.train:
            _fill(own[told.partition_id], told.metrics, "own-accuracy")
        unheard = [
            client
            for client, row in enumerate(aggregated)
            if self.grid.scored(client, time) and all(value is None for value in row)
        ]
        return {
            "experience": time,
            "accuracy": aggregated,
            "own_accuracy": own,
            "average_accuracy": measures.average(aggregated),
            "spatial_forgetting": measures.spatial_forgetting(own, aggregated),
            **({INFERRED: inferred} if self._inference else {}),
            **self._between(grid, time, arrays),
            **({"statistics_drift": self._drift(grid)} if self.config.evaluate.diagnostics else {}),
            **({"unheard": unheard} if unheard else {}),
        }

    def _between(self, grid: FlowerGrid, time: int, arrays: ArrayRecord) -> dict[str, Any]:
        """Let the strategy's server work between two experiences, and return what the round's line says of it."""
        strategy = self.strategy
        if not isinstance(strategy, BetweenExperiences) or time == self.grid.num_times - 1:
            return {}
        clients = range(len(self.grid.cells))
        met = sorted({number for client in clients for number in self.grid.met(client, time)})
        experiences = [self.grid.stream.experiences[number] for number in met]

        def score(network: nn.Module) -> float:
            evaluate = self.config.evaluate
            splits = [(split_of(experience, evaluate.split), experience.classes) for experience in experiences]
            with torch.no_grad():
                scores = [accuracy(network, *of, batch_size=evaluate.batch_size).overall for of in splits]
            return sum(scores) / len(scores)

        boundary = Boundary(
            time=time,
            tensors=unpack(arrays),
            classes=tuple(sorted({label for experience in experiences for label in experience.classes})),
            device=self.trainee.device,
            ask=partial(local_of, strategy, grid),
            score=score,
        )
        return {"between": strategy.between(boundary)}

    def _drift(self, grid: FlowerGrid) -> list[dict[str, float] | None]:
        """Return how far each client's running statistics are from the pooled ones, by layer; None if it has none."""
        report = self.strategy.report
        by_name = drift_by_domain(statistics_of(self, grid, report), self.plan)
        return [by_name.get(client.domain) for client in self.federation.clients]

    def _no_scores(self) -> list[list[float | None]]:
        return [[None] * self.grid.num_times for _ in self.grid.cells]

    def measures(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the accuracy tensors, the drift of running statistics, and what they say."""
        ends = [line for line in lines if "experience" in line]
        aggregated, own = ([line[name] for line in ends] for name in ("accuracy", "own_accuracy"))
        courses = [self.grid.course(client) for client in range(len(self.grid.cells))]
        drift = [[mean(own.values()) if own else None for own in line.get("statistics_drift", ())] for line in ends]
        unheard = [(line["experience"], client) for line in ends for client in line.get("unheard", ())]
        between = [line["between"] for line in ends if "between" in line]
        inferred = [line[INFERRED] for line in ends if INFERRED in line]
        return {
            "accuracy_tensor": aggregated,
            "own_accuracy_tensor": own,
            **({"drift_tensor": drift} if any(value is not None for row in drift for value in row) else {}),
            **({"inferred_tensor": inferred} if inferred else {}),
            "temporal_forgetting": [measures.temporal_forgetting(aggregated, courses, t) for t in range(len(ends))],
            "final": measures.final(aggregated, own, courses, drift, unheard)
            | ({"between": measures.means(between)} if between else {})
            | ({"task_inference": measures.average(inferred[-1])} if inferred else {}),
        }


def _scores(reply: Message) -> dict[str, float]:
    return read_scores(reply, shares=False)


def _fill(row: list[float | None], metrics: Mapping[str, float], name: str) -> None:
    for key, value in metrics.items():
        if key.startswith(f"{name}-"):
            row[int(key.removeprefix(f"{name}-"))] = value
