"""What the learners with a memory share: the buffer, joint or separate passes, and two controls of statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.streams.buffer import Buffer, ReservoirBuffer, Samples
from fednorm.streams.learner import Learner, LearnerOptions, Tensors
from fednorm.training.recalibration import Statistics, batch_layers, in_batches, reestimate


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(LearnerOptions):
    """The options of a learner with a memory.

    Attributes:
        memory_size: Samples that the memory holds.
        memory_batch: Memory samples a step; 0 for as many as there are new ones.
        passes: Whether new and memory samples go through the network ``joint`` in one training forward pass, or
            ``separate`` in passes of their own, new samples first. It changes what batch statistics are taken over and
            how often running ones are updated, and is a confound where methods of normalization are compared.
        statistics: What updates running statistics: ``all`` training passes, or nothing but an extra forward pass
            without gradients after each step over a class-``balanced`` draw from the memory (BN Tricks, arXiv
            2202.08025, without its change of the classifier).
        recalibrate: Whether running statistics are estimated on the memory's samples for every evaluation, and put
            back after it.

    Raises:
        ConfigError: An option is out of range.
    """

    memory_size: int = 500
    memory_batch: int = 0
    passes: str = "joint"
    statistics: str = "all"
    recalibrate: bool = False

    def __post_init__(self) -> None:
        options.whole("learner", "memory_size", self.memory_size, at_least=0)
        if not self.memory_size:
            raise ConfigError("learner.memory_size is 0, and this learner replays samples. Set it to the number of "
                              "samples to keep, e.g. 500, or take learner naive.")  # fmt: skip
        options.whole("learner", "memory_batch", self.memory_batch, at_least=0)
        options.one_of("learner", "passes", self.passes, ("joint", "separate"))
        options.one_of("learner", "statistics", self.statistics, ("all", "balanced"))
        options.flag("learner", "recalibrate", self.recalibrate)

    def batch_ratio(self, batch_size: int) -> int:
        """Return the number of new samples for each memory sample of a joint batch; 0 where there is no such number."""
        memory = self.memory_batch or batch_size
        return batch_size // memory if self.passes == "joint" and batch_size % memory == 0 else 0


class ReplayLearner(Learner):
    """A learner with a reservoir of past samples, filled as they come; a method overrides :meth:`replay`.

    Samples enter the memory after the step that learned from them, without augmentation; in every pass over an
    experience, as in mammoth, so that after several of them the memory may hold a sample more than once.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`ReplayOptions`.
    """

    Options: ClassVar[type[LearnerOptions]] = ReplayOptions
    options: ReplayOptions

    def __init__(self, **template: Any) -> None:
        super().__init__(**template)
        self.buffer = self.make_buffer()
        self._statistics = Statistics(self.model)
        self._require_fit()

    def _require_fit(self) -> None:
        """Refuse options that would do nothing on this network, or fail on it only when the memory is first drawn."""
        if self.options.statistics == "balanced" and not len(self._statistics):
            raise ConfigError(
                "learner.statistics = balanced says what updates the running statistics, and this network has none. "
                "Leave it at 'all', or take a norm with running statistics, e.g. batch_norm."
            )
        if self.options.recalibrate and not batch_layers(self.model):
            raise ConfigError(
                "learner.recalibrate estimates running statistics on the memory, and this network has none. Leave it "
                "at false, or take a norm with running statistics, e.g. batch_norm."
            )
        if self.options.memory_batch == 1 and self.options.passes == "separate" and self.batch_coupled:
            raise ConfigError(
                "learner.memory_batch is 1 and learner.passes is 'separate': a pass over a single image, and this "
                "network's norm estimates a variance from each batch. Set memory_batch to 2 or more (or 0, for as many "
                "as there are new samples), passes to 'joint', or take a norm that works on single images."
            )

    def make_buffer(self) -> Buffer:
        """Return the empty memory."""
        return ReservoirBuffer(self.options.memory_size, num_classes=self.num_classes, seed=self.seed)

    def replay(self, new: Samples) -> Tensor:
        """Learn from one batch and from memory; return the logits of the new samples and leave the memory alone."""
        raise NotImplementedError

    def observe(self, new: Samples) -> Tensor:
        """Learn from one batch, update the statistics as the options say, and remember the batch."""
        if self.options.statistics == "all":
            logits = self.replay(new)
        else:
            with self._statistics.kept():
                logits = self.replay(new)
            self._update_statistics(len(new))
        self.remember(new, logits.detach())
        return logits

    def remember(self, new: Samples, logits: Tensor) -> None:
        """Offer a batch to the memory."""
        del logits
        self.offer(self.buffer, new)

    def remembered(self, new: Samples) -> Samples:
        """Return memory samples for one step."""
        return self.buffer.draw(self.options.memory_batch or len(new))

    def logits_of(self, *groups: Samples) -> tuple[Tensor, ...]:
        """Return the logits of each group of samples, in one forward pass or one each, as the options say."""
        if self.options.passes == "joint":
            return self.pass_forward(*groups)
        return tuple(itertools.chain.from_iterable(self.pass_forward(group) for group in groups))

    @torch.no_grad()
    def _update_statistics(self, count: int) -> None:
        if not len(self.buffer):
            return
        drawn = self.buffer.draw_balanced(2 * count)
        self.step.forward(self.prepared(drawn.images, drawn.tasks), tasks=drawn.tasks, num_tasks=len(self.tasks_seen))

    @contextmanager
    def for_evaluation(self) -> Iterator[nn.Module]:
        """Give the model to evaluate, recalibrated where the options say so."""
        if not self.options.recalibrate or len(self.buffer) < 2:
            with super().for_evaluation() as model:
                yield model
            return
        with self._statistics.kept():
            memory = self.buffer.everything()
            images = self.as_input(memory.images, memory.tasks)
            reestimate(self.model, in_batches(images, self.eval_mb_size))
            yield self.model

    def own_tensors(self) -> Tensors:
        """Return the memory."""
        return {f"buffer/{key}": tensor for key, tensor in self.buffer.state_dict().items()}

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take the memory back."""
        self.buffer.load_state_dict(
            {key.removeprefix("buffer/"): t for key, t in tensors.items() if key.startswith("buffer/")}
        )
