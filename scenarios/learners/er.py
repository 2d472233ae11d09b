"""er: experience replay with a reservoir.

Chaudhry et al. On Tiny Episodic Memories in Continual Learning. 2019. https://arxiv.org/abs/1902.10486. Also Riemer et
al., https://arxiv.org/abs/1810.11910.

    loss = mean of cross_entropy(f(x), y) over the new samples and those drawn from memory

Memory samples are drawn uniformly, without replacement; there are none at the first step. The memory is a reservoir
over all samples (Vitter's algorithm R).

Differs: with ``passes = "separate"`` the two groups go through the network one after the other; the loss is the same
mean over all samples. Avalanche's Replay fills the memory once an experience has ended; ours is filled as samples come,
as in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import LearnerSpec
from fednorm.streams.replay import ReplayLearner


class ERLearner(ReplayLearner):
    """Experience replay."""

    def replay(self, new: Samples) -> Tensor:
        """Learn from new and memory samples alike."""
        groups = (new, self.remembered(new)) if len(self.buffer) else (new,)
        logits = self.logits_of(*groups)
        self.descend(self.loss_of(torch.cat(logits), *groups))
        return logits[0]


SPEC = LearnerSpec(
    name="er",
    summary="Experience replay: cross-entropy over new samples and as many from a reservoir.",
    citation=Citation(
        title="On Tiny Episodic Memories in Continual Learning",
        authors="Chaudhry et al.",
        year=2019,
        arxiv="1902.10486",
    ),
    make=ERLearner,
    verified=("Its steps in plain PyTorch; no official code, as the method is older than its papers.",),
)


def __getattr__(name: str) -> Any:
    """Return ``ER``: the learner as an Avalanche strategy."""
    return strategies(__name__, ER=ERLearner)(name)
