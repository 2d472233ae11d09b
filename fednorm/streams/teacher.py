"""A network as it was, which teaches the one that it has become: a frozen copy, and how a checkpoint keeps it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

_FOLDER = "teacher/"


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network in evaluation mode, none of whose parameters is trained."""
    twin: nn.Module = copy.deepcopy(model)
    return twin.eval().requires_grad_(False)


def tensors_of(teacher: nn.Module | None) -> dict[str, Tensor]:
    """Return a teacher's tensors by their path in a checkpoint; none where there is no teacher."""
    return {} if teacher is None else {f"{_FOLDER}{key}": tensor for key, tensor in teacher.state_dict().items()}


def teacher_from(tensors: Mapping[str, Tensor], model: nn.Module) -> nn.Module | None:
    """Return the teacher that :func:`tensors_of` gave the tensors of, a copy of ``model`` in all else."""
    weights = {key.removeprefix(_FOLDER): tensor for key, tensor in tensors.items() if key.startswith(_FOLDER)}
    if not weights:
        return None
    teacher = frozen_copy(model)
    teacher.load_state_dict(weights)
    return teacher
