"""atp: a rate for every tensor says how far it follows an unlabelled batch; the rates are learned on training clients.

    h_l = - gradient of the mean entropy        for a parameter
    h_l = m_l - M_l  and  v_l - V_l             for a running mean and variance of batch normalization
    w_l' = w_l + r_l h_l

with one rate r_l a tensor; m, v are the batch's moments at that layer (v unbiased), all computed in one pass of the
network as it was trained, and a variance below 0 is set to 0. Before anything is adapted the rates are learned, from
0, on the clients that trained the network: a client adapts to a batch without its labels, takes the gradient g of the
labelled loss of the *same* batch at the adapted network, and updates

    r_l <- r_l - rate_of_rates * <g_l, h_l> / sqrt(d_l)        (d_l: how many numbers the tensor has)

from the trained network for each batch; after a pass over its images the server averages the clients' rates, all
clients alike, for so many ``rounds``. At an unseen client the rates stay as they are: a batch is predicted *after*
the network has been adapted to it. ``reset = "batch"`` is the paper's ATP-batch, each batch from the trained network;
``reset = "each"`` its ATP-online, in which the network that predicts is the mean of those adapted to the batches so
far, each from the trained network.

Bao, Wei, Wang, He. Adaptive Test-Time Personalization for Federated Learning. NeurIPS 2023.
https://arxiv.org/abs/2310.18816; official code: https://github.com/baowenxuan/ATP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.adaptation import Adaptation, AdaptationSpec, Adapter, Knowledge
from fednorm.adaptation._layers import entropy, moments, normalized, replace_forward, running, statistics_layers
from fednorm.cards import Citation
from fednorm.norms._batch import per_channel
from fednorm.options import number, whole

RATES = "rates"
"""What is known: the tensor of rates, one a tensor of the network, in the order of :class:`Adapting`."""


class Adapting:
    """A network whose tensors can be moved by rates, and put back.

    Args:
        model: A copy of the network, in evaluation mode; it is changed.

    Attributes:
        tensors: Every parameter, then the running mean and variance of every batch normalization, as leaves of the
            graph: rates are in this order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(True)
        self._layers = list(statistics_layers(model, "atp").values())
        self._seen: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
        self._params = list(model.parameters())
        self._stats: list[Tensor] = []
        for layer in self._layers:
            for name in ("running_mean", "running_var"):
                leaf = getattr(layer, name).detach().clone().requires_grad_(True)
                setattr(layer, name, leaf)
                self._stats.append(leaf)
            replace_forward(layer, self._forward(layer))
        self.tensors: list[Tensor] = [*self._params, *self._stats]
        self.start = [tensor.detach().clone() for tensor in self.tensors]

    def _forward(self, layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            mean, var = running(layer)
            if not torch.is_grad_enabled():
                return normalized(layer, x, mean.detach(), var.detach())
            with torch.no_grad():
                self._seen[layer] = moments(x, correction=1)
            y = (x - per_channel(mean, x)) / (per_channel(var, x) + layer.eps).sqrt()  # gradients of mean and var
            y = y if layer.weight is None else y * per_channel(layer.weight, x)
            return y if layer.bias is None else y + per_channel(layer.bias, x)

        return forward

    def direction(self, images: Tensor) -> list[Tensor]:
        """Return h, where each tensor would go for a batch, at the network as it is."""
        with torch.enable_grad():
            loss = entropy(self.model(images)).mean()
            grads = torch.autograd.grad(loss, self._params, allow_unused=True)
        moves = [torch.zeros_like(p) if grad is None else -grad for p, grad in zip(self._params, grads, strict=True)]
        for layer in self._layers:
            now = running(layer)
            seen = self._seen.get(layer, now)  # of a layer that has no part in this network's passes, nothing
            moves += [(batch - own).detach() for batch, own in zip(seen, now, strict=True)]
        return moves

    @torch.no_grad()
    def put(self, tensors: Iterable[Tensor]) -> None:
        """Write every tensor."""
        for own, tensor in zip(self.tensors, tensors, strict=True):
            own.copy_(tensor)

    @torch.no_grad()
    def moved(self, rates: Tensor, moves: Iterable[Tensor]) -> list[Tensor]:
        """Return the trained network's tensors moved by their rates; no variance is below 0."""
        tensors = [w + r * h for w, r, h in zip(self.start, rates, moves, strict=True)]
        for place in range(len(self._params) + 1, len(tensors), 2):
            tensors[place] = tensors[place].clamp(min=0)
        return tensors

    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the gradients of the labelled loss at the network as it is."""
        with torch.enable_grad():
            loss = functional.cross_entropy(self.model(images), labels)
            grads = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(self.tensors, grads, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ATP(Adaptation):
    """Moves every tensor by a rate of its own that was learned on the training clients.

    Attributes:
        rounds: Rounds in which the training clients learn the rates; 0 leaves them at 0, which is plain evaluation.
        rate_of_rates: Step with which the rates are learned.
    """

    method: ClassVar[str] = "atp"

    rounds: int = 10
    rate_of_rates: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.method, "rounds", self.rounds, at_least=0)
        number(self.method, "rate_of_rates", self.rate_of_rates, above=0)

    @property
    def passes(self) -> tuple[float, float]:
        """A pass with gradients, and one that predicts."""
        return 1.0, 1.0

    def check(self, model: nn.Module) -> None:
        """Refuse layers that evaluate by running statistics in another way; every network has parameters."""
        statistics_layers(model, self.method)

    @property
    def rounds_of_learning(self) -> int:
        """Rounds in which the training clients learn the rates."""
        return self.rounds

    def initial(self, model: nn.Module) -> dict[str, Tensor]:
        """Return rates of 0, one a parameter and two a batch normalization."""
        count = len(list(model.parameters())) + 2 * len(statistics_layers(model, self.method))
        return {RATES: torch.zeros(count)}

    def refine(
        self, model: nn.Module, knowledge: Knowledge, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the rates after a pass over a training client's batches."""
        adapting, rates = Adapting(model), knowledge[RATES].clone()
        lengths = torch.tensor([math.sqrt(max(tensor.numel(), 1)) for tensor in adapting.tensors])
        for images, labels in batches:
            adapting.put(adapting.start)
            moves = adapting.direction(images)
            adapting.put(adapting.moved(rates, moves))
            grads = adapting.gradients(images, labels)
            slopes = torch.stack([(g * h).sum() for g, h in zip(grads, moves, strict=True)]).cpu()
            rates -= self.rate_of_rates * slopes / lengths
        return {RATES: rates}

    def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
        """Return what adapts to each batch, and then predicts it."""
        adapting, rates = Adapting(model), (knowledge or self.initial(model))[RATES]
        mean: list[Tensor] = []
        met = 0

        def predict(images: Tensor) -> Tensor:
            nonlocal mean, met
            adapting.put(adapting.start)
            now = adapting.moved(rates, adapting.direction(images))
            mean = [before.lerp(new, 1 / (met + 1)) for before, new in zip(mean, now, strict=True)] if met else now
            met += 1
            adapting.put(mean)
            with torch.no_grad():
                logits: Tensor = model(images)
            return logits

        return predict


SPEC = AdaptationSpec(
    name="atp",
    summary="Every tensor follows an unlabelled batch at a rate of its own, learned on the training clients.",
    citation=Citation(
        title="Adaptive Test-Time Personalization for Federated Learning",
        authors="Bao, Wei, Wang, He",
        year=2023,
        arxiv="2310.18816",
    ),
    make=ATP,
    deviations=(
        "Rates are learned on the images that a training client holds back (data.validation), as in the paper; on its "
        "training images where it holds none back, on which a trained network is surer than on others.",
        "All training clients take part in every round of learning, once through their images; the paper has 100 "
        "rounds (rounds), and the same step of 0.1 and division by the square root of a tensor's size.",
        "On a stream, where nobody else trained, the experiences' images that were held back or trained on stand in "
        "for the clients': it looks at images of the past that a learner without memory no longer has.",
    ),
    verified=("one round of learning and one adaptation against the formula written out in float64",),
)
