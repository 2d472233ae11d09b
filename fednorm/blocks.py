"""What of a network, beside its layers, a norm may bring: its attention and its residual sums. Here are the plain ones.

Softmax attention, after Vaswani et al. Attention Is All You Need. 2017. https://arxiv.org/abs/1706.03762 (Section 3.2)

    q_h, k_h, v_h = the h-th of H parts of W_qkv x + b_qkv,  each of width d = C / H
    y = W_o [softmax(q_1 k_1^T / sqrt(d)) v_1; ...; softmax(q_H k_H^T / sqrt(d)) v_H] + b_o

A norm may bring another attention (:meth:`fednorm.spec.Norm.attention`) and another residual sum
(:meth:`fednorm.spec.Norm.residual`), as it may bring another layer.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fednorm.errors import ConfigError, DataError

STD = 0.02
"""Standard deviation of a transformer's initial linear weights, drawn from a normal distribution cut off at ±2."""


def linear(features_in: int, features_out: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer with a transformer's initial weights: a truncated normal of deviation 0.02, bias 0."""
    layer = nn.Linear(features_in, features_out, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Sum(nn.Module):
    """The ordinary residual sum, ``shortcut + branch``."""

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return the sum of two tensors of one shape."""
        return shortcut + branch


class Attention(nn.Module):
    """Softmax self-attention; the base of every other one, which overrides :meth:`attend`.

    Parameters are named and shaped as timm's: ``qkv``, (3C, C), queries first, and ``proj``, (C, C).

    Attributes:
        parts: What ``qkv`` makes of a token, in multiples of C.

    Args:
        width: C, the features of a token.
        heads: H; it must divide C.
        grid: Rows and columns of the patches. Tokens are in this order: others, as a class token, then the patches row
            by row.

    Raises:
        ConfigError: ``heads`` does not divide ``width``.
    """

    parts: ClassVar[int] = 3

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.width = width
        self.heads = require_heads(width, heads)
        self.grid = grid
        self.qkv = linear(width, self.parts * width)
        self.proj = linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, L, C) to (N, L, C).

        Raises:
            DataError: They are of another shape.
        """
        q, k, v = self.split(tokens)
        y: Tensor = self.proj(self.join(self.attend(q, k, v, tokens)))
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """Return each head's output, (N, H, L, d), of its queries, keys and values, (N, H, L, d).

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            tokens: What they were made of, (N, L, C).
        """
        del tokens
        return F.scaled_dot_product_attention(q, k, v)

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what ``qkv`` makes of tokens (N, L, C): as many tensors (N, H, L, d) as there are parts.

        Raises:
            DataError: They are of another shape.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.width:
            name = type(self).__name__
            raise DataError(f"{name} takes tokens of shape (N, L, {self.width}); got {tuple(tokens.shape)}.")
        n, length, _ = tokens.shape
        features: Tensor = self.qkv(tokens)
        heads = features.view(n, length, self.parts, self.heads, self.width // self.heads)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, heads: Tensor) -> Tensor:
        """Put heads (N, H, L, d) side by side, (N, L, C)."""
        return heads.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Return the number of heads."""
        return f"heads={self.heads}"


def require_heads(width: int, heads: int) -> int:
    """Return the number of heads where it divides the width.

    Raises:
        ConfigError: It does not; the message lists the numbers that do.
    """
    if heads < 1 or width % heads:
        valid = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ConfigError(
            f"attention splits the features of a token evenly into heads, but there are {width} features and {heads} "
            f"heads. Set model.heads to one of {valid}, or 0 for the largest that leaves a head 64 features."
        )
    return heads
