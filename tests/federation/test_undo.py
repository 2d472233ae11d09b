"""A client whose update the server rejects, for a reason that it does not see, is as if the round had not been."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from torch import Tensor

from fednorm.cards import STRATEGIES
from fednorm.federation.contexts import BEFORE_RECORD
from fednorm.federation.undo import KEPT
from fednorm.federation.wire import pack, unpack

State = dict[str, dict[str, Tensor]]
KEEPING = ("scaffold", "bn_scaffold", "ditto", "fedper", "fedrep", "fedbn", "fedstein", "silobn", "hbn", "local")
MLP: dict[str, Any] = {"model": {"name": "mlp", "width": 8}, "norm": {"name": "batch_norm"}}
BAD, GOOD = 0, 1


def kept(site: Any, pid: int) -> State:
    """Return what a client keeps, copied."""
    records = site.grid.contexts[pid + 2].state.array_records
    return {name: {k: t.clone() for k, t in unpack(records[name]).items()} for name in KEPT if name in records}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(torch.equal(t, b[name][key]) for key, t in a[name].items())
        for name in a
    )


def spoil(grid: Any, how: Callable[[Message], Message | None], *, after: int) -> None:
    """Change a client's replies to training on their way, after so many of them."""
    send, seen = grid.send_and_receive, [0]

    def spoiled(messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        for message, reply in zip(messages, send(messages, timeout=timeout), strict=True):
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == BAD + 2:
                seen[0] += 1
                if seen[0] > after:
                    reply = how(reply)
            if reply is not None:
                yield reply

    grid.send_and_receive = spoiled


def nan(reply: Message) -> Message:
    tensors = unpack(reply.content["arrays"])
    key = next(iter(tensors))
    reply.content["arrays"] = pack({**tensors, key: torch.full_like(tensors[key], float("nan"))})
    return reply


def damaged(reply: Message) -> Message:
    reply.content["arrays"] = pack({})
    return reply


def failed(reply: Message) -> Message:
    return Message(Error(1, "the connection broke"), reply_to=reply)


def run(site: Any, rounds: int, first: int = 1, **options: Any) -> Any:
    arrays = site.strategy.initial_arrays(site.bench.model)
    return site.strategy.start(site.grid, arrays, num_rounds=rounds, first_round=first, **options)


@pytest.mark.parametrize("name", [name for name in KEEPING if name != "local"])
def test_a_rejected_client_keeps_nothing_of_its_first_round(name: str, make_site: Any) -> None:
    norm = {"norm": {"name": "hybrid_bn"}} if name == "hbn" else {}
    site = make_site(name, **MLP | norm)
    spoil(site.grid, nan, after=0)
    run(site, 1)
    assert [pid for pid, _ in site.strategy.report.rejected] == [BAD]
    assert kept(site, BAD) == {}
    assert kept(site, GOOD) != {}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("scaffold", nan),
        ("scaffold", damaged),
        ("scaffold", lambda _: None),
        ("ditto", nan),
        ("fedper", damaged),
        ("fedbn", lambda _: None),
        ("local", failed),
    ],
)
def test_a_rejected_client_goes_back_to_what_it_had(name: str, way: Any, make_site: Any) -> None:
    before, after = (make_site(name, **MLP) for _ in range(2))
    run(before, 1)
    spoil(after.grid, way, after=1)
    run(after, 2)
    assert same(kept(after, BAD), kept(before, BAD))
    assert not same(kept(after, GOOD), kept(before, GOOD))


def test_an_optimizer_goes_back_too(make_site: Any) -> None:
    train = {"reset_optimizer": False, "momentum": 0.9}
    before, after = (make_site("fedavg", **MLP, train=train) for _ in range(2))
    run(before, 1)
    spoil(after.grid, nan, after=1)
    run(after, 2)
    assert kept(before, BAD).keys() == {"fednorm.trainee"}
    assert same(kept(after, BAD), kept(before, BAD))


def test_a_client_that_is_too_far_away_keeps_its_control_variate(make_site: Any) -> None:
    """The limit is the server's; c_i stays, and so do c and the server's tensors, of which this client is no part."""
    site, limited = (make_site("scaffold", **MLP) for _ in range(2))
    run(site, 1)
    norms = site.strategy.norms
    limited.strategy.max_update_norm = 0.999 * max(norms.values())
    farthest = max(norms, key=norms.__getitem__)
    run(limited, 1)
    assert [pid for pid, _ in limited.strategy.report.rejected] == [farthest]
    assert kept(limited, farthest) == {}
    others = [pid for pid in range(3) if pid != farthest]
    assert all(same(kept(limited, pid), kept(site, pid)) for pid in others)
    # c is the sum of the dc_i that were used, over all three clients: those of the clients that kept theirs.
    dc = {pid: kept(limited, pid)["fednorm.state"] for pid in others}
    weights = {pid: len(limited.bench.federation.clients[pid].train) for pid in others}
    for key, c in limited.strategy.extra_to_send().items():
        mean = sum(weights[pid] * dc[pid][key] for pid in others) / sum(weights.values())
        torch.testing.assert_close(c, 2 / 3 * mean, rtol=1e-5, atol=1e-7)


def test_a_rejected_client_is_evaluated_as_it_was(make_site: Any) -> None:
    """Its own model of the round before, in the network that the others have made."""
    site, other = make_site("ditto", **MLP), make_site("ditto", **MLP)
    run(site, 1)
    before = kept(site, BAD)
    spoil(other.grid, nan, after=1)
    result = run(other, 2)
    other.grid.contexts[BAD + 2].state["fednorm.state"] = pack(before["fednorm.state"])
    scores = other.evaluate(BAD, result.arrays, **{"server-round": 2})
    (told,) = [r.metrics for r in other.strategy.report.evaluate if r.partition_id == BAD]
    assert scores["loss"] == told["loss"]


def test_what_was_before_is_forgotten_with_the_evaluation(make_site: Any) -> None:
    site = make_site("scaffold", **MLP)
    run(site, 2, evaluate_every=2)
    assert all(BEFORE_RECORD not in context.state for context in site.grid.contexts.values())
    site.train(BAD, 3)
    state = site.grid.contexts[BAD + 2].state
    assert BEFORE_RECORD in state
    last = kept(site, BAD)
    site.tell(BAD, "query.undo", **{"server-round": 2})  # of another round: nothing happens
    assert same(kept(site, BAD), last)
    site.tell(BAD, "query.undo", **{"server-round": 3})
    assert not same(kept(site, BAD), last)
    assert BEFORE_RECORD not in state


def test_clients_that_keep_nothing_have_nothing_to_go_back_to(make_site: Any) -> None:
    site = make_site("fedavg", **MLP)
    site.train(BAD, 1)
    assert list(site.grid.contexts[BAD + 2].state) == []


def test_every_strategy_with_client_state_is_here(make_site: Any) -> None:
    keeping = {"hbn"}  # whose norm is another
    for card in STRATEGIES:
        if not card.pooled and not card.needs_experiences and card.own_norm == "batch_norm":
            site = make_site(card.name, **MLP)
            site.train(GOOD, 1)
            keeping |= {card.name} if kept(site, GOOD) else set()
    assert keeping == set(KEEPING)
