"""mir: maximally interfered retrieval: replay of those samples that the coming step would harm most.

Aljundi, Caccia, Belilovsky, Caccia, Lin, Charlin, Tuytelaars. Online Continual Learning with Maximally Interfered
Retrieval. NeurIPS 2019. https://arxiv.org/abs/1908.04742. Official code: optimass/Maximally_Interfered_Retrieval.

    w' = w - lr * gradient of cross_entropy(f_w(x), y) over the new samples         the step that is foreseen
    s  = cross_entropy(f_w'(x), y) - cross_entropy(f_w(x), y)                        of each of some candidates
    loss = cross_entropy over the new samples + cross_entropy over the candidates with the largest s

Candidates are drawn from the reservoir uniformly, without replacement, ``candidates`` of them (50 in the paper); as
many are replayed as ER would (``memory_batch``). lr is the optimizer's present rate. Both terms are means, and are
added, as in the official code. Until there is a memory, it is plain training.

Differs: the step is foreseen, and candidates scored, in evaluation mode and without augmentation, so that running
statistics and dropout have no part in it; the official code does it in training mode, where every look changes the
statistics. With a network without statistics and dropout it is the same. The foreseen step is plain gradient descent
whatever the optimizer, as in the official code, and on the cross-entropy alone. Replayed samples share a forward pass
with the new ones by default (``passes``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.streams.anytime import modes_kept
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import LearnerOptions, LearnerSpec
from fednorm.streams.replay import ReplayLearner, ReplayOptions


@dataclass(frozen=True, kw_only=True)
class MIROptions(ReplayOptions):
    """The options of MIR.

    Attributes:
        candidates: Memory samples that are scored at each step, 1 or more; of fewer than are replayed, all are.

    Raises:
        ConfigError: An option is out of range.
    """

    candidates: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        options.whole("learner", "candidates", self.candidates, at_least=1)


class MIRLearner(ReplayLearner):
    """Replay of the samples whose loss the coming step would raise most."""

    Options: ClassVar[type[LearnerOptions]] = MIROptions
    options: MIROptions

    def replay(self, new: Samples) -> Tensor:
        """Learn from new samples and from those in memory that they interfere with."""
        if not len(self.buffer):
            (logits,) = self.logits_of(new)
            self.descend(self.loss_of(logits, new))
            return logits
        memory = self.remembered(new)
        logits, remembered = self.logits_of(new, memory)
        self.descend(self.loss_of(logits, new) + self.loss_of(remembered, memory))
        return logits

    def remembered(self, new: Samples) -> Samples:
        """Return the memory samples of a step: of the candidates those with the largest interference."""
        count = self.options.memory_batch or len(new)
        candidates = self.buffer.draw(max(self.options.candidates, count))
        if len(candidates) <= count:
            return candidates
        chosen = self.interference(new, candidates).argsort(descending=True, stable=True)[:count]
        return candidates.taken(chosen)

    def interference(self, new: Samples, candidates: Samples) -> Tensor:
        """Return by how much a step on the new samples would raise the loss of each candidate, shape (n,)."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        rate = self.optimizer.param_groups[0]["lr"]
        inputs = self.as_input(candidates.images, candidates.tasks)
        with modes_kept(self.model):
            self.model.eval()
            loss = functional.cross_entropy(self.model(self.as_input(new.images, new.tasks)), new.labels)
            gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            with torch.no_grad():
                foreseen = {name: p - rate * g for (name, p), g in zip(named.items(), gradients, strict=True)}
                after = functional_call(self.model, foreseen, (inputs,))
                before = self.model(inputs)
        labels = candidates.labels
        return functional.cross_entropy(after, labels, reduction="none") - functional.cross_entropy(
            before, labels, reduction="none"
        )


SPEC = LearnerSpec(
    name="mir",
    summary="Maximally interfered retrieval: replays the memory samples whose loss the coming step would raise most.",
    citation=Citation(
        title="Online Continual Learning with Maximally Interfered Retrieval",
        authors="Aljundi, Caccia, Belilovsky, Caccia, Lin, Charlin, Tuytelaars",
        year=2019,
        arxiv="1908.04742",
        where="NeurIPS 2019; official code optimass/Maximally_Interfered_Retrieval",
    ),
    make=MIRLearner,
    deviations=(
        "The step is foreseen and candidates are scored in evaluation mode; in the official code in training mode.",
        "New and memory samples share one forward pass by default; the official code has two (passes = separate).",
    ),
    verified=("The choice by a copy of the network that takes the step, as Avalanche's makes it; each step's loss.",),
)


def __getattr__(name: str) -> Any:
    """Return ``MIR``: the learner as an Avalanche strategy."""
    return strategies(__name__, MIR=MIRLearner)(name)
