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

With one task, or without task numbers (a federation; a plain training loop, which is warned once), pi is 1: batch
normalization with a biased running variance, the momentum above and the loss; psi has the gradient 0 (in the official
code: none).

Cost: about twice PyTorch's batch normalization on maps at a batch of 32, four times on tokens: moments of samples,
their mixture and the normalization are passes of their own; at a batch of 1 it is the number of calls, five times.
Compiled (``compile = true``), a stream's step takes 1.02 to 1.08 times the one with batch normalization.
Federated: psi is a GATE, shared by FedAvg, local under FedBN; running moments and counter as in batch normalization, or
by client and task (FedAvg's ``moments = "pool_tasks"``).
Continual: everything is kept across experiences.
Differs: eta is computed from the counter ``num_batches_tracked`` by the recursion's closed form. The official layer
keeps it in a plain attribute, so that a resumed run starts its schedule again. The paper chooses kappa and lambd for
every cell of its tables and names no default; ours come from its grid. The derivative is written by hand, several
times faster than composed operations; there is no second derivative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._adab2n_compiled import composed
from fednorm.norms._batch import BatchLayer, check_spatial_dims, per_channel
from fednorm.norms._hearing import Hearing
from fednorm.norms._precision import in_full_precision, widened
from fednorm.norms._shares import BATCHES, Batch, require_one_each
from fednorm.roles import Kind
from fednorm.scalar import scalar
from fednorm.spec import Norm, NormSpec, TaskedLayer, TensorSpec

_LANES = 8
"""Numbers in a vector register of most processors; see :func:`_fold`."""


Step = TypeVar("Step", float, Tensor)


def modified_momentum(step: Step, momentum: float, kappa: float) -> Step:
    """Return eta_t, the weight of the t-th batch in the running moments.

        1 / eta_t = (1 - b^(t-1)) / (1 - b) + b^(t-1) momentum^(-kappa),   b = (1 - momentum)^kappa

    the closed form of the recursion; its limit is 1 - b, and kappa = 0 gives 1 / t.

    Args:
        step: t, from 1; in a compiled layer a tensor, float64.
        momentum: In (0, 1].
        kappa: In [0, 1].
    """
    base: float = (1.0 - momentum) ** kappa
    if base == 1.0:
        return 1.0 / step
    decay: Step = base ** (step - 1)
    first: float = momentum**kappa
    return 1.0 / ((1.0 - decay) / (1.0 - base) + decay / first)


class _Step(NamedTuple):
    """What a layer makes of one training batch.

    Attributes:
        batch: Its tasks.
        fold: See :func:`_fold`.
        running: Mean and variance, changed in place.
        eta: Weight of this batch in them.
        lambd: Factor of the penalty.
        eps: Added to the variance.
        corrected: Whether absent tasks get no share.
    """

    batch: Batch
    fold: int
    running: list[Tensor]
    eta: float
    lambd: float
    eps: float
    corrected: bool


class _TaskWeightedNorm(torch.autograd.Function):
    """The normalized batch and the penalty, with the derivative worked out by hand; updates the running moments.

    Sums and sums of squares of single samples are all that the weights need, in the forward and in the backward pass,
    and plain reductions deliver them faster than PyTorch's own batch normalization takes its moments. In the deeper
    layers of a network the *number* of operations costs more than the arithmetic, so that there are few: tasks that are
    not seen get a factor of 0 instead of being cut off, and what depends on the tasks alone is made once a batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, psi: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
        batch, fold, channels = step.batch, step.fold, x.shape[1]
        pseudo = psi.exp().mul_(batch.present if step.corrected else batch.seen)
        mass = pseudo + batch.counts
        total = mass.sum()
        pi = mass.div_(total)
        weights = torch.mv(batch.share, pi)
        maps = _folded(x, fold)
        sums = _sums(maps, channels)
        mean = torch.mv(sums.t(), weights)
        wide_mean = _wide(mean, fold)
        y = torch.empty_like(x)  # and not a view of anything, or no in-place activation could follow
        scratch = _folded(y, fold)
        squares = _squares(maps, wide_mean, channels, scratch)
        var = torch.mv(squares.t(), weights)
        inverse = (var + step.eps).rsqrt_()
        scale = weight * inverse
        wide_scale = _wide(scale, fold)
        # The output goes where the squares were: fresh memory costs more than the arithmetic.
        if x.is_contiguous():
            none = x.new_empty(0)
            torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, step.eps, out=(scratch, none, none))
        else:
            shift = _wide(torch.addcmul(bias, mean, scale, value=-1.0), fold)
            torch.addcmul(per_channel(shift, maps), maps, per_channel(wide_scale, maps), out=scratch)
        torch._foreach_lerp_(step.running, [mean, var], step.eta)
        gaps = torch._foreach_sub([mean, var], step.running)
        penalty = torch.dot(gaps[0], gaps[0]).add_(torch.dot(gaps[1], gaps[1])).mul_(step.lambd / channels)
        ctx.save_for_backward(x)
        wide = wide_mean, _wide(var, fold), wide_scale
        ctx.kept = step, mean, inverse, scale, wide, sums, squares, weights, pi, pseudo.div_(total), gaps
        ctx.set_materialize_grads(False)
        return y, penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_penalty: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        step, mean, inverse, scale, wide, sums, squares, weights, pi, slope_of_psi, gaps = ctx.kept
        wide_mean, wide_var, wide_scale = wide
        batch, fold, channels = step.batch, step.fold, len(mean)
        maps = _folded(x, fold)
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad = _folded(torch.zeros_like(x) if grad_y is None else grad_y.contiguous(memory_format=layout), fold)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, maps, None, wide_mean, wide_var, None, None, False, step.eps, [False, True, True]
        )
        if fold > 1:
            grad_weight, grad_bias = (each.view(fold, channels).sum(0) for each in (grad_weight, grad_bias))
        pull = 0.0 if grad_penalty is None else grad_penalty * (2.0 * step.lambd / channels)
        d_mean, d_var = torch._foreach_mul(gaps, pull)
        d_mean.addcmul_(scale, grad_bias, value=-1.0)
        d_var.addcmul_(scale * inverse, grad_weight, value=-0.5)
        if not (batch.complete or step.corrected):
            # var moves with mean where the weights do not sum to 1: the published shrinkage.
            d_mean.addcmul_(mean * d_var, 1.0 - torch.dot(pi, batch.present), value=-2.0)
        d_pi = torch.mv(batch.share.t(), torch.mv(sums, d_mean).addmv_(squares, d_var))
        grad_psi = d_pi.sub_(torch.dot(d_pi, pi)).mul_(slope_of_psi)
        grad_x = None
        if ctx.needs_input_grad[0]:
            column = weights.unsqueeze(1)
            offset = column * d_mean.addcmul_(mean, d_var, value=-2.0)
            grad_x = _twice_affine(maps, column * d_var, offset).addcmul_(grad, per_channel(wide_scale, maps))
            grad_x = _unfolded(grad_x, x, fold)
        return grad_x, grad_weight, grad_bias, grad_psi, None


def _fold(x: Tensor) -> int:
    """Return how many neighbouring positions a pass takes for one with as many times the channels.

    With channels last, kernels run over the channels, and several times more slowly where their number leaves a rest
    in vector registers, as the 20 of a slim ResNet do.
    """
    fold = 1 if x.is_contiguous() else _LANES // math.gcd(x.shape[1], _LANES)
    return fold if x.shape[-1] % fold == 0 else 1


def _folded(x: Tensor, fold: int) -> Tensor:
    """Return maps (N, C, H, W), channels last, as (N, fold * C, H, W / fold), without touching memory."""
    if fold == 1:
        return x
    n, c, h, w = x.shape
    return x.as_strided((n, fold * c, h, w // fold), (c * h * w, 1, c * w, fold * c))


def _unfolded(maps: Tensor, like: Tensor, fold: int) -> Tensor:
    """Undo :func:`_folded`."""
    if fold == 1:
        return maps
    n, c, h, w = like.shape
    return maps.as_strided((n, c, h, w), (c * h * w, 1, c * w, c))


def _wide(values: Tensor, fold: int) -> Tensor:
    """Return values of shape (C,) for folded maps."""
    return values if fold == 1 else values.expand(fold, -1).reshape(-1)  # half the time of ``repeat``


def _sums(maps: Tensor, channels: int) -> Tensor:
    """Return the sum of every part and channel, shape (N * fold, C)."""
    return maps.sum(tuple(range(2, maps.ndim))).view(-1, channels)


def _squares(maps: Tensor, mean: Tensor, channels: int, scratch: Tensor) -> Tensor:
    """Return the sum of (x - mean)^2 of every part and channel, shape (N * fold, C); scratch is memory like maps."""
    if maps.is_contiguous():
        torch.sub(maps, per_channel(mean, maps), out=scratch)
        norms: Tensor = torch.linalg.vector_norm(scratch, dim=tuple(range(2, maps.ndim)))
        return norms.square_()
    torch.ops.aten.mse_loss.out(maps, per_channel(mean, maps), 0, out=scratch)  # (x - mean)^2 in one pass
    return _sums(scratch, channels)


def _twice_affine(maps: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return 2 * x * slope + offset in one pass, with slope and offset of a number for every part and channel."""
    if not maps.is_contiguous():
        return torch.addcmul(per_channel(offset, maps), maps, per_channel(slope, maps), value=2.0)
    # Evaluation-mode batch norm over N * C channels is the one vectorized kernel for two factors per channel.
    rows, factor = maps.view(1, slope.numel(), -1), slope.mul_(2.0).view(-1)
    zeros, ones = torch.zeros_like(factor), torch.ones_like(factor)
    y: Tensor = torch.native_batch_norm(rows, factor, offset.view(-1), zeros, ones, False, 0.0, 0.0)[0]
    return y.view(maps.shape)


@dataclass(slots=True)
class _Now:
    """What a layer is told and gives back in a step; no attributes of the module, which take long to set.

    Attributes:
        tasks: Of the coming batch.
        seen: How many tasks have been seen.
        penalty: Of the latest batch, until it is asked for.
        counted: Whether the penalty counts in this task.
        seen_so_far: ``seen`` as a tensor: code is compiled anew for every number, and for a tensor once.
    """

    tasks: Tensor | None = None
    seen: int = 1
    penalty: Tensor | None = None
    counted: bool = True
    seen_so_far: Tensor | float = 1.0


class AdaB2NLayer(TaskedLayer, BatchLayer):
    """AdaB2N for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        config: The options.
    """

    def __init__(self, num_features: int, config: AdaB2N) -> None:
        super().__init__(num_features, eps=config.eps, momentum=config.momentum)
        self.config = config
        self.task_weight = nn.Parameter(torch.zeros(config.num_tasks))
        self._now = _Now(counted=config.ada_t0 < 1)
        self._hearing = Hearing(config)

    @property
    def eta(self) -> float:
        """The weight that the latest training batch had in the running moments; that of the first one before any."""
        return self._eta_of(float(max(int(self.num_batches_tracked), 1)))

    def _eta_of(self, step: Step) -> Step:
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
        self._hearing.told = True
        now = self._now
        now.tasks, now.seen = (None, 1) if tasks is None else (tasks, num_tasks)
        now.counted = now.seen > self.config.ada_t0
        now.seen_so_far = scalar(float(now.seen), widened(self.task_weight))

    @property
    def tasks(self) -> Tensor | None:
        """The task of every sample of the latest batch."""
        return self._now.tasks

    def task_shares(self, counts: Tensor) -> Tensor:
        """Return pi of a batch with so many samples of each task that has been seen."""
        mass = self.task_weight.detach()[: len(counts)].exp().to(counts) + counts
        return mass / mass.sum()

    def penalty(self) -> Tensor | None:
        """Return lambd times the squared distance of the latest batch's moments from the running ones, once.

        None where lambd is 0, before task ``ada_t0``, and where no training batch has come since the last call.
        """
        now = self._now
        penalty, now.penalty = now.penalty, None
        return penalty

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong, or the task numbers were for a batch of another size.
        """
        self._check_input_dim(x)
        if not self.training:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if not self._hearing.told:
            self._hearing.say("adab2n")
        return self._train(x)

    def _compiled(self, x: Tensor) -> Tensor:
        now = self._now
        if now.tasks is not None:
            require_one_each(now.tasks, x)
        self.num_batches_tracked.add_(1)
        eta = self._eta_of(self.num_batches_tracked.double())
        y, penalty = composed(self, x, now.tasks, now.seen_so_far, eta.to(x.dtype))
        now.penalty = penalty if self.config.lambd and now.counted and penalty.requires_grad else None
        return y

    @in_full_precision
    def _train(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._compiled(x)
        maps = x if x.ndim > 2 else x.unsqueeze(-1)
        if not (maps.is_contiguous() or (maps.ndim == 4 and maps.is_contiguous(memory_format=torch.channels_last))):
            maps = maps.contiguous()
        now, config, fold = self._now, self.config, _fold(maps)
        batch = BATCHES.of(now.tasks, now.seen, config.num_tasks, maps, fold)
        self.num_batches_tracked.add_(1)
        running = [widened(self.running_mean), widened(self.running_var)]
        step = _Step(batch, fold, running, self.eta, config.lambd, self.eps, config.corrected)
        learned = [widened(each) for each in (self.weight, self.bias, self.task_weight)]
        y: Tensor
        y, penalty = _TaskWeightedNorm.apply(maps, *learned, step)
        if running[0] is not self.running_mean:  # a model in half precision
            self.running_mean.copy_(running[0])
            self.running_var.copy_(running[1])
        counted = config.lambd and now.counted and penalty.requires_grad
        now.penalty = penalty if counted else None
        return y if x.ndim > 2 else y.squeeze(-1)

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to one step's graph can be neither copied nor pickled.
        return {**self.__dict__, "_now": _Now(counted=self.config.ada_t0 < 1)}

    def _shares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / n_t at (sample, its task), shape (N, T), and n_t, shape (T,), which a trace has too."""
        now = self._now
        batch = BATCHES.of(now.tasks, now.seen, self.config.num_tasks, x, 1)
        return batch.share[:, : now.seen] * (x.numel() // (len(x) * self.num_features)), batch.counts[: now.seen]


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
    verified=(
        "Golden traces adab2n_kappa_zero, _one, _mid: the official layer (lvyilin/AdaB2N), float64.",
        "The formula composed of float64 operations, with gradients and penalty by autograd.",
    ),
)
