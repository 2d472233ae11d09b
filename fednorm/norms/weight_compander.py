"""Weight compander: every weight is squashed by an arctan, which bounds it and drives it away from zero.

Cakaj, Mehnert, Yang. Weight Compander: A Simple Weight Reparameterization for Regularization. 2023.
https://arxiv.org/abs/2306.16993

    w = a * arctan(v / b),      a, b > 0

v, of the weight's shape, is what is learned in its place; |w| < a * pi / 2, and w = a / b * v near 0. Gradients of
large v are small, dw/dv = (a / b) / (1 + (v / b)^2). a and b, one of each a layer, first 1, are learned with it
(``learned``), or stay. Convolutions and linear layers, biases not. A network with given weights w starts from
v = b * tan(w / a), which leaves its function as it is; a layer whose weights reach beyond 0.9 of the bound, as fresh
depthwise convolutions do, has a larger a, and b with it. As with ``sws``, no layer normalizes activations: every
convolution has a bias. Train = eval; no buffers; a batch of one works. The weight is computed once a training step, and
once in all while evaluating.

Federated: v, a and b are sent and averaged, not w: the average of arctans is not the arctan of the average.
Continual: nothing is carried over but weights.
Differs: the abstract fixes what the function does, and not the function: this one and a = b = 1 are our reconstruction.
The paper's networks keep their batch normalization, under which a bound on the weights does not bound what they
compute; here it is gone, so that it does. a and b are learned as logarithms, so that they stay positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._computed import ComputedWeight
from fednorm.norms._precision import widened
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

REACH = 0.9
"""Largest share of the bound that a given weight may have: at the bound itself v would be infinite."""


class Companded(ComputedWeight):
    """A layer whose ``weight`` holds v, and which computes with w = a * arctan(v / b)."""

    weight: Tensor

    def add_scales(self, a: float, b: float, *, learned: bool) -> None:
        """Give the layer its a and b, and turn its weight w into v, so that it goes on computing with w.

        Where w reaches beyond :data:`REACH` of the bound, a is what makes it reach as far as that, and b grows with it.
        """
        weight = widened(self.weight.detach())
        largest = float(weight.abs().max()) if weight.numel() and not weight.is_meta else 0.0
        stretched = max(a, largest / (REACH * math.pi / 2))
        self.a, self.b, self.learned = stretched, b * stretched / a, learned
        # Learned as logarithms: no step of an optimizer can make them negative.
        trains = self.weight.requires_grad
        self.log_a = nn.Parameter(self.weight.new_tensor(math.log(self.a)), trains) if learned else None
        self.log_b = nn.Parameter(self.weight.new_tensor(math.log(self.b)), trains) if learned else None
        if not weight.is_meta:
            first, second = (value.detach() if isinstance(value, Tensor) else value for value in self._scales())
            with torch.no_grad():
                self.weight.copy_((weight / first).tan() * second)

    def share_scales(self, other: Companded) -> None:
        """Take a and b of a layer with which this one shares its weight."""
        self.a, self.b, self.learned = other.a, other.b, other.learned
        self.log_a, self.log_b = other.log_a, other.log_b

    def _scales(self) -> tuple[Tensor | float, Tensor | float]:
        if self.log_a is None or self.log_b is None:
            return self.a, self.b
        return widened(self.log_a).exp(), widened(self.log_b).exp()

    def computed_weight(self) -> Tensor:
        """Return w, of the weight's shape."""
        a, b = self._scales()
        return ((widened(self.weight) / b).atan() * a).to(self.weight.dtype)


class CompandedConv2d(Companded, nn.Conv2d):
    """A 2-D convolution with companded weights.

    Args:
        *args: As of ``nn.Conv2d``.
        a: The first a.
        b: The first b.
        learned: Whether a and b are learned.
        **kwargs: As of ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, a: float = 1.0, b: float = 1.0, learned: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_scales(a, b, learned=learned)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` of shape (N, C_in, H, W) with the companded weight."""
        y: Tensor = self._conv_forward(x, self.weight_in_use(), self.bias)
        return y

    def extra_repr(self) -> str:
        """Return the convolution's geometry and this method's settings."""
        geometry: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{geometry}, a={self.a:g}, b={self.b:g}, learned={self.learned}"


class CompandedLinear(Companded, nn.Linear):
    """A linear layer with companded weights; :meth:`WeightCompander.prepare` makes it of an ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input (..., C_in) times the companded weight, plus the bias."""
        return F.linear(input, self.weight_in_use(), self.bias)


@dataclass(frozen=True, kw_only=True)
class WeightCompander(Norm):
    """The weight compander and its options.

    Attributes:
        a: The first a of every layer, greater than 0: weights are bounded by a * pi / 2.
        b: The first b of every layer, greater than 0: the slope at 0 is a / b.
        learned: Whether a and b are learned, one of each a layer.

    Raises:
        ConfigError: An option is out of range.
    """

    a: float = 1.0
    b: float = 1.0
    learned: bool = True

    def __post_init__(self) -> None:
        options.number("weight_compander", "a", self.a, above=0)
        options.number("weight_compander", "b", self.b, above=0)
        options.flag("weight_compander", "learned", self.learned)

    @property
    def conv_layer(self) -> Callable[..., nn.Conv2d]:
        """The companded convolution."""
        return partial(CompandedConv2d, a=self.a, b=self.b, learned=self.learned)

    @property
    def shifts(self) -> bool:
        """Return False: no normalization layer follows, so every convolution has a bias."""
        return False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Compand every convolution and linear layer that is not yet, with the weights that it has.

        Returns:
            The same model.

        Raises:
            ConfigError: A convolution has a forward pass or a parametrization of its own; the message names it.
        """
        companded: dict[int, Companded] = {}
        for path, module in model.named_modules():
            try:
                self._compand(module, companded)
            except ConfigError as error:
                raise ConfigError(f"Layer {path or 'the model itself'!r}: {error}") from error
        return model

    def _compand(self, module: nn.Module, companded: dict[int, Companded]) -> None:
        if isinstance(module, nn.Conv2d) and type(module) not in (nn.Conv2d, CompandedConv2d):
            raise ConfigError(
                f"A {type(module).__name__} computes its weight or its output in a way of its own, which a companded "
                "weight would lose. Build the model with plain nn.Conv2d layers, or use another norm."
            )
        if type(module) is nn.Conv2d:
            module.__class__ = CompandedConv2d
        elif type(module) is nn.Linear:
            module.__class__ = CompandedLinear
        else:
            return
        # The class alone has changed: hooks, shared tensors and references to the layer stay.
        assert isinstance(module, Companded)
        first = companded.setdefault(id(module.weight), module)
        if first is module:
            module.add_scales(self.a, self.b, learned=self.learned)
        else:
            module.share_scales(first)


@torch.no_grad()
def uncompand(model: nn.Module) -> nn.Module:
    """Turn every companded layer into the plain one that computes with the same weight; returns the same model."""
    done: set[int] = set()
    for module in model.modules():
        if not isinstance(module, Companded):
            continue
        if id(module.weight) not in done:
            module.weight.copy_(module.computed_weight())
            done.add(id(module.weight))
        module.__class__ = nn.Conv2d if isinstance(module, CompandedConv2d) else nn.Linear  # type: ignore[assignment]
        for name in ("log_a", "log_b"):
            module._parameters.pop(name, None)
        for name in ("a", "b", "learned"):
            vars(module).pop(name, None)
    return model


SPEC = NormSpec(
    name="weight_compander",
    summary="w = a * arctan(v / b) in every convolution and linear layer; nothing normalizes activations.",
    citation=Citation(
        title="Weight Compander: A Simple Weight Reparameterization for Regularization",
        authors="Cakaj, Mehnert, Yang",
        year=2023,
        arxiv="2306.16993",
    ),
    make=WeightCompander,
    layers=(Companded,),
    convolution=CompandedConv2d,
    tensors={
        "weight": TensorSpec(Kind.WEIGHT, Carry.KEEP),
        "bias": TensorSpec(Kind.WEIGHT, Carry.KEEP),
        "log_a": TensorSpec(Kind.GAIN, Carry.KEEP),
        "log_b": TensorSpec(Kind.GAIN, Carry.KEEP),
    },
    normalizes=False,
    scale_invariant=False,
    verified=("the formula in float64, and its gradient written out",),
    reconstruction="The function, and the first values of a and b.",
    deviations=(
        "The paper's networks keep their batch normalization; here nothing normalizes activations, as with sws.",
        "a and b are learned as logarithms, so that they stay positive.",
        "A layer whose given weights reach beyond 0.9 of the bound begins with a larger a, and b with it.",
    ),
)
