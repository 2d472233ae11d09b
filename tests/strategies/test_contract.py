"""The contract that every registered strategy keeps, whatever it computes."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fednorm.cards import STRATEGIES
from fednorm.errors import AggregationError, ConfigError, IncompleteError
from fednorm.federation.flower_private import quiet_flower_log
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.local import Local
from fednorm.federation.server_optimizer import ServerOptimizer
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.wire import pack, unpack
from fednorm.roles import LEARNED, Kind

every_strategy = pytest.mark.parametrize("name", STRATEGIES.names)
SHARING = [name for name in STRATEGIES.names if not STRATEGIES[name].make.silent]
every_that_shares = pytest.mark.parametrize("name", SHARING)
State = dict[str, Tensor]
MOMENTS = ("HBN", "FBN")
"""Strategies whose moments are no averages; tests/strategies/test_hbn.py and tests/federation/test_fbn.py have them."""


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def averaged_keys(strategy: NormStrategy) -> list[str]:
    """Return the keys that are averaged (or pooled) whatever the strategy does with learned tensors."""
    kinds = strategy.plan.by_key
    own = (Kind.MEAN, Kind.VAR) if type(strategy).__name__ in MOMENTS else ()
    own = LEARNED if isinstance(strategy, ServerOptimizer) else own
    return [k for k in strategy.plan.sent if kinds[k].kind not in own]


@every_strategy
def test_a_spec_is_complete(name: str, lab: Any) -> None:
    spec = STRATEGIES[name]
    assert spec.name == name == spec.make.__module__.rpartition(".")[2]
    assert spec is import_module(f"strategies.{name}").SPEC
    assert issubclass(spec.make, Strategy)
    assert spec.summary.endswith(".")
    assert all((spec.citation.title, spec.citation.authors, spec.citation.year))
    published = spec.citation.arxiv or spec.citation.where.rpartition(" ")[2]  # a submission that is on no other server
    assert published
    assert published in (import_module(f"strategies.{name}").__doc__ or "")
    own_model = spec.make.local.before_evaluation is not Local.before_evaluation
    assert spec.personalised == bool(lab.make(name).plan.local or own_model)


@every_strategy
def test_one_client_alone_is_the_server(name: str, lab: Any) -> None:
    for weighting, rtol in (("equal", 0.0), ("examples", 2e-7)):
        strategy = lab.make(name, weighting=weighting)
        update = lab.update(strategy, 1)
        new = lab.rounds(strategy, [{0: (update, 743)}])
        assert list(new) == list(strategy.plan.sent)
        for key in averaged_keys(strategy):
            torch.testing.assert_close(new[key], update[key], rtol=rtol, atol=0)


@every_strategy
def test_clients_that_agree_are_a_fixed_point(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    update = lab.update(strategy, 1)
    new = lab.rounds(strategy, [dict.fromkeys(range(3), (update, 7))] * 2, old=update)
    for key in averaged_keys(strategy):
        torch.testing.assert_close(new[key], update[key], rtol=5e-7, atol=0)


@every_that_shares
def test_the_order_of_replies_does_not_matter_to_the_last_bit(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    answers = {pid: (lab.update(strategy, pid), 3 + 4 * pid) for pid in range(5)}
    old = lab.update(strategy, 99)
    in_turn = sum(answers[pid][0]["0.weight"] * answers[pid][1] for pid in range(5))
    reversed_ = sum(answers[pid][0]["0.weight"] * answers[pid][1] for pid in reversed(range(5)))
    assert not torch.equal(in_turn, reversed_)  # the order of a float sum does matter here
    results = []
    for seed in range(6):
        strategy = lab.make(name)
        results.append(lab.round(strategy, old, lab.answers(answers, seed=seed, shuffle=seed > 0)))
        assert [report.partition_id for report in strategy.report.train] == list(range(5))
    assert all(equal(results[0], other) for other in results[1:])


@every_strategy
def test_only_the_ratios_of_examples_matter(name: str, lab: Any) -> None:
    def result(factor: int) -> State:
        strategy = lab.make(name)
        answers = {pid: (lab.update(strategy, pid), factor * (3 + 4 * pid)) for pid in range(3)}
        return lab.rounds(strategy, [answers])

    one, many = result(1), result(7)
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=1e-5, atol=1e-3)


@every_strategy
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_weights_are_the_formulas(name: str, weighting: str, lab: Any) -> None:
    strategy = lab.make(name, weighting=weighting)
    counts = (1, 10, 89)
    answers = {pid: (lab.update(strategy, pid), n) for pid, n in enumerate(counts)}
    new = lab.rounds(strategy, [answers])
    p = [n / 100 for n in counts] if weighting == "examples" else [1 / 3] * 3
    for key in averaged_keys(strategy):
        if strategy.plan.by_key[key].kind is Kind.COUNT:
            continue
        expected = sum(w * answers[pid][0][key].double() for pid, w in enumerate(p))
        scale = max(answers[pid][0][key].abs().max().item() for pid in range(3))
        torch.testing.assert_close(new[key].double(), expected, rtol=0, atol=1e-6 * scale)


@every_strategy
def test_counters_stay_integers_and_are_the_first_clients(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    answers = {pid: (lab.update(strategy, pid), 5) for pid in range(3)}
    new = lab.rounds(strategy, [answers])
    counters = [key for key in new if strategy.plan.by_key[key].kind is Kind.COUNT]
    assert counters == [key for key in new if key.endswith("num_batches_tracked")]
    for key in counters:
        assert new[key].dtype == torch.int64
        assert new[key] == answers[0][0][key]
        assert new[key] > 2**24  # more than a float32 could hold to the unit


@every_strategy
@pytest.mark.parametrize("rate", [None, 1e3])
def test_variances_stay_non_negative(name: str, rate: float | None, lab: Any) -> None:
    options = {"server_learning_rate": rate} if rate and "server_learning_rate" in STRATEGIES[name].options else {}
    strategy = lab.make(name, **options)
    updates = [{pid: (lab.update(strategy, 10 * r + pid), 5) for pid in range(3)} for r in range(4)]
    new = lab.rounds(strategy, updates)
    variances = [key for key in new if strategy.plan.by_key[key].kind is Kind.VAR]
    assert bool(variances) == (name not in ("fedbn", "silobn", "fedwon", "local"))
    for key in variances:
        assert new[key].min() >= 0
        if type(strategy).__name__ in MOMENTS:
            continue
        expected = sum(updates[-1][pid][0][key].double() for pid in range(3)) / 3
        torch.testing.assert_close(new[key].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "neutral"), [("fedprox", {"mu": 0.0}), ("fedavgm", {"server_momentum": 0.0, "server_learning_rate": 1.0})]
)
def test_neutral_options_are_fedavg_to_the_last_bit(name: str, neutral: dict[str, float], lab: Any) -> None:
    def result(strategy: NormStrategy) -> State:
        return lab.rounds(
            strategy, [{pid: (lab.update(strategy, 10 * r + pid), 3 + pid) for pid in range(3)} for r in range(3)]
        )

    assert equal(result(lab.make(name, **neutral)), result(lab.make("fedavg")))
    assert lab.make("fedavg").client_config() == {}
    assert lab.make(name, **neutral).client_config() in ({}, {"proximal-mu": 0.0})


@every_strategy
def test_a_checkpoint_resumes_to_the_same_bits(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    updates = [{pid: (lab.update(strategy, 10 * r + pid), 3 + pid) for pid in range(3)} for r in range(4)]
    whole = lab.rounds(strategy, updates)
    before = lab.make(name)
    halfway = lab.rounds(before, updates[:2])
    saved = {key: tensor.clone() for key, tensor in before.state_dict().items()}
    assert bool(saved) == (isinstance(strategy, ServerOptimizer) or bool(strategy.extra_to_send()))
    resumed = lab.make(name)
    resumed.load_state_dict(saved)
    assert equal(lab.rounds(resumed, updates[2:], old=halfway), whole)
    with pytest.raises(ConfigError):
        lab.make(name).load_state_dict({"momentum/nowhere": torch.zeros(1)})


@every_that_shares
def test_inputs_are_not_changed(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    updates = {pid: (lab.update(strategy, pid), 3 + pid) for pid in range(3)}
    old = lab.update(strategy, 9)
    copies = [{key: t.clone() for key, t in state.items()} for state in (old, *(u for u, _ in updates.values()))]
    model = lab.network(name)
    initial = strategy.initial_arrays(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not torch.equal(unpack(initial)["0.weight"], model[0].weight)
    new = lab.round(strategy, old, lab.answers(updates))
    kept = {key: tensor.clone() for key, tensor in new.items()}
    lab.round(strategy, new, lab.answers(updates))
    assert equal(new, kept)
    assert all(equal(a, b) for a, b in zip(copies, [old, *(u for u, _ in updates.values())], strict=True))


def nan(update: State, key: str) -> State:
    return {**update, key: torch.full_like(update[key], torch.nan)}


def one_infinity(update: State, key: str) -> State:
    spoiled = update[key].clone()
    spoiled.view(-1)[-1] = -torch.inf
    return {**update, key: spoiled}


def both_infinities(update: State, key: str) -> State:
    spoiled = update[key].clone()
    spoiled.view(-1)[0], spoiled.view(-1)[-1] = torch.inf, -torch.inf
    return {**update, key: spoiled}


SPOILED: dict[str, tuple[Callable[[State, str], State], Any, str]] = {
    "NaN": (nan, 5, "0.weight has NaN or infinite values"),
    "infinity": (one_infinity, 5, "0.weight has NaN or infinite values"),
    "infinities that cancel": (both_infinities, 5, "0.weight has NaN or infinite values"),
    "shape": (lambda u, k: {**u, k: u[k][:1]}, 5, "0.weight has shape (1, 3, 3, 3); expected (4, 3, 3, 3)"),
    "missing": (lambda u, k: {n: t for n, t in u.items() if n != k}, 5, "missing or extra: 0.weight"),
    "extra": (lambda u, _: {**u, "head.bias": torch.zeros(2)}, 5, "missing or extra: head.bias"),
    "float64": (lambda u, k: {**u, k: u[k].double()}, 5, "0.weight is of type float64; expected float32"),
    "no examples": (lambda u, _: u, 0, "num-examples of 1 or more; got 0"),
    "NaN examples": (lambda u, _: u, float("nan"), "num-examples of 1 or more; got nan"),
    "infinite examples": (lambda u, _: u, float("inf"), "num-examples of 1 or more; got inf"),
}


@every_that_shares
def test_an_unusable_reply_is_rejected_and_the_round_goes_on(name: str, lab: Any) -> None:
    good = lab.make(name)
    updates = {pid: lab.update(good, pid) for pid in range(3)}
    old = lab.update(good, 9)
    expected = lab.round(good, old, lab.answers({0: (updates[0], 4), 1: (updates[2], 4)}))
    for how, (spoil, examples, reason) in SPOILED.items():
        strategy = lab.make(name)
        answers = {0: (updates[0], 4), 1: (spoil(updates[1], "0.weight"), examples), 2: (updates[2], 4)}
        assert equal(lab.round(strategy, old, lab.answers(answers)), expected), how
        assert [pid for pid, _ in strategy.report.rejected] == [1], how
        assert reason in strategy.report.rejected[0][1], how
        assert [report.partition_id for report in strategy.report.train] == [0, 2], how


def test_a_strategy_without_communication_takes_nothing(lab: Any) -> None:
    assert set(STRATEGIES.names) - set(SHARING) == {"local"}
    strategy = lab.make("local")
    assert strategy.plan.sent == ()
    assert strategy.plan.local == tuple(lab.network().state_dict())
    answers = {0: ({}, 4), 1: ({"0.weight": torch.zeros(4, 3, 3, 3)}, 4)}
    assert lab.rounds(strategy, [answers]) == {}
    reason = "expected the 0 tensors of the plan; these are missing or extra: 0.weight"
    assert strategy.report.rejected == [(1, reason)]
    assert (strategy.report.bytes_down, strategy.report.bytes_up) == (0, 0)


def test_a_float_counter_is_rejected_lest_it_be_averaged(lab: Any) -> None:
    strategy = lab.make("fedavg")
    updates = {pid: (lab.update(strategy, pid), 4) for pid in range(2)}
    updates[0][0]["1.num_batches_tracked"] = torch.tensor(3.0)
    new = lab.rounds(strategy, [updates])
    assert strategy.report.rejected == [(0, "1.num_batches_tracked is of type float32; expected int64")]
    assert equal(new, updates[1][0])


def test_large_but_finite_values_are_not_taken_for_infinite(lab: Any) -> None:
    strategy = lab.make("fedavg", weighting="equal")
    update = lab.update(strategy, 1)
    update["0.weight"] = torch.full_like(update["0.weight"], 3e38)  # their sum overflows
    assert equal(lab.rounds(strategy, [{0: (update, 4)}]), update)
    assert strategy.report.rejected == []


@every_strategy
def test_malformed_and_failed_replies_are_rejected(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    update = lab.update(strategy, 1)
    whole = lab.content(update, 3)

    def answer(pid: int, _: Message) -> RecordDict:
        if pid == 0:
            raise RuntimeError("out of memory on node 0")
        return {
            1: RecordDict({"arrays": whole["arrays"]}),
            2: RecordDict({"metrics": whole["metrics"]}),
            3: RecordDict({**whole, "more": pack(update)}),
            4: RecordDict({"arrays": whole["arrays"], "metrics": MetricRecord({"loss": 1.0})}),
            5: whole,
        }[pid]

    grid = lab.ShuffledGrid(lab.answering(answer), 6)
    lab.round(strategy, update, grid)
    assert dict(strategy.report.rejected) == {
        0: "RuntimeError: out of memory on node 0",
        1: "expected one MetricRecord; got 0",
        2: "expected one ArrayRecord; got 0",
        3: "expected one ArrayRecord; got 2",
        4: "expected the metric num-examples of 1 or more; got None",
    }
    assert strategy.report.sampled == tuple(range(6))


@every_that_shares
def test_a_round_without_a_usable_reply_stops_the_run(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    update = lab.update(strategy, 1)
    grid = lab.answers(dict.fromkeys(range(2), (nan(update, "0.weight"), 3)))
    messages = strategy.configure_train(1, pack(update), ConfigRecord(), grid)
    assert strategy.aggregate_train(1, grid.send_and_receive(messages)) == (None, None)
    with pytest.raises(AggregationError, match=r"Round 1: none of the 2 sampled.*client 0: 0.weight has NaN"):
        strategy.start(grid, pack(update), num_rounds=2)


@every_strategy
def test_missing_replies_leave_the_others_in_order(name: str, lab: Any) -> None:
    good, strategy = lab.make(name), lab.make(name)
    updates = {pid: (lab.update(good, pid), 4) for pid in range(4)}
    old = lab.update(good, 9)
    expected = lab.round(good, old, lab.answers({0: updates[1], 1: updates[3]}))
    grid = lab.answers(updates, shuffle=False)
    messages = strategy.configure_train(1, pack(old), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    arrays, _ = strategy.aggregate_train(1, [replies[3], replies[1]])
    assert arrays is not None
    assert equal(unpack(arrays), expected)


def sampled(lab: Any, server_round: int, *, seed: int = 1, nodes: int = 0, fraction: float = 0.3) -> tuple[int, ...]:
    strategy = lab.make("fedavg", fraction=fraction, seed=seed)
    grid = lab.ShuffledGrid(lab.answering(lambda *_: RecordDict(), held_out=(3, 8)), 12, seed=nodes)
    list(strategy.configure_train(server_round, pack(lab.update(strategy, 0)), ConfigRecord(), grid))
    return strategy.report.sampled


def test_sampling_goes_by_partition_id_seed_and_round(lab: Any) -> None:
    draws = {r: sampled(lab, r) for r in range(1, 9)}
    assert all(len(draw) == len(set(draw)) == 3 for draw in draws.values())
    assert all({3, 8}.isdisjoint(draw) and list(draw) == sorted(draw) for draw in draws.values())
    assert len(set(draws.values())) > 4
    assert {r: sampled(lab, r, nodes=r) for r in draws} == draws
    assert {r: sampled(lab, r, seed=2) for r in draws} != draws
    assert sampled(lab, 1, fraction=1.0) == (0, 1, 2, 4, 5, 6, 7, 9, 10, 11)
    assert len(sampled(lab, 1, fraction=0.001)) == 1


@every_strategy
def test_arguments_out_of_range_are_refused(name: str, lab: Any) -> None:
    for option, value in (("fraction", 0.0), ("fraction", 1.1), ("weighting", "size")):
        with pytest.raises(ConfigError, match=option):
            lab.make(name, **{option: value})


def test_round_one_waits_for_every_node(lab: Any) -> None:
    strategy = lab.make("fedavg", min_nodes=4)
    grid = lab.answers({pid: (lab.update(strategy, pid), 4) for pid in range(4)})
    everyone, asked = list(grid.contexts), []
    there = threading.Event()

    def get_node_ids() -> list[int]:
        asked.append(len(asked))
        return everyone if there.is_set() else everyone[: len(asked)]

    grid.get_node_ids = get_node_ids
    threading.Timer(0.3, there.set).start()
    lab.round(strategy, lab.update(strategy, 9), grid)
    assert len(asked) > 1
    assert strategy.report.sampled == (0, 1, 2, 3)


def test_nodes_that_never_come_end_the_wait(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fednorm.federation.strategy.NODE_SECONDS", 0.0)
    strategy = lab.make("fedavg", min_nodes=3)
    update = lab.update(strategy, 0)
    with pytest.raises(AggregationError, match=r"has 3 clients, and 2 nodes came"):
        strategy.start(lab.answers(dict.fromkeys(range(2), (update, 1))), pack(update))


@every_strategy
def test_a_clientapp_that_knows_nothing_of_fednorm_takes_part(name: str, lab: Any) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        step = 1 + int(context.node_config["partition-id"])
        arrays = ArrayRecord({key: tensor + step for key, tensor in state.items()})
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"model": arrays, "report": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        accuracy = float(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": 10, "accuracy": accuracy})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    strategy = lab.make(name)
    initial = strategy.initial_arrays(lab.network(name))
    if strategy.extra_expected():  # it cannot know what this strategy asks for besides, and is told
        with pytest.raises(
            IncompleteError, match=r"'extra'; these are missing or extra: (0\.bias|1\.running_mean).*extra_expected"
        ):
            strategy.start(InProcessGrid(app, 3, {}), initial, num_rounds=2)
        return
    result = strategy.start(InProcessGrid(app, 3, {}), initial, num_rounds=2)
    new, old = unpack(result.arrays), unpack(initial)
    for key in averaged_keys(strategy):
        counts = strategy.plan.by_key[key].kind is Kind.COUNT
        torch.testing.assert_close(new[key], old[key] + (2 if counts else 4))  # +1 the first's, +2 the mean, a round
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(1.0)


def test_a_malformed_evaluation_is_rejected_and_the_run_goes_on(lab: Any) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Any) -> Message:
        content = {"arrays": message.content.array_records["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        answers = {
            0: RecordDict(),
            1: RecordDict({"metrics": MetricRecord({"accuracy": 1.0})}),
            2: RecordDict({"metrics": MetricRecord({"num-examples": 4, "accuracy": 0.25})}),
        }
        return Message(answers[int(context.node_config["partition-id"])], reply_to=message)

    strategy = lab.make("fedavg")
    result = strategy.start(InProcessGrid(app, 3, {}), strategy.initial_arrays(lab.network()), num_rounds=1)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == 0.25
    assert dict(strategy.report.rejected) == {
        0: "evaluation failed: expected one MetricRecord; got 0",
        1: "evaluation failed: expected the metric num-examples of 0 or more; got None",
    }


@every_strategy
def test_start_can_go_on_at_any_round(name: str, lab: Any) -> None:
    def run(strategy: NormStrategy, arrays: ArrayRecord, first: int, last: int) -> tuple[ArrayRecord, list[Any]]:
        def answer(pid: int, message: Message) -> RecordDict:
            current = int(message.content.config_records["config"]["server-round"])
            return lab.content(lab.update(strategy, 100 * current + pid), 1 + pid)

        reports: list[Any] = []
        result = strategy.start(
            lab.ShuffledGrid(lab.answering(answer), 4),
            arrays,
            num_rounds=last,
            first_round=first,
            evaluate_every=10**6,
            on_round=lambda report, _: reports.append((report.server_round, report.sampled)),
        )
        return result.arrays, reports

    whole = lab.make(name, fraction=0.5)
    initial = whole.initial_arrays(lab.network(name))
    arrays, reports = run(whole, initial, 1, 4)
    first, second = lab.make(name, fraction=0.5), lab.make(name, fraction=0.5)
    halfway, early = run(first, initial, 1, 2)
    second.load_state_dict(first.state_dict())
    resumed, late = run(second, halfway, 3, 4)
    assert equal(unpack(resumed), unpack(arrays))
    assert early + late == reports
    assert [number for number, _ in reports] == [1, 2, 3, 4]


@every_strategy
def test_bytes_are_those_of_the_tensors_that_travel(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    update = lab.update(strategy, 1)
    lab.round(strategy, update, lab.answers(dict.fromkeys(range(3), (update, 3))))
    size = sum(t.nbytes for t in update.values())
    assert strategy.plan.bytes_sent == size
    down = size + sum(t.nbytes for t in strategy.extra_to_send().values())
    up = size + sum(form.nbytes for form in strategy.extra_expected().values())
    if not strategy.bytes_beside():
        assert (strategy.report.bytes_down, strategy.report.bytes_up) == (3 * down, 3 * up)
    assert strategy.report.bytes_down + strategy.report.bytes_up == 3 * (down + up + strategy.bytes_beside())
    assert strategy.plan.summary(3)["bytes_per_round"] == 6 * size


# Apps that are not ours -------------------------------------------------------------------------------------------


class Registered(InProcessGrid):
    """A grid as Flower's simulation makes one: random node ids, registered in the order of partition ids."""

    def __init__(self, app: ClientApp, num_nodes: int, seed: int) -> None:
        super().__init__(app, num_nodes, {})
        ids = random.Random(seed).sample(range(2**40), num_nodes)
        self.contexts = {
            node_id: Context(1, node_id, dict(context.node_config), RecordDict(), {})
            for node_id, context in zip(ids, self.contexts.values(), strict=True)
        }


class Distant(Grid):
    """The same without what only an in-process grid knows."""

    def __init__(self, inner: Registered) -> None:
        self.inner = inner

    def get_node_ids(self) -> Any:
        return set(self.inner.contexts)

    def get_nodes(self) -> Any:
        order = [NodeInfo(i, f"2026-01-01T00:00:{n:02}") for n, i in enumerate(self.inner.contexts)]
        return sorted(order, key=lambda node: node.node_id)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return self.inner.send_and_receive(messages, timeout=timeout)

    set_run = run = create_message = push_messages = pull_messages = None  # type: ignore[assignment]


class NodeInfo(NamedTuple):
    node_id: int
    registered_at: str


def plain_app(pids: list[int], change: Callable[[State], State]) -> ClientApp:
    """Return an app that knows nothing of fednorm, and takes down which partitions it trains on."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        pids.append(int(context.node_config["partition-id"]))
        arrays = ArrayRecord(change(message.content.array_records["arrays"].to_torch_state_dict()))
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 8})}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, _: Any) -> Message:
        metrics = MetricRecord({"num-examples": 8, "accuracy": 97.5})  # percent, by its own convention
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize("wrap", [lambda grid: grid, Distant])
def test_nodes_that_describe_nothing_are_numbered_by_partition_id(lab: Any, wrap: Any, logged: Any) -> None:
    draws = []
    for seed in range(4):
        pids: list[int] = []
        strategy = lab.make("fedavg", fraction=0.3, seed=5)
        grid = wrap(Registered(plain_app(pids, dict), 12, seed))
        with quiet_flower_log(logging.INFO):
            logged.records.clear()
            result = strategy.start(grid, strategy.initial_arrays(lab.network()), num_rounds=2)
        assert [told.partition_id for told in strategy.report.train] == pids[4:]
        assert len([record for record in logged.records if "describe" in record.message]) == 1
        assert result.evaluate_metrics_clientapp[2]["accuracy"] == 97.5
        draws.append(pids)
    assert len(draws[0]) == 8
    assert all(draw == draws[0] for draw in draws)


def advice(lab: Any, name: str, change: Callable[[State], State], network: Any = None) -> str:
    network = network or lab.network(name)
    strategy = STRATEGIES[name].make(network)
    with pytest.raises(IncompleteError) as caught:
        strategy.start(InProcessGrid(plain_app([], change), 2, {}), strategy.initial_arrays(network), num_rounds=1)
    assert "learning_rate" not in str(caught.value)
    return str(caught.value)


def test_advice_depends_on_what_was_sent(lab: Any) -> None:
    whole = lab.network("fedbn").state_dict()
    assert "the whole state dict came" in advice(lab, "fedbn", lambda _: whole)
    assert "plan.sent only" in advice(lab, "fedbn", lambda _: whole)
    doubles = advice(lab, "fedavg", lambda state: {k: t.double() for k, t in state.items()})
    assert "in the shape and type in which the message brought it" in doubles
    half = lab.network("fedavg").bfloat16()
    text = advice(lab, "fedavg", lambda state: {k: t.bfloat16() for k, t in state.items()}, half)
    assert "have no bfloat16" in text
    assert "tensor.float()" in text


def test_the_remedies_help(lab: Any) -> None:
    """plan.sent only, as the advice has it, and float32 for a bfloat16 model."""
    network = lab.network("fedbn")
    strategy = STRATEGIES["fedbn"].make(network)
    whole = network.state_dict()
    app = plain_app([], lambda state: {key: whole[key] for key in state})
    strategy.start(InProcessGrid(app, 2, {}), strategy.initial_arrays(network), num_rounds=1)
    assert strategy.report.rejected == []
    half = lab.network("fedavg").bfloat16()
    strategy = STRATEGIES["fedavg"].make(half)
    app = plain_app([], lambda state: {k: t + 0.5 if t.is_floating_point() else t for k, t in state.items()})
    result = strategy.start(InProcessGrid(app, 2, {}), strategy.initial_arrays(half), num_rounds=1)
    assert strategy.report.rejected == []
    for key, tensor in unpack(result.arrays).items():
        assert tensor.dtype == half.state_dict()[key].dtype
        if tensor.is_floating_point():
            assert torch.equal(tensor, (half.state_dict()[key].float() + 0.5).bfloat16())


def test_an_error_in_a_traceback_is_told_by_its_last_line(lab: Any) -> None:
    strategy = lab.make("fedavg")

    def fail(*_: Any) -> RecordDict:
        raise RuntimeError("\n  File 'x', line 3\nTraceback\nException X occurred. Message: out of memory\n")

    grid = lab.ShuffledGrid(lab.answering(fail), 1)
    with pytest.raises(IncompleteError, match=r"\(client 0: out of memory\)"):
        strategy.start(grid, pack(lab.update(strategy, 1)), num_rounds=1)
