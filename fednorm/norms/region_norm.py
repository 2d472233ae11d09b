"""Region normalization, learnable form (RN-L): the foreground and the rest of a map have moments of their own.

Yu, Guo, Jin, Wu, Chen, Li, Zhang, Liu. Region Normalization for Image Inpainting. AAAI 2020.
https://arxiv.org/abs/1911.10375. Official code: geekyutao/RN, rn.py (``RN_L``).

    s = sigmoid(conv7(mean_c x, max_c x))               one map a sample; attention_weight, without a bias
    m = 1 where s >= threshold, else 0                  constant for the gradient
    r = (x - mean_R) / sqrt(var_R + eps n / n_R)        R is the position's region, m = 1 or m = 0; per channel, biased;
                                                        n positions in all, n_R of them in R
    y = r (1 + conv7(s)) + conv7(s)                     one scale and one shift a position, for all channels

``over`` says whose positions are a region's:

* ``batch`` (default): all samples', as published. There are no running moments: in **evaluation** too a sample's output
  depends on the others in its batch, and so on ``evaluate.batch_size``.
* ``sample``: each sample's own; training and evaluation are the same and a batch of one is like any other.

A map of a single position has no regions, and is refused. Features (N, C) have no positions at all: there the method
falls back to layer normalization, as instance_norm does. Tokens (N, C, L) are a line, with kernels of 7.
RN-B, whose regions are given, does not apply: a classifier has no mask of what is corrupted.

Federated: no statistics to disagree about; all tensors are shared by FedAvg, local under FedBN's rule. Continual:
nothing is carried over but what is learned. The method was published for inpainting, never for classification.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import DataError
from fednorm.norms._batch import check_spatial_dims
from fednorm.norms._features import require_features
from fednorm.norms._precision import in_full_precision, widened
from fednorm.norms.layer_norm import SampleLayerNorm
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

KERNEL = 7
"""Size of the three kernels; the official default."""

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class RegionNormLayer(nn.Module):
    """RN-L for maps (N, C, ...) with as many axes after C as it is made for, or fewer; layer norm of features (N, C).

    Args:
        num_channels: C.
        spatial_dims: Number of axes after C, 1 to 3.
        over: ``batch`` or ``sample``: whose positions are a region's.
        threshold: Of s, from which on a position is of the foreground.
        eps: Added to the variance.

    Attributes:
        path: The layer's path in its network, for errors; empty where it is not known.
    """

    def __init__(self, num_channels: int, spatial_dims: int, *, over: str, threshold: float, eps: float) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.over = over
        self.threshold = threshold
        self.eps = eps
        self.path = ""
        kernel = (KERNEL,) * spatial_dims
        self.attention_weight = nn.Parameter(torch.empty(1, 2, *kernel))
        self.scale_weight = nn.Parameter(torch.empty(1, 1, *kernel))
        self.scale_bias = nn.Parameter(torch.empty(1))
        self.shift_weight = nn.Parameter(torch.empty(1, 1, *kernel))
        self.shift_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernels as PyTorch draws those of its convolutions, which is what the official code does."""
        for weight in (self.attention_weight, self.scale_weight, self.shift_weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for bias, weight in ((self.scale_bias, self.scale_weight), (self.shift_bias, self.shift_weight)):
            bound = 1 / math.sqrt(weight.numel())
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong, or a map is a single position.
        """
        shape, dims = tuple(x.shape), self.attention_weight.ndim - 2
        if x.ndim == 2 and shape[1] == self.num_channels > 1:
            return functional.layer_norm(x, shape[1:], eps=self.eps)
        name = f"{type(self).__name__}{f' {self.path!r}' if self.path else ''}"
        if not 3 <= x.ndim <= dims + 2 or shape[1] != self.num_channels:
            axes = ", ".join("DHW"[-dims:] if dims > 1 else "L")
            raise DataError(f"{name} expects an input (N, {self.num_channels}, {axes}); got shape {shape}.")
        if math.prod(shape[2:]) == 1:
            raise DataError(
                f"{name} meets a map of one position, shape {shape}, which has no regions: region_norm tells the "
                "foreground of a map from the rest of it. Use larger images, a network that reduces them less, or "
                "batch_norm or layer_norm."
            )
        return self._regions(x.view(*shape[:2], *[1] * (dims + 2 - x.ndim), *shape[2:])).view_as(x)

    @in_full_precision
    def _regions(self, x: Tensor) -> Tensor:
        seen = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        attention = self._convolved(seen, self.attention_weight).sigmoid()
        mask = (attention.detach() >= self.threshold).to(x.dtype)
        normalized = self._of_region(x, mask) + self._of_region(x, 1 - mask)
        scale = self._convolved(attention, self.scale_weight, self.scale_bias)
        return torch.addcmul(self._convolved(attention, self.shift_weight, self.shift_bias), normalized, 1 + scale)

    def _of_region(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the normalized input where ``mask`` is 1, and 0 elsewhere; a region without a position is nothing."""
        axes = tuple(range(2, x.ndim)) if self.over == "sample" else (0, *range(2, x.ndim))
        size = math.prod(x.shape[axis] for axis in axes)
        count = mask.sum(axes, keepdim=True).clamp_min_(1)
        centred = (x - (x * mask).sum(axes, keepdim=True) / count) * mask
        var = centred.square().sum(axes, keepdim=True) / count
        return centred * (var + self.eps * size / count).rsqrt()

    def _convolved(self, maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        convolve = _CONVOLVE[weight.ndim - 2]
        return convolve(maps, widened(weight), None if bias is None else widened(bias), padding=KERNEL // 2)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, over={self.over}, threshold={self.threshold:g}, eps={self.eps:g}"


@dataclass(frozen=True, kw_only=True)
class RegionNorm(Norm):
    """Region normalization and its options.

    Attributes:
        over: ``batch`` (as published) or ``sample``: whose positions are a region's.
        threshold: Of s, from which on a position is of the foreground, in (0, 1].
        eps: Added to the variance, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    over: str = "batch"
    threshold: float = 0.8
    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.one_of("region_norm", "over", self.over, ("batch", "sample"))
        options.number("region_norm", "threshold", self.threshold, above=0, at_most=1)
        options.number("region_norm", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for maps, or layer normalization for features without positions (``spatial_dims`` 0).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("region_norm", spatial_dims)
        if spatial_dims == 0:
            require_features("region_norm", num_channels, spatial_dims)
            return SampleLayerNorm(num_channels, eps=self.eps)
        return RegionNormLayer(num_channels, spatial_dims, over=self.over, threshold=self.threshold, eps=self.eps)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Tell every layer its path, for its errors."""
        for path, module in model.named_modules():
            if isinstance(module, RegionNormLayer):
                module.path = path
        return model


SPEC = NormSpec(
    name="region_norm",
    summary="y = (x - mean_R) / sqrt(var_R + eps) * (1 + scale) + shift, R a map's foreground or the rest, as learned.",
    citation=Citation(
        title="Region Normalization for Image Inpainting",
        authors="Yu, Guo, Jin, Wu, Chen, Li, Zhang, Liu",
        year=2020,
        arxiv="1911.10375",
        where="learnable form (RN-L); official code geekyutao/RN, rn.py",
    ),
    make=RegionNorm,
    layers=(RegionNormLayer,),
    tensors={
        "attention_weight": TensorSpec(Kind.GATE),
        "scale_weight": TensorSpec(Kind.SCALE),
        "scale_bias": TensorSpec(Kind.SCALE),
        "shift_weight": TensorSpec(Kind.SHIFT),
        "shift_bias": TensorSpec(Kind.SHIFT),
    },
    batch_coupled=True,
    coupled_in_evaluation=True,
    scale_invariant=False,
    thresholds=True,
    deviations=(
        "Published for inpainting, and never evaluated on classification.",
        "Without running moments a sample's output depends on its batch in evaluation too, as published; over='sample' "
        "takes each sample's own moments.",
        "Features without positions fall back to layer normalization.",
        "Costs 15 to 25 times nn.BatchNorm2d on a CPU: two masked moments with their gradients, and three 7 x 7 "
        "convolutions of maps, for none of which there is a fused kernel.",
    ),
    verified=("its formula in float64, and the official code's arithmetic written out: a batch norm of a filled map.",),
)
