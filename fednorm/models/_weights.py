"""Weights to start from: read from a file, checked entry by entry, the classifier's head alone left to the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError

PRETRAINED = "pretrained"
"""In place of a file: the published weights, from the local cache of the library that the model is of."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_INSIDE = ("state_dict", "model_state_dict", "model")
"""Where training scripts put a state dict among other things."""

_COUNTER = "num_batches_tracked"
"""Files older than PyTorch 0.4.1 do not have it."""


class Published(Protocol):
    """What knows where its published weights are."""

    @property
    def name(self) -> str:
        """Return the model's name."""

    def pretrained(self) -> str:
        """Return their file."""


class Weights:
    """The tensors of a file.

    Args:
        path: The file: .safetensors, or a state dict that ``torch.save`` wrote (.pt, .pth, .bin).
        unused: Beginnings of keys that a model may do without.

    Raises:
        ConfigError: It is missing, damaged, holds something else than tensors, or numbers that are none.
    """

    def __init__(self, path: Path, unused: tuple[str, ...] = ()) -> None:
        self.path = path
        tensors = _read(path)
        self.tensors = {key: tensor for key, tensor in tensors.items() if not unused or not key.startswith(unused)}

    def misfit(self, model: nn.Module, head: frozenset[str]) -> str:
        """Return why the tensors do not fit a network, with the names of what does not; empty where they do.

        Args:
            model: The network.
            head: Keys whose shapes depend on the number of classes; there, another shape fits.
        """
        own = model.state_dict()
        missing = [key for key in own if key not in self.tensors and not key.endswith(_COUNTER)]
        unexpected = [key for key in self.tensors if key not in own]
        shapes = [
            f"{key} of shape {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
            for key, tensor in self.tensors.items()
            if key in own and tensor.shape != own[key].shape and key not in head
        ]
        reasons = (("it lacks", missing), ("it has, and the model has not,", unexpected), ("it has", shapes))
        return "; ".join(f"{what} {_some(keys)}" for what, keys in reasons if keys)

    @torch.no_grad()
    def load(self, model: nn.Module) -> tuple[str, ...]:
        """Copy the tensors into a network that they fit, but those of another shape, and say so.

        Returns:
            Notes: which file, and what of the head keeps its initial weights because its shape differs.
        """
        own, other = model.state_dict(), list[str]()
        for key, tensor in self.tensors.items():
            if own[key].shape == tensor.shape:
                own[key].copy_(tensor)
            else:
                other.append(f"{key} {tuple(tensor.shape)} → {tuple(own[key].shape)}")
        said = [f"The weights are those of {self.path.name} (sha256 {file_digest(self.path)})."]
        if other:
            said.append(f"The classifier's head was initialised anew, for another number of classes: {_some(other)}.")
        return tuple(said)

    def refusal(self, name: str, reason: str) -> ConfigError:
        """Return the error for weights that do not fit."""
        return ConfigError(
            f"The weights in {self.path} do not fit model {name}: {reason}. Give a file of the very same architecture, "
            "options and image size, or leave model.weights empty."
        )


def load_weights(
    model: nn.Module, given: str, spec: Published, make: Callable[[int], nn.Module], num_classes: int
) -> tuple[str, ...]:
    """Copy given weights into a network, all but a head for another number of classes.

    Args:
        model: The network.
        given: A file, or ``pretrained``; empty for none.
        spec: The network's card.
        make: Builds the network for a number of classes.
        num_classes: The network's.

    Returns:
        What to say of it, a sentence each.

    Raises:
        ConfigError: There is no such file, it is damaged, or it does not fit.
    """
    if not given:
        return ()
    weights, head = Weights(weights_file(given, spec)), head_of(model, make, num_classes)
    if reason := weights.misfit(model, head):
        raise weights.refusal(spec.name, reason)
    return weights.load(model)


def head_of(model: nn.Module, make: Callable[[int], nn.Module], num_classes: int) -> frozenset[str]:
    """Return the keys whose shapes depend on the number of classes: those that differ in a twin with one more."""
    try:
        with torch.device("meta"):
            twin = make(num_classes + 1)
    except Exception:  # some constructors compute with what they make
        twin = make(num_classes + 1)
    shapes = {key: tensor.shape for key, tensor in twin.state_dict().items()}
    return frozenset(key for key, tensor in model.state_dict().items() if shapes.get(key, tensor.shape) != tensor.shape)


def weights_file(given: str, spec: Published) -> Path:
    """Return the file that ``model.weights`` names.

    Raises:
        ConfigError: There is none, or it is of no form that can be read.
    """
    path = Path(spec.pretrained() if given == PRETRAINED else given).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"model.weights is {given!r}, and there is no such file. Give a file ({', '.join(_SUFFIXES)}), or "
            f"{PRETRAINED!r} for the published weights in the library's cache."
        )
    if given != PRETRAINED and path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"model.weights takes a file that ends in {', '.join(_SUFFIXES)}; got {given!r}.")
    return path


def weights_digest(given: str, spec: Published) -> str:
    """Return 12 hexadecimal digits that identify the weights, wherever their file is.

    Raises:
        ConfigError: There is no such file.
    """
    return file_digest(weights_file(given, spec))


def file_digest(path: Path) -> str:
    """Return 12 hexadecimal digits of a file's contents."""
    try:
        about = path.stat()
        return _digest(path.absolute(), about.st_mtime_ns, about.st_size)
    except OSError as error:
        raise ConfigError(f"The weights in {path} cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=64)
def _digest(path: Path, changed: int, size: int) -> str:
    del changed, size
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise whatever the bytes lead them to
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"The weights in {path} cannot be read ({type(error).__name__}: {reason}). Give a whole file of tensors "
            "alone: torch.save(model.state_dict(), path), or .safetensors."
        ) from error
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(
            f"{path} holds no state dict but a {type(found).__name__} of something else than tensors. Write it with "
            "torch.save(model.state_dict(), path)."
        )
    broken = [key for key, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ConfigError(f"The weights in {path} are not all finite numbers: {_some(broken)}. Give another file.")
    return {str(key): tensor for key, tensor in found.items()}


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
