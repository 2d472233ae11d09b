"""The contract of every normalization method: one suite, parametrized over the registry and the methods' variants."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fednorm.cards import NORMS
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.federation.plan import norm_plan
from fednorm.norms import make_norm, spec_of
from fednorm.roles import LEARNED, STATISTICS, Kind, RoleRule
from fednorm.spec import Norm

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adab2n": ("adab2n", {}),
    "affine_scaled_attention": ("affine_scaled_attention", {}),
    "anfr": ("anfr", {}),
    "anfr-se": ("anfr", {"gate": "se", "gate_gain": 1.0}),
    "batch_channel_norm": ("batch_channel_norm", {}),
    "batch_channel_norm-plain": ("batch_channel_norm", {"weight_standardization": False, "num_groups": 3}),
    "batch_norm": ("batch_norm", {}),
    "batch_norm_corrected": ("batch_norm_corrected", {}),
    # r and d are constant for the gradient: bounds that stay at 1 and 0 leave the plain derivative to compare.
    "batch_renorm": ("batch_renorm", {"growth": 1e-12}),
    "bhyt": ("bhyt", {}),
    "continual_norm": ("continual_norm", {}),
    "continual_norm-3": ("continual_norm", {"num_groups": 3}),
    "crms_norm": ("crms_norm", {}),
    "dyt": ("dyt", {}),
    "gated_norm": ("gated_norm", {}),
    "group_norm": ("group_norm", {}),
    "group_norm-3": ("group_norm", {"num_groups": 3}),
    "hybrid_bn": ("hybrid_bn", {}),
    "instance_norm": ("instance_norm", {}),
    "l1_norm": ("l1_norm", {}),
    "layer_norm": ("layer_norm", {}),
    "layer_norm-channels": ("layer_norm", {"over": "channels"}),
    "layer_norm_channels": ("layer_norm_channels", {}),
    "nalaformer": ("nalaformer", {}),
    "nap": ("nap", {}),
    "nap-channels": ("nap", {"over": "channels", "offset": False}),
    "nap-rms_norm": ("nap", {"statistics": "rms_norm", "offset": False}),
    "none": ("none", {}),
    "pre_affine": ("pre_affine", {}),
    "power_norm": ("power_norm", {}),
    "power_norm-3": ("power_norm", {"num_groups": 3}),
    "region_norm": ("region_norm", {"threshold": 0.5}),
    "region_norm-sample": ("region_norm", {"over": "sample", "threshold": 0.5}),
    "rms_norm": ("rms_norm", {}),
    "rms_norm-channels": ("rms_norm", {"over": "channels"}),
    "seednorm": ("seednorm", {}),
    "seednorm-3": ("seednorm", {"num_heads": 3, "divide": True}),
    "residual_scale": ("residual_scale", {}),
    "selu": ("selu", {}),
    "sws": ("sws", {}),
    "sws-add": ("sws", {"floor": "add", "eps": 1e-6}),
    "sws-unbiased": ("sws", {"unbiased": True, "gain": False, "activation_gain": False}),
    "switch_norm": ("switch_norm", {}),
    "task_balanced_norm": ("task_balanced_norm", {}),
    "weight_compander": ("weight_compander", {}),
    "weight_compander-fixed": ("weight_compander", {"a": 2.0, "b": 0.5, "learned": False}),
    "unified_norm": ("unified_norm", {}),
    # One batch, and so nothing but itself: with a window of 1 the backward pass is that of the forward pass.
    "unified_norm-1": ("unified_norm", {"window": 1}),
    "ws_group_norm": ("ws_group_norm", {}),
    "ws_group_norm-deviation": ("ws_group_norm", {"eps_on": "deviation", "eps": 1e-3, "unbiased": False}),
}
OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "adab2n": {"eps": 0.5, "momentum": 0.7, "kappa": 0.9, "lambd": 0.5, "num_tasks": 3, "ada_t0": 1, "corrected": True},
    "affine_scaled_attention": {"beside": "rms_norm", "phi": "sigmoid", "rho": 0.5, "alpha_ma_init": 1.0},
    "anfr": {
        "eps": 50.0,
        "floor": "add",
        "unbiased": True,
        "gain": False,
        "activation_gain": False,
        "alpha": 0.0,
        "gate": "se",
        "gate_gain": 1.0,
    },
    "batch_channel_norm": {
        "eps": 0.5,
        "momentum": 0.7,
        "num_groups": 3,
        "statistics": "estimate",
        "weight_standardization": False,
        "moving_speed": 0.5,
    },
    "batch_norm": {"eps": 0.5, "momentum": 0.7},
    "batch_norm_corrected": {"eps": 0.5, "momentum": 0.7, "kappa": 0.9},
    "batch_renorm": {"eps": 0.5, "momentum": 0.7, "r_max": 1.0, "d_max": 0.0, "growth": 0.1},
    "bhyt": {"lambd_init": 3.0, "kappa": 5.0, "eps": 0.5},
    "continual_norm": {"eps": 0.5, "momentum": 0.7, "num_groups": 3},
    "crms_norm": {"eps": 0.5},
    "dyt": {"alpha_init": 0.8},
    "gated_norm": {"rank": 3, "gate_scale": 1.0, "eps": 0.5},
    "group_norm": {"eps": 0.5, "num_groups": 3},
    "hybrid_bn": {"eps": 0.5, "momentum": 0.7},
    "instance_norm": {"eps": 0.5, "affine": False},
    "l1_norm": {"over": "sample", "eps": 0.5, "momentum": 0.7},
    "layer_norm": {"eps": 0.5, "over": "channels"},
    "layer_norm_channels": {"eps": 0.5},
    "nalaformer": {"beside": "batch_norm", "sharpness": 1.0},
    "nap": {
        "statistics": "rms_norm",
        "over": "channels",
        "offset": False,
        "affine": "joint",
        "decay": 0.5,
        "every": 2,
        "eps": 0.5,
    },
    "none": {},
    "pre_affine": {"eps": 0.5},
    "power_norm": {
        "eps": 0.5,
        "num_groups": 3,
        "alpha_fwd": 0.5,
        "alpha_bkw": 0.5,
        "warmup_iters": 1,
        "backward_scale": "running",
    },
    "region_norm": {"eps": 0.5, "over": "sample", "threshold": 0.5},
    "rms_norm": {"eps": 0.5, "over": "channels"},
    "seednorm": {"num_heads": 3, "alpha_init": 0.5, "divide": True, "dropout": 0.5, "eps": 0.5},
    "residual_scale": {"beside": "layer_norm", "scale": "skipinit"},
    "selu": {"dropout": 0.5, "initialization": "model"},
    "sws": {"eps": 50.0, "floor": "add", "unbiased": True, "gain": False, "activation_gain": False, "alpha": 0.0},
    "switch_norm": {"eps": 0.5, "momentum": 0.7},
    "task_balanced_norm": {"eps": 0.5, "momentum": 0.7, "batch_ratio": 1},
    "weight_compander": {"a": 2.0, "b": 0.5, "learned": False},
    "unified_norm": {
        "eps": 0.5,
        "momentum": 0.7,
        "window": 1,
        "backward_window": 2,
        "warmup_iters": 1,
        "outlier_filtration": False,
    },
    "ws_group_norm": {"eps": 0.5, "group_eps": 0.5, "num_groups": 3, "eps_on": "deviation", "unbiased": False},
}
"""For every option of every method, a value that is not its default."""
NEEDS_TASKS = {
    ("adab2n", "lambd"), ("adab2n", "num_tasks"), ("adab2n", "ada_t0"), ("adab2n", "corrected"),
    ("task_balanced_norm", "batch_ratio"), ("nap", "affine"), ("nap", "decay"), ("nap", "every"),
    ("weight_compander", "learned"),
    ("affine_scaled_attention", "phi"), ("affine_scaled_attention", "rho"), ("selu", "initialization"),
    ("affine_scaled_attention", "alpha_ma_init"), ("nalaformer", "sharpness"), ("residual_scale", "scale"),
    ("power_norm", "alpha_bkw"), ("power_norm", "backward_scale"), ("unified_norm", "backward_window"),
    ("unified_norm", "window"), ("unified_norm", "warmup_iters"), ("unified_norm", "outlier_filtration"),
    ("batch_channel_norm", "moving_speed"),
}  # fmt: skip
"""Options that act through the training step, attention, residual sums or initial weights; the methods' own tests show
that each does."""

UNSHIFTED = frozenset({
    "anfr", "bhyt", "crms_norm", "gated_norm", "none", "pre_affine", "residual_scale", "rms_norm", "seednorm", "selu",
    "sws", "weight_compander",
})  # fmt: skip
"""Methods that put no shift after a convolution."""
APPROXIMATE = ("power_norm", "power_norm-3", "unified_norm")
"""Variants whose published backward pass is not the gradient of the forward pass."""
UNCENTRED = ("dyt", "hybrid_bn", "power_norm", "unified_norm", "region_norm")
"""Methods that leave something of a constant input, though they have a bias."""
LATER = {"power_norm": {"ema_gz"}, "unified_norm": {"ema_gz", "buffer_gz", "skip_counter"}}
"""Statistics that a single forward pass does not move: of gradients, and of outliers."""

Reference = Callable[[Tensor, nn.Module], Tensor]
C_IN, C = 4, 6


@pytest.fixture(params=VARIANTS)
def norm(request: pytest.FixtureRequest) -> Norm:
    name, options = VARIANTS[request.param]
    return make_norm(name, options)


def card(norm: Norm) -> Any:
    return next(spec for spec in NORMS if spec.make is type(norm))


def unit(norm: Norm, spatial_dims: int = 2) -> nn.Sequential:
    """Build a convolution (a linear layer for features), what follows it, and the nonlinearity, in float64."""
    torch.manual_seed(0)
    before = norm.conv(C_IN, C, 3, padding=1, groups=2, bias=False) if spatial_dims == 2 else nn.Linear(C_IN, C)
    module = nn.Sequential(before, norm.layer(C, spatial_dims), norm.activation("gelu")).double()
    for parameter in module.parameters():  # away from the initial ones and zeros, which hide errors
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


class OnMaps(nn.Module):
    """Attention between the positions of a map."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x.flatten(2).mT)
        return y.mT.reshape(x.shape)


def whole(norm: Norm) -> nn.Sequential:
    """Build a unit, behind attention where the method brings one."""
    module = unit(norm)
    if norm.brings_attention:
        module.insert(0, OnMaps(norm.attention(C_IN, 1, (4, 4))).double())
    return module


def images(n: int = 5, size: int = 4) -> Tensor:
    return torch.randn(n, C_IN, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def features(n: int = 5) -> Tensor:
    return torch.randn(n, C_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# What each method computes, written out from the papers' formulas.


def moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    return mean, ((x - mean) ** 2).mean(axes, keepdim=True)


def affine(x: Tensor, layer: nn.Module) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    y: Tensor = x * layer.weight.view(shape)  # type: ignore[operator]
    return y if getattr(layer, "bias", None) is None else y + layer.bias.view(shape)  # type: ignore[operator, union-attr]


def reference_batch_norm(x: Tensor, layer: nn.Module) -> Tensor:
    mean, var = moments(x, (0, *range(2, x.ndim)))
    return affine((x - mean) / (var + 1e-5).sqrt(), layer)


def reference_groups(groups: int) -> Callable[[Tensor, nn.Module], Tensor]:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        grouped = x.reshape(len(x), groups, -1)
        mean, var = moments(grouped, (2,))
        return affine(((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape), layer)

    return reference


def reference_channels(x: Tensor, layer: nn.Module) -> Tensor:
    mean, var = moments(x, (1,))
    return affine((x - mean) / (var + 1e-5).sqrt(), layer)


def reference_instance(x: Tensor, layer: nn.Module) -> Tensor:
    if x.ndim == 2:
        return reference_groups(1)(x, layer)
    mean, var = moments(x, tuple(range(2, x.ndim)))
    return affine((x - mean) / (var + 1e-5).sqrt(), layer)


def identity(x: Tensor, layer: nn.Module) -> Tensor:
    del layer
    return x


def reference_continual(groups: int) -> Callable[[Tensor, nn.Module], Tensor]:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        grouped = x.reshape(len(x), groups, -1)
        mean, var = moments(grouped, (2,))
        return reference_batch_norm(((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape), layer)

    return reference


def reference_switch(x: Tensor, layer: nn.Module) -> Tensor:
    axes = [(1,), (0,)] if x.ndim == 2 else [(2, 3), (1, 2, 3), (0, 2, 3)]
    mean, var = torch.zeros_like(x), torch.zeros_like(x)
    gates = zip(axes, layer.mean_weight.exp(), layer.var_weight.exp(), strict=True)  # type: ignore[operator, union-attr]
    for over, a, b in gates:
        one_mean, one_var = moments(x, over)
        mean = mean + a / layer.mean_weight.exp().sum() * one_mean  # type: ignore[operator, union-attr]
        var = var + b / layer.var_weight.exp().sum() * one_var  # type: ignore[operator, union-attr]
    return affine((x - mean) / (var + 1e-5).sqrt(), layer)


def reference_over(axes: Callable[[Tensor], tuple[int, ...]], *, centred: bool, eps: float) -> Reference:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        centre = x - x.mean(axes(x), keepdim=True) if centred else x
        y = centre / ((centre**2).mean(axes(x), keepdim=True) + eps).sqrt()
        return affine(y, layer)

    return reference


def reference_sample(*, centred: bool, eps: float) -> Reference:
    return reference_over(lambda x: tuple(range(1, x.ndim)), centred=centred, eps=eps)


def reference_position(*, centred: bool, eps: float) -> Reference:
    return reference_over(lambda _: (1,), centred=centred, eps=eps)


def reference_bhyt(x: Tensor, layer: nn.Module) -> Tensor:
    return affine((layer.lambd * x / (10 * ((x**2).mean(1, keepdim=True) + 1e-6).sqrt())).tanh(), layer)


def reference_crms(x: Tensor, layer: nn.Module) -> Tensor:
    whole = torch.cat([x, -x.sum(1, keepdim=True)], 1)  # the vector of which x is stored
    return affine(x / ((whole**2).mean(1, keepdim=True) + 1e-5).sqrt(), layer)


def reference_dyt(x: Tensor, layer: nn.Module) -> Tensor:
    return affine((layer.alpha * x).tanh(), layer)


def reference_gated(x: Tensor, layer: nn.Module) -> Tensor:
    y = reference_position(centred=False, eps=1e-5)(x, layer).movedim(1, -1)
    hidden = y @ layer.down.T  # type: ignore[operator]
    gate = 1 / (1 + (-(hidden / (1 + (-hidden).exp())) @ layer.up.T).exp())  # type: ignore[operator]
    return (2 * gate * y).movedim(-1, 1)


def reference_l1(x: Tensor, layer: nn.Module) -> Tensor:
    axes = (0, *range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    return affine(centred / (math.sqrt(math.pi / 2) * centred.abs().mean(axes, keepdim=True) + 1e-5), layer)


def reference_pre_affine(x: Tensor, layer: nn.Module) -> Tensor:
    scaled = x * layer.pre_weight.view(1, -1, *[1] * (x.ndim - 2))  # type: ignore[operator]
    return reference_position(centred=False, eps=1e-5)(scaled, layer)


def reference_seednorm(heads: int, *, divide: bool) -> Reference:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        last = x.movedim(1, -1)
        width = x.shape[1] // heads
        gains = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            s = (last[..., own] * layer.beta[own]).sum(-1, keepdim=True)  # type: ignore[index]
            s = (s / width if divide else s).tanh()
            gains.append(layer.weight[own] + layer.alpha[own] * s)  # type: ignore[index]
        y = torch.cat(gains, -1) * last / ((last**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return y.movedim(-1, 1)

    return reference


def reference_batch_channel(groups: int) -> Callable[[Tensor, nn.Module], Tensor]:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        grouped = reference_batch_norm(x, layer).reshape(len(x), groups, -1)
        mean, var = moments(grouped, (2,))
        y = (grouped - mean) / (var + 1e-5).sqrt() * layer.group_weight[:, None] + layer.group_bias[:, None]  # type: ignore[index]
        return y.reshape(x.shape)

    return reference


def reference_hybrid(x: Tensor, layer: nn.Module) -> Tensor:
    share = 1 / (1 + (-layer.distribution_factor).exp())  # type: ignore[operator]
    mean, var = moments(x, (0, *range(2, x.ndim)))
    shape = mean.shape  # a new layer's running moments are 0 and 1; each example draws a layer of its own
    mean, var = share.view(shape) * mean, 1 - share.view(shape) + share.view(shape) * var
    return affine((x - mean) / (var + 1e-5).sqrt(), layer)


def reference_anfr(kind: str, gain: float) -> Reference:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        if x.ndim == 2:
            return x
        s = x.mean((2, 3))
        if kind == "eca":
            k = layer.weight.shape[2]  # type: ignore[union-attr, index]
            padded = torch.cat([torch.zeros(len(s), k // 2), s, torch.zeros(len(s), k // 2)], 1)
            g = torch.stack([padded[:, c : c + k] @ layer.weight[0, 0] for c in range(x.shape[1])], 1)  # type: ignore[index]
        else:
            hidden = (s @ layer.down_weight.T + layer.down_bias).clamp(min=0)  # type: ignore[operator]
            g = hidden @ layer.up_weight.T + layer.up_bias  # type: ignore[operator]
        return x * (gain / (1 + (-g).exp())).view(*g.shape, 1, 1)

    return reference


def reference_power(groups: int) -> Callable[[Tensor, nn.Module], Tensor]:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        parts = x.reshape(len(x), groups, -1, *x.shape[2:])
        u = (parts / ((parts**2).mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        return affine(u / ((u**2).mean((0, *range(2, x.ndim)), keepdim=True) + 1e-5).sqrt(), layer)

    return reference


def reference_unified(x: Tensor, layer: nn.Module) -> Tensor:
    return affine(x / ((x**2).mean((0, *range(2, x.ndim)), keepdim=True) + 1e-5).sqrt(), layer)


def reference_region(over: str) -> Callable[[Tensor, nn.Module], Tensor]:
    def reference(x: Tensor, layer: nn.Module) -> Tensor:
        if x.ndim == 2:
            return reference_groups(1)(x, layer)
        conv = functional.conv2d
        seen = torch.stack((x.mean(1), x.max(1).values), 1)
        s = 1 / (1 + (-conv(seen, layer.attention_weight, padding=3)).exp())  # type: ignore[arg-type]
        y = torch.zeros_like(x)
        for rows in [slice(None)] if over == "batch" else [slice(i, i + 1) for i in range(len(x))]:
            for region in (s[rows, 0] >= 0.5, s[rows, 0] < 0.5):
                if region.any():
                    values = x[rows].movedim(1, -1)[region]  # (positions of the region, C)
                    mean, var = moments(values, (0,))
                    share = region.double().mean()
                    y[rows].movedim(1, -1)[region] = (values - mean) / (var + 1e-5 / share).sqrt()
        scale = conv(s, layer.scale_weight, layer.scale_bias, padding=3)  # type: ignore[arg-type]
        return y * (1 + scale) + conv(s, layer.shift_weight, layer.shift_bias, padding=3)  # type: ignore[arg-type]

    return reference


LAYER_REFERENCES: dict[str, Reference] = {
    "anfr": reference_anfr("eca", 2.0),
    "anfr-se": reference_anfr("se", 1.0),
    "bhyt": reference_bhyt,
    "crms_norm": reference_crms,
    "dyt": reference_dyt,
    "gated_norm": reference_gated,
    "l1_norm": reference_l1,
    "layer_norm_channels": reference_channels,
    "pre_affine": reference_pre_affine,
    "seednorm": reference_seednorm(1, divide=False),
    "seednorm-3": reference_seednorm(3, divide=True),
    "weight_compander": identity,
    "weight_compander-fixed": identity,
    "adab2n": reference_batch_norm,
    "affine_scaled_attention": reference_groups(1),
    "batch_channel_norm": reference_batch_channel(2),
    "batch_channel_norm-plain": reference_batch_channel(3),
    "hybrid_bn": reference_hybrid,
    "power_norm": reference_power(1),
    "power_norm-3": reference_power(3),
    "region_norm": reference_region("batch"),
    "region_norm-sample": reference_region("sample"),
    "unified_norm": reference_unified,
    "unified_norm-1": reference_unified,
    "batch_norm": reference_batch_norm,
    "batch_norm_corrected": reference_batch_norm,
    "batch_renorm": reference_batch_norm,
    "continual_norm": reference_continual(2),
    "continual_norm-3": reference_continual(3),
    "switch_norm": reference_switch,
    "task_balanced_norm": reference_batch_norm,
    "group_norm": reference_groups(2),
    "group_norm-3": reference_groups(3),
    "instance_norm": reference_instance,
    "layer_norm": reference_groups(1),
    "layer_norm-channels": reference_channels,
    "nalaformer": reference_groups(1),
    "nap": reference_sample(centred=True, eps=1e-8),
    "nap-channels": reference_position(centred=True, eps=1e-8),
    "nap-rms_norm": reference_sample(centred=False, eps=1e-8),
    "rms_norm": reference_sample(centred=False, eps=1e-5),
    "rms_norm-channels": reference_position(centred=False, eps=1e-5),
    "none": identity,
    "residual_scale": identity,
    "selu": identity,
    "sws": identity,
    "sws-add": identity,
    "sws-unbiased": identity,
    "ws_group_norm": reference_groups(2),
    "ws_group_norm-deviation": reference_groups(2),
}


def standardized(variant: str, conv: nn.Conv2d) -> Tensor:
    """Return what the method's convolution convolves with, one output channel at a time."""
    gains = getattr(conv, "gain", None)
    if variant == "weight_compander":
        return conv.log_a.exp() * torch.atan(conv.weight / conv.log_b.exp())  # type: ignore[operator]
    if variant == "weight_compander-fixed":
        return 2.0 * torch.atan(conv.weight / 0.5)
    kernels = []
    for index, kernel in enumerate(conv.weight):
        n = kernel.numel()
        centred = kernel - kernel.sum() / n
        square = (centred**2).sum()
        scale = {
            **dict.fromkeys(("sws", "anfr", "anfr-se"), 1 / (square / n * n).clamp_min(1e-4).sqrt()),
            "sws-add": 1 / ((square / n + 1e-6) * n).sqrt(),
            "sws-unbiased": 1 / (square / (n - 1) * n).clamp_min(1e-4).sqrt(),
            "ws_group_norm": 1 / (square / (n - 1) + 1e-5).sqrt(),
            "batch_channel_norm": 1 / (square / (n - 1) + 1e-5).sqrt(),
            "ws_group_norm-deviation": 1 / ((square / n).sqrt() + 1e-3),
        }.get(variant)
        kernels.append(kernel if scale is None else centred * scale * (1 if gains is None else gains[index]))
    return torch.stack(kernels)


@pytest.mark.few(4)
@settings(deadline=None, max_examples=15)
@given(n=st.integers(2, 5), height=st.integers(1, 4), width=st.integers(2, 4), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_its_formula_on_images(variant: str, n: int, height: int, width: int, seed: int) -> None:
    name, options = VARIANTS[variant]
    module = unit(make_norm(name, options))
    conv, layer, activation = module
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, C_IN, height, width, dtype=torch.float64, generator=generator) + 1
    convolved = functional.conv2d(x, standardized(variant, conv), conv.bias, padding=1, groups=2)
    torch.testing.assert_close(conv(x), convolved, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer(convolved), LAYER_REFERENCES[variant](convolved, layer), rtol=1e-8, atol=1e-10)
    gamma = 1.7015043497085571 if variant in ("sws", "sws-add", "anfr", "anfr-se") else 1.0
    expected = functional.selu(x) if variant == "selu" else gamma * functional.gelu(x)
    torch.testing.assert_close(activation(x), expected, rtol=1e-14, atol=0)


@settings(deadline=None, max_examples=15)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_its_formula_on_features(variant: str, n: int, seed: int) -> None:
    name, options = VARIANTS[variant]
    linear, layer, _ = unit(make_norm(name, options), spatial_dims=0)
    assert type(linear) is nn.Linear
    x = torch.randn(n, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(x), LAYER_REFERENCES[variant](x, layer), rtol=1e-8, atol=1e-10)


SHAPES = {"NC": (3, C), "NCL": (3, C, 5), "NCHW": (3, C, 2, 4), "NCDHW": (3, C, 2, 3, 2)}


def test_layer_keeps_shape_type_and_memory_layout(norm: Norm) -> None:
    for (kind, shape), dtype in itertools.product(SHAPES.items(), (torch.float32, torch.float64)):
        layer = norm.layer(C, len(shape) - 2).to(dtype)
        x = torch.randn(shape, dtype=dtype)
        y = layer(x)
        assert (kind, y.shape, y.dtype, y.is_contiguous()) == (kind, x.shape, x.dtype, True)
        if x.ndim == 4:
            last = x.to(memory_format=torch.channels_last)
            torch.testing.assert_close(layer.eval()(last), layer(x))


def test_one_sample_and_no_sample_evaluate(norm: Norm) -> None:
    module = unit(norm).eval()
    x = images(3)
    if not card(norm).coupled_in_evaluation or getattr(norm, "over", "") == "sample":
        torch.testing.assert_close(module(x[:1]), module(x)[:1], rtol=1e-10, atol=1e-12)
    assert module(x[:1]).isfinite().all()
    if not isinstance(module[1], nn.InstanceNorm2d):  # PyTorch's raises an IndexError on an empty batch
        assert module(x[:0]).shape == (0, C, 4, 4)


def test_constant_input_has_finite_output_and_gradient(norm: Norm) -> None:
    for spatial_dims, shape in ((0, (3, C)), (2, (3, C, 4, 4))):
        layer = norm.layer(C, spatial_dims).double()
        x = torch.full(shape, 7.0, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        bias = getattr(layer, "bias", None)
        if bias is not None and card(norm).name not in UNCENTRED:
            torch.testing.assert_close(y, torch.zeros_like(y))  # x - mean is 0 whichever axes the mean is over
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_constant_filters_have_finite_output_and_gradient(norm: Norm) -> None:
    conv = norm.conv(C_IN, C, 3)
    nn.init.constant_(conv.weight, 0.5)
    y = conv(images().float())
    y.square().sum().backward()
    assert y.isfinite().all()
    assert conv.weight.grad is not None
    assert conv.weight.grad.isfinite().all()


def test_gradients_are_those_of_the_forward_pass(norm: Norm) -> None:
    module = unit(norm)
    if card(norm).name == "hybrid_bn":
        module[1].momentum = 0.0  # else the function itself moves from call to call
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)  # type: ignore[no-any-return]

    def check(error: bool) -> bool:
        inputs = (images(3, 3).requires_grad_(), *parameters)
        return torch.autograd.gradcheck(forward, inputs, fast_mode=True, raise_exception=error)

    approximate = any(norm == make_norm(*VARIANTS[variant]) for variant in APPROXIMATE)
    assert check(error=not approximate) is not approximate


def test_every_owned_tensor_is_declared_with_a_fitting_kind(norm: Norm) -> None:
    for module in [*unit(norm).modules(), *unit(norm, spatial_dims=0).modules()]:
        spec = spec_of(module)
        if spec is None:
            assert not dict(module.named_buffers(recurse=False)), f"{module} has state and no card"
            continue
        for name, _ in module.named_parameters(recurse=False):
            assert spec.tensors[name].kind in LEARNED
        for name, _ in module.named_buffers(recurse=False):
            assert spec.tensors[name].kind in STATISTICS


@pytest.mark.parametrize("name", NORMS.names)
def test_every_declared_tensor_exists(name: str) -> None:
    spec = NORMS[name]
    assert spec.name == name
    owners: list[nn.Module] = list(unit(make_norm(name)).modules())
    if name == "instance_norm":  # running moments come only with foreign models
        owners.append(nn.InstanceNorm2d(C, affine=True, track_running_stats=True))
    owners.append(make_norm(name).conv(C, C, 3, bias=True))
    owners += [make_norm(name).attention(4, 1, (2, 2))]
    if "scale" in spec.options:
        owners += [m for m in [make_norm(name, {"scale": "skipinit"}).residual(3)] if m is not None]
    own = [m for m in owners if spec_of(m) is spec]
    assert bool(own) == bool(spec.layers)
    tensors = [*(m.named_parameters(recurse=False) for m in own), *(m.named_buffers(recurse=False) for m in own)]
    assert {key for named in tensors for key, _ in named} == set(spec.tensors)


def test_declared_batch_coupling_is_true_in_fact(norm: Norm) -> None:
    module = whole(norm).train()
    x = images()
    other = x.clone()
    other[0] += 1
    coupled = not torch.allclose(module(x)[1:], module(other)[1:], rtol=0, atol=1e-12)
    assert coupled == (card(norm).batch_coupled and getattr(norm, "over", "") != "sample")
    module.eval()
    coupled = not torch.allclose(module(x)[1:], module(other)[1:], rtol=0, atol=1e-12)
    assert coupled == (card(norm).coupled_in_evaluation and getattr(norm, "over", "") != "sample")


def test_declared_difference_of_training_and_evaluation_is_true_in_fact(norm: Norm) -> None:
    module = whole(norm)
    x = images()
    evaluated = module.eval()(x)  # before training, which moves statistics towards those of this very batch
    assert (not torch.allclose(module.train()(x), evaluated)) == card(norm).train_eval_differ


def test_declared_scale_invariance_is_true_in_fact(norm: Norm) -> None:
    if not card(norm).normalizes:
        return
    layer = unit(norm).train()[1]
    x = 30 * torch.randn(5, C, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 5
    other = copy.deepcopy(layer)
    same = torch.allclose(layer(x), other(3 * x), rtol=1e-4, atol=1e-4)
    assert same == card(norm).scale_invariant


def test_forward_passes_change_declared_statistics_in_training_and_nothing_else(norm: Norm) -> None:
    module = whole(norm)

    def changed() -> set[str]:
        before = copy.deepcopy(module.state_dict())
        module(images())
        return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}

    module.eval()
    assert changed() == set()
    module.train()
    plan = norm_plan(module, RoleRule())
    later = LATER.get(card(norm).name, set())
    statistics = {entry.key for entry in plan.entries if entry.kind in STATISTICS}
    assert changed() == {key for key in statistics if key.rpartition(".")[2] not in later}


def test_pickle_deepcopy_and_state_dict_keep_the_function(norm: Norm) -> None:
    module = whole(norm).eval()
    y = module(images())
    loaded = whole(norm).eval()
    loaded.load_state_dict(module.state_dict())
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(clone(images()), y)
    assert pickle.loads(pickle.dumps(norm)) == norm


def test_plan_covers_a_nested_model(norm: Norm) -> None:
    model = nn.ModuleDict({"stem": unit(norm), "deep": nn.Sequential(nn.Sequential(unit(norm, 0)), nn.Linear(C, 2))})
    plan = norm_plan(model, RoleRule())
    assert [entry.key for entry in plan.entries] == list(model.state_dict())
    assert {entry.kind for entry in plan.entries if entry.key.startswith("deep.1")} == {Kind.WEIGHT}


@pytest.mark.parametrize("name", NORMS.names)
def test_no_option_is_ignored(name: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(NORMS[name].make)}
    assert set(OTHER_OPTIONS[name]) == set(fields)
    for option, value in OTHER_OPTIONS[name].items():
        assert value != fields[option]
        default, other = make_norm(name), make_norm(name, {option: value})
        if (name, option) in NEEDS_TASKS:
            continue
        if option == "alpha":
            assert (default.residual_alpha, other.residual_alpha) == (0.2, None)
            continue
        outputs = []
        for norm in (default, other):
            module = unit(norm).train()
            module(images())
            outputs.append((module(2 * images()), module.eval()(images())))
        same = all(torch.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(*outputs, strict=True))
        assert not same, f"{name}.{option} changes nothing"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("batch_norm", {"eps": 0}, "batch_norm.eps must be greater than 0"),
        ("batch_norm", {"eps": math.nan}, "finite"),
        ("batch_norm", {"eps": "small"}, "must be a finite number; got 'small'"),
        ("batch_norm", {"momentum": 1.5}, "at most 1; got 1.5"),
        ("adab2n", {"kappa": -0.1}, "kappa must be 0 or more; got -0.1"),
        ("adab2n", {"kappa": 1.1}, "at most 1; got 1.1"),
        ("adab2n", {"lambd": -1}, "lambd must be 0 or more; got -1"),
        ("adab2n", {"num_tasks": 0}, "an integer of 1 or more; got 0"),
        ("adab2n", {"ada_t0": -1}, "an integer of 0 or more; got -1"),
        ("adab2n", {"corrected": "yes"}, "true or false; got 'yes'"),
        ("batch_norm_corrected", {"kappa": -1}, "kappa must be 0 or more; got -1"),
        ("batch_renorm", {"r_max": 0.5}, "r_max must be 1 or more and d_max 0 or more; got 0.5 and 5.0"),
        ("batch_renorm", {"growth": 0}, "greater than 0; got 0"),
        ("continual_norm", {"num_groups": 0}, "an integer of 1 or more; got 0"),
        ("batch_channel_norm", {"statistics": "both"}, "one of batch, estimate; got 'both'"),
        ("batch_channel_norm", {"moving_speed": 0}, "greater than 0 and at most 1; got 0"),
        ("batch_channel_norm", {"weight_standardization": 1}, "true or false; got 1"),
        ("hybrid_bn", {"momentum": 0}, "greater than 0 and at most 1; got 0"),
        ("power_norm", {"alpha_fwd": 1.0}, "power_norm.alpha_fwd is the share of the old .* between 0 and 1; got 1.0"),
        ("power_norm", {"alpha_bkw": 0}, "greater than 0; got 0"),
        ("power_norm", {"warmup_iters": -1}, "an integer of 0 or more; got -1"),
        ("power_norm", {"backward_scale": "paper"}, "one of batch, running; got 'paper'"),
        ("region_norm", {"over": "image"}, "one of batch, sample; got 'image'"),
        ("region_norm", {"threshold": 1.5}, "at most 1; got 1.5"),
        ("unified_norm", {"window": 0}, "an integer of 1 or more; got 0"),
        ("unified_norm", {"backward_window": -1}, "an integer of 0 or more; got -1"),
        ("unified_norm", {"outlier_filtration": 0}, "true or false; got 0"),
        ("task_balanced_norm", {"batch_ratio": 0.5}, "an integer of 1 or more; got 0.5"),
        ("group_norm", {"num_groups": 0}, "an integer of 1 or more; got 0"),
        ("group_norm", {"num_groups": 2.5}, "an integer of 1 or more; got 2.5"),
        ("layer_norm", {"over": "pixels"}, "one of sample, channels; got 'pixels'"),
        ("instance_norm", {"affine": 1}, "true or false; got 1"),
        ("rms_norm", {"over": "pixels"}, "one of sample, channels; got 'pixels'"),
        ("nap", {"statistics": "batch_norm"}, "one of layer_norm, rms_norm; got 'batch_norm'"),
        ("nap", {"affine": "decayed"}, "one of decay, joint, free; got 'decayed'"),
        ("nap", {"decay": 1.5}, "at most 1; got 1.5"),
        ("nap", {"decay": -0.5}, "nap.decay is the share of the old value that is kept, 0 to 1; got -0.5"),
        ("nap", {"every": 0}, "an integer of 1 or more; got 0"),
        ("nap", {"offset": 0}, "true or false; got 0"),
        ("anfr", {"gate": "cbam"}, "one of eca, se; got 'cbam'"),
        ("anfr", {"gate_gain": 0}, "greater than 0; got 0"),
        ("sws", {"floor": "min"}, "one of max, add; got 'min'"),
        ("sws", {"alpha": -0.2}, "0 \\(off\\) or more; got -0.2"),
        ("ws_group_norm", {"eps_on": "std"}, "one of variance, deviation; got 'std'"),
        ("bhyt", {"kappa": 0}, "bhyt.kappa must be greater than 0; got 0"),
        ("dyt", {"alpha_init": -0.5}, "dyt.alpha_init must be greater than 0; got -0.5"),
        ("gated_norm", {"rank": 0}, "gated_norm.rank must be an integer of 1 or more; got 0"),
        ("l1_norm", {"over": "pixels"}, "one of batch, sample, channels; got 'pixels'"),
        ("layer_norm_channels", {"over": "sample"}, "has no option 'over'"),
        ("seednorm", {"num_heads": -1}, "an integer of 0 or more; got -1"),
        ("seednorm", {"dropout": 1.0}, "at least 0 and less than 1; got 1.0"),
        ("weight_compander", {"a": 0}, "weight_compander.a must be greater than 0; got 0"),
        ("none", {"eps": 1e-5}, "has no option 'eps'"),
    ],
)
def test_bad_options_are_refused_in_words(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_norm(name, options)


def test_unknown_norm_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'batch_norm'"):
        make_norm("bach-norm")


@pytest.mark.parametrize("name", ["batch_channel_norm", "continual_norm", "group_norm", "power_norm", "ws_group_norm"])
def test_indivisible_channels_are_refused_with_the_valid_counts(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"has 15 channels and num_groups is 4\. Set num_groups to one of 1, 3, 5, 15"
    ):
        make_norm(name, {"num_groups": 4}).layer(15, 2)


def test_convolutions_have_the_biases_that_their_norm_needs(norm: Norm) -> None:
    conv = norm.conv(C_IN, C, 3, bias=False)
    assert (conv.bias is not None) == (card(norm).name in UNSHIFTED)


@pytest.mark.parametrize("name", NORMS.names)
def test_convolutions_keep_the_whole_geometry(name: str) -> None:
    geometry: dict[str, Any] = {
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": (1, 2),
        "groups": 2,
        "padding_mode": "reflect",
    }
    conv = make_norm(name).conv(C_IN, C, (3, 2), **geometry)
    plain = nn.Conv2d(C_IN, C, (3, 2), **geometry)
    assert conv(images(2, 6).float()).shape == plain(images(2, 6).float()).shape
    assert {key: getattr(conv, key) for key in geometry} == geometry
