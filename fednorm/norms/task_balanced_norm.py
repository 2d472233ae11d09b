"""Task-balanced batch normalization: the memory's samples stand beside every part of the current task's.

Cha, Cho, Hwang, Hong, Lee, Moon. Rebalancing Batch Normalization for Exemplar-based Class-Incremental Learning.
CVPR 2023. https://arxiv.org/abs/2201.12559. Official code: csm9493/TaskBalancedBN.

A batch is B_c samples of the current task, then B_p of memory, B_c = ``batch_ratio`` * B_p. With T earlier tasks it
makes S parts: the largest common divisor of B_c and B_p that is not above ``batch_ratio`` * T. Part s has the current
samples s, s + S, s + 2 S, ... and *all* of the memory:

    y[i] of a current sample = its part's batch normalization (biased variance), scale and shift
    y[i] of a memory sample  = mean over s of the S parts' batch normalizations, scale and shift
    running <- (1 - momentum) running + momentum * mean over s of the parts' mean, and of their unbiased variance

S = 1 is batch normalization: the first task, unknown tasks (a federation), and every batch that is not divided as
above, which is recognized by a length that ``batch_ratio`` + 1 does not divide or by another task's sample among the
first B_c. Set ``batch_ratio`` to the learner's ratio of new to memory samples, and put the new ones first. Where an
experience comes again, the current task is the one that it was, and T counts all others seen. Evaluation is batch
normalization with the running moments.

Federated: batch normalization, or by client and task (FedAvg's ``moments = "pool_tasks"``).
Continual: everything is kept across experiences.
Differs: the official layer takes the first B_c samples for current whatever they are; ours checks their task numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import DataError
from fednorm.norms._batch import BatchLayer, batch_norm, check_spatial_dims
from fednorm.norms._hearing import Hearing
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TaskedLayer, TensorSpec


def num_parts(num_current: int, num_memory: int, wanted: int) -> int:
    """Return the largest common divisor of both numbers that is not above ``wanted``; at least 1."""
    common = math.gcd(num_current, num_memory)
    return max((part for part in range(1, min(wanted, common) + 1) if common % part == 0), default=1)


class TaskBalancedNormLayer(TaskedLayer, BatchLayer):
    """Task-balanced batch normalization for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        batch_ratio: Current samples for each memory sample of a batch.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running moments.
        norm: The method object, of which all layers warn together where nobody tells them their tasks.
    """

    def __init__(
        self, num_features: int, *, batch_ratio: int, eps: float, momentum: float, norm: TaskBalancedNorm | None = None
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self._hearing = Hearing(norm)
        self.batch_ratio = batch_ratio
        self._tasks: Tensor | None = None
        self._earlier = self._current = 0

    def set_tasks(self, tasks: Tensor | None, num_tasks: int) -> None:
        """Take the task numbers of the coming batch; the current task is ``num_tasks - 1``."""
        self._hearing.told = True
        self._tasks, self._earlier = (None, 0) if tasks is None else (tasks, num_tasks - 1)
        self._current = self._earlier

    def set_current_task(self, task: int) -> None:
        """Take the number of the current task; T counts all others that have been seen."""
        self._current = task

    unbiased = True

    @property
    def tasks(self) -> Tensor | None:
        """The task of every sample of the latest batch."""
        return self._tasks

    @property
    def eta(self) -> float:
        """The weight of a batch in the running moments."""
        return 1.0 / max(int(self.num_batches_tracked), 1) if self.momentum is None else self.momentum

    def task_shares(self, counts: Tensor) -> Tensor:
        """Return the same share for every task that has been seen: what the division into parts aims at."""
        return torch.full_like(counts, 1.0 / len(counts))

    def division(self, count: int) -> tuple[int, int]:
        """Return B_c and S for the coming batch of ``count`` samples.

        Raises:
            DataError: The task numbers are those of a batch of another size.
        """
        if self._tasks is None or not self._earlier:
            return count, 1
        if len(self._tasks) != count:
            raise DataError(
                f"Task-balanced norm was given the tasks of {len(self._tasks)} samples and then a batch of {count}. "
                "Call set_tasks before every training forward, with one task number per sample."
            )
        memory, rest = divmod(count, self.batch_ratio + 1)
        current = count - memory
        if rest or bool((self._tasks[:current] != self._current).any()):
            return count, 1
        return current, num_parts(current, memory, self.batch_ratio * self._earlier)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong, or the task numbers were for a batch of another size.
        """
        self._check_input_dim(x)
        if self.training and not self._hearing.told:
            self._hearing.say("task_balanced_norm")
        current, parts = self.division(len(x)) if self.training else (len(x), 1)
        return super().forward(x) if parts == 1 else self._in_parts(x, current, parts)

    def _in_parts(self, x: Tensor, current: int, parts: int) -> Tensor:
        """Normalize S parts at once, as S * C channels of one batch."""
        positions = x.shape[2:]
        rows = x[:current].reshape(-1, parts * self.num_features, *positions)
        memory = x[current:].repeat(1, parts, *[1] * len(positions))
        mean, var = self.running_mean.repeat(parts), self.running_var.repeat(parts)
        weight, bias = self.weight.repeat(parts), self.bias.repeat(parts)
        batch = torch.cat((rows, memory))
        y = batch_norm(batch, mean, var, weight, bias, True, self.count_batch(), self.eps)
        self.running_mean.copy_(mean.view(parts, -1).mean(0))
        self.running_var.copy_(var.view(parts, -1).mean(0))
        ours = y[: len(rows)].reshape(current, *x.shape[1:])
        theirs = y[len(rows) :].reshape(-1, parts, *x.shape[1:]).mean(1)
        return torch.cat((ours, theirs))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, eps={self.eps:g}, batch_ratio={self.batch_ratio}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tasks": None, "_earlier": 0, "_current": 0}


@dataclass(frozen=True, kw_only=True)
class TaskBalancedNorm(Norm):
    """Task-balanced batch normalization and its options.

    Attributes:
        batch_ratio: Current samples for each memory sample of a batch: 3 in the paper (48 and 16), 1 for 10 and 10.
        eps: Added to the variance, greater than 0.
        momentum: Weight of the new batch in the running moments, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    batch_ratio: int = 3
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.whole("task_balanced_norm", "batch_ratio", self.batch_ratio, at_least=1)
        options.number("task_balanced_norm", "eps", self.eps, above=0)
        options.number("task_balanced_norm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("task_balanced_norm", spatial_dims)
        return TaskBalancedNormLayer(
            num_channels, batch_ratio=self.batch_ratio, eps=self.eps, momentum=self.momentum, norm=self
        )

    def divides(self, new: int, memory: int) -> bool:
        """Return whether a batch has parts: the memory's samples divide the new ones, and are two or more."""
        return memory > 1 and new >= memory and new % memory == 0

    def for_stream(self, *, num_tasks: int, batch_ratio: int) -> TaskBalancedNorm:
        """Return the method with the learner's ratio of new to memory samples."""
        del num_tasks
        return replace(self, batch_ratio=batch_ratio) if batch_ratio else self


SPEC = NormSpec(
    name="task_balanced_norm",
    summary="Batch norm over parts of the current task's samples, each beside all of the memory's (TBBN).",
    citation=Citation(
        title="Rebalancing Batch Normalization for Exemplar-based Class-Incremental Learning",
        authors="Cha, Cho, Hwang, Hong, Lee, Moon",
        year=2023,
        arxiv="2201.12559",
        where="official code csm9493/TaskBalancedBN, src/networks/tbbn.py",
    ),
    make=TaskBalancedNorm,
    layers=(TaskBalancedNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=(
        "A batch that is not current samples first, memory last, in the stated ratio, is normalized as a whole.",
    ),
    verified=(
        "Golden trace tbbn: the official layer, float64.",
        "The formula part by part, in float64.",
    ),
)
