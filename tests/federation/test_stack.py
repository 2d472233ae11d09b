"""Rows of one stack: their average, how far they have gone, and what they hold, against each client by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor, nn

from fednorm.federation.aggregation import Average
from fednorm.federation.flat import FlatCopy, FlatTensors, flattened
from fednorm.federation.messages import Answered, Asked
from fednorm.federation.plan import NormPlan, norm_plan
from fednorm.federation.replies import UnfitReply, Update, read_update
from fednorm.federation.stack import FEW, Gathered, Stack, StackRow
from fednorm.federation.update_norm import update_norm
from fednorm.federation.wire import FlatRecord, pack
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
    copy_all = FlatCopy.of(tensors)
    assert copy_all is not None
    copied, before = copy_all(), {key: tensor.clone() for key, tensor in tensors.items()}
    assert torch.equal(copied.flat, flattened(tensors))  # type: ignore[arg-type]
    for tensor in tensors.values():
        tensor.add_(1)
    again = copy_all()
    assert list(copied) == list(again) == list(tensors)
    assert all(torch.equal(copied[key], tensor) for key, tensor in before.items()), "they are copies"
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items()), "each time of what is there"
    assert all(copied[key].dtype is tensor.dtype for key, tensor in tensors.items())


def test_what_is_no_small_model_of_single_precision_is_not_copied_into_one() -> None:
    assert FlatCopy.of(network().state_dict()) is None, "float64 is among them"
    assert FlatCopy.of(nn.Linear(400, 400).state_dict()) is None, "it is no small model"
    assert FlatCopy.of({"count": torch.tensor(3)}) is None, "there is no float"


def one_vector(model: nn.Module) -> FlatTensors:
    copy_all = FlatCopy.of(model.state_dict())
    assert copy_all is not None
    return copy_all()


def read(arrays: ArrayRecord, plan: NormPlan) -> Update:
    """Return what a server reads of a client's reply with some arrays."""
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})})
    return read_update(Answered(content, 1, Asked(RecordDict(), 1, "train")), plan)


def test_a_vector_counts_as_long_as_the_tensors_are_its_parts() -> None:
    """Whoever puts another tensor into a record, or copies it, is believed what stands in it."""
    model = nn.Linear(3, 2)
    tensors, plan = one_vector(model), norm_plan(model, RoleRule())
    assert read(FlatRecord(tensors), plan).flat is tensors.flat
    changed = FlatRecord(tensors)
    changed["bias"] = Array(tensors["bias"].numpy() * 2)
    update = read(changed, plan)
    assert torch.equal(update.tensors["bias"], 2 * tensors["bias"])
    assert torch.equal(update.flat, torch.cat([tensors["weight"].flatten(), 2 * tensors["bias"]]))  # type: ignore[arg-type]
    copies = FlatRecord(tensors).copy(), copy.deepcopy(FlatRecord(tensors)), pickle.loads(pickle.dumps(changed))
    for record, expected in zip(copies, (tensors, tensors, update.tensors), strict=True):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in read(record, plan).tensors.items())
    assert type(pickle.loads(pickle.dumps(FlatRecord(tensors)))) is ArrayRecord
    del changed["bias"]
    with pytest.raises(UnfitReply, match="missing or extra: bias"):
        read(changed, plan)


def test_a_vector_is_read_as_single_tensors_are() -> None:
    """Of another form, not finite, or negative where none is: the same refusal, whichever way it comes."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    plan, values = norm_plan(model, RoleRule()), one_vector(model)
    assert read(FlatRecord(values), plan).nbytes == read(pack(dict(values)), plan).nbytes == plan.bytes_sent

    def refusals(tensors: FlatTensors) -> set[str]:
        reasons = set()
        for record in (FlatRecord(tensors), pack(dict(tensors))):
            with pytest.raises(UnfitReply) as refused:
                read(record, plan)
            reasons.add(refused.value.reason)
        return reasons

    assert refusals(one_vector(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))) == {
        "0.weight has shape (2, 4); expected (2, 3)"
    }
    for key, value, reason in (
        ("1.running_var", -1.0, "1.running_var has negative variances"),
        ("1.running_mean", float("nan"), "1.running_mean has NaN or infinite values"),
        ("0.weight", float("inf"), "0.weight has NaN or infinite values"),
    ):
        broken = one_vector(model)
        broken[key].view(-1)[-1] = value
        assert refusals(broken) == {reason}


def test_several_streams_at_once_are_those_by_name() -> None:
    found = torch_streams(3, ("client",), [4, 0, 11], ("round", 2, "batches"))
    expected = [torch_stream(3, "client", number, "round", 2, "batches") for number in (4, 0, 11)]
    assert [one.initial_seed() for one in found] == [one.initial_seed() for one in expected]
