"""Layout: how many axes the input of a normalization layer has, and which one is the batch, by evidence.

Evidence is the layer's own type, what comes before it in an ``nn.Sequential`` (whose order of execution is known), what
PyTorch's transformer layers say of themselves, and an example input that is run. Neither a name nor the order in which
a model registers its layers is any.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation, conv, dropout, pooling

from fednorm.conversion.surroundings import named
from fednorm.errors import ConfigError
from fednorm.norms import recognition_of
from fednorm.recognition.layers import Recognition
from fednorm.rng import torch_seeded

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""One forward pass's input: a tensor, positional arguments, or keyword arguments."""

Shape = tuple[int, ...]

_TORCH_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder)
_SAME_SHAPE = (nn.Identity, dropout._DropoutNd)
_WITH_DIMS = (conv._ConvNd, pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd,
              pooling._AdaptiveMaxPoolNd)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A normalization layer and the input that it gets.

    Attributes:
        recognition: What is known of the layer.
        dims: The numbers of axes beside N and C that its input may have.
        batch_axis: Where channels are last, the batch's axis; None where that cannot be told.
    """

    recognition: Recognition
    dims: tuple[int, ...]
    batch_axis: int | None = 0


def sites(model: nn.Module, example: Example | None) -> dict[int, Site]:
    """Return every normalization layer of a model that is recognised, by its ``id``.

    Args:
        model: The model.
        example: An input to run, or None.

    Raises:
        ConfigError: The example does not run.
    """
    known: dict[int, tuple[str, nn.Module, Recognition]] = {}
    for path, module in model.named_modules():
        recognition = recognition_of(module)
        if recognition is not None and (recognition.spec is None or recognition.spec.normalizes):
            known[id(module)] = (path, module, recognition)
    shapes = _Shapes(model, known, example)
    in_sequence = _dims_in_sequences(model, known)
    # Most networks say nothing of the kind, and to look around each of their layers takes long.
    says = any(_batch_first(module) is not None for module in model.modules())
    result: dict[int, Site] = {}
    for key, (path, _, recognition) in known.items():
        dims = shapes.dims.get(key) or in_sequence.get(key) or recognition.dims
        dims = tuple(d for d in dims if d in recognition.dims) or recognition.dims
        axes = shapes.batch_axes.get(key)
        batch_axis = axes if axes is not None else _batch_axis(model, path) if says else 0
        result[key] = Site(recognition, dims, batch_axis)
    return result


class _Shapes:
    """What an example shows: the shape of every layer's input, and, with the batch doubled, which axis the batch is."""

    def __init__(self, model: nn.Module, known: Mapping[int, Any], example: Example | None) -> None:
        self.dims: dict[int, tuple[int, ...]] = {}
        self.batch_axes: dict[int, int] = {}
        if example is None:
            return
        seen, output = _run(model, known, example)
        self.dims = {key: tuple(sorted({len(shape) - 2 for shape in shapes})) for key, shapes in seen.items()}
        for axis in (0, 1):
            twice = _doubled(model, known, example, axis, output)
            if twice is not None:
                self._compare(seen, twice)
                return

    def _compare(self, once: Mapping[int, list[Shape]], twice: Mapping[int, list[Shape]]) -> None:
        for key, shapes in once.items():
            axes = [_longer(one, two) for one, two in zip(shapes, twice.get(key, []), strict=False)]
            if axes and axes[0] is not None and axes == axes[:1] * len(axes):
                self.batch_axes[key] = axes[0]


def _longer(one: Shape, two: Shape) -> int | None:
    """Return the one axis in which two shapes differ; None where there is none, or several."""
    axes = [axis for axis, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    return axes[0] if len(axes) == 1 and len(one) == len(two) else None


def _doubled(
    model: nn.Module, known: Mapping[int, Any], example: Example, axis: int, output: Any
) -> dict[int, list[Shape]] | None:
    """Return the shapes that layers see where an example is doubled along an axis; None unless that is the batch's.

    It is where the first half of the output does not depend on the second half of the input.
    """
    try:
        seen, same = _run(model, known, _map(example, axis, lambda x: torch.cat([x, x], axis)))
        _, other = _run(model, known, _map(example, axis, lambda x: torch.cat([x, _another(x)], axis)))
    except ConfigError:
        return None
    if not all(isinstance(value, Tensor) for value in (output, same, other)):
        return None
    longer = _longer(tuple(output.shape), tuple(same.shape))
    if longer is None or same.shape[longer] != 2 * output.shape[longer]:
        return None
    one, two = (value.narrow(longer, 0, output.shape[longer]) for value in (same, other))
    return seen if torch.allclose(one, two, rtol=1e-4, atol=1e-5) else None


def _another(x: Tensor) -> Tensor:
    """Return another tensor of the same shape; whole numbers, which may be positions in a table, keep their range."""
    return 2 * x.flip(-1) + 1 if x.is_floating_point() else x.flip(-1)


def run_example(model: nn.Module, example: Example, what: str) -> Any:
    """Return a model's output for an example input, in evaluation mode, with every module's mode put back.

    Raises:
        ConfigError: It does not run.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch_seeded(0, "example"):
            model.eval()
            if isinstance(example, Mapping):
                return model(**example)
            return model(example) if isinstance(example, Tensor) else model(*example)
    except Exception as error:
        raise ConfigError(f"{what} does not run on example_inputs: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, known: Mapping[int, Any], example: Example) -> tuple[dict[int, list[Shape]], Any]:
    """Return the shapes of the inputs that layers get from an example, call by call, and the output."""
    seen: defaultdict[int, list[Shape]] = defaultdict(list)

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[id(module)] += [tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:1]

    layers = [module for module in model.modules() if id(module) in known]
    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
    try:
        output = run_example(model, example, "The model, before any conversion,")
    finally:
        for handle in handles:
            handle.remove()
    return seen, output


def _map(example: Example, axis: int, function: Callable[[Tensor], Tensor]) -> Example:
    """Apply a function to every tensor of an example that has an axis."""

    def one(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) and value.ndim > axis else value

    if isinstance(example, Mapping):
        return {key: one(value) for key, value in example.items()}
    mapped: Example = one(example) if isinstance(example, Tensor) else [one(value) for value in example]
    return mapped


def _dims_in_sequences(model: nn.Module, known: Mapping[int, Any]) -> dict[int, tuple[int, ...]]:
    """Return the number of axes beside N and C before each layer in an ``nn.Sequential``, where that is certain."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    result: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        dims: int | None = None
        for leaf in _leaves(module) if _is_sequence(module) else ():
            if id(leaf) in known:
                first = known[id(leaf)][2].channels_last is False
                if dims is not None and first and places[id(leaf)] == 1:
                    result.setdefault(id(leaf), (dims,))
            else:
                dims = _dims_after(leaf, dims)
    return result


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_sequence(child):
            yield from _leaves(child)
        else:
            yield child


def _dims_after(module: nn.Module, dims: int | None) -> int | None:
    """Return the number of axes beside N and C after a module, given the number before it; None where unknown."""
    if isinstance(module, _WITH_DIMS):
        name = next(base.__name__ for base in type(module).__mro__ if base.__name__[-2:] in ("1d", "2d", "3d"))
        return int(name[-2])
    if isinstance(module, nn.Flatten):
        return 0 if (module.start_dim, module.end_dim) == (1, -1) else None
    if isinstance(module, nn.Linear):
        # A norm with channels on axis 1 that takes its output as it is takes features (N, C).
        return 0
    if isinstance(module, _SAME_SHAPE) or (
        type(module).__module__ == activation.__name__ and not isinstance(module, nn.MultiheadAttention | nn.GLU)
    ):
        return dims
    return None


def _batch_first(module: nn.Module) -> bool | None:
    """Return what a module says of the order of its batch and its sequence; None where it says nothing."""
    flag = getattr(module, "batch_first", None)
    return flag if isinstance(flag, bool) else None


def _batch_axis(model: nn.Module, path: str) -> int | None:
    """Return the batch's axis of a layer with channels last, as the nearest module with a ``batch_first`` says it."""
    names = path.split(".") if path else []
    for depth in range(len(names) - 1, -1, -1):
        ancestor = model.get_submodule(".".join(names[:depth]))
        flags = {flag for module in ancestor.modules() if (flag := _batch_first(module)) is not None}
        if flags == {False}:
            # Other blocks may exchange the axes on either side of their attention.
            return 1 if isinstance(ancestor, _TORCH_BLOCKS) else None
        if flags:
            return 0 if flags == {True} else None
    return 0


def require_layout(site: Site, layer: nn.Module, path: str) -> tuple[int, bool]:
    """Return C and whether the channels are last.

    Raises:
        ConfigError: The layer does not say it.
    """
    known = site.recognition
    if known.channels is not None and known.channels_last is not None:
        return known.channels, known.channels_last
    shape: Any = getattr(layer, "normalized_shape", None)
    what = f"normalizes over the shape {tuple(shape)}" if shape is not None else "does not say how many channels it has"
    raise ConfigError(
        f"Layer {named(path, layer)} {what}, so which axis is the channels, and how many there are, is unknown. "
        "Replace it by hand: make_norm(...).layer(channels, spatial_dims); or leave it, in a class of its own that is "
        "declared: fednorm.declare(TheClass, like=None)."
    )
