"""What a stream's experiences do with normalization layers (``train.norms``), and how a network is scored under it.

``keep``, ``reset`` and ``freeze`` are matters of training. ``per_experience`` trains as ``keep`` does, and of each
experience keeps the layers' tensors as they were at its end, for its test images (domain-specific batch normalization,
Chang et al., arXiv 1906.03950): where the experience is given, the image is classified under that one's tensors among
that one's classes (``task_accuracy``); where it is not, under those of the experience that is inferred
(:mod:`fednorm.streams.task_inference`), or, where nothing is inferred, under the layers' present ones (``accuracy``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fednorm.config import RunConfig
from fednorm.errors import ConfigError, RoleError
from fednorm.streams.evaluation import Accuracy, accuracy, split_of
from fednorm.streams.learner import Learner
from fednorm.streams.norm_boundary import NormBoundary
from fednorm.streams.stream import Experience, Stream
from fednorm.streams.task_inference import Candidate, TaskInference

_NORMS = "norms/"
"""What the keys of kept tensors begin with in a checkpoint."""


@dataclass(frozen=True)
class Scored(Accuracy):
    """Shares of images that are right.

    Attributes:
        inferred: The share whose experience was inferred right; None where none was, or the right one could not be.
    """

    inferred: float | None = None


def require_norms(config: RunConfig) -> None:
    """Refuse a boundary that contradicts the rest of a stream's configuration.

    Raises:
        ConfigError: It does.
    """
    what, train, learner = config.train.norms, config.train, config.learner
    require_agreement(config, "train.norms", what)
    if what != "keep" and learner.card.joint:
        raise ConfigError(
            f"Learner {learner.name} is given all experiences at once, and train.norms = {what!r} is about the "
            "boundary between two of them: it would do nothing. Take 'keep', or a learner that takes them one by one."
        )
    if what == "freeze" and (train.trainable != "all" or train.linear_probe_epochs):
        raise ConfigError(
            "train.norms = 'freeze' says which layers are trained from the second experience on, and so do "
            "train.trainable and train.linear_probe_epochs. Leave one of them out."
        )


def require_agreement(config: RunConfig, key: str, what: str) -> None:
    """Refuse a boundary that contradicts the learner or the evaluation, on a stream or on clients' streams.

    Args:
        config: The run's configuration.
        key: What the boundary is called: ``train.norms`` or ``grid.norms``.
        what: What it does.

    Raises:
        ConfigError: It contradicts one of them.
    """
    learner, infer_task = config.learner, config.evaluate.infer_task
    if infer_task != "none" and what != "per_experience":
        raise ConfigError(
            f"evaluate.infer_task = {infer_task!r} chooses among the normalization tensors of several experiences, and "
            f"with {key} = {what!r} there is one set of them: it would do nothing. Set {key} to 'per_experience', or "
            "leave it out."
        )
    if what == "freeze" and learner.card.make.trains_at_end:
        raise ConfigError(
            f"Learner {learner.name} trains a fresh network in every experience, and {key} = 'freeze' keeps what the "
            "first one left. Take 'keep', or a learner that goes on with its network (naive, er, er_ace, derpp, ewc, "
            "lwf)."
        )


class StreamNorms:
    """The normalization layers of a run's network at the boundaries of its experiences.

    Args:
        config: The run's configuration.
        model: Its network, with its initial values.
        stream: Its experiences.

    Attributes:
        boundary: What the boundary does.
        kept: The layers' tensors at the end of each experience so far, by its number; empty unless they are kept.

    Raises:
        ConfigError: The configuration contradicts itself.
        RoleError: The network has no normalization layer.
    """

    def __init__(self, config: RunConfig, model: nn.Module, stream: Stream) -> None:
        require_norms(config)
        self.boundary = NormBoundary(model, config.train.norms)
        self.kept: dict[int, Mapping[str, Tensor]] = {}
        self._freezes, self._stream, self._evaluate = config.train.norms == "freeze", stream, config.evaluate
        if config.train.norms != "keep" and not self.boundary.keys:
            raise RoleError(
                f"train.norms = {config.train.norms!r} is about normalization layers, and this network has none (norm "
                f"{config.norm.name}): it would do nothing. Take 'keep', or a norm that normalizes activations."
            )
        self._inference = TaskInference.of(config, model, stream, self.boundary.wearing)

    @property
    def per_experience(self) -> bool:
        """Whether each experience's tensors are kept."""
        return self.boundary.per_experience

    @property
    def infers(self) -> bool:
        """Whether the experience of a test image is inferred."""
        return self._inference is not None

    def train(self, learner: Learner, source: Experience) -> None:
        """Train a learner on an experience, or on what is left of it."""
        ended = learner.progress.ended
        if self._freezes and ended:
            with self.boundary.frozen(ended):
                learner.train_passes(source, learner.train_epochs - learner.progress.epoch)
            learner.end(source)
        else:
            learner.train(source)
        if self.per_experience:
            self.kept[source.number] = self.boundary.read()

    def rest(self, learner: Learner) -> None:
        """Let frozen layers rest; called before every pass."""
        self.boundary.rest(learner.progress.ended)

    def score(
        self, model: nn.Module, experience: Experience, present: Experience | None, rows: Tensor | None = None
    ) -> Scored:
        """Score a network, which is in evaluation mode, on an experience.

        Args:
            model: The network.
            experience: The experience.
            present: The one that is trained on, or was last; None for an untrained network.
            rows: The rows of its images that are scored; all of them if None.
        """
        split, size = split_of(experience, self._evaluate.split), self._evaluate.batch_size

        def measured(tensors: Mapping[str, Tensor] | None) -> Accuracy:
            with self.boundary.wearing(tensors):
                return accuracy(model, split, experience.classes, batch_size=size, rows=rows)

        own = measured(self.kept.get(experience.number))
        met = [each for each in self._stream if each.number in self.kept or each is present] if self._inference else []
        if self._inference and met:
            candidates = [Candidate(each.number, each.classes, self.kept.get(each.number)) for each in met]
            of = self._inference.score(model, split, experience.number, candidates, rows)
            share = of.inferred if experience.number in {each.number for each in met} else None
            return Scored(of.accuracy, own.among_own, own.finite, share)
        plain = own if experience.number not in self.kept else measured(None)
        return Scored(plain.overall, own.among_own, own.finite and plain.finite)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it."""
        return {f"{_NORMS}{number}/{key}": tensor for number, own in self.kept.items() for key, tensor in own.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave, from among a checkpoint's."""
        kept: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            if path.startswith(_NORMS):
                number, key = path.removeprefix(_NORMS).split("/", 1)
                kept.setdefault(int(number), {})[key] = tensor
        self.kept = dict(kept)
