"""Sites with data of their own on a grid whose nodes fail: what is refused, what goes on, what is kept, what travels.

The grid is a fake of Flower's: it answers through the functions that a SuperNode's process calls, once a reply is asked
for, and it can be told that a node is dead, silent, slow, or answers nonsense.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from PIL import Image
from safetensors.torch import load_file

import fednorm
from fednorm.config import resolve
from fednorm.errors import ConfigError, FedNormError, IncompleteError, RecordError
from fednorm.federation.client import carry_out
from fednorm.federation.deployment import grid as deployed_grid
from fednorm.federation.deployment import roster as rosters
from fednorm.federation.deployment import site as sites
from fednorm.federation.deployment.about import read_site
from fednorm.federation.deployment.grid import DeployedGrid
from fednorm.federation.deployment.server import serve_sites
from fednorm.federation.flower_private import ensure_task_identity
from fednorm.federation.replies import UnfitReply
from fednorm.federation.simulate import simulate
from fednorm.federation.wire import unpack
from fednorm.federation.workbench import LOCAL_RECORD, process_workbench
from fednorm.records.record import RunRecord

DOMAINS = ("photo", "scans", "street")
VALUES: dict[str, Any] = {
    "data": {"domains": list(DOMAINS), "train_per_client": 12, "test_per_domain": 8},
    "model": {"width": 4},
    "strategy": {"name": "fedbn"},
    "train": {"batch_size": 6},
    "rounds": {"num_rounds": 3, "wait": 0.0, "timeout": 5.0},
}
SUPERLINK = 1


class Node:
    """A node: its configuration, Flower's memory of it, and what is wrong with it."""

    def __init__(self, **config: Any) -> None:
        self.config = {key.replace("_", "-"): value for key, value in config.items()}
        self.state = RecordDict()
        self.fault: Callable[[Message], Any] | None = None


Hook = Callable[["FakeGrid", str, int], None]


class FakeGrid(Grid):
    """Nodes by their ids; ``hook`` is called before a node handles a message, with its type and the round."""

    def __init__(self, values: Mapping[str, Any], nodes: Mapping[int, Node], hook: Hook | None = None) -> None:
        ensure_task_identity(run_id=1, node_id=SUPERLINK, task_id=1)
        self.run_config = {"config": json.dumps(resolve(values).to_dict()), "runtime": "deployment"}
        self.nodes, self.hook = dict(nodes), hook
        self.dead: set[int] = set()
        self.waiting: dict[str, Message] = {}
        self.held: dict[str, Message] = {}
        self.wire: list[tuple[str, int, RecordDict, RecordDict | None]] = []
        self.round = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        raise NotImplementedError("the deployed grid pushes and pulls")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"m{len(self.waiting) + len(self.wire) + len(self.held)}-{message.metadata.dst_node_id}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for number in message_ids:
            if number in self.held:
                replies.append(self.held.pop(number))
            elif (message := self.waiting.pop(number, None)) is not None and (reply := self.handle(message)):
                replies.append(reply)
        return replies

    def handle(self, message: Message) -> Message | None:
        node_id, kind = message.metadata.dst_node_id, message.metadata.message_type
        config = message.content.config_records.get("config")
        if kind == "train" and config is not None:
            self.round = int(str(config["server-round"]))
        if self.hook:
            self.hook(self, kind, node_id)
        if node_id in self.dead or node_id not in self.nodes:
            return self.of_the_superlink(message)
        node = self.nodes[node_id]
        if node.fault and (answer := node.fault(message)) is not Ellipsis:
            self.wire.append((kind, node_id, message.content, None))
            return answer
        context = Context(
            run_id=7, node_id=node_id, node_config=node.config, state=node.state, run_config=self.run_config
        )
        try:
            content = carry_out(process_workbench(context), kind, message.content, context)
        except Exception as error:
            self.wire.append((kind, node_id, message.content, None))
            return Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
        self.wire.append((kind, node_id, message.content, content))
        return Message(content, reply_to=message)

    @staticmethod
    def of_the_superlink(message: Message) -> Message:
        reply = Message(Error(5, "Error: Node Unavailable"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = SUPERLINK
        return reply


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed_grid, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(rosters, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(rosters, "RIVAL_SECONDS", 0.05)
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)
    sites._workbench.cache_clear()
    cached = sites.lru_cache(maxsize=8)(sites._workbench.__wrapped__)
    monkeypatch.setattr(sites, "_workbench", cached)


def nodes(**more: Any) -> dict[int, Node]:
    return {10 + k: Node(domain=name, **more) for k, name in enumerate(reversed(DOMAINS))}


def serve(grid: FakeGrid, runs: Path | None = None) -> dict[str, Any]:
    context = Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=grid.run_config)
    return serve_sites(grid, context, lambda _, config: RunRecord(runs, config) if runs else None, None)


def values(seed: int = 1, **sections: Any) -> dict[str, Any]:
    return {**VALUES, "seed": seed} | {name: {**VALUES.get(name, {}), **table} for name, table in sections.items()}


def events(result: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    return [(line["round"], e["site"], e["event"]) for line in result["rounds"] for e in line.get("events", ())]


def rejected(result: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    return [(line["round"], r["client"], r["reason"]) for line in result["rounds"] for r in line["rejected"]]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("strategy", "data", "kinds"),
    [
        ("fedbn", {"normalize": "domain"}, ["own", "reestimated"]),
        ("scaffold", {}, ["own"]),
        ("ditto", {}, ["own"]),
        ("fedavg", {"held_out": "photo"}, ["own", "unseen"]),
    ],
)
def test_sites_of_their_own_end_with_the_bits_of_one_process(
    strategy: str, data: dict[str, Any], kinds: list[str], tmp_path: Path
) -> None:
    config = resolve(values(strategy={"name": strategy}, data=data, evaluate={"diagnostics": False, "kinds": kinds}))
    deployed = serve(FakeGrid(config.to_dict(), nodes()), tmp_path / "deployed")
    ours = simulate(config, runs=tmp_path / "ours")
    one, other = (load_file(Path(result["run"]) / "model.safetensors") for result in (ours, deployed))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert deployed["final"]["per_domain"] == ours["final"]["per_domain"]
    assert deployed["evaluation"] == ours["evaluation"]
    assert deployed["data"]["clients"] == ours["data"]["clients"]
    assert (deployed["hash"], events(deployed), rejected(deployed)) == (ours["hash"], [], [])


def test_the_server_scores_the_shared_model_on_images_of_its_own(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    for name in range(10):
        (tmp_path / f"central/{name}").mkdir(parents=True)
        Image.fromarray(draw.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(tmp_path / f"central/{name}/0.png")
    own = {"central": True, "central_dir": str(tmp_path / "central"), "diagnostics": False}
    config = values(strategy={"name": "fedavg"}, evaluate=own)
    result, ours = serve(FakeGrid(config, nodes())), simulate(resolve(config), runs=tmp_path / "ours")
    assert result["final"]["central"] == ours["final"]["central"]
    assert [line["central"] for line in result["rounds"]] == [line["central"] for line in ours["rounds"]]
    for changed, message in (
        ({"strategy": {"name": "fedbn"}}, "no whole model"),
        ({"evaluate": {**own, "central_dir": str(tmp_path / "none")}}, "is no folder on the server's machine"),
    ):
        grid = FakeGrid({**config, **changed}, nodes())
        with pytest.raises(FedNormError, match=message):
            serve(grid)
        assert not any(kind == "train" for kind, *_ in grid.wire)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeGrid, dict[str, Any]]:
    """A run in which nothing happens, and its grid."""
    grid = FakeGrid(values(), nodes())
    return grid, serve(grid, tmp_path_factory.mktemp("undisturbed"))


def test_no_image_no_label_and_no_local_tensor_travels(undisturbed: tuple[FakeGrid, dict[str, Any]]) -> None:
    grid, _ = undisturbed
    local = sites.site_workbench(Context(7, 10, grid.nodes[10].config, RecordDict(), grid.run_config)).plan.local
    assert local
    asked = {kind for kind, *_ in grid.wire}
    assert asked == {"query.describe", "train", "evaluate"}, "diagnostics ask for nothing that stays on a site"
    for kind, _, content, reply in grid.wire:
        for record in (content, reply or RecordDict()):
            keys = {key for arrays in record.array_records.values() for key in arrays}
            assert not keys & set(local), kind
            shapes = [array.shape for arrays in record.array_records.values() for array in arrays.values()]
            assert not any(len(shape) == 4 and shape[1:] == (3, 28, 28) for shape in shapes)
            lists = [v for r in record.metric_records.values() for v in r.values() if isinstance(v, list)]
            assert max(map(len, lists), default=0) <= 2


def test_a_killed_node_is_reported_and_comes_back_with_its_state(tmp_path: Path) -> None:
    def hook(grid: FakeGrid, kind: str, _: int) -> None:
        if kind == "train" and grid.round == 2:
            grid.dead.add(10)
        if kind == "train" and grid.round == 3:
            grid.dead.clear()

    config = values(rounds={"num_rounds": 4})
    grid = FakeGrid(config, nodes(), hook)
    result = serve(grid, tmp_path)
    assert [(r, c) for r, c, _ in rejected(result)] == [(2, 2), (2, 2)]
    assert all("Node Unavailable" in reason for *_, reason in rejected(result))
    trained = [
        len(json.loads(line)["clients"]["train"])
        for line in Path(result["run"], "rounds.jsonl").read_text().splitlines()
    ]
    assert trained == [3, 2, 3, 3]
    assert events(result) == []
    counter = next(key for key in unpack(grid.nodes[10].state.array_records[LOCAL_RECORD]) if "num_batches" in key)
    assert int(unpack(grid.nodes[10].state.array_records[LOCAL_RECORD])[counter]) == 3 * 2


@pytest.mark.parametrize("kept", [True, False], ids=["on its disk", "nowhere"])
def test_a_restarted_node_goes_on_or_says_that_its_state_is_lost(
    kept: bool, undisturbed: tuple[FakeGrid, dict[str, Any]], tmp_path: Path
) -> None:
    disk = {"state_dir": str(tmp_path / "state")} if kept else {}

    def hook(grid: FakeGrid, kind: str, node_id: int) -> None:
        if kind == "evaluate" and grid.round == 2 and 10 in grid.nodes and node_id == 12:
            del grid.nodes[10]
            grid.nodes[99] = Node(domain="street", **disk)

    grid = FakeGrid(values(rounds={"min_answered": 0.0}), nodes(**disk), hook)
    result = serve(grid)
    last = unpack(grid.nodes[99].state.array_records[LOCAL_RECORD])
    expected = unpack(undisturbed[0].nodes[10].state.array_records[LOCAL_RECORD])
    assert all(torch.equal(last[key], tensor) for key, tensor in expected.items()) is kept
    lost = [(3, "street", "it has lost what it kept in round 2, and began anew")]
    assert events(result) == [
        (3, "street", "its node has left"), (3, "street", "its node has come back"), *([] if kept else lost)
    ]  # fmt: skip


def test_a_node_that_dies_after_training_goes_back_to_what_the_server_used(tmp_path: Path) -> None:
    """It has trained in round 2 and kept it on its disk; its reply never came, so the round is not part of it."""

    def hook(grid: FakeGrid, kind: str, _: int) -> None:
        if kind == "query.undo":
            grid.nodes.pop(10, None)
            grid.nodes[99] = Node(domain="street", state_dir=str(tmp_path))

    grid = FakeGrid(values(rounds={"min_answered": 0.0, "timeout": 0.3}), nodes(state_dir=str(tmp_path)), hook)
    silent = FakeGrid(values(rounds={"min_answered": 0.0, "timeout": 0.3}), nodes())

    def train_and_die(message: Message) -> Any:
        node, kind = grid.nodes[10], message.metadata.message_type
        if kind != "train" or grid.round != 2:
            return ...
        context = Context(7, 10, node.config, node.state, grid.run_config)
        carry_out(process_workbench(context), kind, message.content, context)
        return None

    grid.nodes[10].fault = train_and_die
    silent.nodes[10].fault = lambda m: None if m.metadata.message_type == "train" and silent.round == 2 else ...
    result, other = serve(grid), serve(silent)
    kept = [unpack(g.nodes[n].state.array_records[LOCAL_RECORD]) for g, n in ((grid, 99), (silent, 10))]
    assert all(torch.equal(tensor, kept[1][key]) for key, tensor in kept[0].items())
    assert [event for *_, event in events(result)] == ["its node has left", "its node has come back"]
    assert any("no reply came within 0.3 s" in reason for *_, reason in rejected(other))


class Killed(BaseException):
    """What ends a server in a test."""


@pytest.mark.few(2)
@pytest.mark.parametrize("phase", ["train", "evaluate", "checkpoint"])
def test_a_server_that_is_killed_goes_on_to_the_same_bits(
    phase: str, undisturbed: tuple[FakeGrid, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes are started again too, under other ids; their tensors are on their disks.

    The line of a round may be there, and the checkpoint of it not.
    """
    save = RunRecord.save_checkpoint

    def saved(record: RunRecord, checkpoint: Any) -> None:
        if phase == "checkpoint" and checkpoint.ended == 2:
            raise Killed
        save(record, checkpoint)

    def hook(grid: FakeGrid, kind: str, node_id: int) -> None:
        if (kind, grid.round, node_id) == (phase, 2, 11):
            raise Killed

    disk = {"state_dir": str(tmp_path / "state")}
    with monkeypatch.context() as patched:
        patched.setattr(RunRecord, "save_checkpoint", saved)
        with pytest.raises(Killed):
            serve(FakeGrid(values(), nodes(**disk), hook), tmp_path / "runs")
    again = FakeGrid(values(), {node_id + 30: node for node_id, node in nodes(**disk).items()})
    result, expected = serve(again, tmp_path / "runs"), undisturbed[1]
    models = [load_file(Path(r["run"]) / "model.safetensors") for r in (result, expected)]
    assert all(torch.equal(tensor, models[1][key]) for key, tensor in models[0].items())
    assert result["final"]["per_domain"] == expected["final"]["per_domain"]
    assert [line["round"] for line in result["rounds"]] == [1, 2, 3]
    assert events(result) == []
    assert {kind for kind, *_ in again.wire} == {"query.describe", "train", "evaluate"}


def test_a_checkpoint_of_sites_is_not_one_of_this_process_s_clients_nor_the_other_way_round(tmp_path: Path) -> None:
    def hook(grid: FakeGrid, kind: str, _: int) -> None:
        if kind == "train" and grid.round == 2:
            raise Killed

    with pytest.raises(Killed):
        serve(FakeGrid(values(), nodes(), hook), tmp_path)
    with pytest.raises(RecordError, match="trained on other data"):
        simulate(resolve(values()), runs=tmp_path)

    class Ending:
        def begin(self, bench: Any, first_round: int) -> None: ...

        def round(self, _: Any) -> None:
            raise Killed

    with pytest.raises(Killed):
        simulate(resolve(values(seed=2)), runs=tmp_path, observer=Ending())
    with pytest.raises(RecordError, match="trained on other data"):
        serve(FakeGrid(values(seed=2), nodes()), tmp_path)


def test_a_late_reply_is_dropped_and_counted() -> None:
    grid = FakeGrid(values(rounds={"timeout": 0.2}), nodes())
    slow: list[Message] = []

    def fault(message: Message) -> Any:
        kind = message.metadata.message_type
        if kind == "train" and grid.round == 1:
            slow.append(message)
            return None
        if kind == "train" and grid.round == 2 and slow:
            late = slow.pop()
            content = RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": 1})})
            grid.held[late.metadata.message_id] = Message(content, reply_to=late)
        return ...

    grid.nodes[10].fault = fault
    result = serve(grid)
    assert [(r, c) for r, c, _ in rejected(result)] == [(1, 2)]
    assert events(result) == [(2, "street", "a reply of it came after its time, and was dropped")]


def test_a_silent_node_is_told_that_its_training_was_not_used_and_nobody_waits_for_it_to_hear() -> None:
    grid, asked = FakeGrid(values(), nodes()), list[tuple[str, int]]()
    grid.nodes[10].fault = lambda message: asked.append((message.metadata.message_type, 10))
    deployed = DeployedGrid(grid, timeout=0.02)
    (reply,) = deployed.send_and_receive([Message(RecordDict(), 10, "train")])
    assert "no reply came within 0.02 s" in reply.error.reason
    pull = grid.pull_messages
    grid.pull_messages = lambda _: pytest.fail("it waits")  # type: ignore[method-assign]
    (reply,) = deployed.send_and_receive([Message(RecordDict(), 10, "query.undo")], timeout=60)
    assert "told without waiting" in reply.error.reason
    grid.pull_messages = pull  # type: ignore[method-assign]
    told = RecordDict({"config": ConfigRecord({"server-round": 1})})
    (other,) = deployed.send_and_receive([Message(told, 11, "query.undo")])
    assert other.has_content(), "one that answers is heard"
    assert (asked, deployed.late) == ([("train", 10), ("query.undo", 10)], [])


class Clock:
    """A clock that goes on where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("wakes", [False, True], ids=["it stays so", "it answers late, in the evaluation"])
def test_a_node_that_is_silent_in_training_holds_up_its_round_once(
    wakes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds 2 and 3 of three; each is evaluated in two ways at the end, and the others answer at once."""
    clock, asked = Clock(), list[str]()
    monkeypatch.setattr(deployed_grid, "time", clock)
    monkeypatch.setattr(deployed_grid, "POLL_SECONDS", 1.0)
    kinds = {"kinds": ["own", "reestimated"], "diagnostics": False}
    grid = FakeGrid(values(rounds={"min_answered": 0.0, "timeout": 100.0}, evaluate=kinds), nodes())
    trains: list[Message] = []

    def fault(message: Message) -> Any:
        kind = message.metadata.message_type
        asked.append(f"{kind} {grid.round}")
        if kind == "train" and grid.round == 2:
            trains.append(message)
        if kind == "evaluate" and grid.round == 2 and wakes:
            late = trains.pop()
            grid.held[late.metadata.message_id] = Message(RecordDict(), reply_to=late)
            grid.waiting[message.metadata.message_id] = message
            grid.nodes[10].fault = None
            return None
        return None if grid.round >= 2 else ...

    grid.nodes[10].fault = fault
    result = serve(grid)
    if wakes:
        assert rejected(result) == [(2, 2, "no reply came within 100 s (rounds.timeout is 100 s)")]
        assert result["rounds"][1]["per_domain"].keys() == set(DOMAINS), "it is waited for, once it has answered"
        assert clock.now == 100 + 1
        return
    silent, spent = "no reply came within 100 s (rounds.timeout is 100 s)", f"evaluation failed: {deployed_grid.SPENT}"
    assert rejected(result) == [(2, 2, silent), (2, 2, spent), (3, 2, silent), (3, 2, spent)]
    every = [f"{kind} {number}" for number in (2, 3) for kind in ("train", "query.undo", "evaluate")]
    assert sorted(asked) == sorted(["query.describe 0", "train 1", "evaluate 1", *every, "evaluate 3"])
    assert clock.now == 2 * 100
    assert result["final"]["missing"] == {"clients": [2], "domains": ["street"]}


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_starts_with_its_fewest_and_later_sites_join_the_next_round(number: int) -> None:
    there, place = nodes(), 12 - number
    late = there.pop(place)

    def hook(grid: FakeGrid, kind: str, _: int) -> None:
        if kind == "train" and grid.round == 1:
            grid.nodes[place] = late

    result = serve(FakeGrid(values(rounds={"min_nodes": 2}), there, hook))
    assert [line["sampled"] for line in result["rounds"]] == [[0, 3 - number], [0, 1, 2], [0, 1, 2]]
    assert events(result) == [(2, DOMAINS[number], "it has joined")]
    assert [line.get("missing") for line in result["rounds"]] == [None] * 3
    assert [client["domain"] for client in result["data"]["clients"]] == list(DOMAINS)


def test_too_few_sites_are_told_by_name() -> None:
    there = nodes()
    del there[10]
    with pytest.raises(IncompleteError, match=r"2 of the 3 sites .* within rounds\.wait, 0 s, not street\. Start"):
        serve(FakeGrid(values(), there))


def test_a_federation_without_any_site_left_keeps_its_rounds(tmp_path: Path) -> None:
    def hook(grid: FakeGrid, kind: str, node_id: int) -> None:
        if kind == "evaluate" and grid.round == 1 and node_id == 10:
            grid.nodes.clear()

    with pytest.raises(IncompleteError, match="No site that trains is there any more"):
        serve(FakeGrid(values(), nodes(), hook), tmp_path)
    assert len(next(tmp_path.glob("*/rounds.jsonl")).read_text().splitlines()) == 1


def test_a_node_that_never_says_who_it_is_holds_nobody_up_for_long() -> None:
    grid = FakeGrid(values(rounds={"num_rounds": 8, "timeout": 0.1}), {**nodes(), 50: Node(domain="late")})
    grid.nodes[50].fault = lambda _: None
    result = serve(grid)
    assert len([1 for kind, node_id, *_ in grid.wire if node_id == 50]) == 3
    assert [line["sampled"] for line in result["rounds"]] == [[0, 1, 2]] * 8


def refusals(grid: FakeGrid) -> str:
    with pytest.raises(IncompleteError) as caught:
        serve(grid)
    return str(caught.value)


def test_two_nodes_of_one_name_are_refused_by_name() -> None:
    text = refusals(FakeGrid(values(), {**nodes(), 50: Node(domain="street")}))
    assert "2 nodes say that they are street; each site needs a name of its own" in text


def test_two_nodes_of_one_number_are_refused_by_it() -> None:
    there = nodes() | {10: Node(domain="street", partition_id=1), 11: Node(domain="scans", partition_id=1)}
    assert "2 nodes say that they are client 1 (partition-id)" in refusals(FakeGrid(values(), there))


def test_a_site_that_the_run_does_not_name_is_refused_and_the_others_go_on() -> None:
    config = values(data={"domains": ["photo", "street"]})
    result = serve(FakeGrid(config, nodes()))
    assert events(result) == [
        (1, "scans", "refused: this run has the sites photo, street (data.domains), and no scans")
    ]
    assert [line["sampled"] for line in result["rounds"]] == [[0, 1]] * 3


def test_a_twin_that_comes_later_is_refused_while_the_first_is_alive() -> None:
    def hook(grid: FakeGrid, kind: str, _: int) -> None:
        if kind == "train" and grid.round == 1:
            grid.nodes[50] = Node(domain="street")

    result = serve(FakeGrid(values(), nodes(), hook))
    assert events(result) == [
        (2, "street", "refused: another node of this run is street, and alive; each site needs a name of its own")
    ]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"version": "0.0.9"}, f"it has fednorm 0.0.9, and the server has {fednorm.__version__}"),
        ({"classes": 9}, "it has 9 classes (0, 1, 2, 3, 4, 5, 6, 7, …), and photo has 10 classes (0, 1,"),
        ({"image-size": 32}, "its images are 32 pixels high, and those of photo 28"),
        ({"plan": "0123"}, "its norm plan is not the server's: 0123"),
        ({"held-out": True}, "it never trains, and data.held_out says otherwise"),
    ],
)
def test_a_site_that_differs_is_refused_with_the_difference(changed: dict[str, Any], difference: str) -> None:
    grid = FakeGrid(values(), nodes())

    def fault(message: Message) -> Any:
        node = grid.nodes[10]
        context = Context(7, 10, node.config, node.state, grid.run_config)
        content = carry_out(process_workbench(context), "query.describe", message.content, context)
        content["client"] = ConfigRecord({**content.config_records["client"], **changed})
        return Message(content, reply_to=message)

    grid.nodes[10].fault = fault
    assert f"Not taken on: street: {difference}" in refusals(grid)


@pytest.mark.parametrize(
    "changed",
    [
        {"domain": "a\nb"},
        {"domain": "x" * 300},
        {"train": -1},
        {"classes": True},
        {"class-names": "not JSON"},
        {"notes": "[1]"},
        {"numbered": True, "partition-id": 10**9},
        {"site": False},
    ],
    ids=str,
)
def test_what_a_site_says_of_itself_is_read_as_a_stranger_s(changed: dict[str, Any]) -> None:
    grid = FakeGrid(values(), nodes())
    node = grid.nodes[10]
    context = Context(7, 10, node.config, node.state, grid.run_config)
    content = carry_out(process_workbench(context), "query.describe", RecordDict(), context)
    ask = Message(RecordDict(), 10, "query.describe")
    assert read_site(Message(content, reply_to=ask)).name == "street"
    content["client"] = ConfigRecord({**content.config_records["client"], **changed})
    with pytest.raises(UnfitReply):
        read_site(Message(content, reply_to=ask))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, 'it has no domain. Start it with --node-config \'domain="NAME" data-dir='),
        ({"data_folder": "x", "Domain": "street"}, "has 'Domain'; it is spelled 'domain'"),
        (
            {"domain": "street", "allow_statistics": "perhaps"},
            "allow-statistics in the node's configuration is true or",
        ),
        (
            {"domain": "street", "partition_id": -1},
            "partition-id in the node's configuration is a number from 0 on; got -1",
        ),
        ({"domain": "ephoto"}, "digits_mini has no domain 'ephoto'"),
        ({"partition_id": 8}, "partition-id=8, and the run has the clients 0 to 2"),
    ],
)
def test_a_node_is_told_what_its_configuration_lacks(config: dict[str, Any], message: str) -> None:
    assert message in refusals(FakeGrid(values(), nodes() | {10: Node(**config)}))


def test_on_the_simulation_a_node_without_a_number_is_told_so_too() -> None:
    context = Context(7, 10, {}, RecordDict(), {"config": json.dumps(resolve(values()).to_dict())})
    with pytest.raises(ConfigError, match="says neither which data it has nor which client it is"):
        process_workbench(context).client(context)


def of(name: str, **metrics: Any) -> Callable[[Message], Any]:
    """Return a fault: a training reply that is spoilt in one way."""

    def fault(message: Message) -> Any:
        if message.metadata.message_type != "train":
            return ...
        arrays = unpack(message.content.array_records["arrays"])
        key = next(iter(arrays))
        spoilt = {
            "nan": arrays | {key: arrays[key] * torch.nan},
            "shape": arrays | {key: arrays[key][None]},
            "missing": {k: t for k, t in arrays.items() if k != key},
            "extra": arrays | {"more": torch.zeros(1)},
        }.get(name, arrays)
        record = ArrayRecord({k: deployed_array(t) for k, t in spoilt.items()})
        numbers = MetricRecord({"num-examples": 12, "loss": 1.0, "accuracy": 0.5} | metrics)
        if name == "raises":
            return Message(Error(0, "ValueError: toy failure 4711"), reply_to=message)
        if name == "empty":
            return Message(RecordDict(), reply_to=message)
        if name == "keys":
            numbers = MetricRecord({"examples": 12})
        return Message(RecordDict({"arrays": record, "metrics": numbers}), reply_to=message)

    return fault


def deployed_array(tensor: torch.Tensor) -> Any:
    from flwr.app import Array

    return Array(np.ascontiguousarray(tensor.numpy()))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["nan", "shape", "missing", "extra", "raises", "empty", "keys"])
def test_the_round_goes_on_whatever_one_node_answers(name: str) -> None:
    grid = FakeGrid(values(rounds={"num_rounds": 1}), nodes())
    grid.nodes[10].fault = of(name)
    result = serve(grid)
    assert [(r, c) for r, c, _ in rejected(result)] == [(1, 2)]
    assert sorted(result["final"]["per_domain"]) == sorted(DOMAINS)


@pytest.mark.parametrize("kind", ["query.local", "query.statistics"])
def test_a_site_refuses_what_its_node_does_not_allow(kind: str) -> None:
    grid = FakeGrid(values(), nodes())
    (reply,) = DeployedGrid(grid, timeout=5).send_and_receive([Message(RecordDict(), 10, kind)])
    assert "Refused: street keeps its local tensors and statistics to itself" in reply.error.reason
    grid.nodes[10].config["allow-statistics"] = True
    (reply,) = DeployedGrid(grid, timeout=5).send_and_receive([Message(RecordDict(), 10, kind)])
    assert reply.has_content()


def test_an_evaluation_that_sites_do_not_allow_is_refused_before_training() -> None:
    grid = FakeGrid(values(evaluate={"kinds": ["own", "cross"]}), nodes())
    with pytest.raises(ConfigError, match=r"evaluate\.kinds = cross asks the sites .* photo, scans, street keeps them"):
        serve(grid)
    assert {kind for kind, *_ in grid.wire} == {"query.describe"}
    allowed = serve(FakeGrid(values(evaluate={"kinds": ["own", "cross"]}), nodes(allow_statistics=True)))
    assert len(allowed["evaluation"]["cross"]["under"]) == 3
    assert allowed["rounds"][-1]["diagnostics"]["drift"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": {"normalize": "global"}}, "which measures the images of all sites"),
        ({"data": {"clients_per_domain": 2}}, "A site is one client"),
        ({"data": {"domains": []}}, "must know whom it waits for"),
        ({"rounds": {"min_nodes": 4}}, "rounds.min_nodes is 4, and data.domains names 3 sites"),
        ({"strategy": {"name": "centralized"}}, "trains on the images of all sites at once"),
        ({"evaluate": {"central": True}}, r"name their folder, on the server's machine, with evaluate\.central_dir"),
    ],
)
def test_what_no_federation_of_sites_can_run_is_refused(changed: dict[str, Any], message: str) -> None:
    grid = FakeGrid(values(**changed), nodes())
    with pytest.raises(FedNormError, match=message):
        serve(grid)
    assert grid.wire == []


def test_each_site_reads_its_own_folder_and_nothing_else(tmp_path: Path) -> None:
    """Three folders of images on three "machines"; two of them are not called as their domains are."""
    places = {"siteA": "siteA", "siteB": "scans", "siteC": "2024"}
    draw = np.random.default_rng(3)
    for k, folder in enumerate(places.values()):
        for name in ("cat", "dog"):
            (tmp_path / f"machine{k}" / folder / name).mkdir(parents=True)
            for number in range(10):
                pixels = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / f"machine{k}" / folder / name / f"{number}.png")
    there = {
        20 + k: Node(domain=name, data_dir=str(tmp_path / f"machine{k}" / folder))
        for k, (name, folder) in enumerate(places.items())
    }
    config = values(data={"name": "image_folders", "domains": [], "dir": "/nowhere"}, rounds={"min_nodes": 3})
    result = serve(FakeGrid(config, there))
    assert [(c["domain"], c["train"], c["test"]) for c in result["data"]["clients"]] == [
        (name, 12, 4) for name in places
    ]
    (tmp_path / "machine2" / "2024" / "owl").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "machine2" / "2024" / "owl" / "0.png")
    sites._workbench.cache_clear()
    text = refusals(FakeGrid(config, there))
    assert "siteC: it has 3 classes (cat, dog, owl), and siteA has 2 classes (cat, dog)" in text
    assert all(str(tmp_path) not in str(c) for c in (text,))
