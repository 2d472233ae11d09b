"""Replay of the exact Pre-RMSNorm rewrite: a transformer in its three forms, and the layers that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm.conversion import convert
from fednorm.conversion.replacement import ChannelsLast
from fednorm.norms._zero_mean import ZeroMeanLinear, centred, whole
from fednorm.norms.crms_norm import CRMSNormLayer
from fednorm.norms.layer_norm import ChannelLayerNorm
from fednorm.norms.rms_norm import RMSNormLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace

_LAYERS: Mapping[str, Callable[[int, float], nn.Module]] = {
    "layer_norm": lambda features, eps: ChannelLayerNorm(features, eps=eps),
    "rms_norm": lambda features, eps: RMSNormLayer(features, over="channels", eps=eps),
    "crms_norm": lambda features, eps: CRMSNormLayer(features, eps=eps),
}
_OFFICIAL = {"CustomizedLayerNorm": "layer_norm", "RMSNorm": "rms_norm", "CRMSNorm": "crms_norm"}
_PRODUCERS = ("patch_linear", "att_out_linear", "mlp_out_linear")
_EMBEDDINGS = ("pos_embedding", "cls_token")
_CONSUMERS = ("att_in_linear", "mlp_in_linear", "cls_head_linear")


def _is_transformer(trace: Trace) -> bool:
    keys = {"x_patches", "pre_ln.patch_linear_weight", "out.pre_ln", "out.pre_rms", "out.pre_crms"}
    return {"depth", "dim", "heads", "dim_head", "eps_in_model"} <= set(trace.hparams) and keys <= set(trace.arrays)


def _is_linear(trace: Trace) -> bool:
    keys = {"weight", "bias", "x", "gy", "y", "module_x_float32", *(f"module_y_float32.{name}" for name in _OFFICIAL)}
    return {"in_features", "out_features", "eps"} <= set(trace.hparams) and keys <= set(trace.arrays)


class _Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), the norms without scale and shift."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_dim: int, eps: float) -> None:
        super().__init__()
        self.shape = (3, heads, dim_head)
        self.norm1 = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.att_in_linear = nn.Linear(dim, 3 * heads * dim_head)
        self.att_out_linear = nn.Linear(heads * dim_head, dim)
        self.mlp_in_linear = nn.Linear(dim, mlp_dim)
        self.mlp_out_linear = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream (N, L, d) after the block."""
        q, k, v = self.att_in_linear(self.norm1(x)).unflatten(-1, self.shape).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.att_out_linear(heads.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp_out_linear(F.gelu(self.mlp_in_linear(self.norm2(x))))
        return y


class _Transformer(nn.Module):
    """The trace's transformer, with its names; the parameters of all blocks stand in one tensor there."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        dim, heads, dim_head, mlp_dim = (int(trace.setting(n)) for n in ("dim", "heads", "dim_head", "mlp_dim"))
        patch, eps = trace.tensor("pre_ln.patch_linear_weight"), float(trace.setting("eps_in_model"))
        self.patch_linear = nn.Linear(patch.shape[1], patch.shape[0])
        self.pos_embedding = nn.Parameter(trace.tensor("pre_ln.pos_embedding"))
        self.cls_token = nn.Parameter(trace.tensor("pre_ln.cls_token"))
        self.blocks = nn.Sequential(
            *(_Block(dim, heads, dim_head, mlp_dim, eps) for _ in range(int(trace.setting("depth"))))
        )
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.cls_head_linear = nn.Linear(dim, int(trace.setting("num_classes")))
        self.double()
        for path, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                index, _, name = path.removeprefix("blocks.").rpartition(".")
                for key, parameter in layer.named_parameters():
                    tensor = trace.tensor(f"pre_ln.{name}_{key}")
                    parameter.data = tensor[int(index)] if index else tensor

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (N, K) of flattened patches (N, L, P)."""
        x = self.patch_linear(patches) + self.pos_embedding
        x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))
        logits: Tensor = self.cls_head_linear(self.norm(x)[:, 0])
        return logits


def _layers(trace: Trace) -> Iterator[Comparison]:
    for eps in (name.removesuffix(".x") for name in trace.names("norm.") if name.count(".") == 1 and name[-2:] == ".x"):
        case = f"norm.{eps}"
        for name, make in _LAYERS.items():
            x = trace.tensor(f"{case}.x").requires_grad_()
            y = ChannelsLast(make(x.shape[-1], float(eps.removeprefix("eps"))).double())(x)
            (y * trace.tensor(f"{case}.gy")).sum().backward()
            assert x.grad is not None
            yield Comparison(f"{case}.{name}.y", y.detach(), trace.tensor(f"{case}.{name}.y"))
            yield Comparison(f"{case}.{name}.grad_x", x.grad, trace.tensor(f"{case}.{name}.grad_x"))


def _weights(trace: Trace) -> Iterator[Comparison]:
    """Compare what the rewrite computes with, layer by layer, with the weights that the official code changed once."""
    for form, shorten in (("pre_rms", False), ("pre_crms", True)):
        for name in trace.names(f"{form}."):
            value = trace.tensor(f"pre_ln.{name}")
            layer, _, tensor = name.rpartition("_")
            if name in _EMBEDDINGS or (layer in _PRODUCERS and tensor == "bias"):
                value = centred(value, -1, shorten=shorten)
            elif layer in _PRODUCERS:
                value = centred(value, -2, shorten=shorten)
            elif layer in _CONSUMERS and tensor == "weight" and shorten:
                # W whole(x) as one matrix: what it makes of each stored entry alone.
                value = (whole(torch.eye(value.shape[-1] - 1, dtype=value.dtype)) @ value.mT).mT
            yield Comparison(f"{form}.{name}", value, trace.tensor(f"{form}.{name}"))


def _replay_transformer(trace: Trace) -> Iterator[Comparison]:
    yield from _layers(trace)
    yield from _weights(trace)
    model, patches = _Transformer(trace), trace.tensor("x_patches")
    with torch.no_grad():
        yield Comparison("out.pre_ln", model(patches), trace.tensor("out.pre_ln"))
        for form, norm in (("pre_rms", "rms_norm"), ("pre_crms", "crms_norm")):
            converted = convert(model, norm, exact=True, example_inputs=patches)
            yield Comparison(f"out.{form}", converted(patches), trace.tensor(f"out.{form}"))
        for name, parameter in model.named_parameters():
            layer = name.rpartition(".")[0]
            if name in _EMBEDDINGS:
                parameter.copy_(centred(parameter, -1, shorten=False))
            elif layer.rpartition(".")[2] in _PRODUCERS:
                parameter.copy_(centred(parameter, 0, shorten=False))
        yield Comparison("out.pre_ln_zero_mean", model(patches), trace.tensor("out.pre_ln_zero_mean"))


def _replay_linear(trace: Trace) -> Iterator[Comparison]:
    layer = ZeroMeanLinear(trace.setting("in_features"), trace.setting("out_features")).double()
    layer.weight.data, layer.bias.data = trace.tensor("weight"), trace.tensor("bias")
    x = trace.tensor("x").requires_grad_()
    y = layer(x)
    (y * trace.tensor("gy")).sum().backward()
    ours = {"y": y.detach(), "grad_x": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    for name, value in ours.items():
        assert value is not None
        yield Comparison(name, value, trace.tensor(name))
    x = trace.tensor("module_x_float32")
    for official, name in _OFFICIAL.items():
        key = f"module_y_float32.{official}"
        norm = _LAYERS[name](x.shape[-1], float(trace.setting("eps"))).to(x.dtype)
        with torch.no_grad():
            yield Comparison(key, norm(x), trace.tensor(key), single=True)


FAMILIES = (
    Family(method="rms_norm and crms_norm (exact rewrite)", matches=_is_transformer, replay=_replay_transformer),
    Family(method="rms_norm and crms_norm (zero-mean linear layer)", matches=_is_linear, replay=_replay_linear),
)
