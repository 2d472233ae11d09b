"""ewc: elastic weight consolidation, a quadratic pull to the weights that earlier experiences needed.

Kirkpatrick et al. Overcoming catastrophic forgetting in neural networks. PNAS 2017. https://arxiv.org/abs/1612.00796.
Online: Schwarz et al. Progress & Compress. ICML 2018. https://arxiv.org/abs/1805.06370.

    separate    loss = cross_entropy(f(x), y) + strength / 2 * sum_t sum_i F_ti (w_i - w_ti)^2
    online      loss = cross_entropy(f(x), y) + strength / 2 * sum_i F_i (w_i - w*_i)^2
                when an experience ends: F <- gamma F + F_t, w* <- w_t

w_t are the parameters at the end of experience t, and F_t the diagonal of the Fisher information there,

    F_ti = mean over x of (d log p(y | x) / d w_i)^2

a mean of squared gradients of *single* samples, in evaluation mode and without augmentation. y is drawn from the
network's own p(. | x), which makes it the Fisher information; ``labels = "data"`` takes the given label instead (the
"empirical Fisher", as in most implementations). All trained parameters take part, those of normalization layers too.

``separate`` needs no more memory than ``online``: a sum of quadratics with diagonal curvatures is one quadratic about
the weighted mean of their centres, and a constant. It is kept that way.

A step of plain gradient descent is stable only where learning rate * strength * F < 2 for every parameter; beyond that
the weights overflow within an experience. F grows with every experience in both modes (online: while gamma is 1), and
its largest value is often between 1 and 10.

Differs: the Fisher information is estimated from ``fisher_samples`` samples of an experience, one backward pass each.
Avalanche's ``EWC`` squares the gradient of each batch's *mean* loss, which is smaller by up to the batch size, has no
factor 1/2, and leaves the model in training mode. mammoth's weighs each sample by p(y | x) besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.rng import torch_stream
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import Learner, LearnerOptions, LearnerSpec, Tensors


@dataclass(frozen=True, kw_only=True)
class EWCOptions(LearnerOptions):
    """The options of EWC.

    Attributes:
        strength: Factor of the penalty, greater than 0. The paper gives none; mammoth's for split CIFAR-10 would be 20
            here, for a smaller F. The default leaves room below the limit of stability at the rates of this field.
        mode: ``separate``, a penalty for each earlier experience, or ``online``, one for all of them.
        gamma: What an earlier Fisher information keeps at each experience's end where ``mode`` is ``online``, in
            (0, 1].
        labels: Whose labels the Fisher information takes: the ``model``'s or the ``data``'s.
        fisher_samples: Most samples of an experience that it is estimated from, chosen at random; 0 for all.

    Raises:
        ConfigError: An option is out of range.
    """

    strength: float = 5.0
    mode: str = "separate"
    gamma: float = 1.0
    labels: str = "model"
    fisher_samples: int = 200

    def __post_init__(self) -> None:
        options.number("learner", "strength", self.strength, above=0)
        options.one_of("learner", "mode", self.mode, ("separate", "online"))
        options.number("learner", "gamma", self.gamma, above=0, at_most=1)
        options.one_of("learner", "labels", self.labels, ("model", "data"))
        options.whole("learner", "fisher_samples", self.fisher_samples, at_least=0)


class EWCLearner(Learner):
    """Learns from new samples, held by a spring for every parameter.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`EWCOptions`.

    Attributes:
        trained: The P numbers that are trained, as the parameters that hold them.
        importance: The springs' stiffness: sum_t F_t, or F; shape (P,).
        centre: Where they pull to, shape (P,).
        offset: The penalty at ``centre``, without the strength.
    """

    Options: ClassVar[type[LearnerOptions]] = EWCOptions
    options: EWCOptions

    def __init__(self, **template: Any) -> None:
        super().__init__(**template)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.importance = torch.zeros_like(_flat(self.trained).detach())
        self.centre = torch.zeros_like(self.importance)
        self.offset = self.importance.new_zeros(())

    def observe(self, new: Samples) -> Tensor:
        """Learn from one batch, penalized once an experience has ended."""
        (logits,) = self.pass_forward(new)
        loss = self.loss_of(logits, new)
        self.descend(loss + self.penalty() if self.progress.ended else loss)
        return logits

    def penalty(self) -> Tensor:
        """Return the second term of the loss at the present parameters, a scalar."""
        stretch = _flat(self.trained) - self.centre
        return self.options.strength * (0.5 * (self.importance * stretch.square()).sum() + self.offset)

    def end_experience(self) -> None:
        """Tie the parameters to their present values."""
        fisher, weights = self.fisher(), _flat(self.trained).detach()
        if self.options.mode == "online":
            self.importance, self.centre = self.options.gamma * self.importance + fisher, weights
            return
        # F_1 (w - c_1)^2 + F_2 (w - c_2)^2 = (F_1 + F_2) (w - c)^2 + F_1 F_2 / (F_1 + F_2) (c_2 - c_1)^2
        total = self.importance + fisher
        share = torch.where(total > 0, fisher / total, 1.0)
        gap = weights - self.centre
        self.offset = self.offset + 0.5 * (self.importance * share * gap.square()).sum()
        self.centre, self.importance = self.centre + share * gap, total

    def fisher(self) -> Tensor:
        """Return the diagonal of the Fisher information on the present experience, shape (P,)."""
        assert self.source is not None
        number, train = self.progress.ended, self.source.train
        rows = torch.randperm(len(train), generator=torch_stream(self.seed, "fisher", number, "rows"))
        rows = rows[: self.options.fisher_samples or len(train)]
        images, labels = self._batch(self.source, rows)
        inputs = self.as_input(images, self._task_of_row[rows] if len(self._task_of_row) else None)
        drawing = torch_stream(self.seed, "fisher", number, "labels")
        total = torch.zeros_like(self.importance)
        self.model.eval()
        for image, label in zip(torch.split(inputs, 1), torch.split(labels, 1), strict=True):
            log_p = functional.log_softmax(self.model(image)[0], dim=0)
            # A network that has diverged has no distribution to draw from, and no finite Fisher information either.
            if self.options.labels == "model" and not log_p.isnan().any():
                label = torch.multinomial(log_p.detach().cpu().exp(), 1, generator=drawing).to(log_p.device)
            gradients = torch.autograd.grad(log_p[label].sum(), self.trained, materialize_grads=True)
            total += _flat(gradients).square()
        self.model.train()
        return total / len(images)

    def own_tensors(self) -> Tensors:
        """Return the springs."""
        return {"importance": self.importance, "centre": self.centre, "offset": self.offset}

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take them back."""
        self.importance, self.centre, self.offset = (tensors[key].clone() for key in ("importance", "centre", "offset"))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return the numbers of some tensors one after the other, whatever their layout in memory."""
    return torch.cat([tensor.flatten() for tensor in tensors])


SPEC = LearnerSpec(
    name="ewc",
    summary="Elastic weight consolidation: pulls parameters back as earlier experiences' Fisher information says.",
    citation=Citation(
        title="Overcoming catastrophic forgetting in neural networks",
        authors="Kirkpatrick et al.",
        year=2017,
        arxiv="1612.00796",
        where="PNAS; online: Schwarz et al., arXiv 1805.06370",
    ),
    make=EWCLearner,
    deviations=("The Fisher information is estimated from at most fisher_samples samples of each experience.",),
    verified=(
        "The Fisher information in closed form and by a loop over samples; the penalty as the sum that it stands for.",
    ),
)


def __getattr__(name: str) -> Any:
    """Return ``EWC``: the learner as an Avalanche strategy."""
    return strategies(__name__, EWC=EWCLearner)(name)
