"""Where the mean over the features of a residual stream can be taken off, found by trying and not by names.

In a network that normalizes before its branches only layer normalizations read the residual stream, and these do not
see its mean over the features. Whether that is so of a layer's output is a fact that can be tested: add any number, of
each position its own, to all features of it, and the network's output must stay. Where it stays the mean can be taken
off, and where every such mean is off the inputs of the layer normalizations have zero mean. Both are looked at in a
copy of the network in float64 with random parameters (initial ones of zero would hide everything), whose dropout drops
the same entries in every pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fednorm.conversion.layout import Example
from fednorm.norms._zero_mean import ZeroMeanInput, ZeroMeanOutput
from fednorm.rng import torch_seeded

TOLERANCE = 1e-9
"""Largest change, relative to the largest output, that rounding in float64 makes; a mean that counts changes more."""


class Part(StrEnum):
    """What of a module has its mean taken off."""

    WEIGHT = "weight"
    """Its output, by its weight: a linear layer or a convolution."""
    OUTPUT = "output"
    """Its output, after it was computed."""
    INPUT = "input"
    """Its first input."""


@dataclass(frozen=True)
class Tap:
    """A place where the mean over the features is taken off.

    Attributes:
        path: The module's path.
        part: What of it.
    """

    path: str
    part: Part


@dataclass
class _Pass:
    """What one forward pass showed.

    Attributes:
        outputs: The network's output tensors, flattened.
        inputs: For each module, by path, the largest |mean| over the features of its first input, relative to the
            input's size; in the order of their beginning.
        results: The same of its output; in the order of their end.
        axes: For each module the number of axes of its first input.
    """

    outputs: Tensor
    inputs: dict[str, float] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)


class Trial:
    """A copy of a network on which it is tried where a mean counts.

    Args:
        model: The copy; it is given random parameters, on the CPU and in float64.
        example: What it is run on.
        features: d, the width of the stream.
    """

    def __init__(self, model: nn.Module, example: Example, features: int) -> None:
        self.model = randomized(model.cpu().double())
        self.example = in_double(example)
        self.features = features
        self.modules = dict(self.model.named_modules())
        self._drop = [p for p, m in self.modules.items() if isinstance(m, _DropoutNd | nn.AlphaDropout) and m.p > 0]
        self.plain = self.run()

    def run(self, taps: Collection[Tap] = (), shifted: Collection[Tap] = ()) -> _Pass:
        """Run the example, with means taken off at some taps, and with numbers added to all features at others."""
        drop = [(self.modules[path], _FixedDropout(path)) for path in self._drop]
        handles = [module.register_forward_hook(hook, prepend=True) for module, hook in drop]
        handles += [self._hook(tap, self._taken_off(tap)) for tap in taps]
        handles += [self._hook(tap, _Shift(self._axis(tap), number)) for number, tap in enumerate(shifted)]
        seen = _Pass(torch.empty(0))
        for path, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._watch(seen, path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._watch_output(seen.results, path)))
        try:
            with torch.no_grad(), torch_seeded(0, "exact"):
                seen.outputs = torch.cat([t.flatten() for t in tensors_in(call(self.model, self.example))])
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def free(self, taps: Sequence[Tap]) -> bool:
        """Return whether the network's output does not depend on the means at some taps."""
        change = (self.run(shifted=taps).outputs - self.plain.outputs).abs().max()
        return bool(change <= TOLERANCE * (1 + self.plain.outputs.abs().max()))

    def _axis(self, tap: Tap) -> int:
        return 1 if tap.part is not Part.INPUT and isinstance(self.modules[tap.path], nn.Conv2d) else -1

    def _taken_off(self, tap: Tap) -> Callable[..., Any]:
        if tap.part is Part.INPUT:
            return ZeroMeanInput(shorten=False)
        return _Centre() if self._axis(tap) == 1 else ZeroMeanOutput(shorten=False)

    def _hook(self, tap: Tap, hook: Callable[..., Any]) -> Any:
        module = self.modules[tap.path]
        if tap.part is Part.INPUT:
            return module.register_forward_pre_hook(hook, with_kwargs=True)
        return module.register_forward_hook(hook)

    def _watch(self, seen: _Pass, path: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            value = next(iter((*args, *kwargs.values())), None)
            if isinstance(value, Tensor):
                seen.axes[path] = value.ndim
            self._look(seen.inputs, path, value)

        return watch

    def _watch_output(self, seen: dict[str, float], path: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, output: Any) -> None:
            del args
            value = output[0] if isinstance(output, tuple) and output else output
            if isinstance(module, nn.Conv2d) and isinstance(value, Tensor):
                value = value.movedim(1, -1)
            self._look(seen, path, value)

        return watch

    def _look(self, seen: dict[str, float], path: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (self.features,):
            size = float(value.square().mean().sqrt())
            mean = float(value.mean(-1).abs().max()) / size if size else 0.0
            seen[path] = max(seen.get(path, 0.0), mean)


class _Shift:
    """A hook that adds to all features of a position the same random number."""

    def __init__(self, axis: int, number: int) -> None:
        self.axis, self.number = axis, number

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        del module
        if rest and isinstance(rest[0], dict):  # the input, with keyword arguments
            kwargs = rest[0]
            if args:
                return (self._shifted(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: self._shifted(kwargs[name])}
        output = rest[0]
        return (self._shifted(output[0]), *output[1:]) if isinstance(output, tuple) else self._shifted(output)

    def _shifted(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.axis] = 1
        draw = torch.Generator().manual_seed(self.number)
        return x + torch.randn(shape, generator=draw, dtype=x.dtype)


class _Centre:
    """A hook that takes the mean over the channels off a feature map."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        del module, args
        return output - output.mean(1, keepdim=True)


class _FixedDropout:
    """A hook that drops entries as dropout does in training, but always the same."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        del module, args
        with torch_seeded(0, "exact", self.path):
            return output * (torch.rand(output.shape) < 0.7)


def randomized(model: nn.Module) -> nn.Module:
    """Give every parameter random numbers of a fitting size; returns the model, in evaluation mode."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim > 1:
                deviation = 1 / math.sqrt(math.prod(parameter.shape[1:]))
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=draw))
            else:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=draw))
    return model.eval()


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield the floating-point tensors in what a network returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from (t for inner in value.values() for t in tensors_in(inner))
    elif isinstance(value, list | tuple):
        yield from (t for inner in value for t in tensors_in(inner))


def in_double(example: Example) -> Example:
    """Return an example on the CPU, its floating-point tensors in float64."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()

    if isinstance(example, dict):
        return {key: one(value) for key, value in example.items()}
    return one(example) if isinstance(example, Tensor) else [one(value) for value in example]


def call(model: nn.Module, example: Example) -> Any:
    """Return a model's output for an example."""
    if isinstance(example, dict):
        return model(**example)
    return model(example) if isinstance(example, Tensor) else model(*example)


def by_pattern(paths: Iterable[str]) -> list[list[str]]:
    """Return paths in groups that differ in numbers only, as the blocks of a stack do; in the order of the first."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"\d+", "*", path), []).append(path)
    return list(groups.values())


class Search:
    """The search for the taps after which the inputs of a network's layer normalizations have zero mean.

    Args:
        trial: The copy to try on.
        norms: The paths of the layer normalizations of the stream.
    """

    def __init__(self, trial: Trial, norms: Sequence[str]) -> None:
        self.trial = trial
        self.norms = norms
        self.groups: list[list[Tap]] = []
        self._tried: set[Tap] = set()

    @property
    def taps(self) -> list[Tap]:
        """The taps that were found."""
        return [tap for group in self.groups for tap in group]

    def open(self, seen: _Pass) -> list[str]:
        """Return the layer normalizations whose input still has a mean, in the order in which they run."""
        return [path for path, mean in seen.inputs.items() if path in set(self.norms) and mean > TOLERANCE]

    def find(self) -> list[str]:
        """Fill :attr:`groups`; returns the layer normalizations for which that was not enough, in their order."""
        weights = [path for path in self.trial.plain.results if self._by_weight(path)]
        for group in by_pattern(weights):
            self._take([Tap(path, Part.WEIGHT) for path in group])
        seen = self.trial.run(self.taps)
        for part in (Part.OUTPUT, Part.INPUT):
            seen = self._take_more(part, seen)
        if not self.open(seen):
            for part in (Part.OUTPUT, Part.INPUT, Part.WEIGHT):
                self._prune(part)
        return self.open(seen)

    def _by_weight(self, path: str) -> bool:
        module = self.trial.modules[path]
        return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)

    def _take_more(self, part: Part, seen: _Pass) -> _Pass:
        """Take taps of a part, the earliest first, while there are layer normalizations whose input has a mean."""
        while self.open(seen):
            means = seen.results if part is Part.OUTPUT else seen.inputs
            paths = [path for path, mean in means.items() if mean > TOLERANCE and self._may_be(part, path)]
            groups = ([Tap(path, part) for path in group] for group in by_pattern(paths))
            if not any(self._take(group) for group in groups):
                break
            seen = self.trial.run(self.taps)
        return seen

    def _may_be(self, part: Part, path: str) -> bool:
        """Return whether a mean may be taken off: not right before a norm, which would be layer normalization."""
        return not (part is Part.INPUT and path in self.norms) and not isinstance(self.trial.modules[path], nn.Conv2d)

    def _take(self, taps: Sequence[Tap]) -> bool:
        """Take those of some alike taps on whose mean nothing depends; returns whether there was one.

        All at once; where that fails and not because of the first, one by one.
        """
        taps = [tap for tap in taps if tap not in self._tried]
        self._tried.update(taps)
        if taps and not self.trial.free(taps):
            alone = len(taps) > 1 and self.trial.free(taps[:1])
            taps = [taps[0], *(tap for tap in taps[1:] if self.trial.free([tap]))] if alone else []
        if taps:
            self.groups.append(list(taps))
        return bool(taps)

    def _prune(self, part: Part) -> None:
        """Give up taps of a part that the others make superfluous: those before the mean of all that came is off."""
        for group in [group for group in self.groups if group[0].part is part]:
            for fewer in ([], group[:1]):
                others = [fewer if one is group else one for one in self.groups]
                if len(fewer) < len(group) and not self.open(self.trial.run([t for one in others for t in one])):
                    self.groups = [one for one in others if one]
                    break
