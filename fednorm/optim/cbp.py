"""Continual backprop (CBP): the least useful of the units that are old enough are replaced, a few at a time.

Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton. Loss of plasticity in deep continual learning. Nature 632, 2024;
https://arxiv.org/abs/2306.13812. Official code: shibhansh/loss-of-plasticity, ``lop/algos``.

After every update, for each hidden layer, with h_i what unit i gives to the next layer (behind pooling) and w_i its
outgoing weights,

    a_i <- a_i + 1
    u_i <- decay u_i + (1 - decay) mean|h_i| mean|w_i|              contribution utility
    c   <- c + rate * (number of units with a_i > maturity)
    while c >= 1: the unit with a_i > maturity and the smallest u_i / (1 - decay^a_i) is replaced;  c <- c - 1

A replaced unit gets incoming weights of its layer's initial distribution, bias 0 and outgoing weights 0; its utility
and age are 0, so that it is safe from replacement for ``maturity`` updates. Means are over samples, positions and the
outputs that the unit has; behind a flattening, of the product at each of a channel's positions. What a norm has of it
begins anew too: scale 1, shift 0, running mean 0, running variance 1, as in the official code for residual networks
and for its ``CBPConv``. The optimizer's moments of all that is set are 0. The output layer keeps its units.

The paper's values: rate 1e-4 to 1e-6 (1e-5 for a residual network on CIFAR-100), maturity 100 (1000 there), decay 0.99.

Differs:

* The utility is divided by 1 - decay^age as in the official code; Algorithm 1 of the paper has no such factor. The
  paper's utility sums over outgoing weights where this and the code take means: within a layer the same order.
* The number of mature units counts, as in the paper; the code of the first experiments takes all units of the layer.
* The official code for linear networks adds to the next layer's bias what the replaced unit gave on average, which
  neither the paper's algorithm nor the code for convolutions does, nor this.
* Adam's step count goes on; the official Adam counts steps of every weight by itself.
* The official code for residual networks replaces units of the stream too (see :mod:`fednorm.optim.hidden_units`).
* The utility is that of the last training forward pass of a step: where new and memory samples go through the network
  separately, of the last group.

A layer whose incoming or outgoing weights are not trained at the moment (a linear probe, a frozen head) is left alone,
and its units do not age. An effect after the update, and before a projection of the weights. In a residual
network the units within the blocks are replaced, and those of the stream never are (:mod:`fednorm.optim.hidden_units`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.device import wide
from fednorm.errors import ConfigError, DataError
from fednorm.optim.hidden_units import hidden_units
from fednorm.optim.units import Link, replace_units

METHOD = "Continual backprop"


class ContinualBackprop:
    """Replaces the least useful mature units of hidden layers; called after every update.

    It hears what units give to the next layer through hooks on the model.

    Args:
        model: The network that is trained.
        optimizer: Of the network. Where training takes a new one, assign it to :attr:`optimizer`.
        rate: Share of the mature units of a layer that is replaced at each update, in (0, 1].
        maturity: Updates before a unit may be replaced, 0 or more.
        decay: What a utility keeps at each update, in [0, 1).
        seed: Of the fresh weights, which come from the streams ``(seed, "cbp", update, path)``.

    Attributes:
        links: The hidden layers, in order.
        updates: Calls so far.
        utilities: u of each layer, float64 where the device has it, shape (units,).
        ages: a of each layer, int64, shape (units,).
        due: c of each layer.
        replaced: Paths of the layers with the units replaced at the latest call.

    Raises:
        ConfigError: An option is out of range, or the network has no such units.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rate: float,
        maturity: int = 100,
        decay: float = 0.99,
        seed: int = 0,
    ) -> None:
        options.number("train", "cbp_rate", rate, above=0, at_most=1)
        options.whole("train", "cbp_maturity", maturity, at_least=0)
        options.share("train", "cbp_decay", decay)
        if decay == 1:
            raise ConfigError("train.cbp_decay must be less than 1, or no utility would ever change; got 1.")
        self.links = hidden_units(model, METHOD)
        self.optimizer = optimizer
        self.rate, self.maturity, self.decay, self.seed = rate, maturity, decay, seed
        self.updates = 0
        devices = [link.layer.weight.device for link in self.links]
        pairs = list(zip(self.links, devices, strict=True))
        self.utilities = [torch.zeros(link.units, dtype=wide(device), device=device) for link, device in pairs]
        self.ages = [torch.zeros(link.units, dtype=torch.int64, device=device) for link, device in pairs]
        self.due = [0.0] * len(self.links)
        self.replaced: dict[str, list[int]] = {}
        self._given: dict[int, Tensor] = {}
        for index, link in enumerate(self.links):
            link.following.register_forward_pre_hook(_listen(self._given, index, link))

    @torch.no_grad()
    def __call__(self) -> None:
        """Take an update into account, and replace what is due.

        Raises:
            ConfigError: The model has made no training forward pass since the last update.
        """
        active = [index for index, link in enumerate(self.links) if link.trained]
        missing = [self.links[index].path for index in active if index not in self._given]
        if missing:
            raise ConfigError(
                f"{METHOD} has seen no training forward pass through {', '.join(missing)} since the last update. Build "
                "it on the model that is trained, after any conversion or copy of it, and train in model.train() mode."
            )
        self.updates += 1
        for index in active:
            self.ages[index] += 1
            self.utilities[index].lerp_(self._contribution(index, self.links[index]), 1 - self.decay)
        # Utilities of all layers are taken before anything changes.
        chosen = [(self.links[index], self._choose(index)) for index in active]
        replace_units(chosen, self.optimizer, self.seed, "cbp", self.updates, whole=True)
        self.replaced = {link.path: units.nonzero().flatten().tolist() for link, units in chosen if units.any()}
        self._given.clear()

    @property
    def counts(self) -> bool:
        """Whether the number of calls decides what a call does."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of ages and utilities by their layer's path, what is due, and the number of calls."""
        kept = {"updates": torch.tensor(self.updates), "due": torch.tensor(self.due, dtype=torch.float64)}
        for index, link in enumerate(self.links):
            kept |= {
                f"age.{link.path}": self.ages[index].clone(),
                f"utility.{link.path}": self.utilities[index].clone(),
            }
        return kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.updates, self.due = int(state["updates"]), state["due"].tolist()
        for index, link in enumerate(self.links):
            self.ages[index].copy_(state[f"age.{link.path}"])
            self.utilities[index].copy_(state[f"utility.{link.path}"])
        self._given.clear()

    def _contribution(self, index: int, link: Link) -> Tensor:
        """Return mean|h| mean|w| of each unit of a layer, shape (units,)."""
        given = self._given[index]
        weight = link.following.weight.detach().abs()
        groups = link.groups
        if isinstance(link.following, nn.Linear):
            return (weight.to(given).mean(0) * given).view(link.units, -1).mean(1)
        # (groups, outputs a group, units a group, positions of the kernel)
        outgoing = weight.to(given).reshape(groups, len(weight) // groups, link.units // groups, -1).mean((1, 3))
        return outgoing.flatten() * given

    def _choose(self, index: int) -> Tensor:
        """Return which units of a layer are replaced now, and count them as new; bool, shape (units,)."""
        ages, utilities = self.ages[index], self.utilities[index]
        chosen = torch.zeros_like(ages, dtype=torch.bool)
        mature = ages > self.maturity
        eligible = int(mature.sum())
        self.due[index] += self.rate * eligible
        count = min(int(self.due[index]), eligible)
        if count:
            corrected = utilities / (1 - self.decay ** ages.to(utilities.dtype).clamp_min(1))
            order = torch.where(mature, corrected, torch.inf).argsort(stable=True)
            chosen[order[:count]] = True
            self.due[index] -= count
            ages[chosen], utilities[chosen] = 0, 0
        return chosen


def _listen(given: dict[int, Tensor], index: int, link: Link) -> Callable[[nn.Module, Any], None]:
    """Return a hook that keeps the mean size of what enters the next layer, over samples and, of a map, positions."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # A copy of the model carries the hook along; its activations are not ours.
        if module is not link.following or not module.training or not torch.is_grad_enabled():
            return
        features = args[0].detach()
        linear = isinstance(module, nn.Linear)
        expected = module.in_features if isinstance(module, nn.Linear) else link.units
        if features.ndim != (2 if linear else 4) or features.shape[1] != expected:
            raise DataError(
                f"{METHOD} expects the {link.units} units of layer {link.path!r} on axis 1 of what the next layer is "
                f"given; got shape {tuple(features.shape)}. Give the network batches of images."
            )
        given[index] = features.transpose(0, 1).flatten(1).to(wide(features.device)).abs().mean(1)

    return hook
