"""What is laid into shared memory comes out on the other side of a fork, to the bit and to the stride."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from multiprocessing import Pipe

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from fednorm.federation.executors.arena import Arena, Named, Receiver, Sender
from fednorm.federation.wire import pack, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


def tensors(scale: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(scale)
    return {
        "weight": torch.randn(4 * scale, 3, 5, 5, generator=draw).to(memory_format=torch.channels_last),
        "wide": torch.randn(3, 2, dtype=torch.float64, generator=draw),
        "half": torch.randn(7, generator=draw).bfloat16(),
        "count": torch.tensor(3 + scale),
        "mask": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 5),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def records(scale: int = 1) -> list[Named]:
    numbers, words = MetricRecord({"loss": 0.1, "n": 3}), ConfigRecord({"mode": "own", "ok": True})
    return [("a/arrays", pack(tensors(scale))), ("b", numbers), ("c", words), ("d/empty", ArrayRecord())]


def require_same(came: Sequence[Named], sent: Sequence[Named]) -> None:
    assert [name for name, _ in came] == [name for name, _ in sent]
    for (_, ours), (_, theirs) in zip(came, sent, strict=True):
        assert type(ours) is type(theirs)
        if not isinstance(ours, ArrayRecord):
            assert dict(ours) == dict(theirs)
            continue
        mine, other = unpack(ours), unpack(theirs)
        assert list(mine) == list(other)
        for key, tensor in mine.items():
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (
                other[key].dtype,
                other[key].shape,
                other[key].stride(),
            )
            own, its = (t.reshape(-1).view(torch.uint8) if t.dim() else t for t in (tensor, other[key]))
            assert torch.equal(own, its), key


@pytest.mark.parametrize("copy", [True, False])
def test_records_come_out_as_they_went_in(copy: bool) -> None:
    arena = Arena()
    sender, receiver = Sender(arena), Receiver(arena)
    for scale in (1, 2, 1, 400, 1):  # layouts come again, and the arena grows
        about, came = receiver.receive(sender.send(records(scale), ("train", scale)), copy=copy)
        assert about == ("train", scale)
        require_same(came, records(scale))


def test_a_copy_outlives_the_next_parcel_and_a_view_does_not() -> None:
    arena = Arena()
    sender, receiver = Sender(arena), Receiver(arena)
    parcel = sender.send([("r", pack({"w": torch.ones(3)}))])
    copied, seen = (receiver.receive(parcel, copy=copy)[1][0][1] for copy in (True, False))
    sender.send([("r", pack({"w": torch.zeros(3)}))])
    assert unpack(copied)["w"].tolist() == [1, 1, 1]
    assert unpack(seen)["w"].tolist() == [0, 0, 0]


def test_a_tensor_with_gaps_is_made_dense_and_a_sparse_one_is_refused() -> None:
    arena = Arena()
    sender, receiver = Sender(arena), Receiver(arena)
    _, ((_, record),) = receiver.receive(sender.send([("r", pack({"w": torch.arange(6)[::2]}))]), copy=True)
    assert unpack(record)["w"].tolist() == [0, 2, 4]
    with pytest.raises(TypeError, match=r"laid out as torch\.sparse_coo"):
        sender.send([("r", pack({"w": torch.eye(2).to_sparse()}))])


def test_a_fork_sees_what_is_written_later_and_the_memory_has_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    there, back = Arena(), Arena()
    near, far = Pipe()
    if not (pid := os.fork()):
        try:
            about, came = Receiver(there).receive(far.recv(), copy=False)
            far.send(Sender(back).send(came, about))
        finally:
            os._exit(0)
    near.send(Sender(there).send(records(300), 7))
    parcel = near.recv()
    assert set(os.listdir("/dev/shm")) == before
    os.waitpid(pid, 0)
    about, came = Receiver(back).receive(parcel, copy=True)
    assert about == 7
    require_same(came, records(300))
