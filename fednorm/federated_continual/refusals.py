"""What cannot be of a federation whose clients learn on streams, each said before anything is trained."""

from __future__ import annotations

from fednorm.config import RunConfig
from fednorm.errors import ConfigError, RoleError
from fednorm.federated_continual.cells import Grid
from fednorm.federation.local import Local
from fednorm.federation.plan import NormPlan
from fednorm.federation.server_optimizer import ServerOptimizer
from fednorm.federation.strategy import NormStrategy
from fednorm.streams.norm_boundary import NormBoundary
from fednorm.streams.own_norms import require_agreement


def require_fit(config: RunConfig) -> None:
    """Refuse what a client on a stream does not have.

    Raises:
        ConfigError: It is something of a plain stream's learner, or of a plain federation; or the parts contradict
            each other.
    """
    learner = config.learner.card
    if config.strategy.card.pooled:
        raise ConfigError(
            f"Strategy {config.strategy.name} trains on the images of all clients at once; then there is no grid. It "
            "is the stream itself: kind = 'continual' (fednorm continual)."
        )
    if learner.joint:
        raise ConfigError(
            f"Learner {config.learner.name} is given all experiences at once; then there is no stream. It is a plain "
            "federation: kind = 'federated', without --scenario."
        )
    if config.train.local_epochs != int(config.train.local_epochs):
        raise ConfigError(
            f"A client on a stream makes whole passes over an experience; got train.local_epochs = "
            f"{config.train.local_epochs}. Set it to a whole number, and rounds.per_experience for how many rounds."
        )
    require_agreement(config, "grid.norms", config.grid.norms)
    _require_tasks(config)


def _require_tasks(config: RunConfig) -> None:
    """Refuse normalization tensors by experience for images of nobody knows which.

    Raises:
        ConfigError: They are asked for.
    """
    evaluate = config.evaluate
    if config.grid.norms == "per_experience" and not evaluate.task_identity and evaluate.infer_task == "none":
        raise ConfigError(
            "grid.norms = 'per_experience' tests each experience under its own normalization tensors, and which "
            "experience a test image is of is not known: evaluate.task_identity is false. Set it to true where the "
            "task is given with the image (the accuracy is then task-incremental); set evaluate.infer_task to "
            "'entropy' or 'statistics' to infer it from the image; or take grid.norms = 'keep'."
        )


def require_plain_training(strategy: NormStrategy, config: RunConfig) -> None:
    """Refuse a strategy whose clients train in a way of their own, which a learner has too.

    Raises:
        ConfigError: It changes the loss, trains in phases, or trains before an evaluation; or it makes something of
            a client's update, and the learner begins each experience from the initial weights.
    """
    side, name = strategy.local, config.strategy.name
    for method, does in (
        ("loss", "changes the loss"),
        ("phases", "trains in phases"),
        ("before_evaluation", "changes the network before it is evaluated"),
    ):
        if getattr(side, method) is not getattr(Local, method):
            raise ConfigError(
                f"Strategy {name} {does} on its clients, and so does what learns there, learner "
                f"{config.learner.name}. Take a strategy that leaves the training to the learner: fedavg, "
                "fedbn, silobn, fedprox, scaffold, fedwon and those with an optimizer of the server."
            )
    from_last = isinstance(strategy, ServerOptimizer) or any(
        getattr(side, method) is not getattr(Local, method) for method in ("begin", "adjust", "end")
    )
    if from_last and config.learner.card.make.trains_at_end:
        raise ConfigError(
            f"Learner {config.learner.name} trains a fresh network in every experience, and strategy {name} takes a "
            "client's training for steps from what the server had sent. Take one that averages: fedavg, fedbn, silobn "
            "or fedwon."
        )


def require_norms(norms: NormBoundary, plan: NormPlan, grid: Grid, config: RunConfig) -> None:
    """Refuse a boundary of experiences that makes nothing, or nothing sensible, of this network's normalization.

    Raises:
        RoleError: It has no normalization layer.
        ConfigError: Tensors are to be kept per experience, and the server averages those of different ones.
    """
    what = config.grid.norms
    if what == "keep":
        return
    if not norms.keys:
        raise RoleError(
            f"grid.norms = {what!r} is about normalization layers, and this network has none (norm "
            f"{config.norm.name}): it would do nothing. Take 'keep', or a norm that normalizes activations."
        )
    if not norms.per_experience:
        return
    shared = sorted(set(norms.keys) & set(plan.sent))
    for time in range(grid.num_times):
        numbers = sorted({cell.number for row in grid.cells if (cell := row[time]) is not None})
        if len(numbers) > 1 and shared:
            raise ConfigError(
                f"grid.norms = 'per_experience', and grid.order = {config.grid.order!r}: at time {time + 1} clients "
                f"are at the experiences {', '.join(str(number + 1) for number in numbers)}, and strategy "
                f"{config.strategy.name} averages their normalization tensors ({shared[0]} and {len(shared) - 1} "
                "more), which are then of no one experience. Take grid.order = 'same', or strategy fedbn, which keeps "
                "all of them on their client."
            )
