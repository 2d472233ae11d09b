"""A head for each task: the classes of an experience compete among themselves alone (task-incremental learning).

    loss = mean over x of - log ( exp(f_y(x)) / sum over c of y's task of exp(f_c(x)) )

One layer with K outputs whose softmax is taken over the classes of a sample's task is a layer for each task on common
features: outputs of other tasks get no gradient of it. So no network has to be told a task. That a test sample's task
is known is what ``task_accuracy`` and ``task_incremental_accuracy`` are measured with. The three ways to be
incremental: van de Ven, Tuytelaars, Tolias, https://doi.org/10.1038/s42256-022-00568-3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fednorm.errors import ConfigError
from fednorm.streams.stream import Stream


class TaskHeads:
    """The cross-entropy over the classes of each sample's task; in the place of a learner's criterion.

    Args:
        stream: Whose labels tell the tasks.

    Raises:
        ConfigError: They do not.
    """

    def __init__(self, stream: Stream) -> None:
        if not stream.label_tells_task:
            raise ConfigError(
                f"train.heads = 'task' gives each experience's classes a head of their own, and in {stream.title} "
                "experiences share classes, so that a label does not tell its task. Leave it at 'one', or take a "
                "scenario that splits the classes (split_digits, split_cifar10) without blurry and repetition."
            )
        tasks = stream.task_of(torch.arange(stream.num_classes))
        self._foreign = tasks[:, None] != tasks

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits, shape (n, K), a scalar."""
        foreign = self._foreign.to(labels.device)[labels]
        return functional.cross_entropy(logits.masked_fill(foreign, -torch.inf), labels)
