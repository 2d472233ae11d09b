"""Affine-scaled attention: softmax weights, scaled by what each query says and shifted by a running mean of it.

Bae, Park, Park, Kim, Lee, Yoo, Woo, Ryu, Kwon, Lee. Affine-Scaled Attention: Towards Flexible and Stable Transformer
Attention. 2026. https://arxiv.org/abs/2602.23057

    A = softmax(Q K^T / sqrt(d)),      alpha(X) = phi(W_a X),      beta(X) = (alpha_ma - alpha(X)) / N
    y = [alpha(X) A + beta(X)] V

with one alpha for each query and head, N the number of keys, and phi the "linear clipping" min(max(0.1 u + 0.5, 0), 1)
or a sigmoid. ``alpha_ma`` is a running mean: in training alpha_ma <- rho alpha_ma + (1 - rho) mean(alpha), where rho is
what is *kept*, the opposite of PyTorch's momentum; evaluation uses what is stored. No gradient goes through it.

It follows that the weights of every query sum to alpha_ma, whatever alpha is, and that single ones can be negative:
what is learned is how far attention is from uniform. With the published start, alpha_ma = 0, that sum is close to 0 in
the first steps; ``alpha_ma_init = 1`` begins with softmax attention's.

It takes the place of a transformer's attention. The layers that normalize are those of the option ``beside``.

Federated: ``alpha_ma`` is a running mean, one number a head; FedAvg averages it, which is exact for a mean, FedBN and
SiloBN keep it local. W_a is a weight.
Continual: ``alpha_ma`` is kept across experiences, and has the memory of a momentum of 0.1: the last experience's.
Differs from the paper: it is for the visible keys of a causal language model; in an image every token sees all N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm import options
from fednorm.blocks import Attention, linear
from fednorm.cards import Citation
from fednorm.norms._beside import BesideNorm, require_kind
from fednorm.norms._precision import widened
from fednorm.roles import Kind
from fednorm.spec import NormSpec, TensorSpec


class AffineScaledAttention(Attention):
    """Affine-scaled self-attention.

    Args:
        width: C.
        heads: H.
        grid: Rows and columns of the patches.
        phi: ``linear_clipping`` or ``sigmoid``.
        rho: The share of ``alpha_ma`` that a training step keeps.
        alpha_ma_init: Initial ``alpha_ma``.
    """

    batch_coupled = False
    """One sample is enough for a mean: a batch of one can be trained on, though the card says that it couples."""

    def __init__(
        self, width: int, heads: int, grid: tuple[int, int], *, phi: str, rho: float, alpha_ma_init: float
    ) -> None:
        super().__init__(width, heads, grid)
        self.phi = phi
        self.rho = rho
        self.scale = linear(width, heads, bias=False)
        self.alpha_ma: Tensor
        self.register_buffer("alpha_ma", torch.full((heads,), float(alpha_ma_init)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """Return each head's output, (N, H, L, d); in training, take note of alpha."""
        alpha = self.alpha(tokens)
        if self.training:
            self._note(alpha)
        shift = self.alpha_ma[:, None, None].to(alpha.dtype) - alpha
        # beta is the same for all keys of a query, so that beta V is beta N times the mean of V.
        y: Tensor = alpha * F.scaled_dot_product_attention(q, k, v) + shift * v.mean(2, keepdim=True)
        return y

    def alpha(self, tokens: Tensor) -> Tensor:
        """Return alpha, (N, H, L, 1), of tokens (N, L, C)."""
        u: Tensor = self.scale(tokens).transpose(1, 2)[..., None]
        return u.sigmoid() if self.phi == "sigmoid" else (0.1 * u + 0.5).clamp(0.0, 1.0)

    @torch.no_grad()
    def _note(self, alpha: Tensor) -> None:
        mean = widened(alpha).mean((0, 2, 3))
        self.alpha_ma.copy_(self.rho * widened(self.alpha_ma) + (1.0 - self.rho) * mean)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{super().extra_repr()}, phi={self.phi}, rho={self.rho:g}"


@dataclass(frozen=True, kw_only=True)
class AffineScaled(BesideNorm):
    """Affine-scaled attention and its options.

    Attributes:
        beside: The method of the layers that normalize.
        phi: ``linear_clipping`` or ``sigmoid``.
        rho: The share of ``alpha_ma`` that a training step keeps, in [0, 1].
        alpha_ma_init: Initial ``alpha_ma``: 0 as published; 1 begins with the sum of softmax weights.

    Raises:
        ConfigError: An option is out of range.
        UnknownNameError: There is no such norm.
    """

    beside: str = "layer_norm"
    phi: str = "linear_clipping"
    rho: float = 0.9
    alpha_ma_init: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        method = "affine_scaled_attention"
        options.one_of(method, "phi", self.phi, ("linear_clipping", "sigmoid"))
        options.share(method, "rho", self.rho)
        options.number(method, "alpha_ma_init", self.alpha_ma_init)

    @property
    def brings_attention(self) -> bool:
        """Return True."""
        return True

    def attention(self, width: int, heads: int, grid: tuple[int, int]) -> Attention:
        """Return affine-scaled attention.

        Raises:
            ConfigError: ``heads`` does not divide ``width``.
        """
        return AffineScaledAttention(width, heads, grid, phi=self.phi, rho=self.rho, alpha_ma_init=self.alpha_ma_init)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Require a network whose attention it is, and prepare it for the norm beside.

        Raises:
            ConfigError: It has no attention that this could be.
        """
        require_attention(model, AffineScaledAttention, "affine_scaled_attention")
        return super().prepare(model)


def require_attention(model: nn.Module, kind: type[Attention], method: str) -> None:
    """Require a network with a method's attention.

    Raises:
        ConfigError: It has none.
    """
    require_kind(
        model,
        kind,
        f"{method} replaces the attention of a transformer, and {{model}} has none that it could replace. Take a model "
        'of tokens, --model vit (model.name = "vit"), or a norm that is a layer, such as layer_norm.',
    )


SPEC = NormSpec(
    name="affine_scaled_attention",
    summary="y = [alpha(X) softmax(Q K^T / sqrt(d)) + (alpha_ma - alpha(X)) / N] V, one alpha a query and head.",
    citation=Citation(
        title="Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention",
        authors="Bae, Park, Park, Kim, Lee, Yoo, Woo, Ryu, Kwon, Lee",
        year=2026,
        arxiv="2602.23057",
        where="method section",
    ),
    make=AffineScaled,
    layers=(AffineScaledAttention,),
    tensors={"alpha_ma": TensorSpec(Kind.MEAN)},
    normalizes=False,
    batch_coupled=True,
    train_eval_differ=True,
    scale_invariant=False,
    tried_on="vit",
    verified=("The formula with its weights written out, query by query, in float64; no official code was found.",),
    reconstruction=(
        "The paper's text was read at second hand. Not stated there: that alpha_ma is one number a head, that beta "
        "takes it after the batch's update, that no gradient goes through it, and how W_a starts (here as every other "
        "linear layer, so that alpha begins near 0.5)."
    ),
    deviations=("Every token sees all N keys; the paper's model is causal.",),
)
