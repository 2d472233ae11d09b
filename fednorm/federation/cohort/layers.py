"""Batch normalization of padded batches: rows that are no images enter no moment.

In a cohort every client's batch has as many rows as the largest, and a mask says which of them are images. A layer that
takes moments from the batch is replaced by a twin of the same tensors, under the same names:

    n    = (images of the batch) * (positions of a map)
    mean = sum_i mask_i x_i / n,     var = sum_i mask_i (x_i - mean)^2 / n

and otherwise by the layer's own formula. Nothing is written in place: what a step makes of the running statistics is
collected, and the caller decides for which clients it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.federation.cohort.kernels import STACKED, normalized, normalized_whole
from fednorm.federation.cohort.torch_private import each, together
from fednorm.norms._batch import BatchLayer, per_channel
from fednorm.norms.batch_channel_norm import BatchChannelNormLayer
from fednorm.norms.batch_norm_corrected import CorrectedBatchNorm
from fednorm.norms.batch_renorm import BatchRenormLayer
from fednorm.norms.continual_norm import ContinualNormLayer


@dataclass
class Padding:
    """What the twins of one network share during a step: which rows are images, and what the step made of buffers.

    Attributes:
        mask: 1 for an image and 0 for padding, float, shape (B,).
        count: How many are images, a scalar.
        whole: Whether every row of every client's is one.
        made: New values of buffers, by their keys.
    """

    mask: Tensor | None = None
    count: Tensor | None = None
    whole: bool = False
    made: dict[str, Tensor] = field(default_factory=dict)

    def now(self) -> tuple[Tensor, Tensor]:
        """Return the mask, and how many images there are."""
        assert self.mask is not None, "the step sets it"
        assert self.count is not None, "the step sets it"
        return self.mask, self.count


class MaskedBatchNorm(nn.Module):
    """PyTorch's batch normalization over the images of a padded batch.

    Attributes:
        weight: As of the layer, None where it has none; likewise the bias and the buffers.

    Args:
        layer: The layer that it stands for, whose tensors it has.
        path: The layer's path in its network.
        padding: Where the step's mask is.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, layer: _BatchNorm, path: str, padding: Padding) -> None:
        super().__init__()
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer)
        self.layer_options = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
        self.eps: float = layer.eps
        self.momentum: float | None = layer.momentum
        self.path, self.padding = path, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``, (B, C) or (B, C, ...)."""
        if not self.training and self.running_mean is not None:
            return self.evaluated(x)
        if type(self).scaled is MaskedBatchNorm.scaled and (whole := together(x, 1)) is not None:
            return self._normalized(whole)
        mean, var, centred, n = self._moments(x)
        self.track(mean.detach(), var.detach(), n)
        return self.scaled(x, centred, var)

    def _normalized(self, x: Tensor) -> Tensor:
        """Return what :meth:`scaled` makes of the batches' moments, of all clients at once; x is of (B, K, C, ...)."""
        mask, count = (together(value, 0) for value in self.padding.now())
        assert mask is not None, "a batch is its client's own"
        assert count is not None, "a batch is its client's own"
        n = count * (x[0, 0].numel() // x.shape[2])
        weight, bias = (None if v is None else _of_clients(v) for v in (self.weight, self.bias))
        if self.padding.whole:
            y, mean, var = normalized_whole(x, weight, bias, self.eps)
        else:
            y, mean, var = normalized(x, mask, n, weight, bias, self.eps)
        if type(self).rate is MaskedBatchNorm.rate and self.momentum is not None and self.running_mean is not None:
            self._track_together(mean, var, n, self.momentum)
        else:
            self.track(each(mean, 0), each(var, 0), each(n, 0))
        return each(y, 1)

    def _track_together(self, mean: Tensor, var: Tensor, n: Tensor, momentum: float) -> None:
        """Do what :meth:`track` does for all clients at once, (K, C) and (K,): ``vmap`` takes longer."""
        unbiased = var * (n / (n - 1).clamp_min_(1))[:, None]
        for name, value in (("running_mean", mean), ("running_var", unbiased)):
            self.note(name, each(torch.lerp(_of_clients(self.now(name)), value, momentum), 0))
        self.note("num_batches_tracked", each(_of_clients(self.now("num_batches_tracked")) + 1, 0))

    def evaluated(self, x: Tensor) -> Tensor:
        """Return the input normalized by the running moments."""
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def scaled(self, x: Tensor, centred: Tensor, var: Tensor) -> Tensor:
        """Return the input normalized by the batch's moments, scaled and shifted."""
        scale = (var + self.eps).rsqrt()
        y = centred * per_channel(scale if self.weight is None else scale * self.weight, x)
        return y if self.bias is None else y + per_channel(self.bias, x)

    def track(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        """Note what the running moments become: the variance is made unbiased, as in PyTorch."""
        if self.running_mean is None:
            return
        seen = self.counted()
        rate = self.rate(seen)
        self.note("running_mean", torch.lerp(self.now("running_mean"), mean, rate))
        unbiased = var * (n / (n - 1).clamp_min(1))
        self.note("running_var", torch.lerp(self.now("running_var"), unbiased, rate))

    def counted(self) -> Tensor:
        """Count the batch, and return how many there were, this one included."""
        seen = self.now("num_batches_tracked") + 1
        self.note("num_batches_tracked", seen)
        return seen

    def rate(self, seen: Tensor) -> Tensor:
        """Return the batch's weight in the running moments, a scalar."""
        if self.momentum is None:
            return 1.0 / seen.to(self.now("running_mean").dtype)
        return torch.full_like(seen, self.momentum, dtype=self.now("running_mean").dtype)

    def now(self, name: str) -> Tensor:
        """Return a buffer as the step has it so far: a layer may be called more than once in a pass."""
        own: Tensor = getattr(self, name)
        return self.padding.made.get(self._key(name), own)

    def note(self, name: str, value: Tensor) -> None:
        """Note what the step makes of a buffer."""
        self.padding.made[self._key(name)] = value

    def _key(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean, biased variance, the centred input, and over how many values they are."""
        mask, count = self.padding.now()
        n = count * (x[0].numel() // x.shape[1])
        weight = mask / n
        mean = weight @ _summed(x)
        centred = x - per_channel(mean, x)
        return mean, weight @ _summed(centred.square()), centred, n


class MaskedCorrected(MaskedBatchNorm):
    """The twin of ``batch_norm_corrected``'s layer: its momentum depends on the number of batches."""

    def rate(self, seen: Tensor) -> Tensor:
        """Return eta_t = (1 - b) / (1 - b^t), b = (1 - momentum)^kappa; in float64, as the layer has it."""
        if self.momentum is None:
            return super().rate(seen)
        kappa = self.layer_options["kappa"]
        wide = torch.float32 if seen.device.type == "mps" else torch.float64
        keep = (1.0 - self.momentum) ** kappa
        many = seen.to(wide)
        eta = 1.0 / many if keep == 1.0 else (1.0 - keep) / (1.0 - torch.pow(torch.full_like(many, keep), many))
        return eta.to(self.now("running_mean").dtype)


class MaskedContinual(MaskedBatchNorm):
    """The twin of ``continual_norm``'s layer: each sample's groups are normalized first."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``."""
        return super().forward(functional.group_norm(x, self.layer_options["num_groups"], eps=self.eps))


class MaskedRenorm(MaskedBatchNorm):
    """The twin of ``batch_renorm``'s layer: r and d pull towards the running moments."""

    weight: Tensor
    bias: Tensor

    def evaluated(self, x: Tensor) -> Tensor:
        """Return the input normalized by the running moments; ``running_var`` has its eps inside."""
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.0)

    def scaled(self, x: Tensor, centred: Tensor, var: Tensor) -> Tensor:
        """Return (x - mean) / sd * r + d, scaled and shifted; r and d count as constants."""
        r, d = self._correction
        y = centred * per_channel((var + self.eps).rsqrt() * (self.weight * r), x)
        return y + per_channel(torch.addcmul(self.bias, self.weight, d), x)

    def track(self, mean: Tensor, var: Tensor, n: Tensor) -> None:  # noqa: ARG002 - its variance is not made unbiased
        """Take r and d by the bounds of before, then move the running moments and the bounds."""
        options, sd = self.layer_options, (var + self.eps).sqrt()
        _, count = self.padding.now()
        samples = {name: self.now(name) for name in ("r_samples", "d_samples")}
        r_bound = (1.0 + options["growth"] * samples["r_samples"].double()).to(sd.dtype)
        d_bound = (options["growth"] * samples["d_samples"].double()).to(sd.dtype)
        running_sd = self.now("running_var").sqrt()
        r = torch.minimum(torch.maximum(sd / running_sd, 1.0 / r_bound), r_bound)
        shift = (mean - self.now("running_mean")) / running_sd
        self._correction = (r, torch.minimum(torch.maximum(shift, -d_bound), d_bound))
        for name, bound, most in (("r_samples", r_bound, options["r_max"]), ("d_samples", d_bound, options["d_max"])):
            more = torch.where(bound < most, count.to(samples[name].dtype), torch.zeros_like(samples[name]))
            self.note(name, samples[name] + more)
        rate = self.rate(self.counted())
        self.note("running_mean", torch.lerp(self.now("running_mean"), mean, rate))
        self.note("running_var", torch.lerp(running_sd, sd, rate).square())


class MaskedBatchChannel(MaskedBatchNorm):
    """The twin of ``batch_channel_norm``'s layer: batch moments, or estimates, then each sample's groups."""

    group_weight: Tensor
    group_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``."""
        each = self.layer_options["num_features"] // self.layer_options["num_groups"]
        scale, shift = (t[:, None].expand(-1, each).reshape(-1) for t in (self.group_weight, self.group_bias))
        return functional.group_norm(self._first(x), self.layer_options["num_groups"], scale, shift, self.eps)

    def _first(self, x: Tensor) -> Tensor:
        if not self.training or self.layer_options["statistics"] == "batch" or self.momentum is None:
            return super().forward(x)
        with torch.no_grad():
            mask, count = self.padding.now()
            weight = mask / (count * (x[0].numel() // x.shape[1]))
            around = weight @ _summed((x - per_channel(self.now("running_mean"), x)).square())
            rate = self.rate(self.counted())
            self.note("running_mean", torch.lerp(self.now("running_mean"), weight @ _summed(x), rate))
            self.note("running_var", torch.lerp(self.now("running_var"), around, rate))
        mean, var = self.now("running_mean"), self.now("running_var")
        return self.scaled(x, x - per_channel(mean, x), var)


Twin = Callable[[_BatchNorm, str, Padding], nn.Module]

TWINS: Mapping[type[nn.Module], Twin] = {
    nn.BatchNorm1d: MaskedBatchNorm,
    nn.BatchNorm2d: MaskedBatchNorm,
    nn.BatchNorm3d: MaskedBatchNorm,
    BatchLayer: MaskedBatchNorm,
    CorrectedBatchNorm: MaskedCorrected,
    ContinualNormLayer: MaskedContinual,
    BatchRenormLayer: MaskedRenorm,
    BatchChannelNormLayer: MaskedBatchChannel,
}
"""The twin of each type of layer that takes moments from the batch: of the type itself, its descendants may differ."""


def with_twins(network: nn.Module, padding: Padding) -> nn.Module:
    """Replace, in place, the layers of a network that have twins; one that stands in two places has one twin.

    Returns:
        The network, or its twin where it is such a layer itself.
    """
    made: dict[int, nn.Module] = {}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        make = TWINS.get(type(module))
        if make is not None:
            assert isinstance(module, _BatchNorm)
            twin = made.setdefault(id(module), make(module, path, padding))
        else:
            if type(module) in STACKED:
                module.__class__ = STACKED[type(module)]  # of the same tensors and options
            continue
        twin.train(module.training)
        if not path:
            return twin
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, twin)
    return network


def _of_clients(values: Tensor) -> Tensor:
    """Return values with the clients' axis in front, of size 1 where all have the same."""
    own = together(values, 0)
    return values[None] if own is None else own


def _summed(x: Tensor) -> Tensor:
    """Return the sums over the positions of (B, C, ...), shape (B, C)."""
    return x.flatten(2).sum(-1) if x.ndim > 2 else x
