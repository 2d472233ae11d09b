"""Norm-aware linear attention, NaLaFormer's: linear in the number of tokens, sharper where a query is longer.

Meng, Luo, Huo, Wang, Li, Zhang. Norm × Direction: Restoring the Missing Query Norm in Vision Linear Attention (first
version: NaLaFormer: Norm-Aware Linear Attention for Transformer Models). 2025. https://arxiv.org/abs/2506.21137

    q, k, v, g = W x,  for each head          k <- k^3,   r = ||q||,   p = 3 (1/2 + tanh r)
    phi(q) = [(relu(q) / r)^p ; (relu(-q) / r)^p]         phi(k) = [relu(k) ; relu(-k)]
    o = R phi(q) . (1/L) sum_n (R phi(k_n)) v_n^T / (phi(q) . (1/L) sum_n phi(k_n) + 1e-6)
    y = W_o [LN(o + c(v)) * silu(g)]

Ordinary linear attention divides the length of a query out; here it comes back as an exponent. Positive and negative
parts are kept apart, so that signs are not lost. R turns pairs of features by angles that grow with a patch's row (the
first half of a head's features) and column (the second), each half of phi alike, and only in the numerator; c is a 5×5
depthwise convolution over the map of patches, LN layer normalization over all heads' features.

It takes the place of a transformer's attention; LN is part of it. The layers that normalize the blocks' inputs are
those of the option ``beside``. Train = eval; no buffers; the features phi are computed in float32 at least.

It pays where tokens are many more than a head's features. On 32×32 images with patches of 4×4 there are 64 of both, and
on a CPU it takes about four times as long as PyTorch's fused softmax attention.

Federated: every tensor is a weight, but for LN's scale and shift, which FedBN keeps local.
Continual: nothing is carried over but weights.
Differs from the official code (``NaLaformer/NALA.py``): a query is divided by r + 1e-6, where the code divides by 0 for
a query of zeros; a class token, which the code does not have, has no place in the map: it is not turned, and no
convolution is added to it. The rest of the backbone (convolutional position encodings and batch normalization in stem
and head, an MLP with a convolution) is not part of the attention, and left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm import options
from fednorm.blocks import STD, Attention
from fednorm.cards import Citation
from fednorm.errors import ConfigError, DataError
from fednorm.norms._beside import BesideNorm
from fednorm.norms._precision import widened, without_autocast
from fednorm.norms.affine_scaled_attention import require_attention
from fednorm.spec import NormSpec

_EPS = 1e-6
_TINY = 1e-12
_BASE = 10000.0
_KERNEL = 5


class NormAwareLinearAttention(Attention):
    """Norm-aware linear self-attention.

    Args:
        width: C.
        heads: H; a head's C / H features must be a multiple of 4, for turning.
        grid: Rows and columns of the patches.
        sharpness: The factor of the exponent p; 3 in the paper.

    Raises:
        ConfigError: The heads do not fit the width.
    """

    parts = 4

    def __init__(self, width: int, heads: int, grid: tuple[int, int], *, sharpness: float) -> None:
        _require_turns(width, heads, grid)
        super().__init__(width, heads, grid)
        self.sharpness = sharpness
        self.lepe = nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        nn.init.trunc_normal_(self.lepe.weight, std=STD)
        nn.init.zeros_(self.lepe.bias)  # type: ignore[arg-type]
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, L, C) to (N, L, C).

        Raises:
            DataError: They are of another shape, or fewer than the patches of the grid.
        """
        q, k, v, gate = self.split(tokens)
        others = tokens.shape[1] - math.prod(self.grid)
        if others < 0:
            raise DataError(
                f"{type(self).__name__} is for a map of {self.grid[0]}×{self.grid[1]} patches, and tokens before them; "
                f"got {tokens.shape[1]} tokens."
            )
        with without_autocast(tokens.device):
            attended = self.attend(widened(q), widened(k), widened(v), tokens)
        mixed = self.join(attended).to(v.dtype) + self._local(self.join(v), others)
        y: Tensor = self.proj(self.ln(mixed) * F.silu(self.join(gate)))
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """Return each head's output, (N, H, L, d), before gate and convolution."""
        del tokens
        length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        direction = q / (length + _EPS)
        power = self.sharpness * (0.5 + torch.tanh(length))
        # Above 0, where a power of less than 1 has no finite derivative; the masks make it 0 again.
        size = direction.abs().clamp_min(_TINY) ** power
        queries = [size * (direction > 0), size * (direction < 0)]
        cubes = k * k * k
        keys = [cubes.relu(), (-cubes).relu()]
        norm = torch.cat(queries, -1) @ torch.cat(keys, -1).mean(2)[..., None]
        turns = angles(self.grid, q)
        turned_q, turned_k = (torch.cat([turned(part, turns) for part in parts], -1) for parts in (queries, keys))
        summary = turned_k.transpose(2, 3) @ v / k.shape[2]
        return turned_q @ summary / (norm + _EPS)

    def _local(self, values: Tensor, others: int) -> Tensor:
        """Return the convolution of the patches' values, (N, L, C); zeros for the tokens before them."""
        rows, columns = self.grid
        patches = values[:, others:].transpose(1, 2).reshape(len(values), self.width, rows, columns)
        local = self.lepe(patches).flatten(2).transpose(1, 2)
        return F.pad(local, (0, 0, others, 0))


def turned(features: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of neighbouring features of the last tokens by angles; the tokens before those stay.

    Args:
        features: (N, H, L, d).
        turns: The angles, (P, d / 2) with P of at most L.
    """
    others = features.shape[2] - len(turns)
    x, y = features[:, :, others:, 0::2], features[:, :, others:, 1::2]
    cos, sin = turns.cos(), turns.sin()
    both = torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(3)
    return torch.cat([features[:, :, :others], both], 2) if others else both


def angles(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return the angle by which each pair of a head's features is turned at each patch, (rows · columns, d / 2).

    The first d/4 pairs turn with the row, the others with the column: by row · 10000^(-i / (d/4 - 1)) for the i-th.
    They are computed when they are needed, since a buffer would lose its digits in a model of half precision.

    Args:
        grid: Rows and columns.
        like: Features (..., d) of the type and on the device that the angles are to have.
    """
    rows, columns = (torch.arange(count, dtype=like.dtype, device=like.device) for count in grid)
    speeds = _BASE ** -torch.linspace(0.0, 1.0, like.shape[-1] // 4, dtype=like.dtype, device=like.device)
    down = (rows[:, None, None] * speeds).expand(-1, len(columns), -1)
    right = (columns[None, :, None] * speeds).expand(len(rows), -1, -1)
    return torch.cat([down, right], -1).flatten(0, 1)


def _require_turns(width: int, heads: int, grid: tuple[int, int]) -> None:
    if heads < 1 or width % heads or (width // heads) % 4:
        valid = ", ".join(str(n) for n in range(1, width + 1) if width % (4 * n) == 0)
        remedy = f"Set model.heads to one of {valid}" if valid else "Set model.width to a multiple of 4"
        raise ConfigError(
            f"nalaformer turns a head's features in pairs, half by row and half by column, so that a head needs a "
            f"multiple of 4 of them; there are {width} features and {heads} heads. {remedy}."
        )
    if not math.prod(grid):
        raise ConfigError(
            "nalaformer needs the rows and columns of the patches, which a foreign attention does not show. Build "
            "fednorm's own transformer with it: --model vit --norm nalaformer."
        )


@dataclass(frozen=True, kw_only=True)
class NaLaFormer(BesideNorm):
    """Norm-aware linear attention and its options.

    Attributes:
        beside: The method of the layers that normalize.
        sharpness: The factor of the exponent, sharpness (1/2 + tanh ||q||); greater than 0.

    Raises:
        ConfigError: An option is out of range.
        UnknownNameError: There is no such norm.
    """

    beside: str = "layer_norm"
    sharpness: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        options.number("nalaformer", "sharpness", self.sharpness, above=0)

    @property
    def brings_attention(self) -> bool:
        """Return True."""
        return True

    def attention(self, width: int, heads: int, grid: tuple[int, int]) -> Attention:
        """Return norm-aware linear attention.

        Raises:
            ConfigError: ``heads`` does not divide ``width`` into multiples of 4.
        """
        return NormAwareLinearAttention(width, heads, grid, sharpness=self.sharpness)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Require a network whose attention it is, and prepare it for the norm beside.

        Raises:
            ConfigError: It has no attention that this could be.
        """
        require_attention(model, NormAwareLinearAttention, "nalaformer")
        return super().prepare(model)


SPEC = NormSpec(
    name="nalaformer",
    summary="Linear attention, phi(q) = [relu(±q) / ||q||]^(3 (1/2 + tanh ||q||)), phi(k) = relu(±k^3), and a gate.",
    citation=Citation(
        title="Norm × Direction: Restoring the Missing Query Norm in Vision Linear Attention",
        authors="Meng, Luo, Huo, Wang, Li, Zhang",
        year=2025,
        arxiv="2506.21137",
        where="ICML 2026; official code, NALA.py",
    ),
    make=NaLaFormer,
    layers=(NormAwareLinearAttention,),
    tensors={},
    normalizes=False,
    scale_invariant=False,
    tried_on="vit",
    verified=("The official code's formula, written out query by query with sines and cosines, in float64.",),
    deviations=(
        "A query is divided by its length plus 1e-6; the code divides by the length.",
        "A class token is not turned and gets no convolution; the code has none.",
        "With 64 tokens it takes about four times as long as fused softmax attention: it is linear in the tokens, not "
        "in a head's features.",
        "The attention alone: not the backbone's convolutional position encodings, stem, head and MLP.",
    ),
)
