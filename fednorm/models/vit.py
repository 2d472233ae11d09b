"""A vision transformer for small images: pre-norm, patches of 4×4 pixels."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.blocks import STD, linear
from fednorm.cards import Citation
from fednorm.chain import require_images
from fednorm.errors import ConfigError
from fednorm.models import ModelSpec
from fednorm.models._residual import ExpectedStd, residual_of
from fednorm.spec import Norm

_WIDTH = 192
_DEPTH = 6
_PATCH = 4
_HEAD = 64
"""Features of a head, at least, where the number of heads is left to the model: that of the published sizes."""


class PatchEmbed(nn.Module):
    """Cuts images into patches of P×P pixels, and maps each to a token: a convolution with kernel and stride P.

    Args:
        norm: The normalization method, whose convolution it is.
        width: C.
        patch_size: P.
    """

    def __init__(self, norm: Norm, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = norm.conv(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, (S / P)², C), row by row."""
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers, with a nonlinearity between them; applied to each token.

    A method that wants a layer before every nonlinearity (:attr:`~fednorm.spec.Norm.inserts`) has one there too.

    Args:
        norm: The normalization method.
        width: C.
        hidden: Features between the two.
    """

    def __init__(self, norm: Norm, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = linear(width, hidden)
        self.norm = norm.token_layer(hidden) if norm.inserts else None
        self.act = norm.activation("gelu")
        self.fc2 = linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (N, L, C) to (N, L, C)."""
        hidden = self.fc1(tokens)
        if self.norm is not None:
            hidden = _normalized(self.norm, hidden)
        return cast(Tensor, self.fc2(self.act(hidden)))


class Block(nn.Module):
    """The pre-norm block: h + attention(norm1(h)), then h + mlp(norm2(h)).

    Args:
        norm: The normalization method: of the layers, the attention, the nonlinearity and the two residual sums.
        width: C.
        heads: Heads of the attention.
        hidden: Features inside the MLP.
        grid: Rows and columns of the patches.
        branches: Residual branches of the whole network.
        expected: The trunk's expected standard deviation so far; taken past this block.
    """

    def __init__(
        self,
        norm: Norm,
        width: int,
        heads: int,
        hidden: int,
        grid: tuple[int, int],
        branches: int,
        expected: ExpectedStd,
    ) -> None:
        super().__init__()
        self.norm1 = norm.token_layer(width)
        self.attn = norm.attention(width, heads, grid)
        self.residual1 = residual_of(norm, branches)
        self.norm2 = norm.token_layer(width)
        self.mlp = MLP(norm, width, hidden)
        self.residual2 = residual_of(norm, branches)
        self.betas = expected.enter("identity"), expected.enter("identity")

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (N, L, C) to (N, L, C)."""
        first, second = self.betas
        branch = self.attn(_normalized(self.norm1, _scaled(tokens, first)))
        tokens = self.residual1(tokens, branch)
        branch = self.mlp(_normalized(self.norm2, _scaled(tokens, second)))
        return cast(Tensor, self.residual2(tokens, branch))


class ViT(nn.Module):
    """Images (N, 3, S, S) to logits (N, K).

    Patches become tokens of C features; a learned position is added to each; ``depth`` blocks of :class:`Block`; then
    the mean over the tokens and a last norm, of (N, C), or a last norm of the tokens and the class token; a linear
    classifier. With the class token and layer normalization it is the published network, with the mean that of MAE's
    classifiers (arXiv 2111.06377). Both are timm's ``VisionTransformer``, whose parameters have the same names. The
    mean comes before its norm because a method that normalizes over the positions (instance normalization) would make
    it a constant.

    Layers that normalize get tokens as (N, C, L), which is how every norm has its axes: see
    :meth:`fednorm.spec.Norm.token_layer`. Weights are drawn as the norm's convolutions draw them, those of linear
    layers from a truncated normal of deviation 0.02 with biases at 0, and so are positions.

    With layer normalization, C = 192, depth 6, S = 32 and K = 10 it has 2,693,194 parameters.

    Where ``norm.residual_alpha`` is a number alpha: ``h + alpha · skip_gain · f(beta · h)``, the normalizer-free form
    of :mod:`fednorm.models._residual`.

    Args:
        norm: The normalization method.
        num_classes: K.
        image_size: S.
        width: C.
        patch_size: P, pixels of a patch's side; S must be a multiple of it.
        depth: Number of blocks.
        heads: Heads of each attention, a divisor of C; 0 for the largest number that leaves each at least 64 features,
            which is the published one.
        mlp_ratio: Features inside the MLP, in multiples of C.
        pool: ``mean`` over the tokens, or a class ``token``.

    Raises:
        ConfigError: A number does not fit.
    """

    def __init__(
        self,
        norm: Norm,
        num_classes: int = 10,
        image_size: int = 32,
        width: int = _WIDTH,
        *,
        patch_size: int = _PATCH,
        depth: int = _DEPTH,
        heads: int = 0,
        mlp_ratio: float = 4.0,
        pool: str = "mean",
    ) -> None:
        _require(image_size, width, patch_size, depth, heads, mlp_ratio, pool)
        super().__init__()
        side = image_size // patch_size
        heads = heads or next(h for h in range(max(1, width // _HEAD), 0, -1) if width % h == 0)
        expected = ExpectedStd(norm.residual_alpha)
        self.image_size = image_size
        self.patch_embed = PatchEmbed(norm, width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "token" else None
        self.pos_embed = nn.Parameter(torch.empty(1, side**2 + (pool == "token"), width))
        nn.init.trunc_normal_(self.pos_embed, std=STD)
        self.blocks = nn.Sequential(
            *(
                Block(norm, width, heads, round(mlp_ratio * width), (side, side), 2 * depth, expected)
                for _ in range(depth)
            )
        )
        # The two places are named as timm's.
        self.norm = norm.token_layer(width) if pool == "token" else None
        self.fc_norm = norm.layer(width, 0) if pool == "mean" else None
        self.head = linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits.

        Raises:
            DataError: The images are not of shape (N, 3, image_size, image_size).
        """
        require_images("vit", images, self.image_size)
        tokens = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.blocks(tokens + self.pos_embed)
        if self.fc_norm is not None:
            return cast(Tensor, self.head(self.fc_norm(tokens.mean(1))))
        assert self.norm is not None
        return cast(Tensor, self.head(_normalized(self.norm, tokens)[:, 0]))


def _normalized(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Apply a layer for (N, C, L) to tokens (N, L, C)."""
    normalized: Tensor = layer(tokens.transpose(1, 2))
    return normalized.transpose(1, 2)


def _scaled(tokens: Tensor, beta: float) -> Tensor:
    return tokens if beta == 1.0 else tokens * beta


def _require(image_size: int, width: int, patch_size: int, depth: int, heads: int, mlp_ratio: float, pool: str) -> None:
    options.whole("model", "patch_size", patch_size, at_least=1)
    options.whole("model", "depth", depth, at_least=1)
    options.whole("model", "heads", heads, at_least=0)
    options.number("model", "mlp_ratio", mlp_ratio, above=0)
    options.one_of("model", "pool", pool, ("mean", "token"))
    if round(mlp_ratio * width) < 1:
        raise ConfigError(
            f"model vit with width {width} and mlp_ratio {mlp_ratio:g} has no feature inside its MLP. Use a larger "
            "model.mlp_ratio; the published one is 4."
        )
    if image_size % patch_size:
        valid = ", ".join(str(n) for n in range(1, image_size + 1) if image_size % n == 0)
        raise ConfigError(
            f"model vit cuts images into patches of {patch_size}×{patch_size} pixels, and {image_size} is no multiple "
            f"of {patch_size}. Set model.patch_size to one of {valid}, or data.image_size to a multiple of "
            f"{patch_size}."
        )


def _make(
    norm: Norm,
    *,
    num_classes: int,
    image_size: int,
    width: int,
    patch_size: int = _PATCH,
    depth: int = _DEPTH,
    heads: int = 0,
    mlp_ratio: float = 4.0,
    pool: str = "mean",
) -> nn.Module:
    return ViT(
        norm,
        num_classes,
        image_size,
        width,
        patch_size=patch_size,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        pool=pool,
    )


SPEC = ModelSpec(
    name="vit",
    summary="Patches of 4×4, 6 pre-norm blocks of attention and MLP with 192 features, mean, a last norm, linear.",
    citation=Citation(
        title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        authors="Dosovitskiy et al.",
        year=2020,
        arxiv="2010.11929",
        where="ICLR 2021",
    ),
    make=_make,
    input_size=32,
    width=_WIDTH,
    verified=("timm's VisionTransformer, with its weights: equal in float64, with the mean and with the class token.",),
    deviations=(
        "Patches of 4×4 instead of 16×16 pixels, for images of 32×32 and 28×28.",
        "The width of the tiny size (arXiv 2012.12877) and half of its depth, for the same reason.",
        "The mean over the tokens, before the last norm, instead of a class token; pool = 'token' has it.",
        "No dropout; layer normalization's eps is the norm's own, 1e-5 (the paper's code: 1e-6).",
        "A norm that wants a layer before every nonlinearity (NaP) gets one between the MLP's first layer and its "
        "GELU as well.",
        "A norm with residual_alpha scales the residual branches after arXiv 2101.08692, which did not treat "
        "this network.",
    ),
)
