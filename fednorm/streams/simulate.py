"""A continual run in this process, from a configuration to its result; resumable in the middle of an experience."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fednorm.allocation import large_blocks_kept
from fednorm.cards import OPTIMIZERS
from fednorm.config import RunConfig
from fednorm.device import on_cpu
from fednorm.errors import DataError, DivergedError
from fednorm.records.checkpoint import Checkpoint
from fednorm.records.record import RunRecord
from fednorm.rng import torch_stream
from fednorm.streams import metrics
from fednorm.streams.adaptation import adapted
from fednorm.streams.anytime import AnytimePoints, Scores, modes_kept, points_of
from fednorm.streams.evaluation import accuracy, is_scored, scope_of, split_of
from fednorm.streams.learner import Learner
from fednorm.streams.own_norms import Scored
from fednorm.streams.probe import diagnose, probe_images
from fednorm.streams.stream import Experience
from fednorm.streams.workbench import ContinualWorkbench
from fednorm.threads import torch_threads

Document = dict[str, Any]

OF_AN_ORDER = (
    "average_incremental_accuracy",
    "forgetting_max_minus_last",
    "forgetting_first_minus_last",
    "backward_transfer",
    "forward_transfer",
)
"""Numbers that mean something only where experiences come one after another."""


WORST = frozenset({"average_minimum_accuracy", "worst_case_accuracy"})
"""Numbers of evaluations on the way that mean something only there, and are there only where those were made."""


class StreamObserver(Protocol):
    """What wants to know how a run goes, e.g. a progress bar."""

    def begin(self, bench: ContinualWorkbench, first_step: int, total_steps: int) -> None:
        """Called before the first step that is trained."""

    def step(self, steps_done: int) -> None:
        """Called after every step."""

    def experience(self, line: Mapping[str, Any]) -> None:
        """Called after every experience with its line of the record."""


def plan(config: RunConfig, bench: ContinualWorkbench | None = None) -> Document:
    """Return what is known of a run before training, and refuse what cannot be run.

    Raises:
        FedNormError: The configuration cannot be run.
    """
    bench = bench or ContinualWorkbench(config)
    return {"kind": "continual", **bench.about, "hash": config.hash, "config": config.to_dict()}


def simulate(
    config: RunConfig,
    *,
    runs: Path | None,
    observer: StreamObserver | None = None,
    bench: ContinualWorkbench | None = None,
) -> Document:
    """Train a learner on a stream; a run that was cut short goes on, a finished one is read back.

    Args:
        config: The run's configuration.
        runs: The folder of records, or None to write nothing.
        observer: Is told how the run goes.
        bench: The run's workbench, if it was made already and has not been trained.

    Returns:
        The result, as in ``result.json``.

    Raises:
        DivergedError: The loss is no number any more; what was finished before is in the record.
        FedNormError: The configuration cannot be run, or the record cannot be written.
    """
    record = RunRecord(runs, config) if runs else None
    if record and (finished := record.result()):
        return finished
    with large_blocks_kept(), torch_threads(config.threads):
        made = bench or ContinualWorkbench(config)
        if record is None:
            return _Run(made, None, observer).go()
        with record.locked():
            return record.result() or _Run(made, record, observer).go()


class _Run:
    """One run, from its checkpoint, if any, to its result."""

    def __init__(self, bench: ContinualWorkbench, record: RunRecord | None, observer: StreamObserver | None) -> None:
        self.bench, self.record, self.observer = bench, record, observer
        self.lines: list[Document] = []
        self.untrained: list[float | None] | None = None
        scope, stream = bench.config.evaluate.experiences, bench.stream
        self._scope = scope_of(scope, memorization=stream.memorization, joint=bench.joint)
        self.spent = 0.0
        self.since = time.perf_counter()
        self.anytime = AnytimePoints(bench.config.evaluate.every_steps, bench.steps)
        bench.learner.watchers.append(self._after_step)

    def go(self) -> Document:
        bench, learner = self.bench, self.bench.learner
        self._open()
        if self.observer:
            self.observer.begin(bench, learner.progress.step, sum(bench.steps))
        for experience in bench.training[learner.progress.ended :]:
            bench.norms.train(learner, experience)
            self._close(experience)
        document = self._document()
        if self.record:
            self.record.finish(document, on_cpu(bench.model.state_dict()), evaluated=self._evaluated())
        return document

    def _open(self) -> None:
        restored = self.record is not None and self._restore(self.record)
        if self.record:
            self.record.describe(self.bench.about)
        if not restored and self._scope == "all":
            self.bench.model.eval()
            self.untrained = [self._score(self.bench.model, e).overall for e in self.bench.stream]
        self.since = time.perf_counter()

    def _restore(self, record: RunRecord) -> bool:
        """Go back to the checkpoint, and return whether there is one; a refused one leaves the record as it was."""
        checkpoint = record.load_checkpoint(self._digest)
        if checkpoint is None:
            return False
        with record.restoring():
            state = dict(checkpoint.state)
            self.bench.learner.load(checkpoint.tensors, state)
            self.bench.norms.load(checkpoint.tensors)
            self.untrained, self.spent = state["untrained"], state["spent"]
            self.anytime.points = state.get("anytime", [])
        self.lines = record.lines()
        return True

    @property
    def _digest(self) -> str:
        digest: str = self.bench.about["data"]["digest"]
        return digest

    def _after_step(self, learner: Learner) -> None:
        """Measure and take a checkpoint now and then."""
        step = learner.progress.step
        self._require_finite(learner.loss.detach())
        self.anytime.take(step, self._seen)
        if self.record and step % self.bench.config.train.checkpoint_every == 0:
            self._save()
        if self.observer:
            self.observer.step(step)

    def _require_finite(self, loss: Tensor) -> None:
        """Refuse to go on from a loss that is no number: all that is measured of it would be of no network.

        Raises:
            DivergedError: It is NaN or infinite.
        """
        if not math.isfinite(float(loss)):
            raise self._diverged("the loss is not a number")

    def _diverged(self, what: str) -> DivergedError:
        learner, config = self.bench.learner, self.bench.config
        assert learner.source is not None
        stands = f" What was finished before is in {self.record.folder}." if self.record else ""
        return DivergedError(
            f"{config.learner.name} + {config.norm.name} diverged: {what} from experience "
            f"{learner.source.number + 1}, step {learner.progress.step} on. Lower train.learning_rate (now "
            f"{config.train.learning_rate:g}) or what else scales an update (the learner's and the norm's factors, "
            f"train.l2_init), or clip gradients (train.agc).{stands}"
        )

    def _save(self) -> None:
        assert self.record is not None
        learner, now = self.bench.learner, time.perf_counter()
        self.spent, self.since = self.spent + now - self.since, now
        state = {
            **learner.state(),
            "untrained": self.untrained,
            "spent": self.spent,
            "anytime": self.anytime.points,
        }
        tensors = learner.tensors() | self.bench.norms.tensors()
        self.record.save_checkpoint(Checkpoint(learner.progress.ended, tensors, state, self._digest))

    def _close(self, source: Experience) -> None:
        """Measure what an experience has left, and write it down.

        ``online_accuracy`` is of the first pass, ``average_online_accuracy`` and ``train_loss`` of all passes.
        ``learning_rate``, from which the diagnostics' effective rates are, is the schedule's mean over the experience's
        steps.
        """
        self._require_finite(self.bench.learner.loss.detach())
        line = finite(self._line(source))
        self.lines.append(line)
        if self.record:
            self.record.append_line(line)
        self.spent, self.since = 0.0, time.perf_counter()
        if self.record:
            self._save()
        if self.observer:
            self.observer.experience(line)

    def _evaluated(self) -> dict[str, Tensor] | None:
        """Return the tensors that were evaluated last, where the learner evaluates others than it trains."""
        trained = {key: tensor.cpu().clone() for key, tensor in self.bench.model.state_dict().items()}
        with self.bench.learner.for_evaluation() as model:
            evaluated = {key: tensor.cpu().clone() for key, tensor in model.state_dict().items()}
        return None if all(torch.equal(trained[key], tensor) for key, tensor in evaluated.items()) else evaluated

    def _score(self, model: nn.Module, experience: Experience, rows: Tensor | None = None) -> Scored:
        return self._finite(self.bench.norms.score(model, experience, self.bench.learner.source, rows))

    def _finite(self, measured: Scored) -> Scored:
        """Return what was measured, unless the network's outputs are no numbers."""
        if measured.finite:
            return measured
        if self.bench.learner.source is None:
            raise DivergedError(
                f"The outputs of the untrained network are not numbers ({self.bench.config.model.name} with norm "
                f"{self.bench.config.norm.name}), so nothing can be learned. Choose another norm, its eps, or model."
            )
        raise self._diverged("the outputs in evaluation are not numbers")

    def _seen(self) -> Scores:
        """Return the accuracy on each experience up to the present one, while it is trained on."""
        bench, evaluate = self.bench, self.bench.config.evaluate
        assert bench.learner.source is not None
        present, scores = bench.learner.source.number, list[float | None]()
        with modes_kept(bench.model), bench.learner.for_evaluation() as model:
            for experience in bench.stream.experiences[: present + 1]:
                split, rows = split_of(experience, evaluate.split), None
                if evaluate.every_images:
                    generator = torch_stream(bench.config.seed, "anytime", experience.number)
                    rows = torch.randperm(len(split), generator=generator)[: evaluate.every_images]
                scored = is_scored(self._scope, experience.number, present)
                scores.append(self._score(model, experience, rows).overall if scored else None)
        return scores

    def _line(self, source: Experience) -> Document:
        bench, learner = self.bench, self.bench.learner
        rate, seen = bench.mean_rate(learner.progress.ended - 1), learner.tally.means()
        with learner.for_evaluation() as model:
            scores = [
                self._score(model, e) if is_scored(self._scope, e.number, source.number) else None for e in bench.stream
            ]
            train_accuracy = self._train_accuracy(model, source)
            diagnostics = self._diagnostics(model, source, rate)
        tells_task = bench.stream.label_tells_task or bench.norms.per_experience
        overall: Scores = [None if score is None else score.overall for score in scores]
        # Without a limit of their own the points are of the same images as the line.
        own = self._seen if bench.config.evaluate.every_images else lambda: overall[: source.number + 1]
        anytime = self.anytime.close(learner.progress.step, own)
        return {
            "experience": source.number,
            "title": source.title,
            "accuracy": overall,
            "task_accuracy": [score and score.among_own for score in scores] if tells_task else None,
            **({"inferred": [score and score.inferred for score in scores]} if bench.norms.infers else {}),
            "online_accuracy": int(learner.hits) / max(learner.met, 1),
            "average_online_accuracy": seen["accuracy"],
            "train_accuracy": train_accuracy,
            "train_loss": seen["loss"],
            "steps": learner.progress.step,
            "learning_rate": rate,
            "diagnostics": diagnostics,
            **self._head_norm(model),
            **anytime,
            "seconds": round(self.spent + time.perf_counter() - self.since, 3),
        }

    def _head_norm(self, model: nn.Module) -> Document:
        trainable = self.bench.trainee.trainable
        return {"head_norm": trainable.head_norm(model.state_dict())} if trainable.head else {}

    def _train_accuracy(self, model: nn.Module, source: Experience) -> float:
        evaluate, seed = self.bench.config.evaluate, self.bench.config.seed
        generator = torch_stream(seed, "train accuracy", source.number)
        rows = torch.randperm(len(source.train), generator=generator)[: evaluate.train_images or None]
        return accuracy(model, source.train, source.classes, batch_size=evaluate.batch_size, rows=rows).overall

    def _diagnostics(self, model: nn.Module, source: Experience, rate: float) -> Document:
        bench, config = self.bench, self.bench.config
        if not config.evaluate.probe_images:
            return {}
        so_far = bench.stream.experiences[: source.number + 1]
        return diagnose(
            model,
            probe_images(so_far, config.evaluate.probe_images, config.seed),
            rate=rate,
            optimizer="adam" if OPTIMIZERS[config.train.optimizer].adaptive else "sgd",
            batch_size=config.evaluate.batch_size,
        )

    def _adaptation(self) -> Document:
        """Return the scores of each test-time adaptation of the finished network; nothing where none was asked for."""
        bench, present = self.bench, self.bench.training[-1].number
        scored = [e for e in bench.stream if is_scored(self._scope, e.number, present)]
        if not bench.config.evaluate.adaptation:
            return {}
        with bench.learner.for_evaluation() as model:
            return {"adaptation": adapted(model, bench.config, scored)}

    def _document(self) -> Document:
        bench, config = self.bench, self.bench.config
        rows = [line["accuracy"] for line in self.lines]
        matrix = rows * len(bench.stream) if bench.joint else rows
        numbers = summary(matrix, self.untrained, self.lines) | anytime_summary(
            self.lines, config.evaluate.average_last
        )
        if bench.norms.infers:
            shares = [share for share in self.lines[-1]["inferred"] if share is not None]
            numbers["task_inference"] = mean(shares) if shares else None
        if bench.joint:  # nothing came before anything else
            numbers |= dict.fromkeys((*OF_AN_ORDER, *(numbers.keys() & WORST)))
        return {
            "kind": "continual",
            **bench.about,
            "experiences": self.lines,
            "accuracy_matrix": matrix,
            "untrained_accuracy": self.untrained,
            **self._adaptation(),
            "final": finite(
                {
                    **numbers,
                    "selection": f"after the last experience, {config.evaluate.split} images",
                }
            ),
            "seconds": round(sum(line["seconds"] for line in self.lines), 3),
            "run": str(self.record.folder) if self.record else None,
            "hash": config.hash,
            "config": config.to_dict(),
        }


def summary(
    matrix: Sequence[Sequence[float | None]],
    untrained: Sequence[float | None] | None,
    lines: Sequence[Mapping[str, Any]],
) -> Document:
    """Return the numbers that a run is judged by.

    Args:
        matrix: The accuracy matrix, a row an experience; None where nothing was measured.
        untrained: The untrained model's accuracy on every experience, if measured.
        lines: The experiences' lines.

    Returns:
        Numbers by name; None where what they need was not measured. ``task_incremental_accuracy`` is the average
        accuracy after the last experience among each experience's own classes, ``train_accuracy`` the mean over the
        experiences, ``plasticity`` the mean over the last tenth of them, ``drift`` the mean over layers at the end.
        ``online_accuracy`` is the mean over the experiences of that on every new batch just before the model was
        trained on it for the first time; later passes over an experience do not count, but in
        ``average_online_accuracy``, which is over all steps as in NaP's paper (None in records of older versions).
    """
    r = np.array([[math.nan if value is None else value for value in row] for row in matrix])
    trained = [line["train_accuracy"] for line in lines]
    drift = list(lines[-1]["diagnostics"].get("drift", {}).values())
    own = lines[-1]["task_accuracy"]
    every_pass = [line["average_online_accuracy"] for line in lines if "average_online_accuracy" in line]
    measured: dict[str, Callable[[], float]] = {
        "average_accuracy": lambda: metrics.average_accuracy(r),
        "average_incremental_accuracy": lambda: metrics.average_incremental_accuracy(r),
        "forgetting_max_minus_last": lambda: metrics.forgetting_max_minus_last(r),
        "forgetting_first_minus_last": lambda: metrics.forgetting_first_minus_last(r),
        "backward_transfer": lambda: metrics.backward_transfer(r),
    }
    return {
        **{name: _or_none(measure) for name, measure in measured.items()},
        "forward_transfer": _or_none(lambda: metrics.forward_transfer(r, np.array(untrained))) if untrained else None,
        "online_accuracy": mean(line["online_accuracy"] for line in lines),
        "average_online_accuracy": mean(every_pass) if len(every_pass) == len(lines) else None,
        "task_incremental_accuracy": mean(own) if own and None not in own else None,
        "train_accuracy": mean(trained),
        "plasticity": metrics.plasticity(trained),
        "drift": mean(drift) if drift and None not in drift else None,
    }


def anytime_summary(lines: Sequence[Mapping[str, Any]], average_last: int) -> Document:
    """Return the numbers of the evaluations on the way; nothing where there were none.

    Args:
        lines: The experiences' lines.
        average_last: Evaluations that ``average_late_accuracy`` is the mean of.
    """
    points = points_of(lines)
    if not points:
        return {}
    return {
        "average_late_accuracy": _or_none(lambda: metrics.average_late_accuracy(points, last=average_last)),
        "average_minimum_accuracy": _or_none(lambda: metrics.average_minimum_accuracy(points)),
        "worst_case_accuracy": _or_none(lambda: metrics.worst_case_accuracy(points)),
    }


def _or_none(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except DataError:  # an entry it needs was not measured
        return None


def finite(value: Any) -> Any:
    """Return a document with None for every number that is infinite or none, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return value
