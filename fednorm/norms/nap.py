"""NaP, Normalize-and-Project: a normalization before every nonlinearity, and weights that keep their initial norm.

Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney. Normalization and effective learning rates in
reinforcement learning. NeurIPS 2024. https://arxiv.org/abs/2407.01800 (Algorithm 1, section 3.3, appendices A.1, A.4)

    a_l = f(s * norm(W_l a_{l-1}) + m)
    W_l <- rho_l W_l / ||W_l||_F        after each update, with rho_l the initial ||W_l||_F

``norm`` is layer or RMS normalization; s and m have one entry per channel, shape (C,); W has no bias. Such a network
does not depend on the scale of W, gradients of W shrink as its norm grows, and they can only let it grow. Projecting
keeps the effective learning rate where the optimizer's schedule puts it. The output layer is free. Three parts:

* the layers, which a model gets where it asks for a norm: in our models, before each nonlinearity;
* :meth:`NaP.prepare` takes the biases off the layers that a NaP layer follows;
* :meth:`NaP.after_update` is the projection, with three treatments of s and m (:mod:`fednorm.optim.projection`).

``convert(model, "nap")`` puts NaP layers where an existing network has normalization layers. In one that has none it
inserts them before each nonlinearity that follows a weight layer. To keep a network's batch normalization and only
project its weights, use :class:`~fednorm.optim.projection.WeightProjection` on it; the paper would put a NaP layer
without offset before each batch normalization as well.

Train = eval; a batch of one works; no running statistics.

Federated: s and m are shared by FedAvg, local under FedBN's rule. Each client projects its own updates, all to the
initial radii; averaging shortens the weights, which no output shows, and the next round's first projection mends.
Continual: nothing is reset at an experience's boundary; the radii stay those of the start.
Differs: the paper does not say what a convolution's normalization is over (``over`` does, as for layer_norm), nor what
alpha is (``decay``). The radius of ``joint`` is sqrt(C) instead of 1. eps is small, for outputs are independent of the
weights' scale only while the variance is large against it. A schedule of the learning rate, in place of the decay that
growing norms amount to, is the run's business. Weight decay beside the projection acts on the output layer, s and m.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import per_channel
from fednorm.norms._features import require_features
from fednorm.norms.layer_norm import ChannelLayerNorm, SampleLayerNorm
from fednorm.norms.rms_norm import RMSNormLayer
from fednorm.optim.hidden import hidden_layers
from fednorm.optim.projection import DECAY, WeightProjection, check_options
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class NaPLayer(nn.Module):
    """What marks NaP's layers, beside the normalization that they are: :meth:`NaP.prepare` and the SPEC go by it."""


class NaPSampleLayerNorm(NaPLayer, SampleLayerNorm):
    """Layer normalization over (C, ...) of each sample.

    Args:
        num_channels: C.
        eps: Added to the variance.
        offset: Whether there is an offset.
    """

    def __init__(self, num_channels: int, *, eps: float, offset: bool) -> None:
        super().__init__(num_channels, eps=eps)
        if not offset:
            self.register_parameter("bias", None)


class NaPChannelLayerNorm(NaPLayer, ChannelLayerNorm):
    """Layer normalization over the channels of (N, C, ...), at each position by itself.

    Args:
        num_channels: C.
        eps: Added to the variance.
        offset: Whether there is an offset.
    """

    def __init__(self, num_channels: int, *, eps: float, offset: bool) -> None:
        super().__init__(num_channels, eps=eps)
        if not offset:
            self.register_parameter("bias", None)


class NaPRMSNorm(NaPLayer, RMSNormLayer):
    """RMS normalization, with an offset where asked for.

    Args:
        num_channels: C.
        over: ``sample`` or ``channels``: what the mean square is over.
        eps: Added to the mean square.
        offset: Whether there is an offset.
    """

    def __init__(self, num_channels: int, *, over: str, eps: float, offset: bool) -> None:
        super().__init__(num_channels, over=over, eps=eps)
        self.bias = nn.Parameter(torch.zeros(num_channels)) if offset else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        y = super().forward(x)
        return y if self.bias is None else y + per_channel(self.bias.to(y.dtype), y)


@dataclass(frozen=True, kw_only=True)
class NaP(Norm):
    """NaP and its options.

    Attributes:
        statistics: ``layer_norm`` (mean and variance) or ``rms_norm`` (mean square): what the layers normalize by.
        over: ``sample`` (over C and all positions) or ``channels`` (over C, at each position).
        offset: Whether the layers have an offset. Where they have none, nothing shifts: biases go all the same.
        affine: What is done to scale and offset after an update: ``decay``, ``joint`` or ``free``.
        decay: alpha, the share of scale and offset that an update keeps, in [0, 1]; the rest is 1 and 0.
        every: Project after each so many updates. The paper found every update and every 1,000 nearly alike.
        eps: Added to the variance or mean square, greater than 0; to be small against the projected scale.

    Raises:
        ConfigError: An option is out of range.
    """

    statistics: str = "layer_norm"
    over: str = "sample"
    offset: bool = True
    affine: str = "decay"
    decay: float = DECAY
    every: int = 1
    eps: float = 1e-8

    def __post_init__(self) -> None:
        options.one_of("nap", "statistics", self.statistics, ("layer_norm", "rms_norm"))
        options.one_of("nap", "over", self.over, ("sample", "channels"))
        options.flag("nap", "offset", self.offset)
        options.number("nap", "eps", self.eps, above=0)
        check_options("nap", self.affine, self.decay, self.every)

    @property
    def on_tokens(self) -> NaP:
        """The method with moments over the features of each token by itself."""
        return replace(self, over="channels")

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a NaP layer over C channels; it takes any number of spatial axes.

        Raises:
            ConfigError: It would normalize single numbers.
        """
        if self.statistics == "rms_norm":
            return NaPRMSNorm(num_channels, over=self.over, eps=self.eps, offset=self.offset)
        require_features("nap", num_channels, spatial_dims, over=self.over)
        kind = NaPSampleLayerNorm if self.over == "sample" else NaPChannelLayerNorm
        return kind(num_channels, eps=self.eps, offset=self.offset)

    @property
    def shifts(self) -> bool:
        """Return True, also without an offset: a bias before the layer would tie the output to the weight's scale."""
        return True

    @property
    def inserts(self) -> bool:
        """Return True: every nonlinearity that has parameters before it is to be normalized."""
        return True

    def prepare(self, model: nn.Module) -> nn.Module:
        """Take the bias off every linear layer and convolution that a NaP layer follows; returns the same model."""
        for hidden in hidden_layers(model):
            if isinstance(hidden.norm, NaPLayer):
                hidden.layer.register_parameter("bias", None)
        return model

    def after_update(self, model: nn.Module) -> Callable[[], None]:
        """Return the projection of the model's hidden weights, with their present norms as radii.

        Raises:
            ConfigError: The model has no hidden weight, or ``joint`` meets a nonlinearity that is not homogeneous.
        """
        return WeightProjection(model, affine=self.affine, decay=self.decay, every=self.every)


SPEC = NormSpec(
    name="nap",
    summary="y = norm(x) * weight + bias before each nonlinearity; hidden weights keep their initial norm.",
    citation=Citation(
        title="Normalization and effective learning rates in reinforcement learning",
        authors="Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney",
        year=2024,
        arxiv="2407.01800",
        where="Algorithm 1, section 3.3 and appendix A",
    ),
    make=NaP,
    layers=(NaPLayer,),
    tensors={"weight": TensorSpec(Kind.SCALE), "bias": TensorSpec(Kind.SHIFT)},
    deviations=(
        "The joint treatment has the radius sqrt(C), the norm at the start; the paper prints 1.",
        "The decay of scale and offset is 0.999 an update by default; the paper does not state it.",
        "Moments of a feature map are over the whole sample by default; the paper does not state it.",
    ),
    verified=(
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
        "The paper's section 3 on networks: invariance to the weights' scale, gradients orthogonal to them, growth.",
        "The projection against its formula in float64. No official code was at hand.",
    ),
)
