"""icarl: exemplars chosen by herding, distillation, and classification by the nearest mean of exemplars.

Rebuffi, Kolesnikov, Sperl, Lampert. iCaRL: Incremental Classifier and Representation Learning. CVPR 2017.
https://arxiv.org/abs/1611.07725 (algorithms 1 to 5). Official code: srebuffi/iCaRL.

    loss = mean over samples and classes of binary cross-entropy(sigmoid(f(x)), q)
           q_c = sigmoid(g_c(x)) for old classes c,  1[y = c] for all others
    an exemplar set of class c, of m = memory_size / (classes so far):  p_1, p_2, ... with
           p_k = argmin over x of || mu - (phi(x) + phi(p_1) + ... + phi(p_(k-1))) / k ||
    y(x) = argmin over c of || phi(x) - mu_c ||

g is the network as the last experience left it, phi the features before the head, brought to length 1, mu the mean of
phi over a class, and mu_c that of its exemplars, brought to length 1. When an experience ends, each old set keeps its
first m exemplars and the experience's classes get sets of their own. The loss is over all K outputs, those of classes
to come too, as in the official code; as a mean it is small, so that the paper's learning rate is 2.

Training is on the experience and on all exemplars: each step has, beside its new samples, as many exemplars, drawn
anew, as are due for each to come once in a pass on average. Features are of evaluation mode, without augmentation.
Until the first experience has ended, evaluation is by the head.

Differs:

* The official code trains on one shuffled union, in which a batch has as many new samples as chance gives it.
* An exemplar is chosen once; the official code may choose one again, and then has one fewer.
* The official code adds the mean of mirrored exemplars; the paper does not, nor does this.
* A class of the present experience that has been seen before (blurry boundaries, domains) is learned from its labels
  and not distilled, and its new exemplars are chosen among new samples and old exemplars. The paper has no such class.
* Class means are computed of the network as it is evaluated, also in the middle of an experience, whose classes have no
  exemplars before it ends and so are not predicted there. For clients on streams this is in the spatial forgetting: the
  networks before the last averaging of an experience have no exemplars of its classes yet.
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
from fednorm.errors import ConfigError
from fednorm.rng import torch_stream
from fednorm.streams.buffer import Samples
from fednorm.streams.class_means import class_head, class_means, normalized_features, with_means
from fednorm.streams.learner import Learner, LearnerOptions, LearnerSpec, Tensors
from fednorm.streams.teacher import frozen_copy, teacher_from, tensors_of


@dataclass(frozen=True, kw_only=True)
class ICaRLOptions(LearnerOptions):
    """The options of iCaRL.

    Attributes:
        memory_size: Exemplars of all classes together, at least one for each; 2000 in the paper.

    Raises:
        ConfigError: An option is out of range.
    """

    memory_size: int = 500

    def __post_init__(self) -> None:
        options.whole("learner", "memory_size", self.memory_size, at_least=1)


class ICaRLLearner(Learner):
    """Learns from new samples, exemplars and the last experience's network, and classifies by means of exemplars.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`ICaRLOptions`.

    Attributes:
        teacher: g, in evaluation mode; None in the first experience.
        exemplars: Of each class seen in an experience that has ended, the first chosen first.
        head: The network's head.

    Raises:
        ConfigError: The memory has no room for a sample of each class, or the network's head is no linear layer.
    """

    Options: ClassVar[type[LearnerOptions]] = ICaRLOptions
    by_cross_entropy = False
    options: ICaRLOptions

    def __init__(self, **template: Any) -> None:
        super().__init__(**template)
        if self.options.memory_size < self.num_classes:
            raise ConfigError(
                f"learner.memory_size is {self.options.memory_size}, and there are {self.num_classes} classes: each "
                f"needs an exemplar. Set it to {self.num_classes} or more."
            )
        self.head = class_head(self.model, self.num_classes, "icarl")
        self.teacher: nn.Module | None = None
        self.exemplars: dict[int, Samples] = {}

    def observe(self, new: Samples) -> Tensor:
        """Learn from one batch, from exemplars and from the teacher."""
        memory = self._drawn(new)
        groups = (new,) if memory is None else (new, memory)
        logits = torch.cat(self.pass_forward(*groups))
        labels = torch.cat([self.labels_of(group) for group in groups])
        targets = functional.one_hot(labels, self.num_classes).to(logits.dtype)
        if self.teacher is not None:
            old = self._distilled()
            with torch.no_grad():
                targets[:, old] = torch.sigmoid(self.teacher(self.mbatch[0]))[:, old].to(targets.dtype)
        self.descend(functional.binary_cross_entropy_with_logits(logits, targets))
        return logits[: len(new)]

    def _drawn(self, new: Samples) -> Samples | None:
        """Return the exemplars of one step, or None where there are none."""
        if not self.exemplars:
            return None
        assert self.source is not None
        memory = self._everything()
        count = max(1, min(len(memory), round(len(new) * len(memory) / len(self.source.train))))
        generator = torch_stream(self.seed, "icarl", "exemplars", self.progress.step)
        chosen = torch.randperm(len(memory), generator=generator)[:count].to(self.device)
        return memory.taken(chosen)

    def _distilled(self) -> list[int]:
        """Return the classes that the teacher teaches: old ones that the present experience does not have."""
        assert self.source is not None
        present = set(self.source.train.targets.tolist())
        return [label for label in sorted(self.exemplars) if label not in present]

    def _everything(self) -> Samples:
        sets = [self.exemplars[label] for label in sorted(self.exemplars)]
        return _joined(sets)

    # Exemplars --------------------------------------------------------------------------------------------------------

    def end_experience(self) -> None:
        """Choose exemplars of the experience's classes, shorten the other sets, and make the network a teacher."""
        assert self.source is not None
        targets = self.source.train.targets
        present = sorted(set(targets.tolist()))
        most = self.options.memory_size // len(set(present) | set(self.exemplars))
        self.model.eval()
        chosen = {label: self._herded(label, (targets == label).nonzero().flatten(), most) for label in present}
        self.model.train()
        self.exemplars = {label: _first(samples, most) for label, samples in self.exemplars.items()} | chosen
        self.teacher = frozen_copy(self.model)

    def _herded(self, label: int, rows: Tensor, most: int) -> Samples:
        """Return the exemplars of a class, of the experience's rows of it and of the exemplars that it has."""
        assert self.source is not None
        images, labels = self._batch(self.source, rows.cpu())
        pool = Samples(images, labels, self._task_of_row[rows.to(self.device)])
        if label in self.exemplars:
            pool = _joined([self.exemplars[label], pool])
        chosen = herding(self._features(pool), most)
        return pool.taken(chosen)

    def _features(self, samples: Samples) -> Tensor:
        inputs = self.as_input(samples.images, samples.tasks)
        return normalized_features(self.model, self.head, inputs, self.eval_mb_size)

    @contextmanager
    def for_evaluation(self) -> Iterator[nn.Module]:
        """Give the model to evaluate: with means of exemplars in the place of its head's weights."""
        self.model.eval()
        if not self.exemplars:
            yield self.model
            return
        memory = self._everything()
        means, known = class_means(self._features(memory), memory.labels, self.num_classes)
        with with_means(self.head, means, known):
            yield self.model

    def memory_filled(self) -> float:
        """Return how full the memory is: whether each class has been met or a few, all its room is used."""
        return 1.0

    def own_tensors(self) -> Tensors:
        """Return the exemplars, in their order, and the teacher."""
        kept = tensors_of(self.teacher)
        if self.exemplars:
            memory = self._everything()
            kept |= {"images": memory.images, "labels": memory.labels, "tasks": memory.tasks}
        return kept

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take both back."""
        self.teacher = teacher_from(tensors, self.model)
        self.exemplars = {}
        if "labels" in tensors:
            images, labels, tasks = (tensors[key].clone() for key in ("images", "labels", "tasks"))
            for label in sorted(set(labels.tolist())):
                own = labels == label
                self.exemplars[label] = Samples(images[own], labels[own], tasks[own])


def herding(features: Tensor, count: int) -> Tensor:
    """Return the samples whose running mean stays nearest to the mean of all, the first chosen first.

    For vectors of length 1, || mu - (phi + S) / k || is least where <phi, k mu - S> is largest, S the sum of those
    chosen so far.

    Args:
        features: phi, shape (n, d), each of length 1.
        count: m.

    Returns:
        ``min(m, n)`` different rows, int64.
    """
    mean = features.double().mean(0) if features.device.type != "mps" else features.mean(0)
    scores = features.to(mean.dtype)
    wanted, chosen = mean.clone(), list[int]()
    free = torch.zeros(len(features), dtype=mean.dtype, device=features.device)
    for _ in range(min(count, len(features))):
        best = int((scores @ wanted + free).argmax())
        chosen.append(best)
        free[best] = -torch.inf
        wanted += mean - scores[best]
    return torch.tensor(chosen, dtype=torch.int64, device=features.device)


def _joined(sets: list[Samples]) -> Samples:
    images, labels, tasks = zip(*((each.images, each.labels, each.tasks) for each in sets), strict=True)
    return Samples(torch.cat(images), torch.cat(labels), torch.cat(tasks))


def _first(samples: Samples, count: int) -> Samples:
    return Samples(samples.images[:count], samples.labels[:count], samples.tasks[:count])


SPEC = LearnerSpec(
    name="icarl",
    summary="iCaRL: exemplars by herding, distillation with sigmoids, and the nearest mean of exemplars.",
    citation=Citation(
        title="iCaRL: Incremental Classifier and Representation Learning",
        authors="Rebuffi, Kolesnikov, Sperl, Lampert",
        year=2017,
        arxiv="1611.07725",
        where="CVPR 2017; official code srebuffi/iCaRL",
    ),
    make=ICaRLLearner,
    deviations=(
        "A step has as many exemplars as are due for one pass over them on average; official batches are of a union.",
        "An exemplar is chosen once, and class means are without mirrored exemplars.",
        "Classes that come again are learned from labels, not distilled.",
    ),
    verified=(
        "The loss is Avalanche's ICaRLLossPlugin; herding and class means by the paper's formulas in float64, and "
        "Avalanche's NCM classifier.",
    ),
)


def __getattr__(name: str) -> Any:
    """Return ``ICaRL``: the learner as an Avalanche strategy."""
    return strategies(__name__, ICaRL=ICaRLLearner)(name)
