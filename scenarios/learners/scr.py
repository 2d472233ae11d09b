"""scr: supervised contrastive replay, and classification by the nearest class mean of the memory.

Mai, Li, Kim, Sanner. Supervised Contrastive Replay: Revisiting the Nearest Class Mean Classifier in Online
Class-Incremental Continual Learning. CVPR Workshops 2021. https://arxiv.org/abs/2103.13885. Official code:
RaptorMai/online-continual-learning. The loss: Khosla et al., https://arxiv.org/abs/2004.11362.

    z = g(f(x)) / ||g(f(x))||  of new and memory samples, each twice: as it is, and augmented
    loss = mean over i of - mean over p of log ( exp(<z_i, z_p> / T) / sum over a != i of exp(<z_i, z_a> / T) )

p are the others of i's class, its own second view among them; f the features before the network's head, g a projection
of two layers, d -> d -> ``projection``, that is the learner's own, thrown away for evaluation, and trained by gradient
descent at the optimizer's present rate. Classification is by the nearest mean of normalized features over the whole
memory (:mod:`fednorm.streams.class_means`). T = 0.07 and 128 numbers are the official code's.

The augmentation is the run's (``train.augment``); the paper has crop, mirroring, jitter and gray images. With none both
views of a sample are one, and only others of its class teach it something.

Differs:

* The network's own head is trained beside it, by cross-entropy on features that pass no gradient on: what is learned
  before it does not know of it. Online accuracy is the head's; the official method has none before a task's end.
* The first batch, before there is a memory, is learned from too; the official code only stores it.
* All groups share one forward pass by default, new samples first; the official code has one for each view.
* The official projection is trained by the run's optimizer, which is plain SGD there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.rng import torch_seeded
from fednorm.streams.buffer import Samples
from fednorm.streams.class_means import HeadInputs, class_head, class_means, normalized_features, with_means
from fednorm.streams.learner import LearnerOptions, LearnerSpec, Tensors
from fednorm.streams.replay import ReplayLearner, ReplayOptions


@dataclass(frozen=True, kw_only=True)
class SCROptions(ReplayOptions):
    """The options of SCR.

    Attributes:
        temperature: T, greater than 0.
        projection: Numbers that the projection has, 1 or more.

    Raises:
        ConfigError: An option is out of range.
    """

    temperature: float = 0.07
    projection: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        options.number("learner", "temperature", self.temperature, above=0)
        options.whole("learner", "projection", self.projection, at_least=1)


class SCRLearner(ReplayLearner):
    """Contrasts new and memory samples by class, and classifies by means of the memory.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`SCROptions`.

    Attributes:
        head: The network's head.
        projection: g.

    Raises:
        ConfigError: The network's head is no linear layer, besides what all learners with a memory refuse.
    """

    Options: ClassVar[type[LearnerOptions]] = SCROptions
    by_cross_entropy = False
    options: SCROptions

    def __init__(self, **template: Any) -> None:
        super().__init__(**template)
        self.head = class_head(self.model, self.num_classes, "scr")
        width = self.head.in_features
        with torch_seeded(self.seed, "scr", "projection"):
            layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.options.projection))
            self.projection = nn.Sequential(*layers).to(self.device)

    def replay(self, new: Samples) -> Tensor:
        """Learn from two views of each new and memory sample."""
        groups = self._views(new)
        if len(self.buffer):
            groups += self._views(self.remembered(new))
        with HeadInputs(self.head, cut=True) as heard:
            logits = self.logits_of(*groups)
        features = torch.cat(heard.passes)
        labels = torch.cat([self.labels_of(group) for group in groups])
        projected = functional.normalize(self.projection(features.float()), dim=1)
        loss = supervised_contrastive(projected, labels, self.options.temperature)
        self.projection.zero_grad()
        self.descend(loss + self.loss_of(torch.cat(logits), *groups))
        self._step_projection()
        return logits[0]

    def _views(self, samples: Samples) -> tuple[Samples, ...]:
        """Return samples as they are, ready for the network, and as pixels that are augmented on their way."""
        plain = Samples(self.as_input(samples.images, samples.tasks), samples.labels, samples.tasks)
        return plain, samples

    @torch.no_grad()
    def _step_projection(self) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        for parameter in self.projection.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=rate)

    @contextmanager
    def for_evaluation(self) -> Iterator[nn.Module]:
        """Give the model to evaluate: with means of the memory in the place of its head's weights."""
        with super().for_evaluation() as model:
            if not len(self.buffer):
                yield model
                return
            memory = self.buffer.everything()
            inputs = self.as_input(memory.images, memory.tasks)
            features = normalized_features(model, self.head, inputs, self.eval_mb_size)
            with with_means(self.head, *class_means(features, memory.labels, self.num_classes)):
                yield model

    def own_tensors(self) -> Tensors:
        """Return the memory and the projection."""
        return super().own_tensors() | {
            f"projection/{key}": tensor for key, tensor in self.projection.state_dict().items()
        }

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take both back."""
        super().load_own_tensors(tensors)
        start = "projection/"
        self.projection.load_state_dict({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})


def supervised_contrastive(projected: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss, a scalar: L_out of Khosla et al.

    Args:
        projected: z, shape (n, p), each of length 1.
        labels: int64, shape (n,), each at least twice.
        temperature: T.
    """
    similar = projected @ projected.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_share = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~itself
    return -(torch.where(positive, log_share, 0).sum(1) / positive.sum(1)).mean()


SPEC = LearnerSpec(
    name="scr",
    summary="Supervised contrastive replay: classes are drawn together; the nearest class mean of the memory decides.",
    citation=Citation(
        title="Supervised Contrastive Replay: Revisiting the Nearest Class Mean Classifier in Online Class-Incremental "
        "Continual Learning",
        authors="Mai, Li, Kim, Sanner",
        year=2021,
        arxiv="2103.13885",
        where="CVPR Workshops 2021; official code RaptorMai/online-continual-learning",
    ),
    make=SCRLearner,
    deviations=(
        "The network's head learns beside it from features that pass no gradient on, for online accuracy.",
        "All groups share one forward pass by default; the official code has one for each view.",
        "The first batch is learned from, before there is a memory.",
    ),
    verified=("The loss is Avalanche's SCRLoss; each step in plain PyTorch; classification is Avalanche's NCM.",),
)


def __getattr__(name: str) -> Any:
    """Return ``SCR``: the learner as an Avalanche strategy."""
    return strategies(__name__, SCR=SCRLearner)(name)
