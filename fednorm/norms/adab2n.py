"""AdaB2N: batch statistics that balance the tasks of a stream, running statistics that adapt between two extremes.

Lyu, Wang, Zhang, Sun, Su, Zhu, Jing. Overcoming Recency Bias of Normalization Statistics in Continual Learning:
Balance and Adaptation. NeurIPS 2023. https://arxiv.org/abs/2310.08855. Official code: lvyilin/AdaB2N.

Of the N samples of a batch n_t are of task t, T tasks have been seen, psi is learned (shape (num_tasks,), zeros):

    c_t  = exp(psi_t) + n_t,   pi_t = c_t / sum_{s < T} c_s,   w_i = pi_{t(i)} / n_{t(i)}
    mean = sum_i w_i mean_HW(x_i),   var = sum_i w_i mean_HW((x_i - mean)^2)
    y    = (x - mean) / sqrt(var + eps) * weight + bias
    running <- (1 - eta_t) running + eta_t batch,  for the mean and for the *biased* variance
    eta_1 = momentum^kappa,  eta_{t+1} = eta_t / (eta_t + (1 - momentum)^kappa);  kappa = 0: eta_t = 1 / t
    loss += lambd * sum_layers [mean_C((mean - running_mean)^2) + mean_C((var - running_var)^2)]

The loss is taken after the update, with the running moments constant; gradients go through mean and var to x and psi.
It counts from task ``ada_t0`` on (0 is the first). t counts training batches since the start; task boundaries do not
reset it. Evaluation is batch normalization with the running moments and needs no task.

**A seen task that is absent from the batch keeps its share pi_t, which no sample gets**: the weights sum to less than 1
and the moments shrink. That is how it was published; ``corrected`` shares pi among the tasks that are present.

With one task, or without task numbers (a federation), pi is 1: batch normalization with a biased running variance, the
momentum above and the loss; psi has the gradient 0 (in the official code: none).

Federated: psi is a GATE, shared by FedAvg, local under FedBN; running moments and counter as in batch normalization.
Continual: everything is kept across experiences.
Differs: eta is computed from the counter ``num_batches_tracked`` by the recursion's closed form. The official layer
keeps it in a plain attribute, so that a resumed run starts its schedule again. The paper chooses kappa and lambd for
every cell of its tables and names no default; ours come from its grid. The derivative is written by hand, several
times faster than composed operations; there is no second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fednorm import options
from fednorm.errors import ConfigError, DataError
from fednorm.norms._batch import BatchLayer, check_spatial_dims, per_channel
from fednorm.roles import Kind
from fednorm.spec import Citation, HookedLayer, Norm, NormSpec, TensorSpec


def modified_momentum(step: int, momentum: float, kappa: float) -> float:
    """Return eta_t, the weight of the t-th batch in the running moments.

        1 / eta_t = (1 - b^(t-1)) / (1 - b) + b^(t-1) momentum^(-kappa),   b = (1 - momentum)^kappa

    the closed form of the recursion; its limit is 1 - b, and kappa = 0 gives 1 / t.

    Args:
        step: t, from 1.
        momentum: In (0, 1].
        kappa: In [0, 1].
    """
    base: float = (1.0 - momentum) ** kappa
    if base == 1.0:
        return 1.0 / step
    decay = base ** (step - 1)
    first: float = momentum**kappa
    return 1.0 / ((1.0 - decay) / (1.0 - base) + decay / first)


@dataclass(frozen=True)
class _Tracking:
    """What one training batch does to the running moments, and what the loss makes of it.

    Attributes:
        running_mean: Changed in place.
        running_var: Changed in place.
        eta: Weight of this batch.
        lambd: Factor of the penalty.
    """

    running_mean: Tensor
    running_var: Tensor
    eta: float
    lambd: float


class _TaskWeightedNorm(torch.autograd.Function):
    """The normalized batch and the penalty, with the derivative worked out by hand; updates the running moments.

    Means and mean squares of single samples are all that the weights need, in the forward and in the backward pass, and
    plain reductions deliver them faster than PyTorch's own batch normalization takes its moments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        psi: Tensor,
        share: Tensor,
        counts: Tensor,
        corrected: bool,
        eps: float,
        tracking: _Tracking,
    ) -> tuple[Tensor, Tensor]:
        pseudo = total = pi = counts
        weights = share[:, 0]
        if len(counts) > 1:  # one task has all the weight, whatever psi is
            pseudo = psi[: len(counts)].exp()
            if corrected:
                pseudo *= counts > 0
            mass = pseudo + counts
            total = mass.sum()
            pi = mass.div_(total)
            weights = torch.mv(share, pi)
        means = x.mean(tuple(range(2, x.ndim)))
        mean = torch.mv(means.t(), weights)
        squares, scratch = _mean_squares(x, mean)
        var = torch.mv(squares.t(), weights)
        none = x.new_empty(0)
        # The output goes where the squares were: fresh memory costs more than the arithmetic.
        y = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps, out=(scratch, none, none))[0]
        running = [tracking.running_mean, tracking.running_var]
        torch._foreach_lerp_(running, [mean, var], tracking.eta)
        mean_gap, var_gap = torch._foreach_sub([mean, var], running)
        penalty = (torch.dot(mean_gap, mean_gap) + torch.dot(var_gap, var_gap)) * (tracking.lambd / len(mean))
        ctx.save_for_backward(
            x, weight, mean, var, means, squares, share, weights, pi, pseudo, total, mean_gap, var_gap
        )
        ctx.eps, ctx.num_tasks, ctx.lambd = eps, len(psi), tracking.lambd
        ctx.set_materialize_grads(False)
        return y, penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_penalty: Tensor | None) -> Any:
        x, weight, mean, var, means, squares, share, weights, pi, pseudo, total, *gaps = ctx.saved_tensors
        grad_y = torch.zeros_like(x) if grad_y is None else _in_layout_of(x, grad_y)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        inverse = (var + ctx.eps).rsqrt_()
        scale = weight * inverse
        d_var = (scale * grad_weight).mul_(inverse).mul_(-0.5)
        d_mean = (scale * grad_bias).neg_()
        if grad_penalty is not None:
            factor = grad_penalty * (2.0 * ctx.lambd / len(mean))
            d_mean.addcmul_(gaps[0], factor)
            d_var.addcmul_(gaps[1], factor)
        if len(pi) > 1:
            # var moves with mean where the weights do not sum to 1: the published shrinkage.
            d_mean.addcmul_(mean * d_var, 1.0 - weights.sum(), value=-2.0)
            d_pi = torch.mv(share.t(), torch.mv(means, d_mean).addmv_(squares, d_var))
            grad_psi = (d_pi - torch.dot(d_pi, pi)).div_(total).mul_(pseudo)
        else:
            grad_psi = torch.zeros_like(pi)
        if len(pi) < ctx.num_tasks:
            grad_psi = functional.pad(grad_psi, (0, ctx.num_tasks - len(pi)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            per_value = weights * (len(x) * len(mean) / x.numel())
            slope = torch.outer(per_value, d_var * 2.0)
            offset = torch.outer(per_value, d_mean.addcmul_(mean, d_var, value=-2.0))
            grad_x = _affine(x, slope, offset).addcmul_(grad_y, per_channel(scale, x))
        return grad_x, grad_weight, grad_bias, grad_psi, None, None, None, None, None


def _mean_squares(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean square of x - mean of every sample and channel, shape (N, C), and memory like x to write to."""
    axes = tuple(range(2, x.ndim))
    if x.is_contiguous():
        centred = x - per_channel(mean, x)
        norms: Tensor = torch.linalg.vector_norm(centred, dim=axes)
        return norms.square_().mul_(norms.numel() / x.numel()), centred
    squares: Tensor = torch.ops.aten.mse_loss(x, per_channel(mean, x), 0)  # (x - mean)^2 in one pass
    return squares.mean(axes), squares


def _affine(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return x * slope + offset in one pass, with slope and offset of shape (N, C)."""
    if not x.is_contiguous():
        return torch.addcmul(per_channel(offset, x), x, per_channel(slope, x))
    # Evaluation-mode batch norm over N * C channels is the one vectorized kernel for two factors per channel.
    rows = x.view(1, slope.numel(), -1)
    zeros, ones = torch.zeros_like(slope).view(-1), torch.ones_like(slope).view(-1)
    y: Tensor = torch.native_batch_norm(rows, slope.view(-1), offset.view(-1), zeros, ones, False, 0.0, 0.0)[0]
    return y.view(x.shape)


def _in_layout_of(x: Tensor, other: Tensor) -> Tensor:
    if x.is_contiguous():
        return other.contiguous()
    return other.contiguous(memory_format=torch.channels_last)


class _Shares:
    """The shares of the latest batch's samples: every layer of a network asks for the same, and they are made once."""

    def __init__(self) -> None:
        self._latest: tuple[Any, Tensor, Tensor, Tensor] | None = None

    def of(self, tasks: Tensor, num_tasks: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / n_t at (sample, its task), shape (N, T), and n_t, shape (T,), in the type of ``x``.

        Raises:
            DataError: There is not one task for each sample of ``x``.
        """
        if len(tasks) != len(x):
            raise DataError(
                f"AdaB2N was given the tasks of {len(tasks)} samples and then a batch of {len(x)}. Call "
                "set_tasks before every training forward, with one task number per sample."
            )
        asked = (id(tasks), tasks._version, num_tasks, x.dtype, x.device)
        latest = self._latest
        if latest is None or latest[0] != asked:
            member = (tasks[:, None] == torch.arange(num_tasks, device=x.device)).to(x.dtype)
            counts = member.sum(0)
            # The tasks are kept too, so that no other tensor gets their id.
            latest = self._latest = asked, tasks, member.div_(counts.clamp_min(1.0)), counts
        return latest[2:]


_SHARES = _Shares()


class AdaB2NLayer(HookedLayer, BatchLayer):
    """AdaB2N for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        config: The options.
    """

    def __init__(self, num_features: int, config: AdaB2N) -> None:
        super().__init__(num_features, eps=config.eps, momentum=config.momentum)
        self.config = config
        self.task_weight = nn.Parameter(torch.zeros(config.num_tasks))
        self._tasks: Tensor | None = None
        self._seen = 1
        self._penalty: Tensor | None = None

    @property
    def eta(self) -> float:
        """The weight that the latest training batch had in the running moments; that of the first one before any."""
        step = max(int(self.num_batches_tracked), 1)
        return 1.0 / step if self.momentum is None else modified_momentum(step, self.momentum, self.config.kappa)

    def set_tasks(self, tasks: Tensor | None, num_tasks: int) -> None:
        """Take the task numbers of the coming batch.

        Raises:
            ConfigError: More tasks have been seen than psi has entries.
        """
        if num_tasks > len(self.task_weight):
            raise ConfigError(
                f"adab2n.num_tasks is {len(self.task_weight)}, and the stream is at its task number {num_tasks}. Set "
                "num_tasks to the stream's number of tasks or more; entries of unseen tasks change nothing."
            )
        self._tasks, self._seen = (None, 1) if tasks is None else (tasks, num_tasks)

    def penalty(self) -> Tensor | None:
        """Return lambd times the squared distance of the latest batch's moments from the running ones, once.

        None where lambd is 0, before task ``ada_t0``, and where no training batch has come since the last call.
        """
        penalty, self._penalty = self._penalty, None
        return penalty

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong, or the task numbers were for a batch of another size.
        """
        self._check_input_dim(x)
        if not self.training:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        maps = x if x.ndim > 2 else x.unsqueeze(-1)
        if not (maps.is_contiguous() or (maps.ndim == 4 and maps.is_contiguous(memory_format=torch.channels_last))):
            maps = maps.contiguous()
        share, counts = self._shares(maps)
        self.count_batch()
        tracking = _Tracking(self.running_mean, self.running_var, self.eta, self.config.lambd)
        y: Tensor
        y, penalty = _TaskWeightedNorm.apply(
            maps, self.weight, self.bias, self.task_weight, share, counts, self.config.corrected, self.eps, tracking
        )
        counted = self.config.lambd and self._seen > self.config.ada_t0 and penalty.requires_grad
        self._penalty = penalty if counted else None
        return y if x.ndim > 2 else y.squeeze(-1)

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to one step's graph can be neither copied nor pickled.
        return {**self.__dict__, "_penalty": None, "_tasks": None, "_seen": 1}

    def _shares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / n_t at (sample, its task), shape (N, T), and n_t, shape (T,)."""
        if self._tasks is None:
            return x.new_full((len(x), 1), 1.0 / len(x)), x.new_full((1,), float(len(x)))
        return _SHARES.of(self._tasks, self._seen, x)


@dataclass(frozen=True, kw_only=True)
class AdaB2N(Norm):
    """AdaB2N and its options, under the paper's and the official code's names.

    Attributes:
        num_tasks: Length of psi: the stream's number of tasks, or more.
        kappa: Between the cumulative average (0) and the exponential one (1) of the batches' moments.
        lambd: Factor of the extra loss, 0 or more.
        ada_t0: The first task (from 0) in which the extra loss counts.
        corrected: Whether absent tasks get no share, so that the weights sum to 1.
        eps: Added to the variance, greater than 0.
        momentum: The exponential average's weight of the new batch, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    num_tasks: int = 20
    kappa: float = 0.4
    lambd: float = 0.01
    ada_t0: int = 0
    corrected: bool = False
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.whole("adab2n", "num_tasks", self.num_tasks, at_least=1)
        options.number("adab2n", "kappa", self.kappa, at_most=1)
        options.number("adab2n", "lambd", self.lambd)
        for option, value in (("kappa", self.kappa), ("lambd", self.lambd)):
            if value < 0:
                raise ConfigError(f"adab2n.{option} must be 0 or more; got {value!r}.")
        options.whole("adab2n", "ada_t0", self.ada_t0, at_least=0)
        options.flag("adab2n", "corrected", self.corrected)
        options.number("adab2n", "eps", self.eps, above=0)
        options.number("adab2n", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("adab2n", spatial_dims)
        return AdaB2NLayer(num_channels, self)

    def for_stream(self, *, num_tasks: int, batch_ratio: int) -> AdaB2N:
        """Return the method with an entry of psi for every task of the stream."""
        del batch_ratio
        return replace(self, num_tasks=max(num_tasks, self.num_tasks))


SPEC = NormSpec(
    name="adab2n",
    summary="Batch norm whose batch moments weigh tasks by a learned Dirichlet mean, with an adaptive momentum.",
    citation=Citation(
        title="Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation",
        authors="Lyu, Wang, Zhang, Sun, Su, Zhu, Jing",
        year=2023,
        arxiv="2310.08855",
        where="official code lvyilin/AdaB2N, models/utils/adab2n.py",
    ),
    make=AdaB2N,
    layers=(AdaB2NLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "task_weight": TensorSpec(Kind.GATE),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=(
        "The momentum is computed from the batch counter in the state dict; the official one starts again on resuming.",
        "kappa and lambd have defaults, from the paper's grid; the paper chooses them for every cell of its tables.",
        "With a single task psi has the gradient 0 instead of none.",
    ),
)
