"""Rows of one stack: their average, how far they have gone, and what they hold, against each client by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from flwr.app import Array
from torch import Tensor, nn

from fednorm.federation.aggregation import Average
from fednorm.federation.flat import copied_flat, flattened
from fednorm.federation.plan import norm_plan
from fednorm.federation.stack import FEW, Gathered, Stack, StackRow
from fednorm.federation.update_norm import update_norm
from fednorm.federation.wire import pack_flat, tensor_of
from fednorm.rng import torch_stream, torch_streams
from fednorm.roles import RoleRule

K = 5


def network() -> nn.Module:
    """A network with a tensor that is large for a stack, small ones, counters, and one of float64."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(FEW // 2, 5), nn.Linear(5, 2))
    model[4].double()
    return model


def clients(*, largest: float = 1.0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return what all were sent, and what each makes of it."""
    draw = torch.Generator().manual_seed(5)
    sent = {key: tensor.clone() for key, tensor in network().state_dict().items()}
    made = [
        {k: t + largest * torch.randn(t.shape, generator=draw, dtype=t.dtype) if t.is_floating_point() else t + 1
         for k, t in sent.items()}
        for _ in range(K)
    ]  # fmt: skip
    for own in made:
        own["1.running_var"] = own["1.running_var"].abs()
    return sent, made


def stacked(made: list[dict[str, Tensor]]) -> Stack:
    return Stack({key: torch.stack([own[key] for own in made]) for key in made[0]}, len(made))


@pytest.mark.parametrize("chosen", [range(K), (0, 2, 3)])
def test_rows_are_averaged_as_clients_one_by_one(chosen: range | tuple[int, ...]) -> None:
    _, made = clients()
    stack, plan = stacked(made), norm_plan(network(), RoleRule())
    found, expected = Average(plan), {key: torch.zeros(t.shape, dtype=torch.float64) for key, t in made[0].items()}
    for number in chosen:
        found.add(StackRow(stack, number), weight := float(3 + number))
        for key, tensor in made[number].items():
            expected[key] += weight / sum(3 + k for k in chosen) * tensor.double()
    for key, tensor in found.result().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-6, atol=1e-6)
        assert tensor.dtype is made[0][key].dtype


def test_an_average_of_rows_that_leave_single_precision_is_finite() -> None:
    _, made = clients()
    most = torch.finfo(torch.float32).max
    for own in made:
        own["3.weight"].fill_(most)
    average, stack = Average(norm_plan(network(), RoleRule())), stacked(made)
    for number in range(K):
        average.add(StackRow(stack, number), 1000.0)
    assert torch.equal(average.result()["3.weight"], torch.full_like(made[0]["3.weight"], most))


@pytest.mark.parametrize("unknown", [(), ("0.bias", "1.running_mean"), ("3.weight",)])
def test_rows_have_gone_as_far_as_their_clients(unknown: tuple[str, ...]) -> None:
    """Also where some of what they send was not sent to them."""
    sent, made = clients()
    known = {key: tensor for key, tensor in sent.items() if key not in unknown}
    assert stacked(made).norms(known) == pytest.approx([update_norm(own, known) for own in made], rel=1e-6)


def test_gathered_tensors_are_those_of_each_in_order() -> None:
    _, made = clients()
    one, other = stacked(made[:3]), stacked(made[3:])
    rows = [StackRow(one, 2), StackRow(one, 0), made[1], StackRow(other, 1)]
    gathered = Gathered(rows)
    assert torch.equal(gathered.of_each("0.bias"), torch.stack([made[k]["0.bias"] for k in (2, 0, 1, 4)]))
    assert gathered.have("0.bias")
    assert not gathered.have("2.bias")
    assert not Gathered([*rows, {}]).have("0.bias")


# One client's, as one vector ------------------------------------------------------------------------------------------


def test_a_small_model_is_copied_into_one_vector() -> None:
    first = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    tensors = nn.Sequential(first, nn.BatchNorm2d(4)).state_dict()
    copies = copied_flat(tensors)
    assert copies is not None
    vector, parts = copies
    assert torch.equal(vector, flattened(tensors))  # type: ignore[arg-type]
    assert all(torch.equal(parts[key], tensor) for key, tensor in tensors.items())
    tensors["0.bias"].add_(1)
    assert not torch.equal(parts["0.bias"], tensors["0.bias"]), "they are copies"
    assert copied_flat(network().state_dict()) is None, "float64 is among them"
    assert copied_flat(nn.Linear(400, 400).state_dict()) is None, "it is no small model"


def test_a_vector_counts_as_long_as_the_tensors_are_its_parts() -> None:
    """Whoever puts another tensor into a record, or copies it, is believed what stands in it."""
    copies = copied_flat(nn.Linear(3, 2).state_dict())
    assert copies is not None
    vector, parts = copies
    record = pack_flat(vector, parts)
    held = {key: tensor_of(array) for key, array in record.items()}
    assert record.whole(held) is vector
    copied = record.copy()
    assert torch.equal(copied.whole(held), vector)  # type: ignore[arg-type]
    record["bias"] = Array(parts["bias"].numpy() * 2)
    changed = {key: tensor_of(array) for key, array in record.items()}
    assert torch.equal(record.whole(changed), torch.cat([parts["weight"].flatten(), 2 * parts["bias"]]))  # type: ignore[arg-type]
    again = copy.deepcopy(pack_flat(vector, parts))
    assert torch.equal(again.whole({key: tensor_of(array) for key, array in again.items()}), vector)  # type: ignore[arg-type]


def test_several_streams_at_once_are_those_by_name() -> None:
    found = torch_streams(3, ("client",), [4, 0, 11], ("round", 2, "batches"))
    expected = [torch_stream(3, "client", number, "round", 2, "batches") for number in (4, 0, 11)]
    assert [one.initial_seed() for one in found] == [one.initial_seed() for one in expected]
