"""What a site keeps on its own disk, so that a node that is started again goes on with its run.

Flower keeps a client's state in its SuperNode's memory, which ends with the process. A site whose node's configuration
names a ``state-dir`` writes the same there after every training: one file a run and site, a safetensors file, whole or
not there, with the records of the client's state as ``RECORD/KEY``.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from flwr.app import ConfigRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fednorm.errors import RecordError
from fednorm.federation.undo import BEFORE_RECORD, KEPT
from fednorm.federation.wire import pack, unpack
from fednorm.records import files
from fednorm.records.formats import shortened
from fednorm.records.integrity import apart

RECORDS = (*KEPT, BEFORE_RECORD)
"""The records of a client's state that outlive its node."""


class KeptOnDisk:
    """The state of one site on its disk.

    Args:
        folder: The node's ``state-dir``; made when missing.
        site: The site's name.
    """

    def __init__(self, folder: Path, site: str) -> None:
        self._folder, self._name = folder, f"{quote(site, safe='')}.safetensors"

    def path(self, run: str) -> Path:
        """Return the file of a run."""
        return self._folder / quote(run, safe="") / self._name

    def save(self, state: RecordDict, run: str, numbers: ConfigRecord) -> None:
        """Write what a client keeps, in the place of what it kept before.

        Args:
            state: The client's ``Context.state``.
            run: The run.
            numbers: Whole numbers that are to come back with it.

        Raises:
            RecordError: It cannot be written; what was there is whole.
        """
        path = self.path(run)
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

    def load(self, state: RecordDict, run: str) -> dict[str, int] | None:
        """Give a client's state what the disk has of a run; None where it has nothing.

        Raises:
            RecordError: The file is damaged.
        """
        path = self.path(run)
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
