"""AdaB2N against its formula composed of float64 operations, and what is peculiar to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import require_compiler
from torch import Tensor, nn

from fednorm.errors import ConfigError, DataError
from fednorm.norms import make_norm
from fednorm.norms.adab2n import AdaB2NLayer, modified_momentum


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(channels: int, spatial_dims: int = 2, **options: Any) -> AdaB2NLayer:
    layer = make_norm("adab2n", {"num_tasks": 4, "lambd": 0.7, **options}).layer(channels, spatial_dims).double()
    assert isinstance(layer, AdaB2NLayer)
    for index, parameter in enumerate(layer.parameters()):
        parameter.data += 0.5 * gaussian(*parameter.shape, seed=index)
    return layer


def weights_of(psi: Tensor, tasks: Tensor, seen: int, corrected: bool) -> Tensor:
    """One sample at a time, as the paper has it."""
    counts = [int((tasks == t).sum()) for t in range(seen)]
    mass = [psi[t].exp() + n if n or not corrected else torch.zeros((), dtype=psi.dtype) for t, n in enumerate(counts)]
    total = torch.stack(mass).sum()
    return torch.stack([mass[t] / total / counts[t] for t in tasks.tolist()])


def formula(layer: AdaB2NLayer, x: Tensor, tasks: Tensor, seen: int, eta: float) -> tuple[Tensor, Tensor]:
    """Return the output and the extra loss without lambd, by autograd's own derivative."""
    axes, shape = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))

    def spatial(values: Tensor) -> Tensor:
        return values.mean(axes) if axes else values

    weights = weights_of(layer.task_weight, tasks, seen, layer.config.corrected)[:, None]
    mean = (weights * spatial(x)).sum(0)
    var = (weights * spatial((x - mean.view(shape)) ** 2)).sum(0)
    running_mean = ((1 - eta) * layer.running_mean + eta * mean).detach()
    running_var = ((1 - eta) * layer.running_var + eta * var).detach()
    y = (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()
    loss = ((mean - running_mean) ** 2).mean() + ((var - running_var) ** 2).mean()
    return y * layer.weight.view(shape) + layer.bias.view(shape), loss


@settings(deadline=None, max_examples=40)
@given(
    tasks=st.lists(st.integers(0, 3), min_size=2, max_size=7),
    positions=st.sampled_from([(), (3,), (2, 3), (3, 8), (2, 1, 2)]),
    channels=st.sampled_from([1, 3, 4, 8]),
    last=st.booleans(),
    corrected=st.booleans(),
    kappa=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_outputs_and_gradients_are_those_of_the_composed_formula(
    tasks: list[int], positions: tuple[int, ...], channels: int, last: bool, corrected: bool, kappa: float, seed: int
) -> None:
    layer = layer_of(channels, len(positions), corrected=corrected, kappa=kappa)
    x = 2 * gaussian(len(tasks), channels, *positions, seed=seed) + 1
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    numbers, gradient = torch.tensor(tasks), gaussian(*x.shape, seed=seed + 1)
    inputs = (x.requires_grad_(), layer.weight, layer.bias, layer.task_weight)
    y, loss = formula(layer, x, numbers, 4, modified_momentum(1, 0.1, kappa))
    expected = torch.autograd.grad((y * gradient).sum() + 0.7 * loss, inputs)
    layer.set_tasks(numbers, 4)
    ours, penalty = layer(x), layer.penalty()
    torch.testing.assert_close(ours, y, rtol=1e-9, atol=1e-10)
    assert penalty is not None
    torch.testing.assert_close(penalty, 0.7 * loss, rtol=1e-9, atol=1e-11)
    for found, wanted in zip(torch.autograd.grad((ours * gradient).sum() + penalty, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert layer.penalty() is None, "a penalty counts once"


def test_a_gradient_of_the_penalty_alone_is_the_formulas() -> None:
    layer, x, tasks = layer_of(3), gaussian(4, 3, 2, 2).requires_grad_(), torch.tensor([0, 2, 2, 1])
    _, loss = formula(layer, x, tasks, 3, modified_momentum(1, 0.1, 0.4))
    expected = torch.autograd.grad(0.7 * loss, (x, layer.task_weight))
    layer.set_tasks(tasks, 3)
    layer(x)
    penalty = layer.penalty()
    assert penalty is not None
    for found, wanted in zip(torch.autograd.grad(penalty, (x, layer.task_weight)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_maps_that_are_neither_layout_and_upstream_gradients_of_the_other_one() -> None:
    layer, tasks = layer_of(3), torch.tensor([0, 1, 1, 2])
    whole = gaussian(4, 6, 5, 2)
    gradient = gaussian(4, 3, 5, 2, seed=1)
    found = []
    for x in (whole[:, ::2], whole[:, ::2].contiguous(), whole[:, ::2].contiguous(memory_format=torch.channels_last)):
        leaf = x.detach().requires_grad_()
        layer.set_tasks(tasks, 3)
        for upstream in (gradient, gradient.contiguous(memory_format=torch.channels_last)):
            found.append(torch.autograd.grad(layer(leaf), leaf, upstream)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("channels", [3, 6, 8, 20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_in_place_activation_may_follow(channels: int, layout: torch.memory_format) -> None:
    layer, x = layer_of(channels), gaussian(3, channels, 2, 8).contiguous(memory_format=layout)
    found = []
    for activation in (nn.ReLU(), nn.ReLU(inplace=True)):
        leaf = x.clone().requires_grad_()
        layer.set_tasks(torch.tensor([0, 1, 1]), 2)
        y = activation(layer(leaf))
        assert y.is_contiguous(memory_format=layout)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (leaf, layer.weight, layer.task_weight))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [3, 20, 40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_single_precision_is_as_near_to_the_formula_as_batch_norm_s(channels: int, layout: torch.memory_format) -> None:
    """Also where the mean is far from 0, and a mean of squares alone would have lost the variance."""
    x, gradient = 300 + gaussian(8, channels, 16, 16), gaussian(8, channels, 16, 16, seed=1)
    double, single = layer_of(channels, lambd=0.0), layer_of(channels, lambd=0.0).float()
    tasks, errors = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), []
    batch_norm = nn.BatchNorm2d(channels)
    batch_norm.load_state_dict({key: value for key, value in single.state_dict().items() if key != "task_weight"})
    for layer in (double, single):
        layer.task_weight.data[:] = 0.0  # equal shares: batch normalization
        layer.set_tasks(tasks, 2)
    leaf = x.clone().requires_grad_()
    y = double(leaf)
    exact = (y.detach(), *torch.autograd.grad(y, (leaf, double.weight, double.bias), gradient))
    for layer in (single, batch_norm):
        leaf = x.float().contiguous(memory_format=layout).requires_grad_()
        y = layer(leaf)
        grads = torch.autograd.grad(y, (leaf, layer.weight, layer.bias), gradient.float())
        errors.append([float((a - b).abs().max()) for a, b in zip((y.detach(), *grads), exact, strict=True)])
    for ours, theirs, scale in zip(*errors, (exact[0].abs().max(), *(g.abs().max() for g in exact[1:])), strict=True):
        assert ours <= 4 * theirs + 1e-5 * float(scale)


@pytest.mark.parametrize(("corrected", "mean", "var"), [(False, 4.40, 0.317), (True, 5.0, 0.0)])
def test_absent_tasks_shrink_the_moments_as_published_unless_corrected(
    corrected: bool, mean: float, var: float
) -> None:
    """A constant input of 5 with three of five seen tasks absent; the official layer recorded 4.40 and 0.317."""
    layer = make_norm("adab2n", {"num_tasks": 5, "kappa": 0, "corrected": corrected}).layer(1, 2).double()
    # c = (1 + n_1 + 1 + n_2 + 3), n_1 + n_2 = 20: the present tasks have 22 / 25 = 0.88 of the weight.
    layer.set_tasks(torch.tensor([3] * 10 + [4] * 10), 5)
    layer(torch.full((20, 1, 2, 2), 5.0, dtype=torch.float64))
    assert layer.running_mean.item() == pytest.approx(mean, abs=5e-4)  # eta_1 is 1
    assert layer.running_var.item() == pytest.approx(var, abs=5e-4)


@settings(deadline=None)
@given(tasks=st.lists(st.integers(0, 3), min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_corrected_weights_sum_to_one_and_published_ones_to_what_is_present(tasks: list[int], seed: int) -> None:
    psi, numbers = gaussian(4, seed=seed), torch.tensor(tasks)
    assert weights_of(psi, numbers, 4, corrected=True).sum().item() == pytest.approx(1)
    sums = []
    for corrected in (True, False):
        layer = layer_of(1, 0, corrected=corrected, kappa=0)
        layer.task_weight.data.copy_(psi)
        layer.set_tasks(torch.cat((numbers, numbers)), 4)
        layer(torch.ones(2 * len(tasks), 1, dtype=torch.float64))
        sums.append(layer.running_mean.item())  # the weighted mean of ones
    mass = psi.exp() + 2 * torch.bincount(numbers, minlength=4)
    assert sums[0] == pytest.approx(1)
    assert sums[1] == pytest.approx((mass[numbers.unique()].sum() / mass.sum()).item())


@pytest.mark.parametrize("momentum", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.4, 0.7, 1.0])
def test_the_closed_form_is_the_recursion(kappa: float, momentum: float) -> None:
    eta = momentum**kappa
    for step in range(1, 300):
        wanted = {0.0: 1 / step, 1.0: momentum}.get(kappa, eta)
        assert modified_momentum(step, momentum, kappa) == pytest.approx(wanted, rel=1e-11)
        eta = eta / (eta + (1 - momentum) ** kappa)


@pytest.mark.parametrize(
    ("kappa", "etas"),
    [(0.1, (0.794, 0.102, 0.0161, 0.0105)), (0.4, (0.398, 0.107, 0.0419, 0.0413)), (0.7, (0.2, 0.106, 0.0711, 0.0711))],
)
def test_momenta_are_the_official_classs(kappa: float, etas: tuple[float, ...]) -> None:
    assert [modified_momentum(t, 0.1, kappa) for t in (1, 10, 100, 10**5)] == pytest.approx(etas, rel=6e-3)


def test_a_resumed_run_goes_on_with_the_momentum_it_had() -> None:
    run, batches = layer_of(3), [gaussian(4, 3, 2, 2, seed=s) + s for s in range(6)]
    for x in batches[:4]:
        run(x)
    resumed = layer_of(3)
    resumed.load_state_dict(run.state_dict())
    assert resumed.eta == run.eta
    for x in batches[4:]:
        assert torch.equal(run(x), resumed(x))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in run.state_dict().items())
    assert run.eta == modified_momentum(6, 0.1, 0.4)


def test_the_running_variance_is_biased_also_in_the_first_task() -> None:
    layer, x = layer_of(3, kappa=0), gaussian(4, 3, 2, 2)
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


def test_without_tasks_it_is_batch_norm_and_psi_rests() -> None:
    layer, x = layer_of(3), gaussian(4, 3, 2, 2)
    plain = nn.BatchNorm2d(3).double()
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "task_weight"})
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-10, atol=1e-12)
    layer.set_tasks(torch.tensor([0, 1, 1, 2]), 3)
    assert not torch.allclose(layer(x), plain(x))
    layer.set_tasks(None, 3)
    y = layer(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-10, atol=1e-12)
    y.square().sum().backward()
    assert torch.equal(layer.task_weight.grad, torch.zeros(4, dtype=torch.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize(("lambd", "ada_t0", "counts"), [(0.7, 0, [1, 1, 1]), (0.7, 2, [0, 0, 1]), (0.0, 0, [0, 0, 0])])
def test_the_penalty_counts_from_its_task_on(lambd: float, ada_t0: int, counts: list[int]) -> None:
    layer, given_ = layer_of(3, lambd=lambd, ada_t0=ada_t0), []
    for seen in (1, 2, 3):
        layer.set_tasks(torch.zeros(4, dtype=torch.long), seen)
        layer(gaussian(4, 3, 2, 2))
        given_.append(int(layer.penalty() is not None))
    assert given_ == counts
    layer.eval()(gaussian(4, 3, 2, 2))
    assert layer.penalty() is None


def test_two_forward_passes_before_the_backward_pass_are_both_right() -> None:
    layer, tasks = layer_of(3), torch.tensor([0, 1, 1])
    x, other = gaussian(3, 3, 2, 2).requires_grad_(), gaussian(3, 3, 2, 2, seed=1)
    _, loss = formula(layer, x, tasks, 2, modified_momentum(1, 0.1, 0.4))
    (expected,) = torch.autograd.grad(0.7 * loss, x)
    layer.set_tasks(tasks, 2)
    layer(x)
    penalty = layer.penalty()
    layer(other)
    assert penalty is not None
    torch.testing.assert_close(torch.autograd.grad(penalty, x)[0], expected, rtol=1e-9, atol=1e-12)


def test_copies_do_not_carry_the_step_they_were_taken_in() -> None:
    layer = layer_of(3)
    layer.set_tasks(torch.tensor([0, 1, 1]), 2)
    layer(gaussian(3, 3, 2, 2))
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.penalty() is None
        assert clone(gaussian(5, 3, 2, 2)).shape == (5, 3, 2, 2)
        assert clone.eta == modified_momentum(2, 0.1, 0.4)


def test_mistakes_are_refused_in_words() -> None:
    layer = layer_of(3)
    with pytest.raises(ConfigError, match=r"num_tasks is 4, and the stream is at its task number 5"):
        layer.set_tasks(torch.zeros(3, dtype=torch.long), 5)
    layer.set_tasks(torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(DataError, match=r"tasks of 3 samples and then a batch of 4"):
        layer(gaussian(4, 3, 2, 2))
    with pytest.raises(DataError, match=r"more than one value per channel; got shape \(1, 3, 1, 1\)"):
        layer(gaussian(1, 3, 1, 1))
    with pytest.raises(DataError, match=r"expects an input \(N, 3, ...\); got shape \(2, 4, 1, 1\)"):
        layer.eval()(gaussian(2, 4, 1, 1))
    with pytest.raises(ConfigError, match="0 to 3 spatial axes; got 4"):
        make_norm("adab2n").layer(3, 4)


def test_layers_of_one_batch_share_its_weights_and_no_other_batch_gets_them() -> None:
    """What is kept for the next layer must not outlive a change of the tasks, of their number or of the type."""
    first, second = layer_of(3), layer_of(3)
    x = gaussian(4, 3, 2, 2)
    tasks = torch.tensor([0, 1, 1, 1])

    def require_formula(layer: AdaB2NLayer, tasks: Tensor, seen: int) -> None:
        layer.set_tasks(tasks, seen)
        expected, _ = formula(layer, x.to(layer.weight.dtype), tasks, seen, 0.1)
        torch.testing.assert_close(layer(x.to(layer.weight.dtype)), expected)

    require_formula(first, tasks, 2)
    require_formula(second, tasks, 2)
    require_formula(second, tasks, 3)
    require_formula(second, torch.tensor([1, 1, 0, 1]), 3)
    require_formula(second, tasks, 3)
    tasks[0] = 2
    require_formula(second, tasks, 3)
    require_formula(first.float(), tasks, 3)


# Compiled -------------------------------------------------------------------------------------------------------------

Told = list[tuple[Tensor | None, int]]
GROWING: Told = [(torch.tensor(each), seen) for each, seen in (([0, 0, 0, 0], 1), ([0, 1, 1, 0], 2), ([2, 1, 2, 2], 4))]


def trained(layer: AdaB2NLayer, call: Any, told: Told, positions: tuple[int, ...]) -> list[Tensor]:
    """Train on a few batches; return outputs, gradients and, at the end, the layer's tensors."""
    seen = []
    for number, (tasks, count) in enumerate(told):
        layer.set_tasks(tasks, count)
        x = gaussian(4, 3, *positions, seed=number).requires_grad_()
        y = call(x)
        loss = (y * gaussian(*y.shape, seed=9)).sum()
        penalty = layer.penalty()
        if penalty is not None:
            loss = loss + 10 * penalty
        learned = [x, *layer.parameters()]
        gradients = torch.autograd.grad(loss, learned)
        with torch.no_grad():
            for parameter, gradient in zip(learned[1:], gradients[1:], strict=True):
                parameter -= 0.05 * gradient
        seen += [y.detach(), *gradients]
    return seen + [tensor.double() for tensor in layer.state_dict().values()]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own
@pytest.mark.few(3)
@pytest.mark.parametrize("options", [{}, {"kappa": 0.0}, {"corrected": True}, {"ada_t0": 2}, {"lambd": 0.0}], ids=str)
@pytest.mark.parametrize("positions", [(2, 3), (), (5,)], ids=["maps", "features", "tokens"])
def test_a_compiled_layer_learns_the_same(options: dict[str, Any], positions: tuple[int, ...]) -> None:
    """Gradients through the penalty, which needs the running moments as they were when it was made, among them."""
    layer, other = layer_of(3, len(positions), **options), layer_of(3, len(positions), **options)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours, plain = trained(layer, compiled, GROWING, positions), trained(other, other, GROWING, positions)
    for one, right in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("positions", [(2, 3), ()], ids=["maps", "features"])
def test_a_layer_compiled_to_machine_code_learns_the_same(positions: tuple[int, ...]) -> None:
    """Only here is anything computed again in the backward pass, from buffers that may have changed."""
    require_compiler()
    torch._dynamo.reset()
    layer, other = layer_of(3, len(positions)), layer_of(3, len(positions))
    ours = trained(layer, torch.compile(layer, fullgraph=True), GROWING, positions)
    for one, right in zip(ours, trained(other, other, GROWING, positions), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_layer_without_tasks_is_told_so_and_learns_the_same() -> None:
    layer, other = layer_of(3), layer_of(3)
    untold: Told = [(None, 1)] * 3
    torch._dynamo.reset()
    ours = trained(layer, torch.compile(layer, backend="aot_eager"), untold, (2, 3))
    for one, right in zip(ours, trained(other, other, untold, (2, 3)), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_no_number_of_tasks_is_compiled_anew() -> None:
    layer, compilations = layer_of(3, num_tasks=20), 0

    def counted(graph: Any, _: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counted)
    for seen in range(1, 21):
        layer.set_tasks(torch.tensor([0, seen - 1, seen - 1, 0]), seen)
        compiled(gaussian(4, 3, 2, 2))
        assert layer.penalty() is not None
    assert compilations == 1


def test_a_compiled_layer_refuses_other_tasks_in_words() -> None:
    layer = layer_of(3)
    layer.set_tasks(torch.zeros(3, dtype=torch.long), 2)
    torch._dynamo.reset()
    with pytest.raises(DataError, match=r"tasks of 3 samples and then a batch of 4"):
        torch.compile(layer, backend="eager")(gaussian(4, 3, 2, 2))
