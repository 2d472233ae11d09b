"""What every normalization method keeps, checked on its layers: the parts of :func:`fednorm.testing.check_norm`.

Each check takes a :class:`Case`, a method's layers on inputs of one shape, and raises :class:`AssertionError` with a
sentence. :data:`CHECKS` has them by name; the project's own tests call them with drawn shapes, for every method that is
registered, and :func:`~fednorm.testing.check_norm` on a few shapes, for a stranger's.

A layer may draw random numbers (dropout): every pass is made in a stream of its own, the same for the same seed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.cards import MODELS
from fednorm.errors import ConfigError, FedNormError
from fednorm.federation.plan import norm_plan
from fednorm.models import make_model
from fednorm.norms import spec_of
from fednorm.rng import torch_seeded, torch_stream
from fednorm.roles import LEARNED, STATISTICS, Kind, RoleRule
from fednorm.spec import HookedLayer, Norm, NormSpec
from fednorm.training.step import TrainingStep

INPUTS = 4
"""Channels or features that go into the convolution or linear layer before a norm's layer."""

SEEN = 10**6
"""What a layer's counters are set ahead by, to look at the gradient of a method that begins with exact ones."""


@dataclass(frozen=True)
class Case:
    """A method's layers on inputs of one shape.

    Attributes:
        card: The method's card.
        norm: The method.
        shape: Of what the norm's layer is given: (N, C, H, W), (N, C, L) or (N, C).
        seed: Of weights and inputs.
    """

    card: NormSpec
    norm: Norm
    shape: tuple[int, ...]
    seed: int = 0

    @property
    def dims(self) -> int:
        """The number of axes after C."""
        return len(self.shape) - 2

    @property
    def name(self) -> str:
        """The method and the shape, for a sentence."""
        return f"norm {self.card.name} on {self.shape}"

    def unit(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """Return a weight layer, the norm's layer and its nonlinearity; learned tensors away from 0 and 1.

        Raises:
            ConfigError: The method does not take such inputs.
        """
        with torch_seeded(self.seed, "contract", "weights"):
            channels = self.shape[1]
            before: nn.Module
            if self.dims == 2:
                before = self.norm.conv(INPUTS, channels, 3, padding=1, bias=False)
            elif self.dims == 1:
                before = nn.Conv1d(INPUTS, channels, 3, padding=1)
            else:
                before = nn.Linear(INPUTS, channels)
            unit = nn.Sequential(before, self.norm.layer(channels, self.dims), self.norm.activation()).to(dtype)
            with torch.no_grad():
                for parameter in unit.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return unit

    def inputs(self, number: int = 0, count: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return inputs of the unit.

        Args:
            number: Of the batch; batches of other numbers are others.
            count: Samples; N of the shape if 0.
            dtype: Their type.
        """
        generator = torch_stream(self.seed, "contract", "inputs", number)
        drawn = torch.randn((count or self.shape[0], INPUTS, *self.shape[2:]), generator=generator, dtype=torch.float64)
        return (1.5 * drawn + 0.5).to(dtype)

    def run(self, unit: nn.Module, inputs: Tensor, number: int = 0) -> Tensor:
        """Return what a unit makes of inputs, its random numbers those of a pass of that number."""
        for layer in unit.modules():
            if isinstance(layer, HookedLayer):
                layer.set_tasks(None, 1)
        with torch_seeded(self.seed, "contract", "pass", number):
            outputs: Tensor = unit(inputs)
        return outputs

    def train(self, unit: nn.Module, batches: range, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Train a unit on batches, as a training step does; only its statistics move without an optimizer."""
        unit.train()
        for number in batches:
            outputs = self.run(unit, self.inputs(number), number)
            loss = (outputs - 1).square().mean()
            for layer in unit.modules():
                if isinstance(layer, HookedLayer) and (penalty := layer.penalty()) is not None:
                    loss = loss + penalty
            unit.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if optimizer is not None:
                optimizer.step()

    def fact(self, unit: nn.Module, name: str) -> bool:
        """Return a fact of the card, or what a layer of the unit says of itself where it is otherwise there."""
        said = [bool(getattr(layer, name)) for layer in unit.modules() if isinstance(getattr(layer, name, None), bool)]
        return any(said) if said else bool(getattr(self.card, name, False))

    def speaks_of(self, unit: nn.Module) -> bool:
        """Return whether what the card says is so must be so here.

        Not where the method acts on something else than these layers, such as attention; and a card speaks of maps: on
        features without positions a method may fall back to another that has not its peculiarities.
        """
        return self.dims == 2 and any(isinstance(layer, self.card.layers) for layer in unit.modules())


def check_roles(case: Case) -> None:
    """Every tensor has a kind, parameters a learned one, buffers a statistic's; and so a role under any rule."""
    unit = case.unit()
    spec = spec_of(unit[1])
    for key in unit[1].state_dict():
        declared = spec is None or "." in key or key in spec.tensors
        assert declared, f"{case.name}: the card does not declare {key!r} in its tensors"
    plan = norm_plan(unit, RoleRule())
    assert [entry.key for entry in plan.entries] == list(unit.state_dict()), f"{case.name}: a tensor has no role"
    parameters = dict(unit.named_parameters())
    for entry in plan.entries:
        allowed = LEARNED if entry.key in parameters else STATISTICS
        known = spec_of(unit.get_submodule(entry.layer)) is not None
        assert not known or entry.kind in allowed, f"{case.name}: {entry.key} cannot be of kind {entry.kind.value}"


def check_forward(case: Case) -> None:
    """The shape stays, values and gradients are finite, and one seed gives one result, bit for bit."""
    results = []
    for _ in range(2):
        unit, inputs = case.unit().train(), case.inputs().requires_grad_()
        outputs = case.run(unit, inputs)
        assert outputs.shape == case.shape, f"{case.name}: the output has shape {tuple(outputs.shape)}"
        assert outputs.dtype == inputs.dtype, f"{case.name}: {inputs.dtype} becomes {outputs.dtype}"
        outputs.square().sum().backward()  # type: ignore[no-untyped-call]
        assert inputs.grad is not None, f"{case.name}: the output does not depend on the input"
        grads = [inputs.grad, *(p.grad for p in unit.parameters() if p.grad is not None)]
        results.append([outputs.detach(), *grads, *unit.state_dict().values()])
    for one, other in zip(*results, strict=True):
        assert bool(one.isfinite().all()), f"{case.name}: a value or a gradient is not finite"
        assert torch.equal(one, other), f"{case.name}: one seed gives two results"


def check_gradient(case: Case) -> None:
    """The backward pass is the derivative of the forward pass, or the card says that it is not, and it is not.

    Finite differences in float64, in training and in evaluation; what an evaluation computes has no approximation.
    """
    fresh = case.unit().train()
    found = _is_derivative(case, fresh)
    if not case.card.exact_backward and found:
        _set_ahead(case, fresh)
        found = _is_derivative(case, fresh)
    if case.card.exact_backward:
        assert found, (
            f"{case.name}: in training the backward pass is not the derivative of the forward pass. If the method "
            "means it so, set exact_backward=False in its card."
        )
    else:
        assert not found or not case.speaks_of(fresh), (
            f"{case.name}: the backward pass is the derivative of the forward pass; set exact_backward=True in its card"
        )
    assert _is_derivative(case, fresh.eval()), f"{case.name}: in evaluation the gradient is not the derivative"


def _set_ahead(case: Case, unit: nn.Module) -> None:
    """Train a unit for some steps, and let its counters tell of many more."""
    case.train(unit, range(6))
    counts = [entry.key for entry in norm_plan(unit, RoleRule()).entries if entry.kind is Kind.COUNT]
    state = unit.state_dict()
    unit.load_state_dict({**state, **{key: state[key] + SEEN for key in counts}})


def _is_derivative(case: Case, unit: nn.Module) -> bool:
    names = [name for name, _ in unit.named_parameters()]

    def forward(inputs: Tensor, *values: Tensor) -> Tensor:
        copied = copy.deepcopy(unit)  # a pass may move statistics, on which the next one depends
        pairs = dict(zip(names, values, strict=True))
        for layer in copied.modules():
            if isinstance(layer, HookedLayer):
                layer.set_tasks(None, 1)
        with torch_seeded(case.seed, "contract", "gradient"):
            outputs: Tensor = torch.func.functional_call(copied, pairs, (inputs,))
        return outputs

    inputs = case.inputs().requires_grad_()
    parameters = [parameter.detach().clone().requires_grad_() for parameter in unit.parameters()]
    # Its projections are drawn from the process-wide generator.
    with torch_seeded(case.seed, "contract", "gradcheck"):
        return bool(
            torch.autograd.gradcheck(
                forward, (inputs, *parameters), fast_mode=True, raise_exception=False, eps=1e-6, atol=1e-5, rtol=1e-3
            )
        )


def check_modes(case: Case) -> None:
    """Training and evaluation differ where the card says so; an evaluation moves nothing and repeats itself."""
    unit = case.unit()
    case.train(unit, range(2))
    trained = case.run(copy.deepcopy(unit).train(), case.inputs(7)).detach()
    unit.eval()
    before = {key: tensor.clone() for key, tensor in unit.state_dict().items()}
    with torch.no_grad():
        evaluated, again = case.run(unit, case.inputs(7)), case.run(unit, case.inputs(7), 1)
    assert torch.equal(evaluated, again), f"{case.name}: evaluation changes with its repetition"
    moved = [key for key, tensor in unit.state_dict().items() if not torch.equal(tensor, before[key])]
    assert not moved, f"{case.name}: an evaluation moves {', '.join(moved)}"
    differ = not torch.allclose(trained, evaluated, rtol=1e-9, atol=1e-12)
    said = case.fact(unit, "train_eval_differ")
    assert differ == said or (said and not case.speaks_of(unit)), (
        f"{case.name}: training and evaluation {'differ' if differ else 'are the same'}; set "
        f"train_eval_differ={differ} in its card"
    )


def check_round_trip(case: Case) -> None:
    """A state dict, a deep copy and a pickle, taken in the middle of training, go on as the layer itself does."""
    unit = case.unit()
    case.train(unit, range(2))
    loaded = case.unit()
    loaded.load_state_dict({key: tensor.clone() for key, tensor in unit.state_dict().items()})
    copies = {
        "a state dict": loaded,
        "a deep copy": copy.deepcopy(unit),
        "a pickle": pickle.loads(pickle.dumps(unit)),
    }
    assert pickle.loads(pickle.dumps(case.norm)) == case.norm, f"{case.name}: a pickle of the method is another method"
    for training in (False, True):
        expected = case.run(unit.train(training), case.inputs(5))
        for how, other in copies.items():
            same = torch.equal(case.run(other.train(training), case.inputs(5)), expected)
            where = "training" if training else "evaluation"
            assert same, f"{case.name}: after {how} the layer computes something else in {where}"


def check_resume(case: Case) -> None:
    """A training that is cut short, saved as plain tensors and gone on with ends with the same bits."""

    def made() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        unit = case.unit(torch.float32)
        return unit, torch.optim.SGD(unit.parameters(), lr=0.01, momentum=0.9)

    case32 = _InSingle(case.card, case.norm, case.shape, case.seed)
    (whole, first), (cut, second) = made(), made()
    case32.train(whole, range(4), first)
    case32.train(cut, range(2), second)
    saved = io.BytesIO()
    torch.save({"model": cut.state_dict(), "optimizer": second.state_dict()}, saved)
    saved.seek(0)
    resumed, third = made()
    state = torch.load(saved, weights_only=True)
    resumed.load_state_dict(state["model"])
    third.load_state_dict(state["optimizer"])
    case32.train(resumed, range(2, 4), third)
    other = [key for key, tensor in whole.state_dict().items() if not torch.equal(tensor, resumed.state_dict()[key])]
    assert not other, f"{case.name}: a training that was cut short ends with another {', '.join(other)}"


@dataclass(frozen=True)
class _InSingle(Case):
    """The same case in single precision, in which training is done."""

    def inputs(self, number: int = 0, count: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return inputs in float32."""
        return super().inputs(number, count, dtype)


def check_one_sample(case: Case) -> None:
    """In evaluation one sample is what it is in a batch; in training too, unless the card says that samples couple."""
    unit = case.unit()
    case.train(unit, range(2))
    inputs = case.inputs(3)
    unit.eval()
    with torch.no_grad():
        alone = torch.allclose(case.run(unit, inputs)[:1], case.run(unit, inputs[:1]), rtol=1e-9, atol=1e-11)
        # PyTorch's instance normalization cannot do without a sample, and others may refuse in words.
        with contextlib.suppress(FedNormError, *([IndexError] if _is_pytorchs(unit[1]) else [])):
            nobody = case.run(unit, inputs[:0])
            assert nobody.shape[0] == 0, f"{case.name}: an empty batch gives {tuple(nobody.shape)}"
    coupled = case.fact(unit, "coupled_in_evaluation")
    assert alone or coupled, f"{case.name}: in evaluation a sample's output depends on the others in its batch"
    unit.train()
    other = inputs.clone()
    other[1:] += 1
    states = copy.deepcopy(unit)
    with torch.no_grad():
        same = torch.allclose(case.run(unit, inputs)[:1], case.run(states, other)[:1], rtol=1e-9, atol=1e-11)
    said = case.fact(unit, "batch_coupled")
    assert same != said or (said and not case.speaks_of(unit)), (
        f"{case.name}: in training a sample's output {'does not depend' if same else 'depends'} on its batch; set "
        f"batch_coupled={not same} in its card"
    )
    try:
        one = case.run(unit, inputs[:1])
    except (FedNormError, ValueError):  # PyTorch's own batch norms refuse what has no variance
        assert case.fact(unit, "batch_coupled"), f"{case.name}: a batch of one is refused in training"
    else:
        assert bool(one.isfinite().all()), f"{case.name}: a batch of one gives values that are not finite"


def check_autocast(case: Case) -> None:
    """Under autocast in bfloat16 it computes what it does in float32, nearly, and its own tensors stay in float32."""
    unit = case.unit(torch.float32).train()
    twin = copy.deepcopy(unit)
    inputs = case.inputs(dtype=torch.float32)
    expected = case.run(twin, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run(unit, inputs)
    assert found.dtype in (torch.bfloat16, torch.float32), f"{case.name}: autocast gives {found.dtype}"
    found.float().square().sum().backward()  # type: ignore[no-untyped-call]
    for key, tensor in unit.state_dict().items():
        assert tensor.dtype == twin.state_dict()[key].dtype, f"{case.name}: autocast makes {key} {tensor.dtype}"
    assert bool(found.isfinite().all()), f"{case.name}: a value is not finite under autocast"
    if case.card.thresholds:
        return  # a rounding of the inputs may change which side of a threshold they are on
    # Where a variance is small beside the mean, a rounding of the inputs is a large part of the output: on average.
    gap = (found.detach().float() - expected.detach()).abs().mean() / expected.detach().abs().mean()
    assert float(gap) < 0.1, f"{case.name}: under autocast the output is {100 * float(gap):.0f} % off"


def check_layout(case: Case) -> None:
    """Channels last in, channels last out, with the same values."""
    if case.dims != 2:
        return
    layer, twin = (case.unit()[1].train() for _ in range(2))
    generator = torch_stream(case.seed, "contract", "maps")
    maps = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    plain = case.run(layer, maps)
    last = case.run(twin, maps.to(memory_format=torch.channels_last))
    assert torch.allclose(plain, last, rtol=1e-9, atol=1e-11), f"{case.name}: channels_last changes the values"
    assert plain.is_contiguous(), f"{case.name}: contiguous inputs give outputs of another layout"
    kept = last.is_contiguous(memory_format=torch.channels_last) or _is_pytorchs(layer)
    assert kept, f"{case.name}: channels_last inputs give outputs of another layout, strides {last.stride()}"


def _is_pytorchs(layer: nn.Module) -> bool:
    """Return whether a layer is one of PyTorch's own, which is as PyTorch has it."""
    return type(layer).__module__.startswith("torch.nn.")


CHECKS: Mapping[str, Callable[[Case], None]] = {
    "roles": check_roles,
    "forward": check_forward,
    "gradient": check_gradient,
    "modes": check_modes,
    "round trip": check_round_trip,
    "resume": check_resume,
    "one sample": check_one_sample,
    "autocast": check_autocast,
    "layout": check_layout,
}
"""The checks of one case, by name."""


def check_program(case: Case, how: str) -> None:
    """A program made of the unit computes what the unit does.

    Args:
        case: The case.
        how: ``compile`` for ``torch.compile``'s graph, in training; ``export`` for ``torch.export``, in evaluation.
    """
    unit = case.unit(torch.float32)
    _InSingle(case.card, case.norm, case.shape, case.seed).train(unit, range(2))
    inputs = case.inputs(2, dtype=torch.float32)
    twin = copy.deepcopy(unit)
    made: Any
    if how == "compile":
        torch._dynamo.reset()
        made, expected = torch.compile(unit.train(), backend="aot_eager"), case.run(twin.train(), inputs)
    else:
        made = torch.export.export(unit.eval(), (inputs,)).module()
        expected = case.run(twin.eval(), inputs)
    found = case.run(made, inputs)
    close = torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert close, f"{case.name}: torch.{how} makes a program of it that computes something else"


def check_network(card: NormSpec, seed: int = 0) -> None:
    """In a whole network, where the method may act on more than layers: roles, resumption, copies, autocast.

    The network is a small one that has what the method acts on: the card's ``tried_on``, where it names one.

    Args:
        card: The method's card.
        seed: Of weights and images.
    """
    network = str(getattr(card, "tried_on", "") or "digits_cnn")
    size = MODELS[network].input_size
    generator = torch_stream(seed, "contract", "images")
    images = torch.randn(4, 4, 3, size, size, generator=generator)
    labels = torch.arange(4) % 5
    whole, first = _network(card, network, seed)
    cut, second = _network(card, network, seed)
    plan = norm_plan(whole, RoleRule())
    assert [entry.key for entry in plan.entries] == list(whole.state_dict()), f"{card.name}: a tensor has no role"
    for number in range(4):
        _step(whole, first, images[number], labels, (seed, number))
    for number in range(2):
        _step(cut, second, images[number], labels, (seed, number))
    resumed, third = _network(card, network, seed)
    resumed.load_state_dict({key: tensor.clone() for key, tensor in cut.state_dict().items()})
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for number in range(2, 4):
        _step(resumed, third, images[number], labels, (seed, number))
    other = [key for key, tensor in whole.state_dict().items() if not torch.equal(tensor, resumed.state_dict()[key])]
    assert not other, f"norm {card.name} on {network}: a training cut short ends with another {', '.join(other[:5])}"
    with torch.no_grad():
        expected = whole.eval()(images[0])
        for how, copied in (("deep copy", copy.deepcopy(whole)), ("pickle", pickle.loads(pickle.dumps(whole)))):
            assert torch.equal(copied.eval()(images[0]), expected), f"norm {card.name} on {network}: a {how} differs"
        with torch.autocast("cpu", torch.bfloat16):
            finite = bool(whole(images[0]).isfinite().all())
    assert finite, f"norm {card.name} on {network}: a value is not finite under autocast"


def _network(card: NormSpec, network: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a small network in training mode, and its optimizer."""
    made: nn.Module | None = None
    for width in (4, 12, 48):  # heads, or groups, divide one of these
        with contextlib.suppress(ConfigError):
            made = made or make_model(network, card.made(), num_classes=5, width=width, seed=seed)
    made = made or make_model(network, card.made(), num_classes=5, seed=seed)
    return made.train(), torch.optim.SGD(made.parameters(), lr=0.01, momentum=0.9)


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, names: tuple[int, int]
) -> None:
    with torch_seeded(names[0], "contract", "step", names[1]):
        TrainingStep(network.train(), optimizer)(images, labels)
