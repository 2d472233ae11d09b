"""a_gem: averaged gradient episodic memory: no step that would raise the loss on a batch from memory.

Chaudhry, Ranzato, Rohrbach, Elhoseiny. Efficient Lifelong Learning with A-GEM. ICLR 2019.
https://arxiv.org/abs/1812.00420 (equation 11, algorithm 1). Official code: facebookresearch/agem.

    g of the new samples, r of samples drawn from memory, over all parameters as one vector:
    g <- g - (<g, r> / <r, r>) r     where <g, r> < 0

The projected gradient is what the optimizer is given, and what clipping sees. The memory has as many samples of each
class as of every other (GDumb's sampler, :class:`~fednorm.streams.buffer.BalancedBuffer`), of the experiences that have
ended: an experience's samples are offered, in random order, at its end. So there is no reference in the first one.

Differs: the official memory is a ring of the latest samples of each class, filled as they come; the paper's tasks have
heads of their own and are told by descriptors. Both gradients are of training mode, as in the official code: running
statistics see new and memory batches in turn, the memory's first. Avalanche's ``AGEM`` keeps random samples of each
experience, and draws as many of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.rng import torch_stream
from fednorm.streams.buffer import BalancedBuffer, Samples
from fednorm.streams.learner import Learner, LearnerOptions, LearnerSpec, Tensors

CHUNK = 256
"""Samples that are read at once where a memory is offered an experience."""


@dataclass(frozen=True, kw_only=True)
class AGEMOptions(LearnerOptions):
    """The options of A-GEM.

    Attributes:
        memory_size: Samples that the memory holds.
        memory_batch: Memory samples that the reference gradient is of; 0 for as many as there are new ones. 256 in the
            paper, with 10 new ones.

    Raises:
        ConfigError: An option is out of range.
    """

    memory_size: int = 500
    memory_batch: int = 0

    def __post_init__(self) -> None:
        options.whole("learner", "memory_size", self.memory_size, at_least=1)
        options.whole("learner", "memory_batch", self.memory_batch, at_least=0)


class AGEMLearner(Learner):
    """Learns from new samples, by what of their gradient does not go against the memory's.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`AGEMOptions`.

    Raises:
        ConfigError: The reference would be of a single image, and the network's norm needs more.
    """

    Options: ClassVar[type[LearnerOptions]] = AGEMOptions
    options: AGEMOptions

    def __init__(self, **template: Any) -> None:
        # Before clipping and every other change of the gradient.
        template["adjust"] = (self._project, *template.get("adjust", ()))
        super().__init__(**template)
        self.buffer = BalancedBuffer(self.options.memory_size, num_classes=self.num_classes, seed=self.seed)
        self._reference: list[Tensor] = []
        if self.options.memory_batch == 1 and self.batch_coupled:
            raise ConfigError(
                "learner.memory_batch is 1: a pass over a single image, and this network's norm estimates a variance "
                "from each batch. Set memory_batch to 2 or more (or 0, for as many as there are new samples), or take "
                "a norm that works on single images."
            )

    def observe(self, new: Samples) -> Tensor:
        """Learn from one batch, after a look at the memory once there is one."""
        self._reference = []
        if len(self.buffer):
            memory = self.buffer.draw(self.options.memory_batch or len(new))
            (remembered,) = self.pass_forward(memory)
            self._reference = self.step.gradients(self.loss_of(remembered, memory))
        (logits,) = self.pass_forward(new)
        self.descend(self.loss_of(logits, new))
        return logits

    @torch.no_grad()
    def _project(self) -> None:
        """Take out of the gradients what would raise the loss on the memory's batch."""
        if not self._reference:
            return
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        pairs = [(p.grad, r) for p, r in zip(trained, self._reference, strict=True) if p.grad is not None]
        along = torch.stack([(gradient * r).sum() for gradient, r in pairs]).sum()
        if along < 0:
            share = along / torch.stack([r.square().sum() for r in self._reference]).sum()
            for gradient, reference in pairs:
                gradient -= share * reference

    def end_experience(self) -> None:
        """Offer the experience's samples to the memory."""
        assert self.source is not None
        order = torch.randperm(
            len(self.source.train), generator=torch_stream(self.seed, "a_gem", self.progress.ended, "order")
        )
        for rows in torch.split(order, CHUNK):
            images, labels = self._batch(self.source, rows)
            self.offer(self.buffer, Samples(images, labels, self._task_of_row[rows.to(self.device)]))

    def own_tensors(self) -> Tensors:
        """Return the memory."""
        return {f"buffer/{key}": tensor for key, tensor in self.buffer.state_dict().items()}

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take the memory back."""
        self.buffer.load_state_dict({key.removeprefix("buffer/"): tensor for key, tensor in tensors.items()})


SPEC = LearnerSpec(
    name="a_gem",
    summary="Averaged gradient episodic memory: gradients are projected so that the memory's loss does not rise.",
    citation=Citation(
        title="Efficient Lifelong Learning with A-GEM",
        authors="Chaudhry, Ranzato, Rohrbach, Elhoseiny",
        year=2019,
        arxiv="1812.00420",
        where="ICLR 2019; official code facebookresearch/agem",
    ),
    make=AGEMLearner,
    deviations=(
        "The memory is balanced by class and offered an experience at its end; the official one is a ring a class.",
        "One head for all classes; the paper's tasks have heads of their own.",
    ),
    verified=("Each step in plain PyTorch; the projection of Avalanche's plugin, given the same reference.",),
)


def __getattr__(name: str) -> Any:
    """Return ``AGEM``: the learner as an Avalanche strategy."""
    return strategies(__name__, AGEM=AGEMLearner)(name)
