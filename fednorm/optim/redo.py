"""ReDo: units that hardly fire are recycled, with fresh incoming and zero outgoing weights.

Sokar, Agarwal, Castro, Evci. The Dormant Neuron Phenomenon in Deep Reinforcement Learning. ICML 2023.
https://arxiv.org/abs/2302.12902 (Equation 1, Algorithm 1). Official code: google/dopamine, ``labs/redo``.

    s_c = mean|a_c| / mean_c(mean|a_c|),       unit c is recycled where s_c <= tau

with a_c what follows the nonlinearity, means over samples and positions; a unit is a feature of a linear layer or a
channel of a convolution. Every ``every`` updates each recycled unit

* gets incoming weights, and its bias, from the layer's initial distribution;
* gets outgoing weights of 0, in the next layer; behind a flattening these are the columns of all its positions;
* loses the optimizer's moments of both (Adam's ``exp_avg`` and ``exp_avg_sq``, SGD's ``momentum_buffer``).

Scores of all layers are taken before anything changes, incoming weights are set before outgoing ones; the output layer
is not recycled; Adam's step count goes on: all as in the official code. A unit that never fired (a_c = 0) contributed
nothing, and with outgoing weights of 0 it still does not: the network's function is unchanged. Not so where a norm that
pools units (layer or group normalization) stands before the nonlinearity: its moments see the new weights. NaP's paper
names this where it finds ReDo the one rival that NaP does not improve (arXiv 2407.01800, section 5).

Differs:

* Scores come from the training batch of the update itself; the official code draws another batch from its replay
  memory (64 transitions in the paper). Use batches that are not tiny, or a small tau.
* A norm's scale and shift of a recycled unit go back to 1 and 0, and the statistics stay. The paper's networks have no
  normalization.
* A bias is drawn as the layer draws it; the official code's layers draw 0. Its moments are reset too.

An effect after the update, and before a projection of the weights where there is one. In a residual network the units
within the blocks are recycled, as in the official code, and those of the stream keep their weights
(:mod:`fednorm.optim.hidden_units`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fednorm import options
from fednorm.device import wide
from fednorm.errors import ConfigError
from fednorm.optim.hidden_units import hidden_units
from fednorm.optim.units import replace_units


class ReDo:
    """Recycles the dormant units of hidden layers, every so many calls.

    Call it after every update. It sees the activations through hooks that are on the model only between the update
    before a recycling and the recycling itself.

    Args:
        model: The network that is trained: linear layers and convolutions, some of them with a nonlinearity and no
            branching before the next one.
        optimizer: Of the network. Where training takes a new one, assign it to :attr:`optimizer`.
        every: Updates between recyclings, 1 or more; 1000 in the paper.
        tau: Largest score of a recycled unit, in [0, 1); 0.025 or 0.1 in the paper, and 0 takes only dead units.
        seed: Of the fresh weights, which come from the streams ``(seed, "redo", recycling, path)``.

    Attributes:
        links: The hidden layers, in order.
        updates: Calls so far.
        recycled: Paths of the layers with the numbers of units recycled in the latest recycling.

    Raises:
        ConfigError: An option is out of range, or the network has no such units.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int, tau: float, seed: int = 0
    ) -> None:
        options.whole("redo", "every", every, at_least=1)
        options.number("redo", "tau", tau)
        if not 0 <= tau < 1:
            raise ConfigError(f"redo.tau is a share of the layer's mean activation, in [0, 1); got {tau!r}.")
        self.links = hidden_units(model, "ReDo")
        self.optimizer = optimizer
        self.every = every
        self.tau = tau
        self.seed = seed
        self.updates = 0
        self.recycled: dict[str, int] = {}
        self._sizes: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._watch()

    @torch.no_grad()
    def __call__(self) -> None:
        """Count an update; recycle where it is one of every ``every``.

        Raises:
            ConfigError: It is, and the model has made no training forward pass since the last update.
        """
        self.updates += 1
        if self.updates % self.every == 0:
            dormant = list(zip(self.links, self._dormant(), strict=True))
            replace_units(dormant, self.optimizer, self.seed, "redo", self.updates // self.every)
            self.recycled = {link.path: int(units.sum()) for link, units in dormant}
        self._watch()

    @property
    def counts(self) -> bool:
        """Whether the number of calls decides what a call does."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of calls so far."""
        return {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on after as many calls as :meth:`state_dict` had counted."""
        self.updates = int(state["updates"])
        self._watch()

    def _watch(self) -> None:
        """Put the hooks on the model where the next call recycles, and take them off where it does not."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sizes.clear()
        if (self.updates + 1) % self.every == 0:
            for index, link in enumerate(self.links):
                self._handles.append(link.listen(_measure(self._sizes, index), "ReDo"))

    def _dormant(self) -> list[Tensor]:
        """Return which units of each layer are dormant, bool of shape (units,)."""
        missing = [link.path for index, link in enumerate(self.links) if index not in self._sizes]
        if missing:
            raise ConfigError(
                f"ReDo has seen no training forward pass through {', '.join(missing)} since the last update. Build it "
                "on the model that is trained, after any conversion or copy of it, and train in model.train() mode."
            )
        sizes = [self._sizes[index] for index in range(len(self.links))]
        return [size <= self.tau * size.mean() for size in sizes]


def _measure(sizes: dict[int, Tensor], index: int) -> Callable[[Tensor], None]:
    """Return what keeps the mean size of each unit's activation."""

    def hear(features: Tensor) -> None:
        sizes[index] = features.to(wide(features.device)).abs().mean(1)

    return hear
