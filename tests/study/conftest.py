"""Small runs, and what their children may die of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fednorm.config import RunConfig, merge, resolve

SMALL: dict[str, Any] = {
    "data": {"train_per_client": 24, "test_per_domain": 10},
    "model": {"width": 4},
    "strategy": {"name": "fedbn"},
    "rounds": {"num_rounds": 4},
}

KIND = """
import fednorm.federation.client as client
import fednorm.federation.cohort.training as training
from fednorm.federation.simulate import simulate
from fednorm.config import resolve

UNIT, ROOM = "round", 20_000


def arm_own(where, n):
    if where == "in a client's training":
        when = lambda bench, who, server_round, **_: server_round == n and who.partition_id == 3
        before(client, "fit", when, die)
        of_cohort = lambda self, clients, tensors, *, server_round, **_: (
            server_round == n and any(who.partition_id == 3 for who in clients)
        )
        before(training.CohortTraining, "train", of_cohort, die)
    elif where == "before the checkpoint":
        before(record.RunRecord, "save_checkpoint", lambda self, checkpoint: checkpoint.ended == n, die)
"""


@pytest.fixture(scope="session")
def launcher(launch: Any) -> Any:
    """Runs that die, besides, ``in a client's training`` or ``before the checkpoint`` of round n."""
    return launch(KIND)


@pytest.fixture(scope="session")
def small() -> Callable[..., dict[str, Any]]:
    """Make the values of a small run: FedBN for four rounds, some keys changed."""

    def values(**changes: Any) -> dict[str, Any]:
        return merge(SMALL, changes)

    return values


@pytest.fixture(scope="session")
def make(small: Callable[..., dict[str, Any]]) -> Callable[..., RunConfig]:
    return lambda **changes: resolve(small(**changes))


class Written:
    """What a finished run left on disk, without the time it took."""

    def __init__(self, folder: Path) -> None:
        self.model = load_file(folder / "model.safetensors")
        clients = folder / "clients.safetensors"
        self.clients = load_file(clients) if clients.exists() else {}
        assert not (folder / "checkpoint.safetensors").exists()
        lines = map(json.loads, (folder / "rounds.jsonl").read_text().splitlines())
        timed = ("seconds", "digest", "files")  # digests are of times too
        self.rounds = [{key: value for key, value in line.items() if key not in timed} for line in lines]
        result = json.loads((folder / "result.json").read_text())
        self.result = {key: value for key, value in result.items() if key not in (*timed, "run", "rounds")}

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Written)
        for mine, theirs in ((self.model, other.model), (self.clients, other.clients)):
            assert mine.keys() == theirs.keys()
            different = [key for key in mine if mine[key].numpy().tobytes() != theirs[key].numpy().tobytes()]
            assert not different
        assert self.rounds == other.rounds
        assert self.result == other.result
        return True


@pytest.fixture(scope="session")
def written() -> type[Written]:
    return Written
