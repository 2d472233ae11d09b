"""Messages within one process are Flower's to whoever looks at them; and what is read of stacks and states of many."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict

from fednorm.federation.contexts import BEFORE_RECORD, FIRST, LOCAL_RECORD, SMALL, Contexts
from fednorm.federation.flower_private import ensure_task_identity
from fednorm.federation.messages import Answered, Asked, asked_of, sender_of
from fednorm.federation.stack import Stack, StackRow, of_each, some_of
from fednorm.federation.wire import pack, unpack


@pytest.fixture
def asked() -> Asked:
    ensure_task_identity(run_id=1, node_id=1, task_id=1)
    return Asked(RecordDict({"metrics": MetricRecord({"a": 1.5})}), 7, "query.describe")


def test_what_is_asked_and_answered_is_a_message_of_flower_s(asked: Asked) -> None:
    answered, failed = Answered(asked.content, 7, asked), Answered(Error(1, "it fell over"), 7, asked)
    whole = Message(asked.content, dst_node_id=7, message_type="query.describe")
    for ours, flower in ((asked, whole), (answered, Message(asked.content, reply_to=whole))):
        assert isinstance(ours, Message)
        assert ours.has_content()
        assert not ours.has_error()
        for name in ("run_id", "src_node_id", "dst_node_id", "message_type", "reply_to_message_id", "group_id"):
            assert getattr(ours.metadata, name) == getattr(flower.metadata, name), name
        with pytest.raises(ValueError, match="no error"):
            _ = ours.error
    assert failed.has_error()
    assert failed.error.reason == "it fell over"
    with pytest.raises(ValueError, match="in place of a content"):
        _ = failed.content
    assert asked_of(asked) == asked_of(whole) == (7, "query.describe")
    assert sender_of(answered) == sender_of(Message(asked.content, reply_to=whole)) == 7


def test_flower_serializes_what_is_asked(asked: Asked) -> None:
    again = Message.inflate(asked.deflate(), {asked.content.object_id: asked.content})
    assert type(again) is Message
    assert again.content == asked.content
    assert again.metadata.dst_node_id == 7


def test_tensors_of_several_clients_are_looked_up_together_in_their_order() -> None:
    one, two = (Stack({"a": torch.randn(3, 2), "b": torch.randn(3)}, 3) for _ in range(2))
    clients = [StackRow(one, 2), StackRow(one, 0), {"a": torch.ones(2)}, StackRow(two, 1), StackRow(one, 1)]
    assert torch.equal(of_each(clients, "a"), torch.stack([own["a"] for own in clients]))
    part = some_of(clients[0], ("b",))
    assert list(part) == ["b"]
    assert "a" not in part
    assert torch.equal(part["b"], one.tensors["b"][2])


def test_a_finite_way_proves_finite_values_and_another_is_looked_at() -> None:
    """Of the clients, one is NaN, and one so far away that single precision cannot hold its squares."""
    values = torch.zeros(4, 3)
    values[1, 2], values[2] = torch.nan, 3e38
    origin = {"w": torch.full((3,), 1.0)}
    stack = Stack({"w": values}, 4, origin)
    norms = stack.norms(dict(origin))
    assert norms[0] == norms[3] == pytest.approx(3**0.5)
    assert stack._finite().tolist() == [True, False, True, True]


def _context(contexts: Contexts, client: int) -> Context:
    return contexts[client + FIRST]


def test_states_of_many_clients_stay_in_memory_while_they_fit_and_last_beyond_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a record nothing is written before there is no room; a round's end forgets what was before it."""
    contexts = Contexts(SMALL + 100, {})
    for client in range(200):
        state = _context(contexts, client).state
        state[LOCAL_RECORD] = pack({"v": torch.full((2,), float(client))})
        state[BEFORE_RECORD] = ArrayRecord()
    contexts.end_round(1)
    assert not contexts.table.used
    monkeypatch.setattr("fednorm.federation.contexts.HELD", 0)
    contexts.end_round(2)
    assert contexts.table.used
    for client in range(200):
        state = _context(contexts, client).state
        assert list(state) == [LOCAL_RECORD]
        assert unpack(state.array_records[LOCAL_RECORD])["v"].tolist() == [client, client]
