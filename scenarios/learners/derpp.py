"""derpp: dark experience replay, DER++.

Buzzega, Boschini, Porrello, Abati, Calderara. Dark Experience for General Continual Learning: a Strong, Simple
Baseline. NeurIPS 2020. https://arxiv.org/abs/2004.07211. Official code: mammoth.

    loss = cross_entropy(f(x), y) + alpha * mean((f(x') - z')^2) + beta * cross_entropy(f(x''), y'')

(x, y) are new samples; (x', z') and (x'', y'') are two independent draws from one reservoir, z' the logits with which a
sample was stored: those of its augmented self, in training mode, before the update of the step in which it came. The
square is averaged over samples and logits. Both terms begin with the first step that finds the memory filled, the
second of the stream. ``beta = 0`` is DER.

Differs: the three groups share one forward pass by default, as AdaB2N has it; mammoth makes three (``passes =
separate``, new samples first), which batch statistics make another method. Avalanche's ``DER`` is another method too:
one draw for both terms, no replay during the first experience, and logits taken after an experience, in evaluation
mode, of images without augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import LearnerOptions, LearnerSpec
from fednorm.streams.replay import ReplayLearner, ReplayOptions


@dataclass(frozen=True, kw_only=True)
class DERPPOptions(ReplayOptions):
    """The options of DER++; ``memory_batch`` is the size of *each* of the two draws.

    Attributes:
        alpha: Factor of the squared distance to the stored logits, 0 or more. The defaults of both factors are
            mammoth's, and AdaB2N's, for split CIFAR-10 with 500 samples.
        beta: Factor of the memory's cross-entropy, 0 or more.

    Raises:
        ConfigError: An option is out of range.
    """

    alpha: float = 0.2
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (("alpha", self.alpha), ("beta", self.beta)):
            options.number("learner", option, value)
            if value < 0:
                raise ConfigError(f"learner.{option} is a factor of the loss and must be 0 or more; got {value!r}.")

    def batch_ratio(self, batch_size: int) -> int:
        """Return the number of new samples for each memory sample of a joint batch; 0 where there is no such number."""
        memory = 2 * (self.memory_batch or batch_size)
        return batch_size // memory if self.passes == "joint" and batch_size % memory == 0 else 0


class DERPPLearner(ReplayLearner):
    """Replay of samples with their labels, and of samples with the logits that they once had."""

    Options: ClassVar[type[LearnerOptions]] = DERPPOptions
    options: DERPPOptions

    def replay(self, new: Samples) -> Tensor:
        """Learn from new samples, from stored logits, and from stored labels."""
        if not len(self.buffer):
            (logits,) = self.logits_of(new)
            self.descend(self.loss_of(logits, new))
            return logits
        dark, memory = self.remembered(new), self.remembered(new)
        assert dark.logits is not None
        logits, recalled, remembered = self.logits_of(new, dark, memory)
        self.descend(
            self.loss_of(logits, new)
            + self.options.alpha * functional.mse_loss(recalled, dark.logits)
            + self.options.beta * self.loss_of(remembered, memory)
        )
        return logits

    def remember(self, new: Samples, logits: Tensor) -> None:
        """Offer a batch to the memory, with its logits."""
        self.offer(self.buffer, new, logits)


SPEC = LearnerSpec(
    name="derpp",
    summary="Dark experience replay (DER++): the memory's labels, and the logits its samples had when they came.",
    citation=Citation(
        title="Dark Experience for General Continual Learning: a Strong, Simple Baseline",
        authors="Buzzega, Boschini, Porrello, Abati, Calderara",
        year=2020,
        arxiv="2004.07211",
        where="NeurIPS 2020",
    ),
    make=DERPPLearner,
    deviations=(
        "New and memory samples share one forward pass by default; the official code has three (passes = separate).",
    ),
    verified=("The loss against plain PyTorch; the stored logits are those before the update.",),
)


def __getattr__(name: str) -> Any:
    """Return ``DERPP``: the learner as an Avalanche strategy."""
    return strategies(__name__, DERPP=DERPPLearner)(name)
