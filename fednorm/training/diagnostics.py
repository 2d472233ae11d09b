"""What a network has become: dead units, rank, norms, effective learning rates, and how far its statistics drifted.

Each quantity has several definitions in the literature; each is named here and cited. All are pure functions; rank and
drift are computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fednorm.computed import still
from fednorm.errors import ConfigError, DataError

Optimizer = Literal["sgd", "adam"]


def dead_units(activations: Tensor, *, active_below: float = 0.0) -> Tensor:
    """Return which units of a layer are dead.

    A unit is dead where its activation is zero everywhere, or nonzero in less than a share ``active_below`` of all
    samples and positions. With 0 this is Dohare et al.'s for Permuted MNIST (Nature 2024; 2,000 probe inputs), with
    0.01 theirs for CIFAR-100 (1,000 inputs).

    Args:
        activations: What follows the nonlinearity on probe inputs, shape (n, C) or (n, C, ...).
        active_below: A share in [0, 1].

    Returns:
        bool, shape (C,); its mean is the share of dead units.

    Raises:
        DataError: There are no samples, or no axis of units.
    """
    active = (_by_unit(activations) != 0).double().mean(1)
    return (active == 0) | (active < active_below)


def dormant_units(activations: Tensor, *, tau: float = 0.025) -> Tensor:
    """Return which units of a layer are tau-dormant.

    ``s_c = mean|a_c| / mean_c(mean|a_c|) <= tau``, means over samples and positions (Sokar et al., ReDo, arXiv
    2302.12902, equation 1). In a layer that is zero everywhere all units are dormant.

    Args:
        activations: What follows the nonlinearity on probe inputs, shape (n, C) or (n, C, ...).
        tau: The threshold.

    Returns:
        bool, shape (C,).

    Raises:
        DataError: There are no samples, or no axis of units.
    """
    size = _by_unit(activations).double().abs().mean(1)
    return size <= tau * size.mean()


def entropy_and_threshold_rank(features: Tensor) -> tuple[float, int]:
    """Return the :func:`entropy_rank` and the :func:`threshold_rank`, from one decomposition.

    Args:
        features: Shape (n, d); not centred here.

    Raises:
        DataError: It is not a matrix, or has no entry.
    """
    s = _singular_values(features)
    return _entropy_rank(s), _threshold_rank(s, 0.01)


def entropy_rank(features: Tensor) -> float:
    """Return the effective rank ``exp(-sum_i p_i log p_i)`` with ``p_i = s_i / sum(s)``, s the singular values.

    Roy, Vetterli. The effective rank. EUSIPCO 2007. In [1, min(n, d)]; 0 for a matrix of zeros.

    Args:
        features: Shape (n, d); not centred here.

    Raises:
        DataError: It is not a matrix, or has no entry.
    """
    return _entropy_rank(_singular_values(features))


def _entropy_rank(s: Tensor) -> float:
    p = s[s > 0] / s.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def srank(features: Tensor, *, delta: float = 0.01) -> int:
    """Return the least k whose k largest singular values hold a share ``1 - delta`` of their sum.

    Kumar et al., arXiv 2010.14498, ``srank_delta``; the code of Dohare et al. (Nature 2024) calls this *stable rank*,
    which elsewhere is ``||F||_F^2 / ||F||_2^2``. 0 for a matrix of zeros.

    Args:
        features: Shape (n, d); not centred here.
        delta: The share left out.

    Raises:
        DataError: It is not a matrix, or has no entry.
    """
    return _holding(_singular_values(features), 1 - delta)


def approximate_rank(features: Tensor, *, delta: float = 0.01) -> int:
    """Return the least k whose k largest *squared* singular values hold a share ``1 - delta`` of their sum.

    Yang et al., Harnessing structures for value-based planning and RL, arXiv 1909.12255. 0 for a matrix of zeros.

    Args:
        features: Shape (n, d); not centred here.
        delta: The share left out.

    Raises:
        DataError: It is not a matrix, or has no entry.
    """
    return _holding(_singular_values(features).square(), 1 - delta)


def threshold_rank(features: Tensor, *, threshold: float = 0.01) -> int:
    """Return the number of singular values above ``threshold`` times the largest, NaP's (arXiv 2407.01800).

    Args:
        features: Shape (n, d); not centred here.
        threshold: The share of the largest.

    Raises:
        DataError: It is not a matrix, or has no entry.
    """
    return _threshold_rank(_singular_values(features), threshold)


def _threshold_rank(s: Tensor, threshold: float) -> int:
    return int((s > threshold * s[0]).sum())


def weight_layers(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of each convolution and linear layer, by the layer's path."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    with still(model):
        return {path: module.weight for path, module in model.named_modules() if isinstance(module, kinds)}


def weight_norms(model: nn.Module) -> dict[str, float]:
    """Return the Frobenius norm of the weight of each convolution and linear layer, by the layer's path."""
    return {path: float(weight.detach().cpu().double().norm()) for path, weight in weight_layers(model).items()}


def mean_weight_magnitude(model: nn.Module) -> float:
    """Return the mean ``|w|`` over all entries of all parameters: the weight magnitude of Dohare et al. (Nature 2024).

    Raises:
        DataError: The model has no parameter.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if not total:
        raise DataError(f"{type(model).__name__} has no parameter whose magnitude could be measured.")
    return float(sum(parameter.detach().cpu().double().abs().sum() for parameter in model.parameters()) / total)


def effective_learning_rates(model: nn.Module, lr: float, *, optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate that each layer's *direction* ``w / ||w||`` feels, by the layer's path.

    Meaningful where the layer's function does not depend on the weight's scale, as before a normalization. With SGD
    the gradient of such a weight shrinks as 1 / ||w||, so that the direction moves by ``lr / ||w||^2``; with Adam,
    whose step does not depend on the gradient's size, by ``lr / ||w||`` (van Laarhoven, arXiv 1706.05350, section 3;
    Lyle et al., arXiv 2407.01800).

    Args:
        model: The network.
        lr: The optimizer's learning rate.
        optimizer: ``sgd`` or ``adam``.

    Raises:
        ConfigError: The optimizer is neither.
    """
    return rates_of_norms(weight_norms(model), lr, optimizer=optimizer)


def rates_of_norms(norms: Mapping[str, float], lr: float, *, optimizer: Optimizer) -> dict[str, float]:
    """Return the effective learning rates of weights whose norms are known; see :func:`effective_learning_rates`.

    Raises:
        ConfigError: The optimizer is neither ``sgd`` nor ``adam``.
    """
    if optimizer not in ("sgd", "adam"):
        raise ConfigError(f"The effective learning rate is defined for sgd and adam; got {optimizer!r}.")
    power = 2 if optimizer == "sgd" else 1
    return {path: lr / norm**power if norm else float("inf") for path, norm in norms.items()}


def relative_updates(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ``||W' - W|| / ||W||`` of each weight: what the effective learning rate is for any optimizer.

    Args:
        before: Weights by name.
        after: The same weights later.

    Returns:
        By name; infinite or NaN for a weight that was zero.

    Raises:
        DataError: The names differ.
    """
    _same_names(before, after)
    return {
        name: float((after[name].double() - weight.double()).norm() / weight.double().norm())
        for name, weight in before.items()
    }


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of the channels of one layer's input.

    Attributes:
        mean: Shape (C,).
        var: Shape (C,), not negative.
    """

    mean: Tensor
    var: Tensor


def wasserstein_drift(running: Moments, reference: Moments, *, eps: float = 1e-5) -> float:
    """Return how far a layer's statistics are from a reference, in the reference's standard deviations.

    The root mean square over channels of the 2-Wasserstein distance between the two Gaussians, divided by the
    reference's deviation: ``sqrt(mean_c(((mu - m)^2 + (sigma - s)^2) / s^2))``, with ``sigma, s = sqrt(var + eps)`` as
    the layer divides by them. 0 where they are equal; it does not change when a channel is shifted or (but for eps)
    scaled. With the statistics of all the data seen as the reference, it is the recency bias of the running ones.

    Args:
        running: The layer's running statistics.
        reference: What they are compared with.
        eps: The layer's eps.

    Raises:
        DataError: The shapes differ.
    """
    mu, sigma, m, s = _gaussians(running, reference, eps)
    return float(_wasserstein(mu, sigma, m, s))


def wasserstein_drifts(running: Sequence[Moments] | Moments, reference: Moments, *, eps: float = 1e-5) -> list[float]:
    """Return the :func:`wasserstein_drift` of several statistics from one reference, computed together.

    Args:
        running: Statistics of one layer, e.g. one of each client; or all of them as one, of shape (k, C).
        reference: What they are compared with.
        eps: The layer's eps.

    Raises:
        DataError: The shapes differ.
    """
    if isinstance(running, Moments):
        _same_shape(Moments(running.mean[0], running.var[0]), reference)
        mu, var = running.mean.detach().double(), running.var.detach().double()
    else:
        if not running:
            return []
        for moments in running:
            _same_shape(moments, reference)
        mu, var = (
            torch.stack([getattr(moments, name) for moments in running]).detach().double() for name in ("mean", "var")
        )
    m, v = reference.mean.detach().double(), reference.var.detach().double()
    drifts: list[float] = _wasserstein(mu, (var + eps).sqrt(), m, (v + eps).sqrt()).tolist()
    return drifts


def kl_drift(running: Moments, reference: Moments, *, eps: float = 1e-5) -> float:
    """Return ``KL(reference || running)`` between the channels' Gaussians, in nats, averaged over channels.

    ``log(sigma / s) + (s^2 + (mu - m)^2) / (2 sigma^2) - 1/2`` with ``sigma, s = sqrt(var + eps)``: large where the
    running variance is too small for the data the layer will meet.

    Args:
        running: The layer's running statistics.
        reference: What they are compared with.
        eps: The layer's eps.

    Raises:
        DataError: The shapes differ.
    """
    mu, sigma, m, s = _gaussians(running, reference, eps)
    return float(((sigma / s).log() + (s**2 + (mu - m) ** 2) / (2 * sigma**2) - 0.5).mean())


def drift_by_layer(
    running: Mapping[str, Moments], reference: Mapping[str, Moments], *, eps: float = 1e-5
) -> dict[str, float]:
    """Return the :func:`wasserstein_drift` of each layer, by its path.

    Raises:
        DataError: The layers differ, or the shapes of one.
    """
    _same_names(running, reference)
    return {path: wasserstein_drift(moments, reference[path], eps=eps) for path, moments in running.items()}


def _wasserstein(mu: Tensor, sigma: Tensor, m: Tensor, s: Tensor) -> Tensor:
    return (((mu - m) ** 2 + (sigma - s) ** 2) / s**2).mean(-1).sqrt()


def _by_unit(activations: Tensor) -> Tensor:
    """Return the activations as (C, samples and positions)."""
    if activations.ndim < 2 or not activations.numel():
        raise DataError(
            f"Expected activations of shape (n, C) or (n, C, ...), one sample or more; got {tuple(activations.shape)}."
        )
    return activations.detach().transpose(0, 1).flatten(1)


def _singular_values(features: Tensor) -> Tensor:
    """Return the singular values in falling order."""
    if features.ndim != 2 or not features.numel():
        raise DataError(f"A rank needs features of shape (n, d), not empty; got {tuple(features.shape)}.")
    values: Tensor = torch.linalg.svdvals(features.detach().double())
    return values


def _holding(values: Tensor, share: float) -> int:
    """Return how many of the values, in falling order, hold a share of their sum."""
    total = values.sum()
    if not total:
        return 0
    # Where rounding keeps the whole sum below the share, all of them hold it.
    return min(int((values.cumsum(0) < share * total).sum()) + 1, len(values))


def _gaussians(running: Moments, reference: Moments, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _same_shape(running, reference)
    mu, var, m, v = (t.detach().double() for t in (running.mean, running.var, reference.mean, reference.var))
    return mu, (var + eps).sqrt(), m, (v + eps).sqrt()


def _same_shape(running: Moments, reference: Moments) -> None:
    if running.mean.shape == running.var.shape == reference.mean.shape == reference.var.shape:
        return
    shapes = {tuple(t.shape) for t in (running.mean, running.var, reference.mean, reference.var)}
    raise DataError(f"Statistics are compared channel by channel, so all must have one shape; got {shapes}.")


def _same_names(first: Mapping[str, object], second: Mapping[str, object]) -> None:
    if first.keys() != second.keys():
        raise DataError(
            f"Both sides must have the same layers; only one has {', '.join(sorted(first.keys() ^ second.keys()))}."
        )
