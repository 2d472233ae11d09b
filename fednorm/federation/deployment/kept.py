"""What a client keeps on a disk, so that a node that is started again goes on with its run.

Flower keeps a client's state in its SuperNode's memory, which ends with the process. A site whose node's configuration
names a ``state-dir`` writes the same there after every training, and a client of Flower's simulation into the run's
record: one file a run and client, a safetensors file, whole or not there, with the records of the client's state as
``RECORD/KEY``.

A server that goes on from a checkpoint says with every message of which round it has used the client's training last
(:data:`SITE`). A client that has trained since, and was never told that it was in vain, goes back by that training.

At an experience's end (``query.boundary``) a client's state changes too, and the server may have to ask for that again.
What the client keeps then is a second file beside the first, with the round; it holds once the server says that so many
rounds have ended (``ended``), and until then the first does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from flwr.app import ConfigRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fednorm.errors import RecordError
from fednorm.federation import undo
from fednorm.federation.contexts import BEFORE_RECORD
from fednorm.federation.undo import KEPT
from fednorm.federation.wire import pack, unpack
from fednorm.records import files
from fednorm.records.formats import shortened
from fednorm.records.integrity import apart

SITE = "fednorm.site"
"""The record that goes to a client beside every message, and the one of its ``Context.state`` that remembers it."""

LOST = "lost-state-of-round"
"""The metric with which a training says that the client does not keep what it kept in the last round that was used."""

RECORDS = (*KEPT, BEFORE_RECORD)
"""The records of a client's state that outlive its node."""

BOUNDARY = "query.boundary"
"""What a client is told at an experience's end, by a server that says how many rounds have ended before."""

CROSSED = "crossed"
"""Of a client's state: the round at whose end it has crossed a boundary since it trained last, or 0."""

_NUMBERS = ("round", "before", CROSSED)

_BESIDE = ".boundary"
"""How the name of the second file ends, before its suffix."""


class KeptOnDisk:
    """The state of one site on its disk.

    Args:
        folder: The node's ``state-dir``; made when missing.
        site: The site's name.
    """

    def __init__(self, folder: Path, site: str) -> None:
        self._folder, self._name = folder, quote(site, safe="")

    def path(self, run: str, beside: str = "") -> Path:
        """Return the file of a run, or the second one beside it."""
        return self._folder / quote(run, safe="") / f"{self._name}{beside}.safetensors"

    def save(self, state: RecordDict, run: str, numbers: ConfigRecord) -> None:
        """Write what a client keeps, in the place of what it kept before.

        Args:
            state: The client's ``Context.state``.
            run: The run.
            numbers: Whole numbers that are to come back with it.

        Raises:
            RecordError: It cannot be written; what was there is whole.
        """
        self._write(self.path(run), state, numbers)
        self.path(run, _BESIDE).unlink(missing_ok=True)

    def save_crossed(self, state: RecordDict, run: str, numbers: ConfigRecord, *, again: bool) -> None:
        """Write what a client keeps after a boundary, beside what it kept before it.

        Args:
            state: As for :meth:`save`.
            run: The run.
            numbers: As for :meth:`save`, :data:`CROSSED` among them.
            again: Whether what it kept before it is what it kept after an earlier one, not having trained in between.

        Raises:
            RecordError: It cannot be written; what was there is whole.
        """
        beside = self.path(run, _BESIDE)
        if again and beside.is_file():
            beside.replace(self.path(run))
        self._write(beside, state, numbers)

    @staticmethod
    def _write(path: Path, state: RecordDict, numbers: ConfigRecord) -> None:
        if not any(name in state for name in RECORDS) and not path.exists():
            return  # there is nothing to lose
        tensors = {
            f"{name}/{key}": tensor
            for name in RECORDS
            if name in state.array_records
            for key, tensor in unpack(state.array_records[name]).items()
        }
        about = {key: str(value) for key, value in numbers.items() if isinstance(value, int)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as part:
                save_file(apart(tensors), part, metadata=about)
        except OSError as error:
            raise RecordError(
                f"The site's state cannot be kept in {path}: {error.strerror or error}. Give the node another folder "
                "(state-dir in its node-config), or make room there."
            ) from error

    def load(self, state: RecordDict, run: str, ended: int = 0) -> dict[str, int] | None:
        """Give a client's state what the disk has of a run; None where it has nothing.

        Args:
            state: The client's ``Context.state``.
            run: The run.
            ended: The rounds that have ended: a boundary at the end of a later one has never been.

        Raises:
            RecordError: A file is damaged.
        """
        beside = RecordDict()
        crossed = self._read(self.path(run, _BESIDE), beside)
        if crossed is None or not 0 < crossed.get(CROSSED, 0) <= ended:
            return self._read(self.path(run), state)
        for name, record in beside.items():
            state[name] = record
        return crossed

    @staticmethod
    def _read(path: Path, state: RecordDict) -> dict[str, int] | None:
        if not path.is_file():
            return None
        records: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                about = {key: int(value) for key, value in (file.metadata() or {}).items()}
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    name, _, inner = key.partition("/")
                    records.setdefault(name, {})[inner] = file.get_tensor(key)
        except (OSError, SafetensorError, ValueError) as error:
            raise RecordError(
                f"The site's state in {path} cannot be read: {shortened(str(error))}. Remove the file: the site then "
                "goes on without what it kept, and the run's record says so."
            ) from error
        for name in RECORDS:
            if name in records:
                state[name] = pack(records[name])
        return about


class Keeping:
    """What clients keep, and of which rounds it is: in their ``Context.state``, and on a disk.

    Args:
        disk: Returns a client's place on the disk by its number; None where it has none.
    """

    def __init__(self, disk: Callable[[int], KeptOnDisk | None]) -> None:
        self._disk, self._lost = disk, 0

    def before(self, kind: str, content: RecordDict, state: RecordDict) -> None:
        """Find what a client kept, and go back to what the server has used of it.

        Args:
            kind: The type of the message.
            content: What it holds; without :data:`SITE` nothing happens.
            state: The client's ``Context.state``.

        Raises:
            RecordError: What is on its disk cannot be read.
        """
        said = content.config_records.get(SITE)
        if said is None:
            return
        run, number = str(said["run"]), int(str(said["partition-id"]))
        numbers = self._numbers(state, run, number, int(str(said.get("ended", 0))))
        if kind == "train":
            last = int(str(said["last-round"]))
            if numbers["round"] > last and BEFORE_RECORD in state:  # trained, and never heard that it was in vain
                undo.go_back(state, numbers["round"])
                numbers["round"] = numbers["before"]
            self._lost = last if numbers["round"] != last else 0
        state[SITE] = ConfigRecord({"run": run, "partition-id": number, **numbers})

    def _numbers(self, state: RecordDict, run: str, number: int, ended: int) -> dict[str, int]:
        """Return the round of what the client keeps, and of what it kept before; from its disk where it has nothing."""
        known = state.config_records.get(SITE)
        if known is not None and known["run"] == run:
            return {key: int(str(known.get(key, 0))) for key in _NUMBERS}
        undo.forget(state)
        for name in KEPT:
            if name in state:
                del state[name]
        disk = self._disk(number)
        found = (disk.load(state, run, ended) if disk else None) or {}
        return {key: found.get(key, 0) for key in _NUMBERS}

    def after(self, kind: str, content: RecordDict, reply: RecordDict, state: RecordDict) -> None:
        """Keep a client's state on its disk where it has changed, and say so where something of it was lost.

        Args:
            kind: The type of the message.
            content: What it held.
            reply: What goes back.
            state: The client's ``Context.state``.

        Raises:
            RecordError: It cannot be written there.
        """
        if SITE not in content or kind not in ("train", "query.undo", BOUNDARY):
            return
        known = state.config_records[SITE]
        disk = self._disk(int(str(known["partition-id"])))
        if kind == BOUNDARY:
            again, known[CROSSED] = bool(known[CROSSED]), int(str(content.config_records[SITE].get("ended", 0))) + 1
            if disk:
                disk.save_crossed(state, str(known["run"]), known, again=again)
            return
        current = int(str(content.config_records["config"]["server-round"]))
        if kind == "train":
            known["before"], known["round"], known[CROSSED] = known["round"], current, 0
            if self._lost and undo.kept_now(state):
                reply.metric_records["metrics"][LOST] = self._lost
        elif known["round"] == current:
            known["round"] = known["before"]
        if disk:
            disk.save(state, str(known["run"]), known)
