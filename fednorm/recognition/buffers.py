"""Which buffers training writes, found out by training a copy of the model on random inputs.

A buffer that no module writes is a constant, whatever it is called: the index table of a windowed attention, the
coefficients of a transform, the mean and deviation that images are normalized with. Two steps of training (forward,
backward, update) of a copy are watched in two ways:

* every operation that writes in place, which PyTorch names in its schema, against the storages of the buffers; so it
  works on the meta device too, where there are no values;
* every buffer before and after: another object, or other values.

Either says that the buffer is written. A buffer outside the state dict counts only where the *second* step changes it
again: a table that the first forward pass fills and later ones keep is a cache.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fednorm.recognition.inputs import Example, examples
from fednorm.rng import torch_seeded, torch_stream
from fednorm.spec import HookedLayer

SMALL = 2
"""Inputs that are tried with a real forward pass before anything else."""

TRIES = 8
"""Inputs to try where shapes alone cannot tell what a model takes, each with a real forward pass."""

Place = tuple[str, str]
"""A module's path and the buffer's name there."""

# Operations that update running statistics without saying so in their schema: the positions of the statistics and of
# the flag that they are updated.
_SILENT: Mapping[str, tuple[tuple[int, int], int]] = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
}


@dataclass(frozen=True)
class Observation:
    """What two training steps of a copy of a model showed.

    Attributes:
        example: The input that the model took; None where none was found.
        written: The buffers that the steps wrote.
        rewritten: Those that the second step changed again.
        reason: Why nothing was observed, as a clause; empty where it was.
    """

    example: Example | None = None
    written: frozenset[Place] = frozenset()
    rewritten: frozenset[Place] = frozenset()
    reason: str = ""


_REMEMBERED: ContextVar[dict[int, tuple[nn.Module, Observation]] | None] = ContextVar("remembered", default=None)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Observe a model once within a block, however often it is asked for: nobody may change a model meanwhile."""
    token = _REMEMBERED.set({})
    try:
        yield
    finally:
        _REMEMBERED.reset(token)


def observe(model: nn.Module) -> Observation:
    """Train a copy of a model for two steps and say which buffers that writes.

    The model is not changed, and no process-wide generator either. Its code runs: what it raises is a reason.
    """
    memory = _REMEMBERED.get()
    if memory is not None and id(model) in memory:
        return memory[id(model)][1]
    with quietly():
        observation = _observe(model)
    if memory is not None:
        memory[id(model)] = (model, observation)  # an id is only unique while its object lives
    return observation


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run somebody else's code: generators are put back, gradients are on, warnings are not ours to show."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - put back, never drawn from
    try:
        with warnings.catch_warnings(), torch_seeded(0, "observe"), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _observe(model: nn.Module) -> Observation:
    try:
        trial = trainable_copy(model)
    except Exception as error:  # a stranger's __deepcopy__
        return Observation(reason=f"it cannot be copied ({said(error)})")
    example, reason = find_example(trial)
    if example is None:
        return Observation(reason=reason)
    try:
        # Finding an input may have written buffers of the trial.
        return _watch(trainable_copy(model), example)
    except Exception as error:
        return Observation(reason=f"a training step on inputs of shape (2, {_shape(example)}) fails ({said(error)})")


def said(error: BaseException) -> str:
    """Return an exception as a short clause: its type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _shape(example: Example) -> str:
    return ", ".join(map(str, example.shape))


def trainable_copy(model: nn.Module) -> nn.Module:
    """Return a copy in training mode; half precisions become float32, which every operation has on every device."""
    trial = copy.deepcopy(model).train()
    halves = any(t.dtype in (torch.float16, torch.bfloat16) for t in [*trial.parameters(), *trial.buffers()])
    return trial.float() if halves else trial


def find_example(trial: nn.Module) -> tuple[Example | None, str]:
    """Find an input that a model takes; the copy given may be changed.

    The first candidates are small and are tried at once. Then shapes are tried on the meta device, which computes
    nothing; where the model needs values, some more on its own device.

    Returns:
        The input and the empty string, or None and why there is none.
    """
    device, candidates, reason = _device(trial), list(examples(trial)), "nothing says what inputs it takes"
    tried = len(candidates) if device.type == "meta" else SMALL
    for example in candidates[:tried]:
        reason = _takes(trial, example, device)
        if not reason:
            return example, ""
    with contextlib.suppress(Exception):
        shapes = copy.deepcopy(trial).to("meta")
        fitting = (example for example in candidates[tried:] if not _takes(shapes, example, torch.device("meta")))
        example = next(fitting)
        if not _takes(trial, example, device):
            return example, ""
    for example in candidates[tried:TRIES]:
        reason = _takes(trial, example, device)
        if not reason:
            return example, ""
    return None, f"no input was found that it takes; the last try, of shape (2, {_shape(example)}), gave {reason}"


def _takes(model: nn.Module, example: Example, device: torch.device) -> str:
    """Return the empty string where a model maps an input to something with values, or what went wrong."""
    try:
        with torch.no_grad():
            outputs = model(_batch(model, example, 0, device))
    except Exception as error:
        return said(error)
    return "" if _floats(outputs) else "no tensor of floats"


def _batch(model: nn.Module, example: Example, step: int, device: torch.device) -> Tensor:
    floats = (tensor.dtype for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point())
    generator = torch_stream(0, "observe", step)
    return example.batch(2, generator, device=device, dtype=next(floats, torch.get_default_dtype()))


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def _floats(outputs: Any) -> list[Tensor]:
    values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def train_once(model: nn.Module, images: Tensor) -> Tensor:
    """Train a model for one step on the mean square of all its outputs, and return that, detached."""
    hooked = [module for module in model.modules() if isinstance(module, HookedLayer)]
    for layer in hooked:
        layer.set_tasks(None, 1)
    outputs = _floats(model(images))
    loss = sum((output.float().square().mean() for output in outputs), torch.zeros((), device=images.device))
    loss = sum((penalty for layer in hooked if (penalty := layer.penalty()) is not None), loss)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if parameters and loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD(parameters, lr=1e-3).step()
        model.zero_grad(set_to_none=True)
    return loss.detach()


def _watch(model: nn.Module, example: Example) -> Observation:
    """Train for two steps and compare; for one where there are neither values nor buffers outside the state dict."""
    steps = []
    meta = _device(model).type == "meta"
    for step in range(1 if meta and not any(module._non_persistent_buffers_set for module in model.modules()) else 2):
        before = _buffers(model)
        values = {place: _value(tensor) for place, tensor in before.items()}
        writes = _Writes(before)
        images = _batch(model, example, step, _device(model))
        with writes:
            train_once(model, images)
        after = _buffers(model)
        changed = {p for p, tensor in after.items() if p not in before or not _same(values[p], _value(tensor))}
        replaced = {p for p, tensor in after.items() if p not in before or tensor is not before[p]}
        steps.append((changed, writes.places, replaced))
    changed, wrote, _ = steps[-1]
    return Observation(
        example,
        written=frozenset().union(*(part for step in steps for part in step)),
        rewritten=frozenset(wrote if meta else changed),
    )


def _buffers(model: nn.Module) -> dict[Place, Tensor]:
    return {
        (path, name): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in module._buffers.items()
        if tensor is not None
    }


def _value(tensor: Tensor) -> Tensor | None:
    return None if tensor.device.type == "meta" else tensor.detach().clone()


def _same(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return True
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    return bool(torch.equal(torch.nan_to_num(before), torch.nan_to_num(after)))


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down which of some tensors' storages are written while it is entered."""

    def __init__(self, tensors: Mapping[Place, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: set[Place] = set()
        self._by_storage: dict[int, set[Place]] = {}
        for place, tensor in tensors.items():
            for storage in _storages([tensor]):
                self._by_storage.setdefault(storage, set()).add(place)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        for storage in _storages(_targets(func, args, kwargs)):
            self.places |= self._by_storage.get(storage, set())
        return func(*args, **kwargs)


def _targets(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an operation writes."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[i] if i < len(args) else kwargs.get(argument.name)
    if func._schema.name in _SILENT:
        statistics, training = _SILENT[func._schema.name]
        if len(args) > training and args[training]:
            yield from (args[i] for i in statistics)


def _storages(values: Iterable[Any]) -> Iterator[int]:
    for tensor in tree_leaves(list(values)):
        if isinstance(tensor, Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a subclass that wraps others has none
                yield tensor.untyped_storage()._cdata
