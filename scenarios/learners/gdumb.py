"""gdumb: greedy sampler and dumb learner: the stream only fills a balanced memory, and a fresh network learns that.

Prabhu, Torr, Dokania. GDumb: A Simple Approach that Questions Our Progress in Continual Learning. ECCV 2020. Official
code: drimpossible/GDumb.

    memory <- as many samples of each class as of every other (BalancedBuffer), offered as they come
    at an experience's end:  w <- w_0,  then ``memory_epochs`` epochs of cross_entropy(f(x), y) over the memory
    rate of epoch e, times the optimizer's learning rate:
        0.1                                                                     for e = 0
        final + (1 - final) * (1 + cos(pi (e - 2^k) / 2^k)) / 2                 for 2^k <= e < 2^(k+1)

which is a cosine with warm restarts (SGDR) whose cycles double, after an epoch to warm up: the official code's. A
cycle ends after 1, 2, 4, ... epochs, and ``memory_epochs`` is best one of these. Gradients are clipped to a norm of
``clip``. Momentum, weight decay and learning rate are the optimizer's: SGD, 0.9, 1e-6, 0.05 in the official code.
Batches have as many samples as new ones come at a time (16 in the official code), augmented alike.

w_0 are the weights, statistics and counters that the network had when the learner was made, the same each time; the
optimizer starts without momentum or moments. Nothing is learned between: a new sample's logits, by which online
accuracy is measured, are those of the network trained last, in evaluation mode, untrained in the first experience.
Effects on the parameters act when the memory is learned, and those of an experience's beginning just before; a
schedule of the learning rate has no effect.

On a client of a federation the epochs over the memory are dealt to the rounds of an experience: in each a client offers
what it sees of the experience for the first time, and learns the memory for its share of them, from w_0 in the
experience's first round; the server averages. With one client that is the stream, to the bit.

Differs: 32 epochs instead of 256, for time, and no CutMix. The official code trains once, on the memory at the
stream's end, in half precision, and reports the best *test* accuracy of all its epochs; here the last epoch counts.
Avalanche's ``GDumb`` puts a whole experience into its memory before it trains, with an ordinary reservoir for each
class, and has no schedule. Only an experience's first epoch is offered to the memory, so that no image is in it twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.rng import reseed, stream_seed, torch_stream
from fednorm.streams.buffer import BalancedBuffer, Samples
from fednorm.streams.learner import Learner, LearnerOptions, LearnerSpec, Tensors
from fednorm.training.loop import batches_of


@dataclass(frozen=True, kw_only=True)
class GDumbOptions(LearnerOptions):
    """The options of GDumb.

    Attributes:
        memory_size: Samples that the memory holds.
        memory_epochs: Passes over the memory at an experience's end.
        final_rate: Learning rate at the end of a cycle, as a share of the highest, in [0, 1].
        clip: Largest norm of the gradient of all parameters together; 0 for no clipping.

    Raises:
        ConfigError: An option is out of range.
    """

    memory_size: int = 500
    memory_epochs: int = 32
    final_rate: float = 0.01
    clip: float = 10.0

    def __post_init__(self) -> None:
        options.whole("learner", "memory_size", self.memory_size, at_least=1)
        options.whole("learner", "memory_epochs", self.memory_epochs, at_least=1)
        options.share("learner", "final_rate", self.final_rate)
        options.number("learner", "clip", self.clip)
        if self.clip < 0:
            raise ConfigError(f"learner.clip must be 0 or more; got {self.clip!r}.")

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, from 0, as a share of the optimizer's."""
        if epoch == 0:
            return 0.1
        cycle = 1 << (epoch.bit_length() - 1)
        return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * (epoch - cycle) / cycle)) / 2


class GDumbLearner(Learner):
    """Remembers as new samples come, and learns when an experience ends.

    Args:
        **template: As for :class:`~fednorm.streams.learner.Learner`; ``options`` are :class:`GDumbOptions`. The model
            must be as it was initialised, and the optimizer at its learning rate.
    """

    Options: ClassVar[type[LearnerOptions]] = GDumbOptions
    trains_at_end = True
    options: GDumbOptions

    def __init__(self, **template: Any) -> None:
        super().__init__(**template)
        self.buffer = BalancedBuffer(self.options.memory_size, num_classes=self.num_classes, seed=self.seed)
        self._initial = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        # What begins with an experience begins here with the training that its end brings.
        self._begin_training = self.begin
        self.begin = ()

    @torch.no_grad()
    def observe(self, new: Samples) -> Tensor:
        """Remember a batch, and return what the network trained last makes of it."""
        if not self.progress.epoch:
            self.offer(self.buffer, new)
        self.model.eval()
        logits: Tensor = self.model(self.as_input(new.images, new.tasks))
        self.model.train()
        self.mb_output, self.loss = logits, self.loss_of(logits, new)
        return logits

    def end_experience(self) -> None:
        """Train the network on the memory, from its initial weights."""
        self.train_at_end(0, 1)

    def train_at_end(self, part: int, parts: int) -> None:
        """Train on the memory for a part of the epochs; the first part begins from the initial weights."""
        if part == 0:
            self._begin_anew()
        epochs, memory = self.options.memory_epochs, self.buffer.everything()
        for epoch in range(epochs * part // parts, epochs * (part + 1) // parts):
            self._set_rates(self.options.rate(epoch))
            self._train_on_memory(memory, epoch)
        self._set_rates(1.0)

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the initial weights, which a client's network has left behind."""
        self._initial = {key: tensor.clone() for key, tensor in tensors.items()}

    def _begin_anew(self) -> None:
        self.model.load_state_dict(self._initial)
        self.optimizer.state.clear()
        if self.progress.ended:
            for effect in self._begin_training:
                effect(self.experience_number)

    def _set_rates(self, share: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = share * rate

    def _train_on_memory(self, memory: Samples, epoch: int) -> None:
        names = ("memory", self.progress.ended, "epoch", epoch)
        order = torch.randperm(len(memory), generator=torch_stream(self.seed, *names, "order"))
        for batch, slots in enumerate(batches_of(order, self.train_mb_size, single=not self.batch_coupled)):
            if not len(slots):
                continue
            reseed(stream_seed(self.seed, *names, "model", batch))
            self._augmenting.manual_seed(stream_seed(self.seed, *names, "augment", batch))
            samples = memory.taken(slots)
            (logits,) = self.pass_forward(samples)
            self.descend(self.loss_of(logits, samples))

    def memory_filled(self) -> float:
        """Return how full the memory is: all of it is learned at an experience's end."""
        return len(self.buffer) / self.options.memory_size

    def before_update(self) -> None:
        """Clip the gradient."""
        if self.options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)

    def own_tensors(self) -> Tensors:
        """Return the memory; the initial weights need no saving, as a learner is made on a fresh network."""
        return {f"buffer/{key}": tensor for key, tensor in self.buffer.state_dict().items()}

    def load_own_tensors(self, tensors: Tensors) -> None:
        """Take the memory back."""
        self.buffer.load_state_dict({key.removeprefix("buffer/"): tensor for key, tensor in tensors.items()})


SPEC = LearnerSpec(
    name="gdumb",
    summary="Greedy sampler and dumb learner: a class-balanced memory, and at each end a fresh network trained on it.",
    citation=Citation(
        title="GDumb: A Simple Approach that Questions Our Progress in Continual Learning",
        authors="Prabhu, Torr, Dokania",
        year=2020,
        where="ECCV 2020; official code drimpossible/GDumb",
    ),
    make=GDumbLearner,
    deviations=(
        "32 epochs over the memory by default, 256 in the paper; no CutMix.",
        "A network is trained at the end of every experience, in single precision, and its last epoch counts.",
    ),
    verified=("Its training on the memory in plain PyTorch; the rates of the official code's schedule.",),
)


def __getattr__(name: str) -> Any:
    """Return ``GDumb``: the learner as an Avalanche strategy."""
    return strategies(__name__, GDumb=GDumbLearner)(name)
