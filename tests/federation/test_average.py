"""Averages that are finite by definition, computed again exactly with fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.federation.aggregation import Average, weighted_mean
from fednorm.federation.flat import flattened
from fednorm.federation.wire import pack, unpack
from strategies.fedadam import FedAdam
from strategies.fedavg import FedAvg

LAST = 2**53
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def average(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """Return the average of one shared tensor, the others of the plan left at what they are."""
    model = nn.Linear(tensors[0].numel(), 1, bias=False).to(tensors[0].dtype)
    mean = Average(FedAvg(model).plan)
    for tensor, weight in zip(tensors, weights, strict=True):
        mean.add({"weight": tensor.reshape(1, -1)}, weight)
    return mean.result()["weight"].flatten()


def exact(tensors: list[Tensor], weights: list[float]) -> list[Fraction]:
    total = sum(map(Fraction, weights))
    rows = [[Fraction(value) for value in tensor.double().tolist()] for tensor in tensors]
    return [
        sum((Fraction(n) * v for n, v in zip(weights, values, strict=True)), Fraction()) / total
        for values in zip(*rows, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_average_of_finite_values_is_finite_and_right(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    info = torch.finfo(dtype)
    count = data.draw(st.integers(1, 5))
    weights: list[float] = [data.draw(st.integers(1, 2000) | st.integers(LAST - 9, LAST)) for _ in range(count)]
    sizes = st.floats(-1, 1).map(lambda x: x * info.max) | st.floats(-4, 4)
    tensors = [torch.tensor([data.draw(sizes) for _ in range(3)], dtype=torch.float64).to(dtype) for _ in weights]
    result = average(tensors, weights)
    assert result.dtype == dtype
    assert bool(result.isfinite().all())
    largest = [max(abs(float(t[i])) for t in tensors) for i in range(3)]
    for got, want, scale in zip(result.double().tolist(), exact(tensors, weights), largest, strict=True):
        assert abs(Fraction(got) - want) <= Fraction(4 * count * info.eps * scale) + Fraction(info.smallest_normal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("examples", [600, 60_000, 2**40])
def test_equal_half_precision_clients_are_a_fixed_point_to_the_last_bit(dtype: torch.dtype, examples: int) -> None:
    tensor = (torch.randn(50, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    assert torch.equal(average([tensor] * 7, [float(examples)] * 7), tensor)


def test_half_precision_averages_are_rounded_once() -> None:
    ones = [torch.tensor([x], dtype=torch.float16) for x in (1.0, 1.0, 1.0 + 2**-10)]
    # sum_k n_k w_k / n in float64, then rounded: summed in float16, 2048 + 1 would be 2048
    assert average(ones, [1000, 1047, 2]).item() == 1.0
    assert average(ones, [1, 1, 2046]).item() == 1.0 + 2**-10


def test_the_largest_number_of_each_type_is_its_own_average() -> None:
    for dtype in DTYPES:
        most = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(average([most] * 3, [LAST, 3, LAST - 1]), most)
        assert average([most, -most], [4, 4]).tolist() == [0, 0]


def test_float32_averages_keep_their_bits() -> None:
    """Sums in float32 in the clients' order, as they have always been made."""
    draw = torch.Generator().manual_seed(3)
    tensors = [torch.randn(100, generator=draw) for _ in range(4)]
    weights = [743, 12, 99, 5]
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    assert torch.equal(average(tensors, weights), total.div_(sum(weights)))


def test_one_tensor_of_absurd_values_leaves_the_others_bits_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    plan, draw = FedAvg(model).plan, torch.Generator().manual_seed(3)
    clients = [{k: torch.randn(plan.by_key[k].shape, generator=draw) for k in plan.sent} for _ in range(3)]
    absurd = [dict(client) for client in clients]
    absurd[1]["0.weight"] = torch.full((2, 3), 3e38)
    results = []
    for states in (clients, absurd):
        mean = Average(plan)
        for state in states:
            mean.add(state, 700)
        results.append(mean.result())
    assert bool(results[1]["0.weight"].isfinite().all())
    assert results[1]["0.weight"][0, 0].item() == pytest.approx(1e38, rel=1e-6)
    for key in set(plan.sent) - {"0.weight"}:
        assert torch.equal(results[0][key], results[1][key])


def test_metrics_overflow_as_little() -> None:
    assert weighted_mean([1.0, 4.0], [1, 3]) == 3.25
    assert weighted_mean([1e308, 1e308], [700, 700]) == 1e308
    assert weighted_mean([1e308, -1e308], [LAST, LAST]) == 0
    assert weighted_mean([1.0], [0]) != weighted_mean([1.0], [0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_server_optimizer_steps_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1, bias=False).to(dtype)
    strategy = FedAdam(model, server_learning_rate=0.5, beta_1=0.0, beta_2=0.0, tau=1e-3)
    assert strategy.state_dict()["second/weight"].item() == pytest.approx(1e-6, rel=1e-6)  # float16 has it to 2 %
    for delta in (2.0, 300.0):  # the square of 300 is beyond float16
        old = {"weight": torch.zeros(1, 1, dtype=dtype)}
        new = strategy.server_update(old, {"weight": torch.full((1, 1), delta, dtype=dtype)})
        assert new["weight"].dtype == dtype
        assert new["weight"].item() == pytest.approx(0.5 * delta / (delta + 1e-3), rel=1e-2)


def test_a_bfloat16_model_travels_and_comes_back() -> None:
    tensor = torch.tensor([1.5, -2.25, 3e38], dtype=torch.bfloat16)
    array = pack({"w": tensor})["w"]
    flowers = type(array).__mro__[1](array.dtype, tuple(array.shape), array.stype, array.data)
    assert torch.equal(unpack({"w": flowers})["w"], tensor)  # type: ignore[arg-type]
    assert array.numpy().dtype == "float32"


class Pieces(nn.Module):
    """Tensors of several kinds, layouts and sizes, one of them without values to average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(7, 4)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=5),
    large=st.booleans(),
    without=st.integers(-1, 4),
)
def test_a_small_model_summed_as_one_vector_has_the_same_bits(
    seed: int, weights: list[float], large: bool, without: int
) -> None:
    """Also where one client's vector is missing, and where the sums leave float32's range on the way."""
    model, draw = Pieces(), torch.Generator().manual_seed(seed)
    plan = FedAvg(model).plan
    apart, together = Average(plan), Average(plan)
    for number, weight in enumerate(weights):
        tensors = {}
        for key, tensor in model.state_dict().items():
            if key in plan.sent:
                made = torch.empty_like(tensor)
                value = torch.randn(tensor.shape, generator=draw).abs().add(0.1)
                tensors[key] = (
                    made.copy_(value * (1e32 if large else 1.0)) if made.is_floating_point() else made.zero_()
                )
        flat = None if number == without else flattened(tensors)
        assert flat is None or flat.numel() == sum(t.numel() for t in tensors.values() if t.is_floating_point())
        apart.add(tensors, weight)
        together.add(tensors, weight, flat)
    one, other = apart.result(), together.result()
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert tensor.stride() == other[key].stride()
        if large:  # sums that leave float32's range do so at another client
            torch.testing.assert_close(tensor, other[key], rtol=1e-6, atol=0)
        else:
            assert torch.equal(tensor, other[key])
