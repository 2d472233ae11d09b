"""er_ace: experience replay with the asymmetric cross-entropy.

Caccia, Aljundi, Asadi, Tuytelaars, Pineau, Belilovsky. New Insights on Reducing Abrupt Representation Change in Online
Continual Learning. ICLR 2022. https://arxiv.org/abs/2104.05025. Official code: pclucas14/AML; mammoth and AdaB2N have
it too.

    loss = cross_entropy(f(x_new), y_new; classes in the batch) + cross_entropy(f(x_mem), y_mem; all classes)

The softmax of the new samples is over the classes that occur in their batch, and over those that have never been seen:
old classes are not pushed away by new samples. Both terms are means, and are added. Until the second experience there
is neither mask nor replay, as in mammoth and AdaB2N; with ``task_free`` both begin with the second step, as in the
paper's task-free runs.

Differs: new and memory samples share one forward pass by default (``passes``), as AdaB2N needs it; the official code
has two. Classes are unseen by a record of those seen; the official code goes by the largest label seen and leaves that
class unmasked too. Avalanche's ER_ACE puts the whole experience into a class-balanced memory before it trains on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import LearnerOptions, LearnerSpec, Tensors
from fednorm.streams.replay import ReplayLearner, ReplayOptions


@dataclass(frozen=True, kw_only=True)
class ERACEOptions(ReplayOptions):
    """The options of ER-ACE.

    Attributes:
        task_free: Whether mask and replay begin with the second step instead of the second experience.

    Raises:
        ConfigError: An option is out of range.
    """

    task_free: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        options.flag("learner", "task_free", self.task_free)


class ERACELearner(ReplayLearner):
    """Experience replay with the asymmetric cross-entropy."""

    Options: ClassVar[type[LearnerOptions]] = ERACEOptions
    options: ERACEOptions

    def __init__(self, **template: Any) -> None:
        super().__init__(**template)
        self.seen_classes = torch.zeros(self.num_classes, dtype=torch.bool, device=self.device)

    def replay(self, new: Samples) -> Tensor:
        """Learn from new samples among the classes at hand, and from memory among all."""
        present = torch.zeros_like(self.seen_classes)
        present[new.labels] = True
        self.seen_classes |= present
        if not len(self.buffer) or not (self.options.task_free or self.progress.ended):
            (logits,) = self.logits_of(new)
            self.descend(self.loss_of(logits, new))
            return logits
        memory = self.remembered(new)
        logits, remembered = self.logits_of(new, memory)
        absent = self.seen_classes & ~present
        masked = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        self.descend(self.loss_of(masked, new) + self.loss_of(remembered, memory))
        return logits

    def own_tensors(self) -> Tensors:
        """Return the memory and the classes seen."""
        return super().own_tensors() | {"seen_classes": self.seen_classes}

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take both back."""
        super().load_own_tensors(tensors)
        self.seen_classes = tensors["seen_classes"].clone()


SPEC = LearnerSpec(
    name="er_ace",
    summary="Experience replay whose new samples compete only with the classes of their batch (asymmetric CE).",
    citation=Citation(
        title="New Insights on Reducing Abrupt Representation Change in Online Continual Learning",
        authors="Caccia, Aljundi, Asadi, Tuytelaars, Pineau, Belilovsky",
        year=2022,
        arxiv="2104.05025",
        where="ICLR 2022",
    ),
    make=ERACELearner,
    deviations=(
        "New and memory samples share one forward pass by default; the official code has two (passes = separate).",
        "Classes are unseen by a record of those seen, not by the largest label.",
    ),
    verified=("The loss with its mask against a loop over samples and classes, in plain PyTorch.",),
)


def __getattr__(name: str) -> Any:
    """Return ``ERACE``: the learner as an Avalanche strategy."""
    return strategies(__name__, ERACE=ERACELearner)(name)
