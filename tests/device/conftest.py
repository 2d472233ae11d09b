"""A device that is none: tensors that hold values on the CPU, say that they are elsewhere, and mix with no others.

PyTorch's ``meta`` device lends its name, since every build of PyTorch knows it. A run on it computes what one on the
CPU does, and fails wherever one on an accelerator would: where a tensor made without a device meets one of the model,
where values are read as NumPy, where a generator of the CPU draws on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fednorm import device as devices

AWAY = torch.device("meta")
COPIES = ("aten::copy_", "aten::_foreach_copy_")
TAKES_INDEX = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class Mixed(AssertionError):
    """Tensors of two devices met; an assertion, so that no ``except RuntimeError`` passes over it."""


class Away(Tensor):
    """A tensor that is on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[Away], held: Tensor) -> Away:
        made: Away = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=AWAY,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            twin = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                twin._is_param = True
            memo[id(self)] = twin
        return memo[id(self)]

    def numpy(self, **_: Any) -> NoReturn:
        raise Mixed("values on a device are no NumPy array: .cpu() first")

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()


has_float64 = True
"""Whether the pretended device has float64; Apple's have not."""


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on what is held, and refuse what no accelerator would do."""
    name, leaves = func._schema.name, tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    away = any(isinstance(leaf, Away) for leaf in tensors)
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    if away and name not in COPIES:
        _require_together(func, name, args, tensors)
    result_away = away if device is None else device.type == AWAY.type
    if result_away and kwargs.get("generator") is not None:
        raise Mixed(f"{name} draws on the device with a generator of the CPU")
    wrappers = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, Away)}
    wrappers |= {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Away)}
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Away) else leaf, (args, kwargs))
    if name == "aten::_to_copy" and device is not None and away != result_away:
        plain_kwargs.pop("device")  # a move copies; on the CPU alone it would not
    result = func(*plain_args, **plain_kwargs)

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if result_away and value.dtype is torch.float64 and not has_float64:
            raise Mixed(f"{name} makes float64, which the device does not have")
        if id(value) in wrappers:
            return wrappers[id(value)]
        return Away(value) if result_away else value

    return tree_map(back, result)


def _require_together(func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    here = [tensor for tensor in tensors if not isinstance(tensor, Away)]
    first = tree_flatten(args[:1])[0]
    if name in TAKES_INDEX and isinstance(args[0], Away):
        indices = {id(index) for index in args[1]}
        here = [tensor for tensor in here if id(tensor) not in indices]
    written = func._schema.is_mutable and any(any(tensor is one for one in first) for tensor in here)
    if any(tensor.ndim for tensor in here) or written:
        shapes = [(type(tensor).__name__, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        raise Mixed(f"{name} takes tensors of two devices: {shapes[:6]}")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return dispatch(func, args, kwargs or {})


class _Values(TorchFunctionMode):
    """Let ``torch.tensor([...], device=...)`` keep its values, which on the meta device it has none of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Pretend that this machine has another device, in a block, and give it."""
    with _Mode(), _Values():
        yield AWAY


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A machine whose ``cuda`` is the pretended device: ``device`` is that, ``Mixed`` what it refuses with."""

    def torch_device(name: str) -> torch.device:
        return AWAY if name == "cuda" else torch.device(name)

    monkeypatch.setattr(devices, "torch_device", torch_device)
    with pretended_device():
        yield SimpleNamespace(device=AWAY, Mixed=Mixed)


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended device like Apple's."""
    monkeypatch.setitem(globals(), "has_float64", False)
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset({AWAY.type}))
