"""What happened in a round, as the server takes it down: who was asked, what came, what was not used and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import MetricRecord
from torch import Tensor

from fednorm.federation.aggregation import weighted_mean
from fednorm.federation.replies import Cause, UnfitReply


@dataclass(frozen=True)
class ClientReport:
    """What one client reported in one round.

    Attributes:
        partition_id: The client.
        domain: Its domain.
        metrics: The numbers among its metrics.
        update_norm: How far its training led it (:func:`~fednorm.federation.update_norm.update_norm`); None after an
            evaluation.
    """

    partition_id: int
    domain: str
    metrics: Mapping[str, float]
    update_norm: float | None = None


@dataclass
class RoundReport:
    """What happened in one round.

    Attributes:
        server_round: The round, from 1.
        sampled: Partition ids of the clients that were asked to train.
        train: What those reported that trained.
        evaluate: What those reported that evaluated; empty in rounds without evaluation.
        evaluated: Whether clients were asked to evaluate.
        scored: Partition ids of those that were asked; None for all that do not only evaluate.
        rejected: Partition id and reason of every reply that was not used; None for a node that the run does not
            know.
        causes: How often each kind of fault was among them.
        bytes_down: Bytes of tensors sent to clients for training.
        bytes_up: Bytes of tensors received from them.
        seconds: Wall-clock time of the round.
        statistics: Running statistics that travelled with each reply that was used, by partition id; in rounds that
            are evaluated.
        events: What became of the nodes of a deployed run: each with the site, and what happened to it.
    """

    server_round: int
    sampled: tuple[int, ...] = ()
    train: list[ClientReport] = field(default_factory=list)
    evaluate: list[ClientReport] = field(default_factory=list)
    evaluated: bool = False
    scored: tuple[int, ...] | None = None
    rejected: list[tuple[int | None, str]] = field(default_factory=list)
    causes: Counter[Cause] = field(default_factory=Counter)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    statistics: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    events: list[dict[str, str]] = field(default_factory=list)

    def reject(self, partition_id: int | None, unfit: UnfitReply, during: str = "") -> None:
        """Take down a reply that is not used, and what for it was sent where that is not training."""
        self.rejected.append((partition_id, f"{during} failed: {unfit.reason}" if during else unfit.reason))
        self.causes[unfit.cause] += 1


def shown(rejected: Iterable[tuple[int | None, str]], most: int = 3) -> str:
    """Return the first few rejections as they stand in an error."""
    return "; ".join(
        f"{'another node' if partition_id is None else f'client {partition_id}'}: {reason}"
        for partition_id, reason in list(rejected)[:most]
    )


def weighted_metrics(reports: Sequence[ClientReport]) -> MetricRecord:
    """Average each metric over the clients that report it, weighted by their examples; NaN without any example."""
    keys = dict.fromkeys(key for report in reports for key in report.metrics if key != "num-examples")
    return MetricRecord({key: mean_metric(reports, key) for key in keys})


def mean_metric(reports: Iterable[ClientReport], key: str) -> float:
    """Return the mean of a metric over the clients that report it, weighted by their examples; NaN without any."""
    metrics = [report.metrics for report in reports if key in report.metrics]
    return weighted_mean([m[key] for m in metrics], [m["num-examples"] for m in metrics])
