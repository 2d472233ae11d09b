"""Tensors on Flower's wire: the bytes are Flower's own, and a client's local tensors are never among them."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from torch import Tensor

from fednorm.cards import STRATEGIES
from fednorm.federation.replies import EXTRA
from fednorm.federation.wire import MemoryArray, nbytes, pack, tensor_of, unpack
from fednorm.federation.workbench import STATE_RECORD

TENSORS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.randn(3, 4),
    "float64": lambda: torch.randn(5, dtype=torch.float64),
    "int64 scalar": lambda: torch.tensor(2**40),
    "uint8": lambda: torch.arange(6, dtype=torch.uint8).view(2, 3),
    "bool": lambda: torch.tensor([True, False]),
    "empty": lambda: torch.zeros(0, 3),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last, 1 x 1": lambda: torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "channels last, a column": lambda: torch.randn(1, 3, 1, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 4).T,
    "every second": lambda: torch.arange(10.0)[::2],
}
every_tensor = pytest.mark.parametrize("kind", TENSORS)


@every_tensor
def test_a_memory_array_is_what_flowers_array_would_be(kind: str) -> None:
    tensor = TENSORS[kind]()
    ours, flowers = MemoryArray(tensor), Array(tensor.numpy())
    assert isinstance(ours, Array)
    assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
    assert ours.data == flowers.data
    assert ours.object_id == flowers.object_id
    np.testing.assert_array_equal(ours.numpy(), flowers.numpy(), strict=True)


@every_tensor
def test_a_memory_array_pickles_to_flowers_array(kind: str) -> None:
    tensor = TENSORS[kind]()
    copy = pickle.loads(pickle.dumps(MemoryArray(tensor)))
    assert type(copy) is Array
    assert copy == Array(tensor.numpy())


@every_tensor
def test_a_memory_array_travels_as_flowers_array(kind: str) -> None:
    tensor = TENSORS[kind]()
    sent = MemoryArray(tensor)
    came = Array.inflate(sent.deflate(), sent.children)
    assert type(came) is Array
    assert torch.equal(tensor_of(came), tensor)
    assert tensor_of(came).dtype == tensor.dtype


def test_a_record_travels_with_its_names_in_order() -> None:
    tensors = {kind: make() for kind, make in TENSORS.items()}
    sent = pack(tensors)
    children = {array.object_id: Array.inflate(array.deflate(), array.children) for array in sent.values()}
    came = unpack(ArrayRecord.inflate(sent.deflate(), children))
    assert list(came) == list(tensors)
    assert all(torch.equal(came[kind], tensor) for kind, tensor in tensors.items())
    assert pickle.loads(pickle.dumps(sent)).object_id == sent.object_id


@every_tensor
def test_nothing_is_copied_in_this_process(kind: str) -> None:
    tensor = TENSORS[kind]()
    record = pack({"x": tensor})
    received = unpack(record)["x"]
    assert received.data_ptr() == tensor.data_ptr()
    assert received.stride() == tensor.stride()
    assert record["x"].numpy().__array_interface__["data"] == tensor.numpy().__array_interface__["data"]


def test_parameters_lose_their_graph_and_plain_arrays_may_be_written_to() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not unpack(pack({"w": parameter}))["w"].requires_grad
    plain = tensor_of(Array(np.ones(3)))
    plain.add_(1)
    assert plain.tolist() == [2, 2, 2]


def test_nbytes_counts_values_only() -> None:
    assert nbytes(pack({"a": torch.zeros(3, 4), "b": torch.tensor(1), "c": torch.zeros(0)}).values()) == 48 + 8
    assert nbytes([Array(np.zeros((2, 2)))]) == 32


# What travels in a round ------------------------------------------------------------------------------------------

SENTINEL = 1234.5677


def wire(thing: Any) -> bytes:
    """Return everything that Flower would send for a message: the object and all below it, each serialized."""
    return thing.deflate() + b"".join(map(wire, (thing.children or {}).values()))


def recorded(grid: Any, log: list[Message]) -> None:
    """Let a grid keep every message and reply that goes through it."""
    handle = grid._handle

    def handle_and_keep(message: Message) -> Message:
        log.append(message)
        log.append(handle(message))
        return log[-1]

    grid._handle = handle_and_keep


PLAIN = [card.name for card in STRATEGIES if not card.needs_experiences]
"""Strategies that a plain federation can have."""


def planted(keys: Iterable[str], site: Any) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        like = site.bench.model.state_dict()[key]
        yield key, torch.full_like(like, SENTINEL if like.is_floating_point() else 987654321987)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PLAIN)
def test_local_tensors_are_in_no_message(name: str, make_site: Any) -> None:
    site = make_site(name, train={"learning_rate": 1e-12})
    local = site.strategy.plan.local
    log: list[Message] = []
    recorded(site.grid, log)
    for pid in range(3) if local else ():
        site.keep(pid, dict(planted(local, site)))
    arrays = site.strategy.initial_arrays(site.bench.model)
    site.strategy.start(site.grid, arrays, num_rounds=2)
    trainers = 1 if STRATEGIES[name].pooled else 3
    again = ["query.measure"] * 3 if name == "hbn" else []
    once = ["query.measure"] * 3 if name == "fedrdn" else []  # means and stds of images
    assert [m.metadata.message_type for m in log[1::2]] == ["query.describe"] * 3 + once + (
        ["train"] * trainers + again + ["evaluate"] * 3
    ) * 2
    sent = b"".join(map(wire, log))
    secrets = [tensor.numpy().tobytes() for pid in range(3) for key in local for tensor in [site.kept(pid)[key]]]
    assert len(secrets) == 3 * len(local)
    assert not any(secret in sent for secret in secrets)
    assert struct.pack("<f", SENTINEL) not in sent
    assert struct.pack("<q", 987654321987) not in sent
    assert not any(key.encode() in sent for key in local)


def test_a_clients_named_state_is_in_no_message(make_site: Any) -> None:
    site = make_site("ditto", train={"learning_rate": 1e-12}, options={"lambd": 0.0})
    log: list[Message] = []
    recorded(site.grid, log)
    for context in site.grid.contexts.values():
        context.state[STATE_RECORD] = pack(dict(planted(site.bench.model.state_dict(), site)))
    site.strategy.start(site.grid, site.strategy.initial_arrays(site.bench.model), num_rounds=2)
    sent = b"".join(map(wire, log))
    assert struct.pack("<f", SENTINEL) not in sent
    assert struct.pack("<q", 987654321987) not in sent
    for context in site.grid.contexts.values():
        assert unpack(context.state[STATE_RECORD])["fc3.weight"].eq(SENTINEL).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["fedavg", "silobn"])
def test_the_search_does_find_what_is_sent(name: str, make_site: Any) -> None:
    site = make_site(name, train={"learning_rate": 1e-12})
    log: list[Message] = []
    recorded(site.grid, log)
    initial = unpack(site.strategy.initial_arrays(site.bench.model))
    initial["norm1.weight"] = torch.full_like(initial["norm1.weight"], SENTINEL)
    site.strategy.start(site.grid, pack(initial), num_rounds=1)
    train = [message for message in log if message.metadata.message_type == "train"]
    assert len(train) == 6
    assert all(struct.pack("<f", SENTINEL) in wire(message) for message in train)
    assert all(b"norm1.weight" in wire(message) for message in train)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PLAIN)
def test_a_round_is_as_long_as_its_shared_tensors_and_their_headers(name: str, make_site: Any) -> None:
    site = make_site(name)
    log: list[Message] = []
    recorded(site.grid, log)
    site.strategy.start(site.grid, site.strategy.initial_arrays(site.bench.model), num_rounds=1)
    plan, state = site.strategy.plan, site.bench.model.state_dict()
    size_of_locals = sum(state[key].nbytes for key in plan.local)
    assert not plan.local or size_of_locals > 300
    for message in (message for message in log if message.metadata.message_type == "train"):
        arrays = message.content.array_records["arrays"]
        reference = ArrayRecord({key: Array(arrays[key].numpy()) for key in plan.sent})
        beside = message.content.array_records.get(EXTRA)
        more = len(wire(ArrayRecord({k: Array(a.numpy()) for k, a in beside.items()}))) if beside else 0
        # identifiers, settings, metrics
        assert 0 < len(wire(message)) - len(wire(reference)) - more < 1000
        assert nbytes(arrays.values()) == plan.bytes_sent == sum(state[key].nbytes for key in plan.sent)
        assert len(wire(reference)) - plan.bytes_sent <= 700 * len(plan.sent) + 20
