"""What a run knows of its clients before any of them has answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fednorm.data.clients import Counts
from fednorm.federation.replies import Expected

LASTING = 2**13
"""Clients up to which what is known of them, once put together, lasts."""


class ExpectedClients(Mapping[int, Expected]):
    """What a run knows of its clients, by partition id; each put together when it is asked for.

    Args:
        counts: How many images each client has.
        split: The split that is scored.
        constant: Whether they train on all of their training images in every round.
    """

    def __init__(self, counts: Counts, split: str, *, constant: bool = True) -> None:
        self._counts, self._constant = counts, constant
        # As lists: an entry of an array takes longer to be taken out than all the rest of a client.
        self._domain, self._held_out, self._train = (
            values.tolist() for values in (counts.domain, counts.held_out, counts.train)
        )
        self._made: dict[int, Expected] = {}
        self._scored = (counts.validation if split == "validation" else counts.test).tolist()

    def __getitem__(self, partition_id: int) -> Expected:
        known = self._made.get(partition_id)
        if known is None:
            known = self._put_together(partition_id)
            if len(self._made) < LASTING:
                self._made[partition_id] = known
        return known

    def _put_together(self, partition_id: int) -> Expected:
        if not 0 <= partition_id < len(self._train):
            raise KeyError(partition_id)
        return Expected(
            self._counts.domains[self._domain[partition_id]],
            bool(self._held_out[partition_id]),
            self._train[partition_id],
            self._scored[partition_id],
            self._constant,
        )

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._counts)))

    def __len__(self) -> int:
        return len(self._counts)
