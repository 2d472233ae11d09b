"""lwf: learning without forgetting, by distillation from the network of the last experience.

Li, Hoiem. Learning without Forgetting. ECCV 2016, TPAMI 2018. https://arxiv.org/abs/1606.09282.

    loss = cross_entropy(f(x), y) + alpha * mean over x of KL(softmax(g(x)_O / T) || softmax(f(x)_O / T))

g is the network as the last experience left it, O the classes of all experiences before the present one, x the new
samples, the same augmented ones for both networks. There is no memory, and in the first experience no second term. The
paper's second term is the cross-entropy of the tempered probabilities, with the same gradient; it has no factor T²,
which Hinton et al. (arXiv 1503.02531) have, and neither has this: multiply alpha by it. T = 2 and alpha = 1 are the
paper's. With a single class in O the second term is 0, whatever the networks say.

Differs: the paper's tasks have heads of their own, each distilled by itself, and its new head is trained alone for a
while; here is one head of K outputs (class-incremental), the cross-entropy is over all of them, and there is no
warm-up. The teacher runs in evaluation mode. Avalanche's ``LearningWithoutForgetting`` has the same formula for one
head (the tests compare the two), but its teacher stays in training mode, where it normalizes with each batch's own
statistics and drops units out; that is why this is not it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import Learner, LearnerOptions, LearnerSpec, Tensors
from fednorm.streams.teacher import frozen_copy, teacher_from, tensors_of


@dataclass(frozen=True, kw_only=True)
class LwFOptions(LearnerOptions):
    """The options of LwF.

    Attributes:
        alpha: Factor of the distillation, greater than 0.
        temperature: T, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    alpha: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        options.number("learner", "alpha", self.alpha, above=0)
        options.number("learner", "temperature", self.temperature, above=0)


class LwFLearner(Learner):
    """Learns from new samples their labels and what the last experience's network made of them.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`LwFOptions`.

    Attributes:
        teacher: g, in evaluation mode; None in the first experience.
        old_classes: O, bool, shape (K,).
    """

    Options: ClassVar[type[LearnerOptions]] = LwFOptions
    options: LwFOptions

    def __init__(self, **template: Any) -> None:
        super().__init__(**template)
        self.teacher: nn.Module | None = None
        self.old_classes = torch.zeros(self.num_classes, dtype=torch.bool, device=self.device)

    def observe(self, new: Samples) -> Tensor:
        """Learn from one batch and from the teacher."""
        (logits,) = self.pass_forward(new)
        loss = self.loss_of(logits, new)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(self.mbatch[0])
            loss = loss + self.options.alpha * self.distillation(logits, taught)
        self.descend(loss)
        return logits

    def distillation(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Return the mean divergence from the teacher's tempered probabilities over the old classes.

        Args:
            logits: Of the network, shape (n, K).
            taught: Of the teacher, shape (n, K).
        """
        own, wanted = (
            functional.log_softmax(each[:, self.old_classes] / self.options.temperature, dim=1)
            for each in (logits, taught)
        )
        return functional.kl_div(own, wanted, reduction="batchmean", log_target=True)

    def end_experience(self) -> None:
        """Make the network the next experience's teacher."""
        assert self.source is not None
        self.old_classes[self.source.train.targets] = True
        self.teacher = frozen_copy(self.model)

    def own_tensors(self) -> Tensors:
        """Return the classes seen, and the teacher."""
        return {"old_classes": self.old_classes} | tensors_of(self.teacher)

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take both back."""
        self.old_classes = tensors["old_classes"].clone()
        self.teacher = teacher_from(tensors, self.model)


SPEC = LearnerSpec(
    name="lwf",
    summary="Learning without forgetting: the last experience's network teaches what it made of new samples.",
    citation=Citation(
        title="Learning without Forgetting", authors="Li, Hoiem", year=2016, arxiv="1606.09282", where="ECCV 2016"
    ),
    make=LwFLearner,
    deviations=(
        "One head for all classes, and no warm-up; the paper's tasks have heads of their own.",
        "The teacher is in evaluation mode; Avalanche's is in training mode.",
    ),
    verified=("The loss against the formula; without statistics and dropout it is Avalanche's LwF.",),
)


def __getattr__(name: str) -> Any:
    """Return ``LwF``: the learner as an Avalanche strategy."""
    return strategies(__name__, LwF=LwFLearner)(name)
