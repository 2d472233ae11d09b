"""Where a run computes: the devices that this machine has, what they can do, and the clock that waits for them.

Random numbers are drawn on the CPU and moved, so that every device gets the same: initial weights, batches,
augmentation, memories. Dropout alone draws on the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Kinds of devices that compute in single precision at most."""


class Machine(Protocol):
    """What of a run's configuration says how it is computed."""

    @property
    def device(self) -> str:
        """The device's name."""

    @property
    def amp(self) -> str:
        """``none`` or ``bf16``."""

    @property
    def compile(self) -> bool:
        """Whether forward passes are compiled."""


def automatic() -> str:
    """Return the device that ``auto`` stands for: ``cuda``, ``mps``, or ``cpu`` where there is neither."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def available() -> list[str]:
    """Return the names of this machine's devices."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    several = [f"cuda:{number}" for number in range(count)] if count > 1 else []
    return ["cpu", *["cuda"][:count], *several, *["mps"][: torch.backends.mps.is_available()]]


def torch_device(name: str) -> torch.device:
    """Return a device of this machine by its name.

    Raises:
        ConfigError: This machine, or its PyTorch, does not have it.
    """
    kind, _, number = name.partition(":")
    names = available()
    if kind not in names or (number and int(number) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device is {name!r}, and this machine has {', '.join(names)} (PyTorch {torch.__version__}). Take one of "
            "these, or auto."
        )
    return torch.device(name)


def device_of(config: Machine) -> torch.device:
    """Return the device of a run, which can do what the run asks of it.

    Raises:
        ConfigError: It is not there, has no autocast in bfloat16, or ``torch.compile`` does not work here.
    """
    device = torch_device(config.device)
    if config.amp == "bf16" and not _has_bf16(device):
        raise ConfigError(
            f"amp is 'bf16', and {device_name(device)} (device {config.device}) does not compute in bfloat16. Set amp "
            "to none."
        )
    if config.compile:
        _require_compiler(device)
    return device


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch.amp.is_autocast_available(device.type):
        return False
    try:
        with torch.autocast(device.type, torch.bfloat16):
            one = torch.ones(1, 1, device=device)
            return (one @ one).dtype is torch.bfloat16
    except (RuntimeError, TypeError):
        return False


@lru_cache
def _require_compiler(device: torch.device) -> None:
    """Compile something small: what is missing, a C++ compiler or Triton, is found in no other way.

    Raises:
        ConfigError: It cannot be done.
    """
    try:
        torch.compile(lambda x: x + x)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds, from a compiler's own to those of the operating system
        words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"compile is true, and torch.compile does not work here on device {device}: {type(error).__name__}: "
            f"{words[:300]} Install what it asks for (on the CPU a C++ compiler), or leave compile out."
        ) from error


def place_of(model: nn.Module, device: str | torch.device) -> torch.device:
    """Return the device of a learner by its name: that which its network is on.

    Raises:
        ConfigError: The network is somewhere else.
    """
    device, own = torch.device(device), next((p.device for p in model.parameters()), torch.device(device))
    if own.type != device.type or device.index not in (None, own.index):
        raise ConfigError(
            f"The learner has device = {str(device)!r}, and its network is on {str(own)!r}. Move the network before "
            f"the optimizer is made, model.to({str(device)!r}), or pass device={str(own)!r}."
        )
    return own


def device_name(device: torch.device) -> str:
    """Return what a record calls a device: a GPU's model, or its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def described(config: Machine, device: torch.device) -> dict[str, Any]:
    """Return what a record says of the device: nothing on the CPU, where it never said anything."""
    return {} if config.device == "cpu" else {"device": {"name": config.device, "model": device_name(device)}}


def wide(device: torch.device) -> torch.dtype:
    """Return the widest type of floats that a device has: float64, or float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(device: torch.device) -> float:
    """Return a clock's seconds, once the device is done with what came before.

    On the CPU with one thread they are this process's seconds of work, so that what other processes do on the machine
    does not enter.
    """
    synchronize(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU: those that are there themselves, and copies of others."""
    return {key: tensor.cpu() for key, tensor in tensors.items()}


# Precision and compilation -------------------------------------------------------------------------------------------


class _Autocast(nn.Module):
    """What a network's class is derived from beside its own where it computes in bfloat16."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            output = super().forward(*args, **kwargs)
        # Losses and accuracies are taken in single precision, as autocast itself takes losses.
        return output.float() if isinstance(output, Tensor) else output


def prepare(model: nn.Module, config: Machine) -> None:
    """Let a model's forward pass be one under autocast, and a compiled one, where a run's configuration says so.

    It is the model itself that changes, so that every pass is one of these, whoever makes it; keys of its state dict
    stay, and so do copies of it.
    """
    if config.amp == "bf16":
        own = type(model)
        model.__class__ = type(own.__name__, (_Autocast, own), {"__module__": own.__module__})
    if config.compile:
        # Who looks into a network registers hooks when it is compiled already; without this they are never called.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        model.compile()


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Let a compiled model run as it is written within the block, where hooks are registered to look into it.

    For every hook that comes and goes it would be compiled anew, and after a few times never again.
    """
    if model._compiled_call_impl is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
