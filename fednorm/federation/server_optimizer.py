"""Optimizers on the server: a step from the present tensors towards the clients' average, learned tensors only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.federation.aggregation import HALF
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.roles import LEARNED


class ServerOptimizer(NormStrategy):
    """A strategy whose server takes optimizer steps over the shared *learned* tensors.

    Shared running statistics and counters are averaged as in FedAvg, whatever the optimizer. The steps of
    half-precision tensors are taken, and their slots kept, in float32: squares and small constants leave float16's
    range.
    """

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors the optimizer keeps beside each learned one."""

    def __init__(self, model: nn.Module, **common: Unpack[Common]) -> None:
        super().__init__(model, **common)
        self._learned = [key for key in self.plan.sent if self.plan.by_key[key].kind in LEARNED]
        state = model.state_dict()
        self._slots = {
            key: {slot: self.initial(slot, _widened(state[key])) for slot in self.slots} for key in self._learned
        }

    @abstractmethod
    def update(self, old: Tensor, mean: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return the next value of one learned tensor.

        Args:
            old: Its present value.
            mean: The clients' average.
            slots: What the optimizer keeps for it; updated in place.
        """

    def initial(self, slot: str, like: Tensor) -> Tensor:
        """Return a slot's first value."""
        del slot
        return torch.zeros_like(like)

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take a step for each learned tensor; the rest is the average."""
        return mean | {key: self._step(old[key], mean[key], self._slots[key]) for key in self._learned}

    def _step(self, old: Tensor, mean: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        return self.update(_widened(old), _widened(mean), slots).to(old.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the slots, as ``slot/key``: the slots themselves change in place."""
        return {name: tensor.clone() for name, tensor in self._named_slots().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back the slots."""
        own = self._named_slots()
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))
            raise ConfigError(f"The checkpoint's optimizer does not fit {type(self).__name__}: {', '.join(odd[:5])}.")
        for key, tensor in own.items():
            tensor.copy_(state[key])

    def _named_slots(self) -> dict[str, Tensor]:
        return {f"{slot}/{key}": tensor for key, slots in self._slots.items() for slot, tensor in slots.items()}


def _widened(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor
