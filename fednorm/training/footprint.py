"""How much memory a model and a step of its training will take, from shapes alone, before any of it is allocated.

The model is built and run once on two images. A small one is run as it is; on PyTorch's ``meta`` device, whose tensors
have shapes and no values, are run only those of which this would already take too much: there nearly every operation is
defined by PyTorch's compiler, and the first imports it (1.6 CPU-seconds and 140 MB, more than a tiny run takes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fednorm.cards import MODELS
from fednorm.errors import ConfigError, FedNormError
from fednorm.limits import shown
from fednorm.memory import require_memory
from fednorm.spec import HookedLayer, Norm


@dataclass(frozen=True)
class Footprint:
    """What a model takes, in bytes.

    Attributes:
        state: Its parameters and buffers.
        kept: What a forward pass keeps of one image for the backward pass: the output of every layer.
        largest: The largest output of a layer, of one image.
        parameters: How many parameters it has.
    """

    state: int
    kept: int
    largest: int
    parameters: int


def footprint(name: str, norm: Norm, *, num_classes: int, image_size: int, width: int) -> Footprint:
    """Return what a model takes; arguments are those of :func:`~fednorm.models.make_model`, checked by it.

    Where a layer cannot run without values, its outputs and those after it are left out: a lower bound.

    Raises:
        ConfigError: A layer has more entries than can be numbered.
    """
    spec = MODELS[name]
    shape = (num_classes, image_size or spec.input_size, width or spec.width)
    try:
        return _measured(name, norm, *shape)
    except TypeError:  # not hashable: a stranger's norm may have a list among its options
        return _measured.__wrapped__(name, norm, *shape)


@lru_cache(maxsize=64)  # a third of the time of a run of a few steps; those of a process mostly share a model
def _measured(name: str, norm: Norm, num_classes: int, size: int, width: int) -> Footprint:
    """Build a model of fednorm's and run it, without values unless it is small."""
    for device in ("cpu", "meta"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]), _Limit(device):
                model = MODELS[name].make(norm, num_classes=num_classes, image_size=size, width=width)
                state = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
                outputs = _outputs(model, size, device)
                break
        except FedNormError:
            raise
        except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # 2**63 entries and more
            if device == "cpu":
                continue
            raise ConfigError(
                f"model {name} of width {shown(width)} for images of {shown(size)} pixels a side is "
                f"beyond what can be numbered ({shown(str(error).splitlines()[0])}). Lower model.width or "
                "data.image_size."
            ) from error
    return Footprint(
        state, sum(outputs), max(outputs, default=0), sum(parameter.numel() for parameter in model.parameters())
    )


def _outputs(model: nn.Module, size: int, device: str) -> list[int]:
    """Return the bytes of every layer's output for one image, as far as they can be known.

    Raises:
        _TooLargeError: The device is no ``meta`` device, and running the model would take too much.
    """
    outputs: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.numel() * output.element_size() // 2)

    # No layer of fednorm's models enlarges an image, so that none has a larger output than this.
    widest = max((len(parameter) for parameter in model.parameters() if parameter.ndim), default=3)
    if device == "cpu" and 2 * 4 * max(widest, 3) * size**2 > TRIED_BYTES:
        raise _TooLargeError
    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    for layer in model.modules():
        if isinstance(layer, HookedLayer):
            layer.set_tasks(None, 1)  # nothing is trained, so that it need not ask for them
    try:
        model(torch.empty(2, 3, size, size, device=device).zero_())
    except _TooLargeError:
        raise
    except Exception:
        return outputs
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


TRIED_BYTES = 2**28
"""What a model may take while it is tried with values."""


class _TooLargeError(RuntimeError):
    """A model is not to be run with values."""


class _Limit(TorchFunctionMode):
    """Stops a model that is built or run with values before it takes too much.

    Memory that was asked for and not yet written takes none, so that looking at each new tensor is early enough.

    Args:
        device: Where it is; nothing is limited on the ``meta`` device.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._left = TRIED_BYTES if device == "cpu" else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns.

        Raises:
            _TooLargeError: It has come to too much.
        """
        output = func(*args, **(kwargs or {}))
        if self._left is not None and isinstance(output, Tensor):
            memory = output.untyped_storage()
            shared = (argument.untyped_storage() for argument in args if isinstance(argument, Tensor))
            if all(memory.data_ptr() != other.data_ptr() for other in shared):
                self._left -= memory.nbytes()
            if self._left < 0:
                raise _TooLargeError
        return output


def require_footprint(
    config: Any,
    norm: Norm,
    *,
    num_classes: int,
    image_size: int,
    copies: float,
    train_images: int,
    test_images: int,
) -> None:
    """Refuse a run whose model, or a batch of it, does not fit this machine.

    In private training a batch has the gradient of each image beside what others have.

    Args:
        config: The run's configuration, of either kind.
        norm: Its norm.
        num_classes: Number of logits.
        image_size: Height and width of the images, in pixels.
        copies: How often the model's tensors are there: with gradients, the optimizer's tensors, clients' own.
        train_images: Most images that a batch of training can have.
        test_images: Most images that a batch of an evaluation can have.

    Raises:
        ConfigError: It would take more memory than is free; it says how much.
    """
    if MODELS.is_foreign(config.model.name):  # a stranger's network is built once, and may do anything while it is
        return
    width = config.model.width
    takes = footprint(config.model.name, norm, num_classes=num_classes, image_size=image_size, width=width)
    model = f"model {config.model.name}" + (f" of width {width:,}" if width else "")
    require_memory(
        int(copies * takes.state),
        f"{model} for images of {image_size} x {image_size} pixels, with {takes.parameters:,} parameters, and what "
        "goes with it in training",
        "Lower model.width or data.image_size.",
    )
    train, test = min(config.train.batch_size, train_images), min(config.evaluate.batch_size, test_images)
    image, trained, beside = 4 * 3 * image_size**2, takes.kept, ""
    if config.train.private_noise:  # of every image the gradient of every parameter, in single precision
        train, trained = largest_draw(train, train_images), trained + 4 * takes.parameters
        beside = f", with a gradient of its {takes.parameters:,} parameters for each (train.private_noise),"
    for key, images, each, more in (
        ("train.batch_size", train, trained + image, beside),
        ("evaluate.batch_size", test, takes.largest + image, ""),
    ):
        require_memory(
            int(copies * takes.state + images * each),
            f"{model} on {images:,} images of {image_size} x {image_size} pixels at a time{more}",
            f"Lower {key}, data.image_size or model.width.",
        )


def largest_draw(batch_size: int, count: int) -> int:
    """Return how many images a batch of private training has at most, but for one in thousands.

    Poisson sampling draws B images in the mean; four standard deviations more are B + 4 sqrt(B (1 - B / n)), and there
    are no more than n.

    Args:
        batch_size: B.
        count: n, the client's images.
    """
    if not count:
        return 0
    return min(count, math.ceil(batch_size + 4 * math.sqrt(batch_size * max(0.0, 1 - batch_size / count))))
