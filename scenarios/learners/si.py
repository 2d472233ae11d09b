"""si: synaptic intelligence, a quadratic pull to the weights whose way through training lowered the loss.

Zenke, Poole, Ganguli. Continual Learning Through Synaptic Intelligence. ICML 2017. https://arxiv.org/abs/1703.04200.
Official code: ganguli-lab/pathint.

    loss = cross_entropy(f(x), y) + strength * sum_i O_i (w_i - w*_i)^2
    at every update:              p_i <- p_i - g_i * (w_i after - w_i before)
    when an experience ends:      O_i <- max(0, O_i + p_i / ((w_i - w*_i)^2 + damping)),  w*_i <- w_i,  p_i <- 0

g is the gradient of the first term alone (norms' own penalties included), before any clipping, and the step is what the
optimizer and all that follows it made of the weight. w* are the weights at the end of the last experience, and at first
those that training began with. All trained parameters take part, those of normalization layers too. Importances are
summed over experiences and cut at 0, as in the official code; damping (xi) is 0.1 on permuted MNIST and 0.001 on split
CIFAR there.

Differs: Avalanche's ``SynapticIntelligence`` leaves the parameters of batch normalization out, takes the gradient of
both terms, and cuts each importance at 0.001 from above but not at 0 from below; its factor is half of ours. On the CPU
version 0.6 keeps views of the weights in place of copies, so that every importance stays 0 and it trains as ``naive``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import Learner, LearnerOptions, LearnerSpec, Tensors


@dataclass(frozen=True, kw_only=True)
class SIOptions(LearnerOptions):
    """The options of synaptic intelligence.

    Attributes:
        strength: c, factor of the penalty, greater than 0.
        damping: xi, greater than 0: what keeps the importance of a weight that hardly moved finite.

    Raises:
        ConfigError: An option is out of range.
    """

    strength: float = 0.1
    damping: float = 0.1

    def __post_init__(self) -> None:
        options.number("learner", "strength", self.strength, above=0)
        options.number("learner", "damping", self.damping, above=0)


class SILearner(Learner):
    """Learns from new samples, held by a spring for every parameter.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`SIOptions`.

    Attributes:
        trained: The P numbers that are trained, as the parameters that hold them.
        importance: O, shape (P,).
        centre: w*, shape (P,).
        path: p, shape (P,).
    """

    Options: ClassVar[type[LearnerOptions]] = SIOptions
    options: SIOptions

    def __init__(self, **template: Any) -> None:
        # Before clipping and every other change of the gradient.
        template["adjust"] = (self._hear, *template.get("adjust", ()))
        super().__init__(**template)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.centre = _flat(self.trained)
        self.importance, self.path = torch.zeros_like(self.centre), torch.zeros_like(self.centre)
        self._gradient = self._before = self.centre

    def begin_experience(self) -> None:
        """Take the weights that the first experience begins with; a client of a federation is given them then."""
        if not self.progress.ended:
            self.centre = _flat(self.trained)

    def observe(self, new: Samples) -> Tensor:
        """Learn from one batch, penalized once an experience has ended, and take note of the way."""
        self._before = _flat(self.trained)
        (logits,) = self.pass_forward(new)
        loss = self.loss_of(logits, new)
        self.descend(loss + self.penalty() if self.progress.ended else loss)
        self.path -= self._gradient * (_flat(self.trained) - self._before)
        return logits

    def penalty(self) -> Tensor:
        """Return the second term of the loss at the present parameters, a scalar."""
        stretch = torch.cat([parameter.flatten() for parameter in self.trained]) - self.centre
        return self.options.strength * (self.importance * stretch.square()).sum()

    @torch.no_grad()
    def _hear(self) -> None:
        """Keep the gradient of the loss without the penalty."""
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained)
        self._gradient = _flat(gradients)
        if self.progress.ended:
            self._gradient -= 2 * self.options.strength * self.importance * (self._before - self.centre)

    def end_experience(self) -> None:
        """Tie the parameters to their present values."""
        weights = _flat(self.trained)
        gained = self.path / ((weights - self.centre).square() + self.options.damping)
        self.importance = (self.importance + gained).clamp_min_(0)
        self.centre = weights
        self.path = torch.zeros_like(weights)

    def own_tensors(self) -> Tensors:
        """Return the springs and the way so far."""
        return {"importance": self.importance, "centre": self.centre, "path": self.path}

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take them back."""
        self.importance, self.centre, self.path = (tensors[key].clone() for key in ("importance", "centre", "path"))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return copies of the numbers of some tensors one after the other, whatever their layout in memory."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


SPEC = LearnerSpec(
    name="si",
    summary="Synaptic intelligence: pulls parameters back by how much their way through training lowered the loss.",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
        where="ICML 2017; official code ganguli-lab/pathint",
    ),
    make=SILearner,
    verified=(
        "The path and the importances by a loop in plain PyTorch, with clipping and momentum too; those of Avalanche's "
        "plugin after an experience.",
    ),
)


def __getattr__(name: str) -> Any:
    """Return ``SI``: the learner as an Avalanche strategy."""
    return strategies(__name__, SI=SILearner)(name)
