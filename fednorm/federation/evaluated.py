"""Which clients an evaluation is made on (``evaluate.clients``): all, those sampled in the round, or a seeded draw."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

from fednorm.config import ALL_CLIENTS, SAMPLED_CLIENTS
from fednorm.errors import ConfigError
from fednorm.federation.nodes import Node
from fednorm.federation.replies import Expected
from fednorm.rng import stream


def evaluated(
    nodes: Sequence[Node], which: str, *, sampled: Collection[int], expected: Mapping[int, Expected], seed: int
) -> list[Node]:
    """Return the clients that are evaluated, in the order of partition ids.

    A number k draws once for a whole run, so that its rounds can be compared, from the clients that have images to
    score: as many of each domain as can be, since a mean is over domains.

    Args:
        nodes: The clients that can be evaluated.
        which: ``all``, ``sampled``, or k in digits.
        sampled: Partition ids of the clients that were asked to train in the round.
        expected: What is known of the clients; empty where nothing is.
        seed: The run's; the stream is (seed, "evaluate", domain).
    """
    if which == ALL_CLIENTS:
        return list(nodes)
    if which == SAMPLED_CLIENTS:
        asked = set(sampled)
        return [node for node in nodes if node.partition_id in asked]
    by_domain: dict[str, list[Node]] = {}
    for node in nodes:
        known = expected.get(node.partition_id)
        if known is None or known.scored:
            by_domain.setdefault(node.domain, []).append(node)
    drawn = []
    for domain, members in by_domain.items():
        order = stream(seed, "evaluate", domain).permutation(len(members))[: int(which)]
        drawn.append([members[place] for place in order])
    dealt = [node for turn in zip_longest(*drawn) for node in turn if node is not None][: int(which)]
    return sorted(dealt, key=lambda node: node.partition_id)


def require_evaluated(which: str, domains: Sequence[str]) -> None:
    """Refuse a draw that is too small to have a client of each domain.

    Args:
        which: ``evaluate.clients``.
        domains: The domains that are scored.

    Raises:
        ConfigError: It is.
    """
    if which.isdecimal() and int(which) < len(domains):
        raise ConfigError(
            f"evaluate.clients draws {which} clients, and there are {len(domains)} domains to score "
            f"({', '.join(domains[:8])}{', …' * (len(domains) > 8)}). Draw at least {len(domains)}, or take all."
        )
