"""Moments by client and task, merged by the law of total variance: for norms that balance tasks, in a federation.

A layer that balances the tasks of a stream (``adab2n``, ``task_balanced_norm``) has running moments of a mixture, each
client's of another. An average of these mixes tasks by where they happen to be; so clients keep apart what belongs to
each task. A batch with n_t samples of task t, with moments m_t and v_t of the layer's input over them:

    client k:  M_kt <- (1 - eta) M_kt + eta m_t,   V_kt <- (1 - eta) V_kt + eta v_t,   N_kt <- N_kt + n_t
    server:    M_t, V_t  = the moments of the clients' M_kt, V_kt pooled by N_kt        (law of total variance)
               mean      = sum_t s_t M_t
               var       = sum_t s_t (V_t + (M_t - mean)^2)
               s_t       = sum_k p_k s_kt, made to sum to 1 over the tasks that anyone has seen

eta is the batch's weight in the layer's own running moments, s_kt the share that the layer gives task t among the
counts that client k has seen (:meth:`~fednorm.spec.TaskedLayer.task_shares`). A client's M_kt begin a round as the
server's M_t, for a task that is new as the running moments that it sent. A task that nobody saw in a round stays as it
was: its share does not go to the others. One client's running moments are taken as they are: a mixture of its own is
what they are already. With one task it is what FedAvg's pooled moments are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError, RoleError
from fednorm.federation.local import Local, Turn
from fednorm.federation.plan import NormPlan
from fednorm.federation.pooling import pool_moments
from fednorm.federation.replies import Form
from fednorm.norms._precision import widened
from fednorm.spec import TaskedLayer

MEAN, VAR, COUNT, SHARE = "task_mean", "task_var", "task_count", "task_share"


def require_tasked(model: nn.Module, plan: NormPlan) -> None:
    """Refuse layers with running moments that do not tell tasks apart.

    Raises:
        RoleError: There is one.
    """
    for mean_key, _ in plan.moments():
        layer = plan.by_key[mean_key].layer
        module = model.get_submodule(layer)
        if not isinstance(module, TaskedLayer):
            norm = plan.by_key[mean_key].norm or type(module).__name__
            raise RoleError(
                f"strategy.moments = 'pool_tasks' merges moments by client and task, and layer {layer!r} (norm {norm}) "
                "counts no tasks: its counts cannot be merged. Take norm adab2n or task_balanced_norm, or moments = "
                "'pool', which pools its running moments over clients."
            )


class TaskMoments(Local):
    """Keeps moments and counts of each task during a client's training, and sends them."""

    def begin(self, turn: Turn) -> None:
        """Go on from the server's moments of each task, and look at what the layers are given."""
        strategy = self.strategy
        strategy.let_go()  # of a training that failed on its way
        self.turn, self.own = turn, {}
        for path, pair in strategy.pool.pairs.items():
            layer = turn.model.get_submodule(path)
            assert isinstance(layer, TaskedLayer)
            self.own[path] = _Kept.begun(turn, path, pair)
            strategy.handles.append(layer.register_forward_hook(partial(self._look, self.own[path])))

    @torch.no_grad()
    def _look(self, kept: _Kept, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        del output
        if layer.training:
            kept.take(layer, args[0].detach(), self.turn.task_numbers())

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Send each task's moments, count and share."""
        self.strategy.let_go()
        sent: dict[str, Tensor] = {}
        for path, kept in self.own.items():
            layer = turn.model.get_submodule(path)
            assert isinstance(layer, TaskedLayer)
            values = {MEAN: kept.mean, VAR: kept.var, COUNT: kept.count, SHARE: kept.shares(layer, turn.task_numbers())}
            sent |= {f"{path}.{name}": tensor.to("cpu", torch.float32) for name, tensor in values.items()}
        return sent


@dataclass
class _Kept:
    """One layer's moments of each task, by the number of its experience.

    Attributes:
        mean: Shape (T, C).
        var: Shape (T, C).
        count: Samples in this round, shape (T,).
        seen: Whether a task has moments, shape (T,).
        batches: Batches in this round.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    seen: Tensor
    batches: int = 0

    @classmethod
    def begun(cls, turn: Turn, path: str, pair: tuple[str, str]) -> _Kept:
        mean, var, count = (turn.extra[f"{path}.{name}"] for name in (MEAN, VAR, COUNT))
        running = [widened(turn.tensors[key].detach()) for key in pair]
        device, seen = running[0].device, (count > 0).to(running[0].device)
        mean, var = (
            torch.where(seen[:, None], known.to(device, own.dtype), own)
            for known, own in zip((mean, var), running, strict=True)
        )
        return cls(mean, var, torch.zeros(len(count), dtype=torch.float64), seen)

    def take(self, layer: TaskedLayer, x: Tensor, numbers: list[int]) -> None:
        """Take a batch that a layer has just normalized, and counted."""
        maps = widened(x).flatten(2) if x.ndim > 2 else widened(x).unsqueeze(-1)
        positions = maps.shape[2]
        places = x.new_zeros(len(x), dtype=torch.int64) if layer.tasks is None else layer.tasks
        of_sample = maps.mean(2)
        self.batches += 1
        for place in sorted(set(places.tolist())):
            rows = (places == place).nonzero()[:, 0]
            number, values = numbers[place] if numbers else 0, len(rows) * positions
            mean = of_sample[rows].mean(0)
            squares = (maps[rows] - mean[:, None]).square_().sum((0, 2))
            var = squares / max(values - 1 if layer.unbiased else values, 1)
            self.mean[number].lerp_(mean, layer.eta)
            self.var[number].lerp_(var, layer.eta)
            self.count[number] += len(rows)
            self.seen[number] = True

    def shares(self, layer: TaskedLayer, numbers: list[int]) -> Tensor:
        """Return the layer's share of each task, by its number."""
        shares = torch.zeros(len(self.count), dtype=torch.float64)
        own = torch.tensor(numbers if numbers else [0])
        shares[own] = layer.task_shares(self.count[own] / max(self.batches, 1)).detach().cpu().double()
        return shares


class TaskPool:
    """The server's moments of each task, and their merging.

    Args:
        plan: Whose layers with running moments these are of.

    Attributes:
        pairs: The keys of mean and variance of each of these layers, by its path.
    """

    def __init__(self, plan: NormPlan) -> None:
        self.pairs = {plan.by_key[mean].layer: (mean, var) for mean, var in plan.moments()}
        self._widths = {layer: plan.by_key[mean].shape[0] for layer, (mean, _) in self.pairs.items()}
        self._held: dict[str, Tensor] = {}
        self._replies: list[tuple[Mapping[str, Tensor], float]] = []

    def to_send(self, num_tasks: int) -> Mapping[str, Tensor]:
        """Return every task's moments, and how many of its samples there have been; zeros where there were none."""
        if not self._held:
            for layer, width in self._widths.items():
                for name, shape in ((MEAN, (num_tasks, width)), (VAR, (num_tasks, width)), (COUNT, (num_tasks,))):
                    self._held[f"{layer}.{name}"] = torch.zeros(shape)
        return self._held

    def expected(self, num_tasks: int) -> Mapping[str, Form]:
        """Return what a client sends."""
        forms = {key: Form.of(tensor) for key, tensor in self.to_send(num_tasks).items()}
        return forms | {f"{layer}.{SHARE}": Form((num_tasks,)) for layer in self.pairs}

    def begin(self) -> None:
        """Begin a round."""
        self._replies = []

    def add(self, extra: Mapping[str, Tensor], weight: float) -> None:
        """Take what one client of the round sent, with its weight in the average."""
        self._replies.append((extra, weight))

    def merged(self, *, by_count: bool) -> dict[str, Tensor]:
        """Merge the round into the moments of each task, and return the running moments that follow, float64.

        Args:
            by_count: Whether samples count alike; else clients do.

        Returns:
            Nothing where one client alone has sent something.
        """
        running: dict[str, Tensor] = {}
        for layer, pair in self.pairs.items():
            moments = self._merge(layer, by_count)
            if len(self._replies) > 1 and moments is not None:
                running |= dict(zip(pair, moments, strict=True))
        return running

    def _merge(self, layer: str, by_count: bool) -> tuple[Tensor, Tensor] | None:
        means, variances, seen, shares = (
            [extra[f"{layer}.{name}"].double() for extra, _ in self._replies] for name in (MEAN, VAR, COUNT, SHARE)
        )
        weights = [weight for _, weight in self._replies]
        counts = torch.stack(seen)
        if not by_count:
            counts = (
                counts / counts.sum(1, keepdim=True).clamp_min(1) * torch.tensor(weights, dtype=torch.float64)[:, None]
            )
        held = {name: self._held[f"{layer}.{name}"] for name in (MEAN, VAR, COUNT)}
        of_tasks = [(held[MEAN][task].double(), held[VAR][task].double()) for task in range(counts.shape[1])]
        for task in counts.sum(0).nonzero()[:, 0].tolist():
            of_task, around = ([each[task] for each in moments] for moments in (means, variances))
            of_tasks[task] = pool_moments(of_task, around, counts[:, task].tolist())
            held[MEAN][task], held[VAR][task] = of_tasks[task]
        held[COUNT] += torch.stack(seen).sum(0)
        share = torch.stack([own * weight for own, weight in zip(shares, weights, strict=True)]).sum(0)
        share = torch.where(held[COUNT] > 0, share, 0.0)
        if not float(share.sum()) > 0:
            return None
        return pool_moments([mean for mean, _ in of_tasks], [var for _, var in of_tasks], share.tolist())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments and counts."""
        return {f"tasks/{key}": tensor.clone() for key, tensor in self._held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], num_tasks: int) -> None:
        """Take the moments and counts back.

        Raises:
            ConfigError: They are of another network.
        """
        own = {f"tasks/{key}" for key in self.to_send(num_tasks)}
        if odd := sorted(own ^ set(state)):
            raise ConfigError(f"The checkpoint's moments of tasks do not fit this network: {', '.join(odd[:5])}.")
        self._held = {key.removeprefix("tasks/"): tensor.clone() for key, tensor in state.items()}
