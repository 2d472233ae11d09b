"""``check``: what every strategy and every conversion would make of a model, and whether a step of training works."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fednorm.cards import NORMS, STRATEGIES
from fednorm.conversion.replacement import convert_with_report
from fednorm.errors import ConfigError, FedNormError
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.trial import one_round
from fednorm.inspection.strangers import load_model
from fednorm.norms import spec_of
from fednorm.recognition.buffers import Observation, observe, quietly, remembered, said, train_once, trainable_copy
from fednorm.recognition.inputs import Example
from fednorm.rng import torch_stream

LARGE = 2**30
"""Bytes of a model from which it is checked without values: several copies of it would not fit a small machine."""

NO_VALUES = "not run: the model has no values (it is on the meta device, or larger than a gigabyte)"

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One training step on random inputs.

    Attributes:
        loss: Its loss; None where there is none, as on the meta device.
        failure: Why it did not work, or was not tried, as a sentence; empty where it worked.
    """

    loss: float | None = None
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether the step worked."""
        return not self.failure


@dataclass(frozen=True)
class StrategyVerdict:
    """What a strategy would do with the model as it is.

    Attributes:
        name: The strategy.
        plan: Numbers of state entries by role, and ``bytes_per_round`` of one client; None where it refuses.
        refusal: Its sentence; empty where it takes the model.
        step: One round of two clients.
    """

    name: str
    plan: Mapping[str, int] | None
    refusal: str
    step: Step


@dataclass(frozen=True)
class NormVerdict:
    """What ``convert`` would do with the model's normalization.

    Attributes:
        name: The norm.
        layers: Paths of the layers it replaces.
        inserted: Paths of the activations before which it puts one.
        convolutions: How many convolutions it rebuilds.
        left: What it looked at and leaves: path, class and reason.
        notes: What it says beside.
        refusal: Its sentence; empty where it converts.
        step: One step of the converted model.
    """

    name: str
    layers: tuple[str, ...]
    inserted: tuple[str, ...]
    convolutions: int
    left: tuple[str, ...]
    notes: tuple[str, ...]
    refusal: str
    step: Step


@dataclass(frozen=True)
class ModelReport:
    """What :func:`check` found out about a model.

    Attributes:
        model: Its name, or its class.
        parameters: Number of its parameters.
        layers: Its normalization layers by class, each with how many there are and the norm that speaks for them.
        input_shape: Shape of one sample that it takes; None where none was found.
        step: One step of the model as it is.
        strategies: A verdict a strategy.
        norms: A verdict a norm.
    """

    model: str
    parameters: int
    layers: Mapping[str, tuple[int, str]]
    input_shape: tuple[int, ...] | None
    step: Step
    strategies: tuple[StrategyVerdict, ...]
    norms: tuple[NormVerdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return dataclasses.asdict(self)


def check(
    model: nn.Module | str,
    *,
    strategies: Iterable[str] | None = None,
    norms: Iterable[str] | None = None,
    steps: bool = True,
) -> ModelReport:
    """Say what every strategy and every conversion would make of a model, and try a step of training of each.

    The model is not changed, no weights are downloaded, and no process-wide generator is touched. An input is guessed
    (:mod:`fednorm.recognition.inputs`); the loss is the mean square of the outputs.

    Args:
        model: The model, or its name as :func:`~fednorm.inspection.strangers.load_model` reads it:
            ``torchvision:resnet18``, ``timm:resnet26d``, ``resnet18`` (ours), ``package.module:make``.
        strategies: Their names; all of them if None.
        norms: Their names; all of them if None.
        steps: Whether to try steps at all.

    Returns:
        The report. What a strategy, a conversion or the model's own code raises is a sentence in it.

    Raises:
        FedNormError: The model cannot be made, or a name is not registered.

    Example:
        >>> report = fednorm.check("torchvision:swin_t", norms=["group_norm"])  # doctest: +SKIP
        >>> report.strategies[0].plan["constant"]  # doctest: +SKIP
        12
    """
    name = model if isinstance(model, str) else type(model).__name__
    chosen, wanted = list(strategies or STRATEGIES.names), list(norms or NORMS.names)
    for strategy in chosen:
        STRATEGIES[strategy]
    for norm in wanted:
        NORMS[norm]
    module = _light(load_model(model) if isinstance(model, str) else model)
    with remembered():
        seen = observe(module) if steps else Observation(reason="not run")
        # A step has been observed; on the meta device another shows nothing more.
        own = Step(failure=seen.reason) if _meta(module) or not steps else _step(module, seen)
        return ModelReport(
            model=name,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            layers=_layers(module),
            input_shape=None if seen.example is None else seen.example.shape,
            step=own,
            strategies=tuple(_strategy(strategy, module, seen, steps=steps and own.ok) for strategy in chosen),
            norms=tuple(_norm(norm, module, seen, steps=steps and own.ok) for norm in wanted),
        )


def _light(model: nn.Module) -> nn.Module:
    """Return the model, or one without values where copies of it would be too large."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"check takes a torch.nn.Module or the name of one; got {type(model).__name__}.")
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if held <= LARGE or _meta(model):
        return model
    with torch.no_grad():
        return copy.deepcopy(model).to("meta")


def _meta(model: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def _layers(model: nn.Module) -> dict[str, tuple[int, str]]:
    counts: dict[str, tuple[int, str]] = {}
    for module in model.modules():
        spec = spec_of(module)
        if spec is not None and spec.normalizes:
            kind = type(module).__name__
            counts[kind] = (counts.get(kind, (0, ""))[0] + 1, spec.name)
    return counts


def _attempt(act: Callable[[], T]) -> tuple[T | None, str]:
    """Run somebody's code; return what it gives, or None and a sentence."""
    try:
        with quietly():
            return act(), ""
    except FedNormError as error:
        return None, str(error)
    except Exception as error:  # the model's own code may raise anything
        return None, f"it raises {said(error)}"


def _step(model: nn.Module, seen: Observation) -> Step:
    """Try one training step of a copy; a converted model may need more pixels than the model itself."""
    if seen.example is None:
        return Step(failure=seen.reason)
    first = ""
    for example in (seen.example, *_larger(seen.example)):
        loss, failure = _attempt(lambda example=example: _train(trainable_copy(model), example))  # type: ignore[misc]
        if not failure:
            return Step(None if _meta(model) else loss)
        first = first or failure
    return Step(failure=first)


def _larger(example: Example) -> tuple[Example, ...]:
    if len(example.shape) != 3:
        return ()
    channels, height, width = example.shape
    return tuple(Example((channels, height * by, width * by)) for by in (2, 4) if height * by <= 256)


def _train(model: nn.Module, example: Example) -> float:
    loss = train_once(model, _random_batch(model, example))
    return 0.0 if loss.device.type == "meta" else loss.item()


def _random_batch(model: nn.Module, example: Example) -> torch.Tensor:
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
    return example.batch(2, torch_stream(0, "check"), device=device, dtype=dtype)


def _strategy(name: str, model: nn.Module, seen: Observation, *, steps: bool) -> StrategyVerdict:
    strategy, refusal = _attempt(lambda: _make(name, model))
    if strategy is None:
        return StrategyVerdict(name, None, refusal, Step(failure="refused"))
    example = seen.example
    if not steps or example is None or _meta(model):
        failure = NO_VALUES if _meta(model) else "not run"
        return StrategyVerdict(name, strategy.summary_of_plan(1), "", Step(failure=failure))
    loss, failure = _attempt(lambda: one_round(strategy, model, lambda client: _train(client, example)))
    return StrategyVerdict(name, strategy.summary_of_plan(1), "", Step(loss, failure))


def _make(name: str, model: nn.Module) -> NormStrategy:
    return STRATEGIES[name].make(model, min_nodes=2)


def _norm(name: str, model: nn.Module, seen: Observation, *, steps: bool) -> NormVerdict:
    done, refusal = _attempt(lambda: convert_with_report(model, name))
    remark: tuple[str, ...] = ()
    if done is None and (example := observe(model).example) is not None:
        # What a layer's input looks like may have to be seen.
        images = _random_batch(model, example)
        done, _ = _attempt(lambda: convert_with_report(model, name, example_inputs=images))
        remark = (f"Converted with example_inputs of shape {tuple(images.shape)}; without: {refusal}",)
    if done is None:
        return NormVerdict(name, (), (), 0, (), (), refusal, Step(failure="refused"))
    converted, report = done
    step = _step(converted, seen) if steps else Step(failure="not run")
    return NormVerdict(
        name,
        tuple(report.layers),
        tuple(report.inserted),
        len(report.convolutions),
        tuple(f"{left.path} ({left.type}): {left.reason}" for left in report.left),
        (*remark, *report.notes),
        "",
        step,
    )
