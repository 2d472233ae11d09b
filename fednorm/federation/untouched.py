"""Whether the model still is what clients were evaluated on: then the next evaluation need not write it again.

Where all clients evaluate what the server sends and nothing besides, one after the other, only the first needs it
written, and weights that layers compute in evaluation are computed once.
"""

from __future__ import annotations

from collections.abc import Collection

from flwr.app import ArrayRecord
from torch import Tensor, nn

_KNOWN = ("torch", "fednorm")
"""Packages whose layers change no tensor of theirs while they evaluate."""


def known(model: nn.Module) -> bool:
    """Return whether all of a model's layers are of packages whose layers do nothing but evaluate."""
    return all(type(module).__module__.partition(".")[0] in _KNOWN for module in model.modules())


class Untouched:
    """Remembers what a model held at the end of an evaluation, until the next message to a client.

    Whatever writes to the model's tensors is seen, but for what escapes PyTorch's own count of versions
    (``parameter.data.mul_(2)``). So what may run a user's code is no mere evaluation: nothing is remembered of a model
    with layers of a user's, and none of an evaluation before which a strategy's clients do something.

    Args:
        model: The model.
        tensors: Its tensors, which share their memory with it.

    Attributes:
        now: Whether the model was untouched at the latest message.
    """

    def __init__(self, model: nn.Module, tensors: Collection[Tensor]) -> None:
        self._known = known(model)
        self._tensors = tensors
        self._sent: ArrayRecord | None = None
        self._noted: tuple[ArrayRecord, list[int]] | None = None
        self.now = False

    def ask(self, arrays: ArrayRecord, *, alone: bool) -> bool:
        """Return whether the model holds what a message sends; what was remembered is forgotten.

        Args:
            arrays: What is sent.
            alone: Whether nothing of the client's own goes with it.
        """
        noted, self._noted = self._noted, None
        self._sent = arrays if alone and self._known else None
        self.now = alone and noted is not None and noted[0] is arrays and noted[1] == self._versions()
        return self.now

    def note(self) -> None:
        """Remember that the model holds what was asked for, and was evaluated since and nothing else."""
        if self._sent is not None:
            self._noted = self._sent, self._versions()

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]
