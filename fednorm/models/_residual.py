"""The two ways a residual branch joins the trunk, and the bookkeeping of the normalizer-free one.

A normalizer-free network (Brock, De and Smith, arXiv 2101.08692) keeps the trunk's variance known instead of measuring
it. Its block ``l`` computes

    h_{l+1} = s(h_l) + alpha · g_l · f_l(beta_l · h_l),        beta_l = 1 / sigma_l

where the branch ``f_l`` preserves variance, ``g_l`` is the learnable ``skip_gain``, zero at first, and ``sigma_l`` is
the standard deviation that ``h_l`` would have at initialisation with every ``skip_gain`` at 1:

    sigma_0 = 1;      sigma_{l+1}² = sigma_l² + alpha²         where s is the identity
                      sigma_{l+1}² = 1 + alpha²                where s is a convolution of beta_l · h_l
                      sigma_{l+1}² = 1                         where there is no s, and f_l is all
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fednorm.blocks import Sum
from fednorm.spec import Norm

Shortcut = Literal["identity", "convolution", "none"]


class ScaledSum(nn.Module):
    """The normalizer-free residual sum, ``shortcut + alpha · skip_gain · branch``.

    ``skip_gain`` is one learned number, zero at first (SkipInit, arXiv 2002.10444), so that the network starts as its
    shortcuts alone.

    Args:
        alpha: The residual scale; 0.2 in the paper.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return the scaled sum of two tensors of one shape."""
        return torch.addcmul(shortcut, branch, self.skip_gain, value=self.alpha)

    def extra_repr(self) -> str:
        """Return alpha for the module's printed form."""
        return f"alpha={self.alpha:g}"


def residual_sum(alpha: float | None) -> nn.Module:
    """Return what joins a branch to its shortcut: the ordinary sum where alpha is None, else the scaled one."""
    return Sum() if alpha is None else ScaledSum(alpha)


def residual_of(norm: Norm, branches: int) -> nn.Module:
    """Return what joins a branch to its shortcut: what the method brings, else :func:`residual_sum`.

    Args:
        norm: The normalization method.
        branches: How many residual branches the network has.
    """
    own = norm.residual(branches)
    return residual_sum(norm.residual_alpha) if own is None else own


class ExpectedStd:
    """The expected standard deviation of the trunk, block by block, while a network is built.

    Args:
        alpha: The residual scale, or None for an ordinary network: every beta is then 1.
    """

    def __init__(self, alpha: float | None) -> None:
        self.alpha = alpha
        self.std = 1.0

    def enter(self, shortcut: Shortcut) -> float:
        """Return beta of the next block, whose shortcut is of the given form, and take its effect into account."""
        if self.alpha is None:
            return 1.0
        beta = 1.0 / self.std
        before = self.std if shortcut == "identity" else 1.0
        self.std = before if shortcut == "none" else math.hypot(before, self.alpha)
        return beta
