"""Self-normalizing networks: no layers, but a nonlinearity and initial weights that keep mean 0 and variance 1.

Klambauer, Unterthiner, Mayr, Hochreiter. Self-Normalizing Neural Networks. NeurIPS 2017.
https://arxiv.org/abs/1706.02515

    selu(x) = lambda x  where x > 0,    lambda alpha (e^x - 1)  elsewhere
    alpha = 1.6732632423543772,  lambda = 1.0507009873554805
    W ~ N(0, 1 / fan_in),  b = 0                                                     (LeCun's normal initialisation)

alpha and lambda are such that a unit whose inputs have mean 0 and variance 1 has an output that has them too, and that
this fixed point attracts. Images must come with mean 0 and variance 1, as fednorm's data does. ``dropout`` is
AlphaDropout after every nonlinearity: it sets units to -lambda alpha and rescales so that mean and variance stay.

Every nonlinearity that a model asks for is SELU, and every linear layer and convolution is drawn anew, the output layer
too. The theory is for plain feed-forward networks: residual sums add variance, so that a ResNet wants
``residual_scale`` with ``norm = "selu"``. Train = eval without dropout; no tensors; a batch of one works.

Federated: every tensor is a weight. FedBN on such a network is FedAvg, and is refused.
Continual: nothing is carried over but weights.
Converting a model (``fednorm.convert``) puts SELU in place of its activation modules, and keeps its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.spec import ACTIVATIONS, Norm, NormSpec


@dataclass(frozen=True, kw_only=True)
class SELU(Norm):
    """Self-normalizing networks and their options.

    Attributes:
        dropout: Share of units that AlphaDropout drops after every nonlinearity, in [0, 1).
        initialization: ``lecun_normal``, or ``model`` for the model's own initial weights.

    Raises:
        ConfigError: An option is out of range.
    """

    dropout: float = 0.0
    initialization: str = "lecun_normal"

    def __post_init__(self) -> None:
        options.share("selu", "dropout", self.dropout)
        if self.dropout == 1:
            raise ConfigError("selu.dropout is the share of units that is dropped, and at 1 none is left; got 1.")
        options.one_of("selu", "initialization", self.initialization, ("lecun_normal", "model"))

    @property
    def shifts(self) -> bool:
        """Return False: no layer follows, so every convolution has a bias."""
        return False

    def activation(self, name: str = "relu") -> nn.Module:
        """Return SELU for every nonlinearity, with its dropout; the identity stays one."""
        if name == "identity":
            return ACTIVATIONS[name]()
        return nn.Sequential(nn.SELU(), nn.AlphaDropout(self.dropout)) if self.dropout else nn.SELU()

    @property
    def brings_activation(self) -> bool:
        """Return True."""
        return True

    @torch.no_grad()
    def initialize(self, model: nn.Module) -> None:
        """Draw the weights of every linear layer and convolution from N(0, 1 / fan_in), and set biases to 0."""
        if self.initialization == "model":
            return
        for module in model.modules():
            if isinstance(module, nn.Linear | _ConvNd):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


SPEC = NormSpec(
    name="selu",
    summary="f = SELU for every nonlinearity, weights from N(0, 1 / fan_in); no layer normalizes activations.",
    citation=Citation(
        title="Self-Normalizing Neural Networks",
        authors="Klambauer, Unterthiner, Mayr, Hochreiter",
        year=2017,
        arxiv="1706.02515",
        where="Equations 2 and 14, section 2",
    ),
    make=SELU,
    tensors={},
    normalizes=False,
    scale_invariant=False,
    verified=(
        "PyTorch's F.selu, to the last bit; the fixed point of mean and variance by quadrature in float64; the "
        "deviation of the initial weights.",
    ),
    deviations=(
        "In networks with residual sums the fixed point does not hold: residual_scale goes with it.",
        "In a transformer the nonlinearity of the MLP is SELU, and nothing normalizes before the attention.",
    ),
)
