"""GBWBN: batch normalization of symmetric positive definite matrices, in Bures–Wasserstein geometry.

Wang, Jin, Hu, Chen, Wang, Song. Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry. CVPR 2025.
https://arxiv.org/abs/2504.00660

For a batch of matrices X (N, n, n), with the power theta and the learned matrices M (the metric's) and G (the shift):

    X1 = M^-1/2 X^theta M^-1/2,   G1 = M^-1/2 G^theta M^-1/2
    B  = A^-1/2 (mean (A^1/2 X1 A^1/2)^1/2)^2 A^-1/2,   A = mean X1          the batch's barycentre, in one step from A
    v  = mean tr(X1 + I - 2 X1^1/2) / theta^2                                squared distances to I
    Xc = Exp_I(transport of Log_B(X1) from B to I)                           centred
    Xs = Exp_I(scale / sqrt(v + eps) Log_I(Xc))                              scaled
    Xn = Exp_G1(transport of Log_I(Xs) from I to G1)                         shifted
    y  = (M^1/2 Xn M^1/2)^(1/theta)

with Log_P(X) = C + C^T - 2P for C = (P X)^1/2, Exp_P(T) = P + T + L P L for L P + P L = T, and the transport of T from
P to Q, of eigenvalues p and q, U T' U^T with T'_ij = sqrt((q_i + q_j) / (p_i + p_j)) T_ij in the eigenbasis. B and v
count as constants for the gradient. Evaluation takes the running ones: the mean moves along the geodesic, v as in batch
normalization, both by ``momentum``. All in float64.

Differs: M and G are exponentials of symmetric matrices, so that every optimizer keeps them positive definite (the
official code has an optimizer on the manifold for G); and the running mean is kept as its logarithm. So what a
federation makes of the three, an average of entries, is their log-Euclidean barycentre, and never leaves the manifold.
The official running mean is in no state dict, and its running variance is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.errors import DataError
from fednorm.recognition.tensor_kinds import declare_tensors
from fednorm.roles import Kind

FLOOR = 1e-12
"""The smallest eigenvalue that a power or a logarithm is taken of."""

_DISTINCT = 1e-7
"""Step between the first eigenvalues of G: eigenvectors of equal ones have no derivative."""


def spectral(matrix: Tensor, function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Return f(A) = U f(b) U^T of symmetric matrices A = U b U^T, with the first derivative of Daleckii and Krein.

    That derivative has divided differences of f in place of the differences of eigenvalues that the eigenvectors' own
    divides by: it is exact where eigenvalues are equal, too. There is no second one.

    Args:
        matrix: A, of shape (..., n, n).
        function: f, elementwise.
        slope: Its derivative.

    Returns:
        f(A), of shape (..., n, n).
    """
    values, vectors = torch.linalg.eigh(matrix.detach())
    rows, columns = values.unsqueeze(-1), values.unsqueeze(-2)
    apart = rows - columns
    close = apart.abs() <= 1e-6 * (1 + rows.abs() + columns.abs())
    divided = (function(rows) - function(columns)) / torch.where(close, torch.ones_like(apart), apart)
    loewner = torch.where(close, slope((rows + columns) / 2), divided)
    turned = vectors.mT @ (matrix - matrix.detach()) @ vectors  # zero: it carries the derivative alone
    result: Tensor = vectors @ (torch.diag_embed(function(values)) + loewner * turned) @ vectors.mT
    return result


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return A^p of symmetric positive definite matrices (..., n, n)."""
    if exponent == 1:
        return matrix
    return spectral(
        matrix,
        lambda b: b.clamp_min(FLOOR) ** exponent,
        lambda b: exponent * b.clamp_min(FLOOR) ** (exponent - 1),
    )


def logarithm(matrix: Tensor) -> Tensor:
    """Return log A of symmetric positive definite matrices (..., n, n)."""
    return spectral(matrix, lambda b: b.clamp_min(FLOOR).log(), lambda b: 1 / b.clamp_min(FLOOR))


def exponential(matrix: Tensor) -> Tensor:
    """Return exp A of symmetric matrices (..., n, n)."""
    return spectral(matrix, torch.exp, torch.exp)


def root_of_product(left: Tensor, right: Tensor) -> Tensor:
    """Return (P X)^1/2 = P^1/2 (P^1/2 X P^1/2)^1/2 P^-1/2 of symmetric positive definite matrices."""
    root = power(left, 0.5)
    return root @ power(root @ right @ root, 0.5) @ power(left, -0.5)


def barycentre(matrices: Tensor) -> Tensor:
    """Return one fixed-point step from the arithmetic mean toward the Bures–Wasserstein barycentre of (N, n, n)."""
    mean = matrices.mean(0)
    root, inverse = power(mean, 0.5), power(mean, -0.5)
    middle = power(root @ matrices @ root, 0.5).mean(0)
    return inverse @ middle @ middle @ inverse


def geodesic(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return the point at the share ``t`` of the way between two symmetric positive definite matrices (n, n)."""
    cross = root_of_product(start, end)
    return (1 - t) ** 2 * start + t**2 * end + t * (1 - t) * (cross + cross.mT)


class BuresWassersteinNorm(nn.Module):
    """Batch normalization of symmetric positive definite matrices (N, n, n), float64; see the module's text.

    Args:
        size: n.
        theta: The power, greater than 0: 1 for SPDNet, 0.5 for residual networks of matrices, in the paper.
        eps: Added to the variance.
        momentum: The share of a batch's statistics in the running ones.

    Raises:
        ConfigError: An option is out of range.
    """

    def __init__(self, size: int, *, theta: float = 1.0, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        options.number("bures_wasserstein", "theta", theta, above=0)
        self.size, self.theta, self.eps, self.momentum = size, theta, eps, momentum
        zeros = torch.zeros(size, size, dtype=torch.float64)
        self.log_metric = nn.Parameter(zeros.clone())
        self.log_shift = nn.Parameter(torch.diag(_DISTINCT * torch.arange(size, dtype=torch.float64)))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("log_running_mean", zeros.clone())
        self.register_buffer("running_var", torch.ones((), dtype=torch.float64))
        self.log_running_mean: Tensor
        self.running_var: Tensor

    def forward(self, matrices: Tensor) -> Tensor:
        """Return the normalized matrices, of the shape of the input.

        Raises:
            DataError: The input is not (N, n, n) in float64.
            ValueError: It is one matrix, in training: as PyTorch's batch normalization says it.
        """
        if matrices.shape[1:] != (self.size, self.size) or matrices.dtype != torch.float64:
            raise DataError(
                f"this layer normalizes matrices of shape (N, {self.size}, {self.size}) in float64; got "
                f"{tuple(matrices.shape)} in {str(matrices.dtype).removeprefix('torch.')}."
            )
        metric = (self.log_metric + self.log_metric.mT) / 2
        inside, outside = exponential(-metric / 2), exponential(metric / 2)
        x = inside @ power(matrices, self.theta) @ inside
        mean, var = self._statistics(x)
        centred = _square(_to_identity(x, mean))
        scaled = _square(self.scale / (var + self.eps).sqrt() * _log_at_identity(centred))
        shift = (self.log_shift + self.log_shift.mT) / 2
        shifted = _from_identity(_log_at_identity(scaled), inside @ exponential(self.theta * shift) @ inside)
        return power(outside @ shifted @ outside, 1 / self.theta)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean (n, n) and the variance () to normalize with; training moves the running ones."""
        if not self.training:
            return exponential(self.log_running_mean), self.running_var.clone()
        if len(x) < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        mean = barycentre(x)
        roots = power(x, 0.5)
        traces = torch.diagonal(x + torch.eye(self.size, dtype=x.dtype, device=x.device) - 2 * roots, 0, -2, -1)
        var = traces.sum(-1).mean() / self.theta**2
        moved = geodesic(exponential(self.log_running_mean), mean, self.momentum)
        self.log_running_mean.copy_(logarithm((moved + moved.mT) / 2))
        self.running_var.lerp_(var, self.momentum)
        return mean, var

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.size}, theta={self.theta:g}, eps={self.eps:g}, momentum={self.momentum:g}"


def _log_at_identity(x: Tensor) -> Tensor:
    """Return Log_I(X) = 2 X^1/2 - 2 I."""
    return 2 * power(x, 0.5) - 2 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _square(tangent: Tensor) -> Tensor:
    """Return Exp_I(T) = I + T + T^2 / 4, the square of I + T / 2."""
    half = torch.eye(tangent.shape[-1], dtype=tangent.dtype, device=tangent.device) + tangent / 2
    return half @ half


def _to_identity(x: Tensor, mean: Tensor) -> Tensor:
    """Return the transport of Log_B(X) from B, a constant, to I."""
    cross = root_of_product(mean, x)
    tangent = cross + cross.mT - 2 * mean
    values, vectors = torch.linalg.eigh(mean)
    factors = (2 / (values.unsqueeze(-1) + values)).sqrt()
    moved: Tensor = vectors @ (factors * (vectors.mT @ tangent @ vectors)) @ vectors.mT
    return moved


def _from_identity(tangent: Tensor, end: Tensor) -> Tensor:
    """Return Exp_G1 of the transport of T from I to G1."""
    values, vectors = torch.linalg.eigh(end)
    sums = values.unsqueeze(-1) + values
    moved = (sums / 2).sqrt() * (vectors.mT @ tangent @ vectors)
    solved = moved / sums  # L of L G1 + G1 L = T'
    point: Tensor = end + vectors @ (moved + solved @ (values.unsqueeze(-1) * solved)) @ vectors.mT
    return point


declare_tensors(
    BuresWassersteinNorm,
    log_metric=Kind.SCALE,
    log_shift=Kind.SHIFT,
    scale=Kind.SCALE,
    log_running_mean=Kind.MEAN,
    running_var=Kind.QUADRATIC,  # the mean squared distance to I: it needs no mean beside it to be combined
)
