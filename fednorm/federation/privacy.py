"""Private training in a federation: which strategies can have it, and what each client has spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fednorm.data.clients import Counts
from fednorm.errors import ConfigError
from fednorm.federation.local import Local, Phase, rate_of
from fednorm.training.private import epsilon, require_private

if TYPE_CHECKING:
    from fednorm.config import TrainConfig
    from fednorm.federation.workbench import Workbench

NOTE = (
    "Images are protected, not clients: each client's epsilon is that of one of its images. The noise comes from the "
    "run's seed (a simulation), and scores and numbers of images are sent without noise."
)


def check_private(bench: Workbench) -> None:
    """Refuse what private training cannot do, before a run.

    Raises:
        ConfigError: As :func:`~fednorm.training.private.require_private`; or the strategy's clients look at their
            images other than by the gradients of the training.
    """
    side, name = bench.strategy.local, bench.config.strategy.name
    own = [
        method
        for method in ("loss", "phases", "end", "measure", "before_evaluation")
        if getattr(side, method) is not getattr(Local, method)
    ]
    if own or bench.config.strategy.card.pooled or bench.config.strategy.card.own_scaling:
        what = f" ({side.__name__}.{own[0]})" if own else ""
        raise ConfigError(
            f"Clients of strategy {name} do more with their images than take gradients{what}, which private training "
            "(train.private_noise) does not account for. Take fedavg, fedprox or fedbn."
        )
    require_private(bench.trainee)


def spent(train: TrainConfig, counts: Counts, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a result says of a private run's budget.

    Args:
        train: Section ``train`` of the run.
        counts: How many images each client has.
        lines: Every round's line. A client has spent what it was asked for, whether its update was used or not.
    """
    asked = Counter(int(client) for line in lines for client in line["sampled"])
    clients = []
    for client in sorted(asked):
        count = int(counts.train[client])
        rate, steps = rate_of(train, count), asked[client] * Phase().batches(train, -(-count // train.batch_size))
        clients.append(
            {
                "client": client,
                "domain": counts.domains[counts.domain[client]],
                "sampling_rate": rate,
                "steps": steps,
                "epsilon": _epsilon(train, rate, steps),
            }
        )
    return {
        "noise_multiplier": train.private_noise,
        "max_grad_norm": train.private_clip,
        "delta": train.private_delta,
        "accountant": "RDP of the sampled Gaussian (Opacus)",
        "epsilon": max((client["epsilon"] for client in clients), default=0.0),
        "clients": clients,
        "note": NOTE,
    }


_KNOWN: dict[tuple[float, float, int, float], float] = {}


def _epsilon(train: TrainConfig, rate: float, steps: int) -> float:
    """Return a client's epsilon; many have the same."""
    key = (train.private_noise, rate, steps, train.private_delta)
    if key not in _KNOWN:
        _KNOWN[key] = epsilon(*key)
    return _KNOWN[key]
