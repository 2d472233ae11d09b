"""Residual scaling: every branch of a residual network is multiplied by a constant, or by a learned number from 0.

Dherin, Munn. On residual network depth. 2025. https://arxiv.org/abs/2510.03470: lambda = 1, 1 / sqrt(n) or 1 / n for n
branches. De, Smith. Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks. NeurIPS
2020. https://arxiv.org/abs/2002.10444: SkipInit, a learned number a branch that starts at 0.

    h_{l+1} = s(h_l) + lambda f_l(h_l)

s is the identity, or the network's own shortcut. n is the number of branches that the whole network has: 8 in our
resnet18, 2 a block in the ViT. The paths through n identical branches have the weight (1 + lambda)^n in all: 2^n,
about e^sqrt(n), less than e. With lambda = 1 the network is what it is without.

The layers, convolutions, attention and nonlinearities are those of the option ``beside``, none by default, as in both
papers; ``beside = "selu"`` is a self-normalizing residual network.

Federated: a learned number is a weight, and averaged; there is no other tensor.
Continual: nothing is carried over but weights.
Differs: both papers have the identity as shortcut and nothing after the sum; our resnet18 is activated after the sum,
and has three convolutions for shortcuts. A network that a conversion is given must have fednorm's own residual sums:
where a foreign one adds its branches cannot be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.limits import shown
from fednorm.norms._beside import BesideNorm, require_kind
from fednorm.roles import Kind
from fednorm.spec import NormSpec, TensorSpec

SCALES = ("1", "1/sqrt(n)", "1/n", "skipinit")


class ScaledResidual(nn.Module):
    """A residual sum, shortcut + lambda · branch.

    Args:
        scale: lambda; None for a learned number, ``skip_gain``, that starts at 0.
    """

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.skip_gain = nn.Parameter(torch.zeros(())) if scale is None else None

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return the sum of two tensors of one shape."""
        if self.scale is not None:
            return torch.add(shortcut, branch, alpha=self.scale)
        return torch.addcmul(shortcut, branch, self.skip_gain.to(branch.dtype))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """Return lambda."""
        return "learned" if self.scale is None else f"scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class ResidualScale(BesideNorm):
    """Residual scaling and its options.

    Attributes:
        beside: The method of everything else.
        scale: ``1``, ``1/sqrt(n)``, ``1/n``, ``skipinit``, or a number greater than 0.

    Raises:
        ConfigError: An option is out of range.
        UnknownNameError: There is no such norm.
    """

    beside: str = "none"
    scale: float | str = "1/sqrt(n)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale, str):
            if self.scale not in SCALES:
                raise ConfigError(
                    f"residual_scale.scale must be one of {', '.join(SCALES)} or a number greater than 0; got "
                    f"{shown(self.scale)}."
                )
        else:
            options.number("residual_scale", "scale", self.scale, above=0)
        if self.other.residual_alpha is not None:
            raise ConfigError(
                f"norm {self.beside} scales the residual branches itself, so that residual_scale cannot go with it. "
                f"Take norm {self.beside} alone, or another beside residual_scale."
            )

    def residual(self, branches: int) -> nn.Module:
        """Return the scaled sum for a network with so many branches."""
        named = {"1": 1.0, "1/sqrt(n)": 1.0 / math.sqrt(branches), "1/n": 1.0 / branches, "skipinit": None}
        return ScaledResidual(named[self.scale] if isinstance(self.scale, str) else float(self.scale))

    def prepare(self, model: nn.Module) -> nn.Module:
        """Require a network with branches, and prepare it for the norm beside.

        Raises:
            ConfigError: It has no residual sum of fednorm's.
        """
        require_kind(
            model,
            ScaledResidual,
            "residual_scale scales the branches of a residual network, and {model} has no residual sum that it could "
            "scale (where a foreign network adds its branches cannot be seen). Take fednorm's resnet18, mobilenet_v2 "
            "or vit (--model resnet18), or another norm.",
        )
        return super().prepare(model)


SPEC = NormSpec(
    name="residual_scale",
    summary="h + lambda f(h) in every residual branch, lambda = 1, 1/sqrt(n), 1/n, a number, or learned from 0.",
    citation=Citation(
        title="On residual network depth",
        authors="Dherin, Munn",
        year=2025,
        arxiv="2510.03470",
        where="the residual scaling; SkipInit is of De, Smith (arXiv 2002.10444)",
    ),
    make=ResidualScale,
    layers=(ScaledResidual,),
    tensors={"skip_gain": TensorSpec(Kind.WEIGHT)},
    normalizes=False,
    scale_invariant=False,
    tried_on="resnet18",
    verified=(
        "Every block's sum written out; at lambda = 1 the network without it, to the last bit; the variance of the "
        "residual stream by depth.",
    ),
    deviations=(
        "The shortcut is the network's own, and resnet18 is activated after the sum; both papers have the identity "
        "and nothing after it.",
    ),
)
