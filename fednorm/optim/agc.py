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
from itertools import accumulate
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

_SMALL = 2**16
"""Values of the matrix of all units up to which a model is clipped in it: a call costs more than its arithmetic."""


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
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    if learning:
        _Clipper(learning, units).clip(clipping, eps)


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

        self._clipper: _Clipper | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        """Clip the gradients that the parameters have now, in place."""
        learning = [parameter for parameter in self.parameters if parameter.grad is not None]
        if not learning:
            return
        if self._clipper is None or not self._clipper.is_for(learning):
            self._clipper = _Clipper(learning, self.units)
        self._clipper.clip(self.clipping, self.eps)


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


class _Clipper:
    """Clips the gradients of some parameters: all units are compared at once, a small model's time goes into calls.

    Args:
        parameters: The parameters; there are some.
        units: What a unit is.
    """

    def __init__(self, parameters: list[Tensor], units: Units) -> None:
        self._given = parameters
        by_row = [parameter for parameter in parameters if has_rows(parameter, units)]
        whole = [parameter for parameter in parameters if not has_rows(parameter, units)]
        self._by_row, self._parameters = len(by_row), by_row + whole
        self._sizes = [len(parameter) for parameter in by_row] + [1] * len(whole)
        self._ends = list(accumulate(self._sizes))
        self._padded = _Padded.of(by_row, whole)

    def is_for(self, parameters: list[Tensor]) -> bool:
        """Return whether it was made for these parameters, where they are now."""
        return (
            len(parameters) == len(self._given)
            and all(one is other for one, other in zip(parameters, self._given, strict=True))
            and (self._padded is None or self._padded.holds(parameters[0]))
        )

    def clip(self, clipping: float, eps: float) -> None:
        """Clip in place."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._padded:
            self._padded.clip(self._parameters, gradients, clipping, eps)
            return
        norms = self._norms(gradients)
        exceeds, factors = _factors(self._norms(self._parameters), norms, clipping, eps)
        clipped = [(gradients[i], factors[self._ends[i] - self._sizes[i] : self._ends[i]]) for i in self._any(exceeds)]
        _multiply(clipped)

    def _any(self, exceeds: Tensor) -> Sequence[int]:
        """Return the numbers of the tensors of which some unit's gradient is too long."""
        if exceeds.device.type != "cpu":  # an answer would cost a synchronisation, more than what it may save
            return range(len(self._sizes))
        values = exceeds.numpy().tobytes()  # a byte each
        ends, sizes = self._ends, self._sizes
        return [i for i, end in enumerate(ends) if b"\1" in values[end - sizes[i] : end]]

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        """Return the Euclidean norms of all units of the parameters or of their gradients; one dimension."""
        # Over its dimensions and not flattened: those of a channels-last weight would be copied.
        rows = [
            torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim))) for tensor in tensors[: self._by_row]
        ]
        whole = tensors[self._by_row :]
        return torch.cat([*rows, torch.stack(torch._foreach_norm(whole))] if whole else rows)


def _factors(weights: Tensor, norms: Tensor, clipping: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return which units' gradients are too long, and every unit's factor.

    Args:
        weights: Norms of all units.
        norms: Of their gradients.
        clipping: lambda.
        eps: The least norm of a unit that counts.
    """
    bound = weights.clamp_min(eps)
    bound *= scalar(clipping, bound)
    exceeds = norms > bound
    return exceeds, torch.where(exceeds, bound / norms.clamp_min(_SMALLEST_NORM), scalar(1.0, norms))


class _Padded:
    """All units of a small model's parameters and of their gradients: rows of one matrix, padded with zeros.

    Args:
        matrix: Zeros, shape (2, units, values of the longest unit).
        by_row: Parameters whose rows are units.
        whole: Parameters that are a unit each.
    """

    def __init__(self, matrix: Tensor, by_row: list[Tensor], whole: list[Tensor]) -> None:
        self._weights, self._gradients = matrix
        self._places: list[Tensor] = []
        for half in matrix:
            row = 0
            for tensor in by_row:
                self._places.append(_like(half[row : row + len(tensor)], tensor))
                row += len(tensor)
            self._places += [half[row + i, : tensor.numel()].view(tensor.shape) for i, tensor in enumerate(whole)]

    @classmethod
    def of(cls, by_row: list[Tensor], whole: list[Tensor]) -> _Padded | None:
        """Return the matrix for some parameters; None where it would be large."""
        units = sum(map(len, by_row)) + len(whole)
        most = max([t.numel() // max(len(t), 1) for t in by_row] + [t.numel() for t in whole])
        if 2 * units * most > _SMALL:
            return None
        return cls((by_row + whole)[0].detach().new_zeros(2, units, most), by_row, whole)

    def holds(self, parameter: Tensor) -> bool:
        """Return whether it is where a parameter is, and of its type: a model may have been moved."""
        weights = self._weights
        return (parameter.device, parameter.dtype) == (weights.device, weights.dtype)

    def clip(self, parameters: list[Tensor], gradients: list[Tensor], clipping: float, eps: float) -> None:
        """Clip the gradients in place."""
        torch._foreach_copy_(self._places, parameters + gradients)
        weights, norms = (torch.linalg.vector_norm(half, dim=1) for half in (self._weights, self._gradients))
        # No factor is above 1, so that the padding stays 0.
        self._gradients *= _factors(weights, norms, clipping, eps)[1].unsqueeze(1)
        torch._foreach_copy_(gradients, self._places[len(parameters) :])


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Return the beginnings of a matrix's rows in a tensor's shape, and in its order in memory."""
    some = rows[:, : tensor.numel() // max(len(tensor), 1)]
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return some.view(len(tensor), *tensor.shape[2:], tensor.shape[1]).permute(0, 3, 1, 2)
    return some.view(tensor.shape)


def _multiply(clipped: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Multiply gradients by their units' factors. A factor of 1 changes no bit, so that some may be left out.

    To ask of each row whether it needs any takes longer than to multiply it, but of large tensors: there often a
    hundredth of the rows is clipped, and the others need not pass through memory.
    """
    every, shaped = [], []
    for gradient, factor in clipped:
        if gradient.numel() >= _LARGE and gradient.device.type == "cpu" and len(factor) == len(gradient):
            rows = (factor != 1).nonzero().flatten()
            if len(rows) <= len(factor) // 8:
                gradient.index_copy_(0, rows, gradient[rows] * _beside(factor[rows], gradient))
                continue
        every.append(gradient)
        shaped.append(_beside(factor, gradient))
    if every:
        torch._foreach_mul_(every, shaped)


def _beside(factor: Tensor, gradient: Tensor) -> Tensor:
    """Return a tensor's factors in a shape that multiplies its rows, or all of it."""
    return factor.view([-1] + [1] * (gradient.ndim - 1)) if gradient.ndim else factor[0]
