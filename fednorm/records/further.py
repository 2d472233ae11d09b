"""A finished run goes on: 200 rounds after a run of 100 with the same configuration, to the same bits as 200 at once.

A finished record keeps the server's tensors and every client's (of many clients, all that they keep); what else its
last checkpoint had (a server optimizer's moments, control variates, clients' momentum) stands in
``further.safetensors``. A longer run that finds the record of a shorter one beside its own begins with its lines and
tensors, as if it had been cut short there.

Where the length enters what is computed before its end, the longer run is another run and begins anew: a learning rate
that falls over the rounds. A stream does not go on so: its number of passes, and of experiences, is part of each of
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fednorm.config import RunConfig
from fednorm.errors import FedNormError
from fednorm.records.checkpoint import Checkpoint
from fednorm.records.columns import reports
from fednorm.records.folder import Tensors
from fednorm.records.integrity import read_tensors
from fednorm.records.record import ABOUT, CLIENTS, FURTHER, MODEL, RESULT, RunRecord
from fednorm.records.versions import versions

OF_LENGTH = ("linear", "cosine")
"""Schedules that fall over all rounds."""

SAME = ("fednorm", "torch", "numpy", "machine")
"""Versions that must be those of the finished run, for the bits to be."""

KEPT_APART: Mapping[str, str] = {"server": MODEL, "client": CLIENTS}
"""Parts of a checkpoint that a finished record has in files of their own."""


@dataclass(frozen=True)
class Finished:
    """The record of a finished run that differs from a longer one in nothing but its number of rounds.

    Attributes:
        folder: Its folder.
        config: Its configuration.
        about: What its ``run.json`` says.
    """

    folder: Path
    config: RunConfig
    about: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        """Return its number of rounds."""
        return self.config.rounds.num_rounds


def shorter(config: RunConfig, runs: Path) -> Finished | None:
    """Return the longest finished run that a run could go on from; None where there is none.

    Args:
        config: The run's configuration.
        runs: The folder of records.
    """
    if config.kind != "federated":
        return None
    found = [made for folder in Path(runs).glob(f"{config.title}-*") if (made := _finished(config, folder))]
    return max(found, key=lambda finished: finished.rounds, default=None)


def _finished(config: RunConfig, folder: Path) -> Finished | None:
    try:
        if not (folder / RESULT).is_file():
            return None
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        rounds = about["config"]["rounds"]["num_rounds"]
        if type(rounds) is not int or not 0 < rounds < config.rounds.num_rounds:
            return None
        own = replace(config, rounds=config.rounds.replace(num_rounds=rounds))
    except (OSError, ValueError, LookupError, TypeError):  # a record of something else, or none
        return None
    return Finished(folder, own, about) if folder.name == f"{config.title}-{own.hash}" else None


def why_not(config: RunConfig, finished: Finished) -> str:
    """Return why a run does not go on from a shorter one, a sentence; empty where it does.

    Args:
        config: The longer run's configuration.
        finished: The shorter run.
    """
    begins = f"so these {config.rounds.num_rounds} rounds are another run, and begin anew."
    there = f"A run of {finished.rounds} rounds has finished ({finished.folder})"
    if config.train.schedule in OF_LENGTH:
        return (
            f"{there}, and its learning rate has fallen over all of them (train.schedule = "
            f"{config.train.schedule!r}): {begins}"
        )
    before, now = finished.about.get("versions", {}), versions()
    if other := [f"{name} {before.get(name)}, not {now[name]}" for name in SAME if before.get(name) != now[name]]:
        return f"{there}, with {'; '.join(other)}: its bits may not be those of today, {begins}"
    if not (finished.folder / FURTHER).exists():
        return f"{there}, of which an older fednorm has not kept all that it takes to go on: {begins}"
    chosen = config.evaluate.best_round and finished.rounds % config.rounds.evaluate_every
    return f"{there}, and has scored a round that the longer one does not: {begins}" if chosen else ""


def begin(record: RunRecord, data: str, scores: tuple[str, ...]) -> Finished | None:
    """Let a run of which nothing stands begin with what a shorter one has left, if there is one.

    Args:
        record: The record of the longer run, locked.
        data: The digest of the data as they are now.
        scores: The keys of a round's line that tell of its evaluation: the last round of the shorter run is evaluated,
            whatever ``rounds.evaluate_every`` says.

    Returns:
        The shorter run; None where the run begins anew, or goes on by itself.

    Raises:
        RecordError: The record cannot be written.
    """
    config = record.config
    if record.has_checkpoint() or not (finished := shorter(config, record.folder.parent)):
        return None
    if why_not(config, finished) or finished.about.get("data", {}).get("digest") != data:
        return None
    try:
        earlier = RunRecord(record.folder.parent, finished.config)
        if not earlier.result():  # which checks every file of it
            return None
        written, tensors = earlier.lines(), _tensors(finished)
        lines: list[dict[str, Any]] = [{**line, "clients": reports(finished.folder, line)} for line in written]
    except FedNormError:  # it is damaged: that is said to whoever asks for it
        return None
    if finished.rounds % config.rounds.evaluate_every:
        last = {key: value for key, value in lines[-1].items() if key not in scores}
        lines[-1] = {**last, "clients": {**last["clients"], "evaluate": []}}
    last_state = Checkpoint(finished.rounds, tensors, data=data, table=earlier.states.used)
    try:
        record.take_over(lines, last_state, earlier.states)
    finally:
        earlier.states.close()
    return finished


def rest(checkpoint: Checkpoint) -> Tensors:
    """Return the tensors of a run's last checkpoint that no other file of its finished record holds."""
    return {key: t for key, t in checkpoint.tensors.items() if key.partition("/")[0] not in KEPT_APART}


def _tensors(finished: Finished) -> Tensors:
    tensors = dict(read_tensors(finished.folder / FURTHER, finished.config.hash)[0])
    for place, name in KEPT_APART.items():
        path = finished.folder / name
        if path.exists():
            tensors |= {f"{place}/{key}": t for key, t in read_tensors(path, finished.config.hash)[0].items()}
    return tensors
