"""Self-normalized resets (SNR): a unit is reset when it has been silent for longer than its own past makes plausible.

Farias, Jozefiak. Self-Normalized Resets for Plasticity in Continual Learning. ICLR 2025.
https://arxiv.org/abs/2410.20098. Official code: ajozefiak/SelfNormalizedResets (JAX).

A unit fires at an update where its activation is above 0 for some sample and position of the batch. Its inter-firing
times A are the updates from one firing to the next, 1 where it fires every time. With s updates of silence, the present
one is at least s + 1, and after every update the unit is reset where

    (1 + number of its past A that were s + 1 or more) / (1 + number of its past A) <= eta,      or s >= longest

the left side being an estimate of P(A >= s + 1) that counts the present silence too, so that a unit with fewer than
1 / eta - 1 past firings is reset by ``longest`` alone. A unit that fires rarely may be silent for long; one that always
fired is reset soon after it stops. A reset unit gets incoming weights of its layer's initial distribution, bias 0 and
outgoing weights 0, and the optimizer's moments of these are 0; the silence is added to its past, and the next begins.
What a norm has of it begins anew: scale 1, shift 0, running mean 0, running variance 1. The output layer keeps its
units.

Differs:

* Algorithm 1 of the paper resets where P(A >= a) <= eta and leaves the estimate open (written from memory of the paper,
  and from its code). The official code keeps a threshold a unit, which it sets at task ends: to a percentile of the
  histogram of silences since the last time, or, if that is no lower, to a multiple of its old value, between one batch
  and a largest silence. Here the whole past counts, at every update, without the ends of tasks: one level in place of
  four options. The numbers of the paper are not claimed.
* Silence is counted in updates, by the official code in samples (batches times their size).
* Other nonlinearities than ReLU, which the paper has, fire above 0 too.
* The official networks have no normalization.
* A past inter-firing time beyond ``longest`` counts as ``longest``: such a silence ends in a reset anyway.

A layer whose incoming or outgoing weights are not trained at the moment (a linear probe, a frozen head) is left alone,
and its silences stand still. An effect after the update, and before a projection of the weights. In a
residual network the units within the blocks are reset, and those of the stream never are
(:mod:`fednorm.optim.hidden_units`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.optim.hidden_units import hidden_units
from fednorm.optim.units import replace_units

METHOD = "Self-normalized resets"


class SelfNormalizedResets:
    """Resets the units of hidden layers that are implausibly silent; called after every update.

    Args:
        model: The network that is trained.
        optimizer: Of the network. Where training takes a new one, assign it to :attr:`optimizer`.
        eta: The level, in (0, 1).
        longest: Updates of silence after which any unit is reset, 1 or more.
        seed: Of the fresh weights, which come from the streams ``(seed, "snr", update, path)``.

    Attributes:
        links: The hidden layers, in order.
        updates: Calls so far.
        silent: Updates of silence of each layer's units, int64, shape (units,).
        past: How often each inter-firing time was seen, int32, shape (units, longest + 1); column k is of k + 1.
        reset: Paths of the layers with the units reset at the latest call.

    Raises:
        ConfigError: An option is out of range, or the network has no such units.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, eta: float, longest: int = 500, seed: int = 0
    ) -> None:
        options.number("train", "snr_eta", eta, above=0)
        if eta >= 1:
            raise ConfigError(f"train.snr_eta is a probability below 1; got {eta!r}.")
        options.whole("train", "snr_longest", longest, at_least=1)
        self.links = hidden_units(model, METHOD)
        self.optimizer = optimizer
        self.eta, self.longest, self.seed = eta, longest, seed
        self.updates = 0
        devices = [link.layer.weight.device for link in self.links]
        pairs = list(zip(self.links, devices, strict=True))
        self.silent = [torch.zeros(link.units, dtype=torch.int64, device=device) for link, device in pairs]
        self.past = [torch.zeros(link.units, longest + 1, dtype=torch.int32, device=device) for link, device in pairs]
        self.reset: dict[str, list[int]] = {}
        self._fired: dict[int, Tensor] = {}
        for index, link in enumerate(self.links):
            link.listen(_hear(self._fired, index), METHOD, graded=True)

    @torch.no_grad()
    def __call__(self) -> None:
        """Take an update into account, and reset what is implausibly silent.

        Raises:
            ConfigError: The model has made no training forward pass since the last update.
        """
        active = [index for index, link in enumerate(self.links) if link.trained]
        missing = [self.links[index].path for index in active if index not in self._fired]
        if missing:
            raise ConfigError(
                f"{METHOD} have seen no training forward pass through {', '.join(missing)} since the last update. "
                "Build them on the model that is trained, after any conversion or copy of it, and train in "
                "model.train() mode."
            )
        self.updates += 1
        for index in active:
            fired = self._fired[index]
            self._record(index, fired)
            self.silent[index] += 1
            self.silent[index][fired] = 0
        self._fired.clear()
        chosen = {index: self._implausible(index) for index in active}
        for index, units in chosen.items():
            self._record(index, units)
            self.silent[index][units] = 0
        due = [(self.links[index], units) for index, units in chosen.items()]
        replace_units(due, self.optimizer, self.seed, "snr", self.updates, whole=True)
        self.reset = {link.path: units.nonzero().flatten().tolist() for link, units in due if units.any()}

    @property
    def counts(self) -> bool:
        """Whether the number of calls decides what a call does."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of present and past silences by their layer's path, and the number of calls."""
        kept = {"updates": torch.tensor(self.updates)}
        for index, link in enumerate(self.links):
            kept |= {f"silent.{link.path}": self.silent[index].clone(), f"past.{link.path}": self.past[index].clone()}
        return kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.updates = int(state["updates"])
        for index, link in enumerate(self.links):
            self.silent[index].copy_(state[f"silent.{link.path}"])
            self.past[index].copy_(state[f"past.{link.path}"])
        self._fired.clear()

    def _record(self, index: int, units: Tensor) -> None:
        """Add the inter-firing times that end now to the past of some units."""
        columns = self.silent[index][units].clamp_max(self.longest)
        self.past[index][units.nonzero().flatten(), columns] += 1

    def _implausible(self, index: int) -> Tensor:
        """Return which units of a layer are reset now, bool, shape (units,)."""
        silent = self.silent[index]
        if not silent.any():
            return torch.zeros_like(silent, dtype=torch.bool)
        past = self.past[index]
        as_long = torch.arange(past.shape[1], device=past.device) >= silent.clamp_max(self.longest)[:, None]
        chance = (1 + (past * as_long).sum(1)) / (1 + past.sum(1))
        return (silent > 0) & ((chance <= self.eta) | (silent >= self.longest))


def _hear(fired: dict[int, Tensor], index: int) -> Callable[[Tensor], None]:
    """Return what tells which units fire in the training forward passes since the last update."""

    def hear(features: Tensor) -> None:
        now = (features > 0).any(1)
        fired[index] = now | fired[index] if index in fired else now

    return hear
