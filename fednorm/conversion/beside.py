"""What a norm brings beside its layers, put into a network: its attention, its residual sums, its nonlinearity.

Attention is replaced where it is softmax self-attention whose weights can be kept: fednorm's own, nn.MultiheadAttention
as torchvision's transformers have it, and any module with a ``qkv`` and a ``proj`` that computes the same, as timm's.
That is found out by what it computes: on random tokens it must give what ours gives with its weights. An attention that
cannot be replaced is refused with its path; where a foreign network adds its residual branches cannot be seen.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from fednorm.blocks import Attention, Sum
from fednorm.conversion.report import ConversionReport
from fednorm.conversion.surroundings import named
from fednorm.errors import ConfigError, DataError
from fednorm.norms.residual_scale import ScaledResidual
from fednorm.recognition.buffers import quietly
from fednorm.rng import torch_stream
from fednorm.spec import Norm

REPLACED = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus, nn.Tanh),
)
"""Nonlinearities of hidden layers, which a norm with its own takes the place of; gates such as nn.Sigmoid stay."""

_UNKNOWN_GRID = (0, 0)
_TOKENS = 5
"""Tokens on which a foreign attention is compared with ours."""


class SelfAttention(nn.Module):
    """A norm's attention in the place of one that takes tokens and, it may be, a mask: timm's.

    Args:
        attention: What computes.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map tokens (N, L, C) to (N, L, C).

        Raises:
            DataError: There is a mask.
        """
        _require_no_mask(type(self.attention).__name__, (*args, *kwargs.values()))
        y: Tensor = self.attention(tokens)
        return y


class MultiheadSelfAttention(nn.Module):
    """A norm's attention in the place of ``nn.MultiheadAttention``, for queries, keys and values that are one tensor.

    Args:
        attention: What computes.
        batch_first: Whether tokens are (N, L, C) instead of (L, N, C).
    """

    # What PyTorch's transformer layers look at before they take a fused path: this sends them past it.
    in_proj_bias = None

    def __init__(self, attention: Attention, *, batch_first: bool) -> None:
        super().__init__()
        self.attention = attention
        self.batch_first = batch_first
        self.num_heads = attention.heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Return the output, and None where nn.MultiheadAttention has its weights.

        Raises:
            DataError: The three are not one tensor, or there is a mask.
        """
        del need_weights, average_attn_weights
        name = type(self.attention).__name__
        if key is not query or value is not query:
            raise DataError(f"{name} is self-attention, and query, key and value are not one tensor.")
        _require_no_mask(name, (key_padding_mask, attn_mask, is_causal))
        tokens = query if self.batch_first else query.transpose(0, 1)
        y: Tensor = self.attention(tokens)
        return y if self.batch_first else y.transpose(0, 1), None


def _require_no_mask(name: str, values: tuple[Any, ...]) -> None:
    if any(value is not None and value is not False for value in values):
        raise DataError(f"{name} takes no mask: every token sees all others. Call the network without one.")


class Beside:
    """Replaces, in one network, what a norm brings beside its layers.

    Args:
        norm: The norm.
        model: The network before anything is replaced.
        report: What was done is written there.
    """

    def __init__(self, norm: Norm, model: nn.Module, report: ConversionReport) -> None:
        self.norm = norm
        self.report = report
        self.branches = sum(isinstance(module, Sum | ScaledResidual) for module in model.modules())

    @property
    def replaced(self) -> bool:
        """Whether anything was replaced."""
        report = self.report
        return bool(report.attentions or report.residuals or (self.norm.brings_activation and report.activations))

    def replacement(self, module: nn.Module, path: str) -> nn.Module | None:
        """Return what stands for a module; None where it stays.

        Raises:
            ConfigError: It is an attention whose weights the norm's cannot keep.
        """
        for paths, new in (
            (self.report.attentions, self._attention(module, path)),
            (self.report.residuals, self._residual(module)),
            (self.report.activations, self._activation(module)),
        ):
            if new is not None:
                paths.append(path)
                return new
        return None

    def _attention(self, module: nn.Module, path: str) -> nn.Module | None:
        """Return what stands for an attention; None where it stays, or the module is none.

        Raises:
            ConfigError: It is an attention whose weights the norm's cannot keep.
        """
        if isinstance(module, Attention):
            return self._own(module, path)
        if not self.norm.brings_attention:
            return None
        if isinstance(module, nn.MultiheadAttention):
            return self._multihead(module, path)
        return self._foreign(module, path) if _has_heads(module) else None

    def _residual(self, module: nn.Module) -> nn.Module | None:
        """Return what stands for one of fednorm's residual sums; None where it stays, or the module is none."""
        if not isinstance(module, Sum | ScaledResidual):
            return None
        new = self.norm.residual(self.branches) or Sum()
        if type(new) is type(module) and vars(new).get("scale") == vars(module).get("scale"):
            return None
        return new.to(next((p.device for p in module.parameters()), torch.device("cpu")))

    def _activation(self, module: nn.Module) -> nn.Module | None:
        """Return the norm's own nonlinearity for one of PyTorch's; None where it has none, or the module is none."""
        if not self.norm.brings_activation or not isinstance(module, REPLACED) or isinstance(module, nn.SELU):
            return None
        return self.norm.activation("relu")

    def _own(self, old: Attention, path: str) -> Attention | None:
        new = self._built(old, old.width, old.heads, old.grid, path)
        if type(new) is type(old) and new.extra_repr() == old.extra_repr():
            return None
        if new.parts != old.parts:
            raise ConfigError(
                f"Attention {named(path, old)} makes {old.parts} parts of a token, and {type(new).__name__} "
                f"{new.parts}, so that its weights cannot be kept. Build the model with the norm in the first place."
            )
        if type(new) is type(old):
            new.load_state_dict(old.state_dict())
        new.qkv, new.proj = old.qkv, old.proj
        return new

    def _multihead(self, old: nn.MultiheadAttention, path: str) -> nn.Module:
        plain = old._qkv_same_embed_dim and old.bias_k is None and not old.add_zero_attn
        if not plain or old.dropout:
            raise self._refusal(old, path, "has keys or values of its own, or dropout of attention weights,")
        new = self._built(old, old.embed_dim, old.num_heads, _UNKNOWN_GRID, path)
        self._require_parts(new, old, path)
        new.qkv.weight = old.in_proj_weight
        _give_bias(new.qkv, old.in_proj_bias)
        new.proj = old.out_proj
        return MultiheadSelfAttention(new, batch_first=old.batch_first)

    def _foreign(self, old: nn.Module, path: str) -> nn.Module:
        qkv, proj = cast(nn.Linear, old.qkv), cast(nn.Linear, old.proj)
        if not _is_softmax_attention(old):
            raise self._refusal(old, path, "does not compute plain softmax self-attention over all tokens,")
        if any(isinstance(child, nn.Dropout) and child.p for child in old.children()):
            raise self._refusal(old, path, "has dropout,")
        new = self._built(old, qkv.in_features, cast(int, old.num_heads), _UNKNOWN_GRID, path)
        self._require_parts(new, old, path)
        new.qkv, new.proj = qkv, proj
        return SelfAttention(new)

    def _built(self, old: nn.Module, width: int, heads: int, grid: tuple[int, int], path: str) -> Attention:
        """Build the norm's attention: where the old one is, of its type, and trained as it is."""
        try:
            new = self.norm.attention(width, heads, grid)
        except ConfigError as error:
            raise ConfigError(f"Attention {named(path, old)}: {error}") from error
        like = next(old.parameters())
        new.requires_grad_(any(parameter.requires_grad for parameter in old.parameters()))
        return new.to(device=like.device, dtype=like.dtype)

    def _require_parts(self, new: Attention, old: nn.Module, path: str) -> None:
        if new.parts != Attention.parts:
            raise self._refusal(old, path, f"makes {Attention.parts} parts of a token instead of {new.parts},")

    def _refusal(self, old: nn.Module, path: str, why: str) -> ConfigError:
        return ConfigError(
            f"Attention {named(path, old)} {why} so that {type(self.norm).__name__} cannot take its place with its "
            "weights kept. Build fednorm's own transformer with it (--model vit), or convert to a norm that is a layer."
        )


def _has_heads(module: nn.Module) -> TypeGuard[nn.Module]:
    """Return whether a module is built like an attention with one linear layer for queries, keys and values."""
    heads, qkv, proj = (getattr(module, name, None) for name in ("num_heads", "qkv", "proj"))
    return type(heads) is int and isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)


@torch.no_grad()
def _is_softmax_attention(module: nn.Module) -> bool:
    """Return whether a module gives what softmax self-attention gives with its weights, on random tokens."""
    qkv, proj, heads = cast(nn.Linear, module.qkv), cast(nn.Linear, module.proj), cast(int, module.num_heads)
    width = qkv.in_features
    if (qkv.out_features, proj.in_features, proj.out_features) != (3 * width, width, width) or width % heads:
        return False
    ours = Attention(width, heads, _UNKNOWN_GRID)
    ours.qkv, ours.proj = qkv, proj
    tokens = torch.randn(2, _TOKENS, width, generator=torch_stream(0, "attention")).to(qkv.weight)
    training = [(inner, inner.training) for inner in module.modules()]
    try:
        with quietly():
            theirs = module.eval()(tokens)
    except Exception:  # a stranger's forward pass may want anything
        return False
    finally:
        for inner, mode in training:
            inner.training = mode
    if not isinstance(theirs, Tensor) or theirs.shape != tokens.shape:
        return False
    return tokens.is_meta or bool(torch.allclose(ours.eval()(tokens), theirs, rtol=1e-3, atol=1e-5))


def _give_bias(linear: nn.Linear, bias: Tensor | None) -> None:
    if bias is not None:
        linear.bias = cast(nn.Parameter, bias)
    else:
        nn.init.zeros_(linear.bias)
