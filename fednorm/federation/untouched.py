"""Whether the model still is what clients were evaluated on: then the next evaluation need not write it again.

Where all clients evaluate what the server sends and nothing besides, one after the other, only the first needs it
written, and weights that layers compute in evaluation are computed once.
"""

from __future__ import annotations

from collections.abc import Collection

from flwr.app import ArrayRecord
from torch import Tensor


class Untouched:
    """Remembers what a model held at the end of an evaluation, until the next message to a client.

    Args:
        tensors: The model's, which share their memory with it. Whatever writes to them counts, but for what escapes
            PyTorch's own count of versions (``parameter.data.mul_(2)``): so what may run code of others is no mere
            evaluation and is not noted.

    Attributes:
        now: Whether the model was untouched at the latest message.
    """

    def __init__(self, tensors: Collection[Tensor]) -> None:
        self._tensors = tensors
        self._noted: tuple[ArrayRecord, list[int]] | None = None
        self.now = False

    def note(self, arrays: ArrayRecord) -> None:
        """Remember that the model holds what a message sent, whole, and was evaluated and nothing else."""
        self._noted = arrays, self._versions()

    def ask(self, arrays: ArrayRecord, *, alone: bool) -> bool:
        """Return whether the model holds what a message sends; what was remembered is forgotten.

        Args:
            arrays: What is sent.
            alone: Whether nothing of the client's own goes with it.
        """
        noted, self._noted = self._noted, None
        self.now = alone and noted is not None and noted[0] is arrays and noted[1] == self._versions()
        return self.now

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]
