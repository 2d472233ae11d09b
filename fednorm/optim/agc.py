"""Adaptive gradient clipping: each unit's gradient is bounded relative to that unit's weights.

Brock, De, Smith, Simonyan. High-Performance Large-Scale Image Recognition Without Normalization. ICML 2021.
https://arxiv.org/abs/2102.06171 (Equation 3)

    bound = lambda * max(||w_i||, eps)
    g_i <- g_i * bound / max(||g_i||, 1e-6)     where ||g_i|| > bound

A unit i is one row of dimension 0: an output channel of a convolution, an output feature of a linear layer. A tensor
with fewer than two dimensions is a single unit. Implementations disagree about a gain of shape (C, 1, 1, 1), and so
``units`` says whose rule holds:

* ``deepmind`` (default): sizes of 1 do not count as dimensions, so the gain is one unit, like a bias.
* ``timm``: the gain is C units of one number each.

Clipping precedes weight decay and momentum. The classifier is not clipped, as in the authors' experiments. Stateless:
in a federation each client clips its own gradients, and nothing of it is sent.
Differs from DeepMind's code: a kernel that loses some but not all of its dimensions to ``squeeze`` (one input or one
output channel) still has one unit per output channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.scalar import scalar

Units = Literal["deepmind", "timm"]
Layers = Literal["all", "convolutions", "linear"]

_SMALLEST_NORM = 1e-6

_LARGE = 2**18
"""Values of a tensor from which its clipped rows are sought out: below, it is in a cache, and calls cost more."""


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor], clipping: float, eps: float = 1e-3, *, units: Units = "deepmind"
) -> None:
    """Clip the gradients of ``parameters`` in place, unit by unit; those without a gradient are left out.

    Args:
        parameters: The parameters. All must be on one device and of one floating-point type.
        clipping: lambda, greater than 0: the largest ratio of a unit's gradient norm to its weight norm.
        eps: Weight norms below it count as this much, so that zero weights can leave zero.
        units: Whether a gain of shape (C, 1, 1, 1) is one unit (``deepmind``) or C units (``timm``).

    Raises:
        ConfigError: ``clipping`` or ``eps`` is not greater than 0, or ``units`` is unknown.
    """
    options.number("agc", "clipping", clipping, above=0)
    options.number("agc", "eps", eps, above=0)
    options.one_of("agc", "units", units, ("deepmind", "timm"))
    _clip(*_parted([parameter for parameter in parameters if parameter.grad is not None], units), clipping, eps)


class AdaptiveGradientClipping:
    """Adaptive gradient clipping of a model's parameters, the classifier's excepted.

    Args:
        model: The model.
        clipping: lambda, greater than 0. NFNets use 0.01 at batch 4096, FedWon 0.01 to 1.28 depending on the batch.
        eps: Smallest weight norm that counts, greater than 0.
        units: Whether a gain of shape (C, 1, 1, 1) is one unit (``deepmind``) or C units (``timm``).
        classifier: Path of the module that is not clipped; empty for the last ``nn.Linear`` of the model.
        layers: What is clipped: ``all`` parameters, or those that ``convolutions`` or ``linear`` layers own.

    Raises:
        ConfigError: An option is out of range, there is no such classifier, or nothing is left to clip.
    """

    def __init__(
        self,
        model: nn.Module,
        clipping: float,
        eps: float = 1e-3,
        *,
        units: Units = "deepmind",
        classifier: str = "",
        layers: Layers = "all",
    ) -> None:
        options.number("agc", "clipping", clipping, above=0)
        options.number("agc", "eps", eps, above=0)
        options.one_of("agc", "units", units, ("deepmind", "timm"))
        options.one_of("agc", "layers", layers, ("all", "convolutions", "linear"))
        self.clipping = clipping
        self.eps = eps
        self.units: Units = units
        self.classifier = classifier or find_classifier(model)
        try:
            excluded = {id(parameter) for parameter in model.get_submodule(self.classifier).parameters()}
        except AttributeError as error:
            raise ConfigError(
                f"The model has no module {self.classifier!r} to exempt from gradient clipping."
            ) from error
        self.parameters: list[Tensor] = [p for p in _parameters(model, layers) if id(p) not in excluded]
        if layers != "all" and not self.parameters:
            raise ConfigError(
                f"{type(model).__name__} has no {layers} but its classifier, so that gradient clipping of {layers} "
                "does nothing. Leave train.agc_on at all."
            )

        self._by_row, self._whole = _parted(self.parameters, units)

    @torch.no_grad()
    def __call__(self) -> None:
        """Clip the gradients that the parameters have now, in place."""
        by_row, whole = ([p for p in some if p.grad is not None] for some in (self._by_row, self._whole))
        _clip(by_row, whole, self.clipping, self.eps)


def _parameters(model: nn.Module, layers: Layers) -> Iterable[Tensor]:
    """Return the parameters that layers of one type own, or all."""
    if layers == "all":
        return model.parameters()
    kind = nn.Linear if layers == "linear" else _ConvNd
    return [p for module in model.modules() if isinstance(module, kind) for p in module.parameters()]


def find_classifier(model: nn.Module) -> str:
    """Return the path of a model's last linear layer, in module order.

    Raises:
        ConfigError: The model has no linear layer.
    """
    linear: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"{type(model).__name__} has no nn.Linear, so its classifier, which gradient clipping leaves alone, cannot "
            "be told. Name it: classifier='path.of.module'."
        )
    return linear[-1]


def has_rows(parameter: Tensor, units: Units) -> bool:
    """Return whether each row of dimension 0 is a unit; else the whole tensor is one."""
    shape = parameter.shape if units == "timm" else [size for size in parameter.shape if size != 1]
    return len(shape) > 1


def _parted(parameters: list[Tensor], units: Units) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters each of whose rows is a unit, and those that are one unit each."""
    rows = [has_rows(parameter, units) for parameter in parameters]
    by_row = [parameter for parameter, by_row in zip(parameters, rows, strict=True) if by_row]
    return by_row, [parameter for parameter, by_row in zip(parameters, rows, strict=True) if not by_row]


def _clip(by_row: list[Tensor], whole: list[Tensor], clipping: float, eps: float) -> None:
    """Clip in place. All units of all tensors are compared at once: a small model's time goes into calls, not sums."""
    ordered = by_row + whole
    if not ordered:
        return
    gradients = [parameter.grad for parameter in ordered if parameter.grad is not None]
    bound = _unit_norms(by_row, whole).clamp_min_(eps)
    bound *= scalar(clipping, bound)
    norms = _unit_norms(gradients[: len(by_row)], gradients[len(by_row) :])
    exceeds = norms > bound
    # On a GPU this question would cost a synchronisation, more than the multiplications it may save.
    if exceeds.device.type == "cpu" and not exceeds.any():
        return
    factors = torch.where(exceeds, bound / norms.clamp_min(_SMALLEST_NORM), scalar(1.0, norms))
    sizes = [len(parameter) for parameter in by_row] + [1] * len(whole)
    _multiply(gradients, factors.split_with_sizes(sizes))


def _multiply(gradients: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each gradient by its units' factors. A factor of 1 changes no bit, so that some may be left out.

    To ask for each tensor whether it needs any takes longer than to multiply it, but of large ones: there often a
    hundredth of the rows is clipped, and the others need not pass through memory.
    """
    every, shaped = [], []
    for gradient, factor in zip(gradients, factors, strict=True):
        if gradient.numel() >= _LARGE and gradient.device.type == "cpu" and len(factor) == len(gradient):
            rows = (factor != 1).nonzero().flatten()
            if len(rows) <= len(factor) // 8:
                if len(rows):
                    gradient.index_copy_(0, rows, gradient[rows] * _beside(factor[rows], gradient))
                continue
        every.append(gradient)
        shaped.append(_beside(factor, gradient))
    if every:
        torch._foreach_mul_(every, shaped)


def _beside(factor: Tensor, gradient: Tensor) -> Tensor:
    """Return a tensor's factors in a shape that multiplies its rows, or all of it."""
    return factor.view([-1] + [1] * (gradient.ndim - 1)) if gradient.ndim else factor[0]


def _unit_norms(by_row: list[Tensor], whole: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of every row of the first tensors, then of the others as wholes; one dimension."""
    rows = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in by_row]
    return torch.cat([*rows, torch.stack(torch._foreach_norm(whole))] if whole else rows)
