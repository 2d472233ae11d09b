"""Many small clients at once: jobs of one kind are carried out cohort by cohort, all else one after the other.

What a client sends and keeps is what it is where it takes its turn alone, up to rounding; it does not depend on which
clients are in its cohort, and is the same to the bit for cohorts of the same size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fednorm.data.domain import Client, Split
from fednorm.federation import undo
from fednorm.federation.client_adaptation import ADAPTATION
from fednorm.federation.cohort.evaluation import scored_alike, scored_apart
from fednorm.federation.cohort.network import Tensors, alike, several
from fednorm.federation.cohort.training import CohortTraining
from fednorm.federation.executors import Answer, Failure, Job
from fednorm.federation.executors.sequential import answer
from fednorm.federation.flower_private import metric_record, record_dict
from fednorm.federation.local import Local, Phase
from fednorm.federation.scores import Scores, scores_of
from fednorm.federation.stack import RowRecord, Stack, StackRow
from fednorm.federation.wire import arrays_of, config_of, pack, unpack
from fednorm.federation.workbench import LOCAL_RECORD, Workbench
from fednorm.norms import spec_of
from fednorm.signals import raise_stop

log = logging.getLogger("fednorm")

IMAGES, PIXELS = 1024, 2**19
"""The most images, and pixels of them, of a pass where all clients have one network; 64 images there may be always."""


@dataclass(frozen=True, eq=False)
class _Turn:
    """One client's training: the job, whose it is, and how long it takes."""

    job: Job
    client: Client
    phases: tuple[Phase, ...]
    steps: int

    @property
    def parts(self) -> tuple[frozenset[str] | None, ...]:
        """What its phases train: clients of one cohort train the same."""
        return tuple(phase.parameters for phase in self.phases)


@dataclass(frozen=True, eq=False)
class _Result:
    """What a cohort's training left, on the CPU.

    Attributes:
        sent: The tensors of the plan that travel.
        kept: Those that stay.
        sound: Of which clients those that stay are finite.
        loss: Of each client.
        accuracy: Of each client.
    """

    sent: Stack
    kept: Stack
    sound: list[bool]
    loss: list[float]
    accuracy: list[float]


class Cohort:
    """Trains and evaluates clients of one shape together.

    Args:
        bench: The run's workbench, before any turn: its model holds the run's initial tensors.
        size: K, the most clients of a cohort.
    """

    def __init__(self, bench: Workbench, size: int) -> None:
        self._bench, self._size = bench, size
        self._training = CohortTraining(bench)
        self._local = bench.strategy.local
        specs = [spec_of(module) for module in bench.model.modules()]
        # Where a round has every client, it replaces every row of the last: rows need not be copied out of their stack.
        self._whole = bench.config.rounds.fraction == 1
        self._apart = any(spec is not None and spec.coupled_in_evaluation for spec in specs)

    def close(self) -> None:
        """Do nothing: the workbench is whoever's it was."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield the answer to each job; see :class:`~fednorm.federation.executors.Executor`."""
        for (kind, _), group in groupby(jobs, key=lambda job: (job.kind, id(job.content))):
            of_kind = list(group)
            if kind == "train":
                yield from self._train(of_kind)
            elif kind == "evaluate" and self._can_evaluate(of_kind[0]):
                yield from self._evaluate(of_kind)
            elif kind == "query.statistics":
                yield from (self._statistics(job) for job in of_kind)
            else:
                yield from (answer(self._bench, job) for job in of_kind)

    def _client(self, job: Job) -> Client:
        return self._bench.federation.clients[job.client]

    def _statistics(self, job: Job) -> Answer:
        """Return the running moments that a client keeps: rows of a stack, where it keeps one."""
        own = _own(job)
        if not isinstance(own, StackRow):
            return answer(self._bench, job)
        keys = [key for pair in self._bench.plan.moments() for key in pair if key in own]
        metrics = metric_record({"num-examples": len(self._client(job).train)})
        return record_dict({"metrics": metrics, "arrays": RowRecord(StackRow(own.stack.part(keys), own.number))})

    # Training ---------------------------------------------------------------------------------------------------------

    def _train(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        turns = [self._turn(job) for job in jobs]
        done: dict[int, tuple[_Result | Failure, int]] = {}
        cohorts = iter(self._cohorts(turns))
        for place, turn in enumerate(turns):
            if not turn.steps:  # it fails in the words of a client that is alone
                yield answer(self._bench, turn.job)
                continue
            while place not in done:
                places = next(cohorts)
                result = self._carried_out(places, turns)
                done |= {other: (result, number) for number, other in enumerate(places)}
            result, number = done.pop(place)
            yield result if isinstance(result, Failure) else self._answer(turn, result, number)

    def _carried_out(self, places: list[int], turns: Sequence[_Turn]) -> _Result | Failure:
        """Train a cohort; what it raises is the failure of each of its clients, and does not end the round."""
        try:
            return self._trained(places, turns)
        except Exception as error:  # as of one client's turn
            raise_stop(error)
            log.debug("the cohort of client %d failed", turns[places[0]].job.client, exc_info=True)
            return Failure(f"the client's cohort failed: {type(error).__name__}: {error}")

    def _turn(self, job: Job) -> _Turn:
        bench = self._bench
        client, train = self._client(job), bench.config.train
        phases: Sequence[Phase] = (Phase(),)
        if self._local.phases is not Local.phases:
            turn = bench.turn(client, _round(job.content), job.content, job.context)
            phases = self._local(bench.strategy).phases(turn)
        count = len(client.train)
        steps = sum(phase.batches(train, -(-count // train.batch_size)) for phase in phases) if count else 0
        return _Turn(job, client, tuple(phases), steps)

    def _cohorts(self, turns: Sequence[_Turn]) -> list[list[int]]:
        """Return the places of each cohort's turns: clients that train alike, and about equally long."""
        places = [place for place, turn in enumerate(turns) if turn.steps]
        size = _share(len(places), self._size)
        alike: dict[object, list[int]] = {}
        for place in sorted(places, key=lambda place: turns[place].steps):
            alike.setdefault(turns[place].parts, []).append(place)
        return [own[start : start + size] for own in alike.values() for start in range(0, len(own), size)]

    def _trained(self, places: list[int], turns: Sequence[_Turn]) -> _Result:
        size = _share(sum(turn.steps > 0 for turn in turns), self._size)
        padded = places + places[-1:] * (size - len(places))
        cohort = [turns[place] for place in padded]
        content, bench = cohort[0].job.content, self._bench
        tensors = self._stacked([turn.job for turn in cohort])
        config = config_of(content)
        adjust = None
        if self._local.stacked is not None:
            learned = {key: tensors[key] for key in bench.learned if key in tensors}
            adjust = self._local.stacked(bench.strategy, dict(config), learned).adjust
        trained = self._training.train(
            [turn.client for turn in cohort],
            tensors,
            server_round=_round(content),
            phases=[turn.phases for turn in cohort],
            adjust=adjust,
        )
        host = {key: tensor.cpu() for key, tensor in trained.tensors.items()}
        same = self._training.network.same
        kept = Stack({key: host[same[key]] for key in bench.plan.local}, size)
        sound = _finite(kept.tensors, size)
        sent = Stack({key: host[same[key]] for key in bench.plan.sent}, size, unpack(arrays_of(content, "arrays")))
        return _Result(sent, kept, sound, trained.loss.tolist(), trained.accuracy.tolist())

    def _stacked(self, jobs: Sequence[Job]) -> Tensors:
        """Return what each client's model holds before its turn, as of :meth:`Workbench.receive`."""
        bench, device = self._bench, self._bench.trainee.device
        sent = unpack(arrays_of(jobs[0].content, "arrays"))
        own = _Own(jobs) if bench.plan.local else None
        stacked: Tensors = {}
        for key in self._training.network.keys:
            first = sent[key] if key in sent else bench.initial[key]
            if own and (key not in sent or key in bench.plan.counters) and own.anybody(key):
                stacked[key] = own.stacked(key, first.cpu()).to(device)
            else:
                stacked[key] = alike(first.to(device), len(jobs))
        return stacked

    def _answer(self, turn: _Turn, result: _Result, number: int) -> Answer:
        if result.kept.tensors:
            self._keep(turn.job, result, number)
        metrics = {"num-examples": len(turn.client.train), "loss": result.loss[number]}
        metrics["accuracy"] = result.accuracy[number]
        arrays = RowRecord(StackRow(result.sent, number))
        return record_dict({"arrays": arrays, "metrics": metric_record(metrics)})

    def _keep(self, job: Job, result: _Result, number: int) -> None:
        """Let a client keep what its training made of its own tensors, unless it has diverged."""
        state = job.context.state
        before = undo.kept_now(state)
        if result.sound[number]:
            row = StackRow(result.kept, number)
            own = RowRecord(row) if self._whole else pack({key: tensor.clone() for key, tensor in row.items()})
            state[LOCAL_RECORD] = own
        undo.remember(state, before, _round(job.content))

    # Evaluation -------------------------------------------------------------------------------------------------------

    def _can_evaluate(self, job: Job) -> bool:
        config = config_of(job.content)
        if ADAPTATION in config:  # each client's network becomes another
            return False
        mode = config.get("mode", "own")
        plain = self._local.before_evaluation is Local.before_evaluation
        return not self._apart and (mode == "given" or (mode == "own" and plain))

    def _evaluate(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        bench = self._bench
        if "mode" not in config_of(jobs[0].content) and bench.plan.local:  # a round's, after which its trainings stand
            for job in jobs:
                undo.forget(job.context.state)
        last = jobs[-1]
        bench.receive(arrays_of(last.content, "arrays"), last.context.state)  # the model is left as if one by one
        sent = unpack(arrays_of(last.content, "arrays"))
        wanted = [key for key in bench.plan.local if key in bench.statistics and key not in sent]
        clients = [self._client(job) for job in jobs]
        ready = [
            client.held_out or all(key in own for key in wanted)
            for client, own in ((c, _own(job) if wanted else ()) for c, job in zip(clients, jobs, strict=True))
        ]
        together = [place for place, is_ready in enumerate(ready) if is_ready]
        scores = dict(zip(together, self._scored([jobs[p] for p in together], sent), strict=True))
        for place, job in enumerate(jobs):
            # The statistics of a client that has never trained are estimated first.
            yield record_dict({"metrics": metric_record(scores[place])}) if place in scores else answer(bench, job)

    def _scored(self, jobs: Sequence[Job], sent: Mapping[str, Tensor]) -> list[Scores]:
        """Return the scores of clients that are evaluated with the tensors they have."""
        if not jobs:
            return []
        return scores_of(
            [self._client(job) for job in jobs],
            self._bench.config.evaluate,
            lambda splits: self._scored_on(jobs, sent, splits),
            in_a_round="mode" not in config_of(jobs[0].content),
        )

    def _scored_on(self, jobs: Sequence[Job], sent: Mapping[str, Tensor], splits: Sequence[Split]) -> list[Scores]:
        bench, network, device = self._bench, self._training.network, self._bench.trainee.device
        mine = [key for key in network.keys if key in bench.plan.local and key not in sent]
        if not mine:  # the model holds what all of them have
            bench.trainee.trainable.evaluation_mode()
            size = max(64, min(IMAGES, PIXELS // bench.federation.image_size**2))
            return scored_alike(bench.model, splits, size, device)
        shared = {
            key: (sent[key] if key in sent else bench.initial[key]).to(device)
            for key in network.keys
            if key not in mine
        }
        rows = min(bench.config.evaluate.batch_size, max(map(len, splits)) or 1)
        size, scores = _share(len(jobs), self._size), list[Scores]()
        for start in range(0, len(jobs), size):
            places = list(range(start, min(start + size, len(jobs))))
            padded = places + places[-1:] * (size - len(places))
            own = _Own([jobs[place] for place in padded])
            stacked = {key: own.stacked(key, bench.initial[key].cpu()).to(device) for key in mine}
            found = scored_apart(network, stacked, shared, [splits[place] for place in padded], rows, device)
            scores += found[: len(places)]
        return scores


def _share(count: int, size: int) -> int:
    """Return how large cohorts are: all of one size, which follows from how many clients are asked."""
    return -(-count // max(1, -(-count // size)))


class _Own:
    """What several clients keep of the model."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._each = [_own(job) for job in jobs]
        self._stacks: dict[int, tuple[Stack, list[int], list[int]]] = {}
        for place, own in enumerate(self._each):
            if isinstance(own, StackRow):
                _, places, numbers = self._stacks.setdefault(id(own.stack), (own.stack, [], []))
                places.append(place)
                numbers.append(own.number)

    def anybody(self, key: str) -> bool:
        """Return whether any of them keeps a tensor."""
        return any(key in stack.tensors for stack, _, _ in self._stacks.values()) or any(
            key in own for own in self._each if not isinstance(own, StackRow)
        )

    def stacked(self, key: str, otherwise: Tensor) -> Tensor:
        """Return a tensor of each, shape (K, ...), in memory of its own; ``otherwise`` for whom does not keep it."""
        if len(self._stacks) == 1:
            stack, places, numbers = next(iter(self._stacks.values()))
            if len(places) == len(self._each) and key in stack.tensors:
                return stack.rows(key, numbers)
        if sum(len(places) for _, places, _ in self._stacks.values()) < len(self._each):
            return torch.stack([own.get(key, otherwise) for own in self._each]).contiguous()
        out = several(otherwise, len(self._each))
        for stack, places, numbers in self._stacks.values():
            if key in stack.tensors:
                out[places] = stack.tensors[key][numbers]
        return out


def _own(job: Job) -> Mapping[str, Tensor]:
    """Return what a client keeps of the model."""
    record = job.context.state.get(LOCAL_RECORD)  # .array_records makes a new dictionary at every call
    if isinstance(record, RowRecord):
        return record.row
    return unpack(record) if isinstance(record, ArrayRecord) else {}


def _round(content: RecordDict) -> int:
    return int(str(config_of(content).get("server-round", 0)))


def _finite(tensors: Mapping[str, Tensor], count: int) -> list[bool]:
    """Return of which clients every value of every float tensor is finite."""
    sound = torch.ones(count, dtype=torch.bool)
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.numel():
            sound &= tensor.flatten(1).isfinite().all(1) if tensor.ndim > 1 else tensor.isfinite()
    return sound.tolist()
