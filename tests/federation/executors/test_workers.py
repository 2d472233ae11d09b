"""Clients that are taken side by side compute what they compute one after the other, whatever becomes of a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from fednorm.config import resolve
from fednorm.errors import IncompleteError
from fednorm.federation.executors import Answer, Executor, Failure, Job
from fednorm.federation.executors.process import Done
from fednorm.federation.executors.sequential import Sequential, answer
from fednorm.federation.executors.workers import Workers, _Turns
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.simulate import simulate
from fednorm.federation.wire import pack, unpack
from fednorm.federation.workbench import Workbench
from fednorm.signals import raising

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")

METHODS: Mapping[str, dict[str, Any]] = {
    "fedavg": {},
    "fedbn": {"strategy": {"name": "fedbn"}},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "ditto": {"strategy": {"name": "ditto"}},
    "hbn": {"strategy": {"name": "hbn"}},
    "momentum": {"train": {"momentum": 0.9, "reset_optimizer": False}, "strategy": {"name": "fedbn"}},
}
"""Strategies whose clients keep something of each kind: nothing, tensors of the plan, tensors of their own, momenta."""


class Run:
    """What came of a run: the server's tensors, every client's state, and the result."""

    def __init__(self, bench: Workbench, executor: Executor) -> None:
        self.grids: list[InProcessGrid] = []
        self.tensors: dict[str, Tensor] = {}
        with pytest.MonkeyPatch.context() as patch:
            made, start = InProcessGrid.__init__, type(bench.strategy).start

            def remember(grid: InProcessGrid, *args: Any, **kwargs: Any) -> None:
                made(grid, *args, **kwargs)
                self.grids.append(grid)

            def started(*args: Any, **kwargs: Any) -> Any:
                result = start(*args, **kwargs)
                self.tensors = unpack(result.arrays)
                return result

            patch.setattr(InProcessGrid, "__init__", remember)
            patch.setattr(type(bench.strategy), "start", started)
            self.result = simulate(bench.config, runs=None, bench=bench, executor=lambda _: executor)
        self.states = {
            f"{context.node_id}/{name}/{key}": tensor
            for context in self.grids[0].contexts.values()
            for name, record in context.state.array_records.items()
            for key, tensor in unpack(record).items()
        }

    def require_like(self, other: Run) -> None:
        for ours, theirs in ((self.tensors, other.tensors), (self.states, other.states)):
            assert ours.keys() == theirs.keys()
            assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        mine, its = ({**run.result, "seconds": 0, "rounds": _untimed(run.result)} for run in (self, other))
        assert mine == its


def _untimed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in result["rounds"]]


@pytest.fixture
def make_bench(make_site: Callable[..., Any]) -> Callable[..., Workbench]:
    def make(rounds: int = 2, **sections: Any) -> Workbench:
        options = dict(sections.pop("strategy", {"name": "fedavg"}))
        site = make_site(options.pop("name"), rounds={"num_rounds": rounds}, options=options, **sections)
        bench: Workbench = site.bench
        return bench

    return make


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def dying(bench: Workbench, client: int, kind: str, flag: Path | None, job: Job) -> Answer:
    """Carry out a job; a client's worker is killed in the middle of it, once (until the flag is there) or always."""
    if job.client == client and job.kind == kind and (flag is None or not flag.exists()):
        answer(bench, job)  # what is done is lost
        if flag is not None:
            flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(bench, job)


# The same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_workers_compute_the_same_bits(make_bench: Callable[..., Workbench], method: str, count: int) -> None:
    before = children()
    kinds = {"evaluate": {"kinds": ["own", "reestimated"]}}
    reference = make_bench(**METHODS[method], **kinds)
    bench = make_bench(**METHODS[method], **kinds)
    Run(bench, Workers(bench, count)).require_like(Run(reference, Sequential(reference)))
    assert children() == before


def test_a_worker_that_is_killed_once_changes_nothing(make_bench: Callable[..., Workbench], tmp_path: Path) -> None:
    bench, reference = (make_bench(strategy={"name": "fedbn"}) for _ in range(2))
    carry = partial(dying, bench, 1, "train", flag := tmp_path / "died")
    Run(bench, Workers(bench, 2, carry)).require_like(Run(reference, Sequential(reference)))
    assert flag.exists()


def test_a_client_whose_workers_always_die_is_rejected_and_the_round_goes_on(
    make_bench: Callable[..., Workbench],
) -> None:
    bench = make_bench(strategy={"name": "fedbn"})
    run = Run(bench, Workers(bench, 2, partial(dying, bench, 1, "train", None)))
    reasons = [rejection for line in run.result["rounds"] for rejection in line["rejected"]]
    assert [rejection["client"] for rejection in reasons] == [1, 1]
    assert all("was killed, as a system does that has no memory left" in r["reason"] for r in reasons)
    assert {key.split("/")[0] for key in run.states} == {"2", "4"}  # clients 0 and 2 keep theirs


def test_where_no_worker_lives_the_round_has_no_usable_update(make_bench: Callable[..., Workbench]) -> None:
    bench, before = make_bench(), children()

    def die(_: Job) -> Answer:
        os._exit(3)

    with pytest.raises(IncompleteError, match="ended with exit code 3, 2 times"):
        Run(bench, Workers(bench, 2, die))
    assert children() == before


def test_a_client_that_raises_is_a_failure_with_the_same_words(make_bench: Callable[..., Workbench]) -> None:
    bench = make_bench()
    job = [Job("train", pid, RecordDict(), context(pid)) for pid in range(3)]
    workers = Workers(bench, 2)
    told = list(workers.run(job))
    workers.close()
    assert told == list(Sequential(bench).run(job))
    assert all(isinstance(failure, Failure) and "KeyError" in failure.reason for failure in told)


# What is asked and what is kept -------------------------------------------------------------------------------------


def context(pid: int) -> Context:
    config: dict[str, str | int | float | bool] = {"partition-id": pid}
    return Context(run_id=1, node_id=pid + 2, node_config=config, state=RecordDict(), run_config={})


def test_who_stops_asking_leaves_the_other_clients_as_they_were(make_site: Callable[..., Any]) -> None:
    site, before = make_site("fedbn", rounds={"num_rounds": 2}), children()
    workers = Workers(site.bench, 2)
    grid = InProcessGrid(workers, 3, {})
    content = RecordDict({"arrays": site.strategy.initial_arrays(site.bench.model)})
    content["config"] = ConfigRecord({"server-round": 1})
    messages = [Message(content, dst_node_id=pid + 2, message_type="train") for pid in range(3)]
    replies = grid.send_and_receive(messages)
    assert next(iter(replies)).metadata.src_node_id == 2
    replies.close()  # type: ignore[attr-defined]
    assert [bool(c.state) for c in grid.contexts.values()] == [True, False, False]
    assert len(list(grid.send_and_receive(messages[1:]))) == 2
    assert all(c.state for c in grid.contexts.values())
    workers.close()
    assert children() == before


def test_a_signal_at_the_fork_of_a_worker_is_not_lost(
    make_bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own callbacks at a fork (logging's locks) swallow what is raised in them."""
    fork = os.fork

    def forked() -> int:
        pid = fork()
        if pid:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", forked)
    bench = make_bench()
    workers, before = Workers(bench, 2), children()
    with raising(), pytest.raises(KeyboardInterrupt):
        Run(bench, workers)
    workers.close()
    assert children() == before


def test_each_client_may_be_sent_something_else(make_site: Callable[..., Any]) -> None:
    site = make_site("fedbn", rounds={"num_rounds": 2})

    initial = unpack(site.strategy.initial_arrays(site.bench.model))

    def content(scale: float) -> RecordDict:
        tensors = {key: tensor * scale for key, tensor in initial.items()}
        return RecordDict({"arrays": pack(tensors), "config": ConfigRecord({"server-round": 1})})

    told = []
    for make in (Sequential, lambda bench: Workers(bench, 2)):
        executor = make(site.bench)
        answers = list(executor.run([Job("train", pid, content(1 + pid), context(pid)) for pid in range(3)]))
        executor.close()
        told.append([unpack(one.array_records["arrays"]) for one in answers])  # type: ignore[union-attr]
    for ours, theirs in zip(*told, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# The order ----------------------------------------------------------------------------------------------------------


def turns(lengths: list[int], window: int) -> _Turns:
    return _Turns([Job("train", n, RecordDict(), context(n)) for n in range(len(lengths))], lengths, window)


def test_the_longest_goes_first_and_none_too_far_ahead() -> None:
    queue = turns([1, 5, 3, 9, 9], window=3)
    assert [queue.pop() for _ in range(queue.waiting)] == [1, 2, 0]
    queue.came(1, Done(Failure("b"), {}, ()))
    assert (queue.ready, queue.waiting) == (False, 0)
    queue.came(0, Done(Failure("a"), {}, ()))
    assert [queue.next()[1].answer for _ in range(2)] == [Failure("a"), Failure("b")]
    assert [queue.pop() for _ in range(queue.waiting)] == [3, 4]  # of two alike the first


def test_a_dead_worker_s_jobs_go_first_and_the_one_it_was_at_only_twice() -> None:
    queue = turns([1, 1, 1, 1], window=4)
    first, second = queue.pop(), queue.pop()
    queue.take_back([first, second], -signal.SIGKILL)
    assert [queue.pop(), queue.pop()] == [first, second]
    queue.take_back([first, second], -signal.SIGSEGV)
    assert queue.ready
    failure = queue.next()[1].answer
    assert failure == Failure(
        "the process that this client was trained or evaluated in was ended by signal SIGSEGV, 2 times"
    )
    assert [queue.pop() for _ in range(queue.waiting)] == [second, 2, 3]


def test_a_grid_of_an_executor_puts_answers_into_flower_s_messages() -> None:
    class Echo:
        def run(self, jobs: Any) -> Any:
            for job in jobs:
                yield Failure("no") if job.client else RecordDict()

        def close(self) -> None: ...

    grid = InProcessGrid(Echo(), 2, {})
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    first, second = grid.send_and_receive(messages)
    assert first.has_content()
    assert first.metadata.src_node_id == 2
    assert (second.error.reason, second.metadata.src_node_id) == ("no", 3)
    assert [reply.has_error() for reply in grid.pull_messages(grid.push_messages(messages))] == [False, True]


def test_configurations_with_workers_have_the_hash_of_those_without() -> None:
    assert resolve({"workers": 2}).hash == resolve({}).hash
    assert resolve({"workers": 2}).to_dict() == resolve({}).to_dict()


PRETENDED = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fednorm.federation.executors.process import forks_train

if sys.argv[1] == "first":
    torch.ones(1, requires_grad=True).sum().backward()
with FakeTensorMode():
    torch.ones(1)
torch.ones(1, requires_grad=True).sum().backward()
print(forks_train())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("order", "can"), [("first", "True"), ("later", "False")])
def test_whether_forks_can_compute_gradients_is_tried(order: str, can: str) -> None:
    """torch.export and torch.compile pretend that there is a GPU; PyTorch starts threads for it at its first pass."""
    said = subprocess.run([sys.executable, "-c", PRETENDED, order], capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == can


def test_where_forks_cannot_compute_gradients_clients_take_their_turns_here(
    make_bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch, logged: Any
) -> None:
    bench, reference = (make_bench(strategy={"name": "fedbn"}) for _ in range(2))
    monkeypatch.setattr("fednorm.federation.executors.workers.forks_train", lambda: False)
    monkeypatch.setattr("fednorm.federation.executors.workers.Process", lambda *_: pytest.fail("it forked"))
    Run(bench, Workers(bench, 2)).require_like(Run(reference, Sequential(reference)))
    assert ["clients take their turns in this one" in message for message in logged.messages].count(True) == 1


def test_a_client_that_fails_while_the_run_is_stopped_stops_it(
    make_bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def carry_out(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("what is put in order fails")

    bench = make_bench()
    monkeypatch.setattr("fednorm.federation.executors.sequential.carry_out", carry_out)
    with pytest.raises(KeyboardInterrupt):
        Run(bench, Sequential(bench))
