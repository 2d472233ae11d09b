"""Whatever a client sends: a reply that does not fit is rejected with its reason, and nothing else changes."""

# ruff: noqa: ARG005 - every fault is drawn from the same things, and few need all of them

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednorm.errors import AggregationError, DivergedError, FedNormError, IncompleteError
from fednorm.federation.client import make_client_app
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.server import serve
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.wire import pack, unpack
from fednorm.records.record import RunRecord

Draw = Callable[[st.SearchStrategy[Any]], Any]
BAD = 1
"""The client whose replies are spoiled, of three."""


class Sly(InProcessGrid):
    """A grid on which one client's replies of some types are spoiled.

    Args:
        bench: The run's workbench.
        spoil: What becomes of that client's replies, by the message's type.
        answers: What clients have answered before, given again in place of training anew; filled on the way.
    """

    def __init__(
        self, bench: Any, spoil: Mapping[str, Callable[[Message], Any]], answers: dict[Any, RecordDict] | None = None
    ) -> None:
        super().__init__(make_client_app(lambda _: bench), len(bench.federation.clients), {})
        self.spoil, self.answers = dict(spoil), answers

    def _handle(self, message: Message) -> Any:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        if self.answers is None:
            reply = super()._handle(message)
        else:
            if (node, kind) not in self.answers:
                self.answers[node, kind] = super()._handle(message).content
            records = self.answers[node, kind].items()
            reply = Message(RecordDict({name: record.copy() for name, record in records}), reply_to=message)
        return self.spoil[kind](reply) if node == BAD + 2 and kind in self.spoil else reply


# Faults ---------------------------------------------------------------------------------------------------------------


DANGEROUS = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(127) + b"\n"
"""The header of an array of objects, which NumPy would unpickle if it were let."""

FIELDS: tuple[Callable[[Draw, bytes, np.ndarray], dict[str, Any]], ...] = (
    lambda draw, data, _: {"data": draw(st.binary(max_size=40))},
    lambda draw, data, _: {"data": data[: draw(st.integers(0, len(data) - 1))]},
    lambda draw, data, _: {"data": data + b"\0"},
    lambda draw, data, _: {"data": DANGEROUS + b"cos\nsystem\n(S'false'\ntR."},
    lambda draw, data, _: {"data": b"PK\x03\x04" + data},
    lambda draw, data, _: {"data": data.replace(b"(", b"(" + b"(" * 3000, 1)},
    lambda draw, data, _: {"data": data.replace(b"'shape': (", b"'shape': (99999999999, ", 1)},
    lambda draw, data, plain: {"data": Array(plain.astype(">f8")).data},
    lambda draw, data, plain: {"data": Array(plain.astype("complex64")).data, "dtype": "complex64"},
    lambda draw, data, _: {"data": None},
    lambda draw, data, _: {"dtype": draw(st.sampled_from(["float16", "f", "O", "", "bfloat16", "\ud800\x1b", None]))},
    lambda draw, data, _: {"stype": draw(st.sampled_from(["pickle", "torch", "", "numpy.savez", None]))},
    lambda draw, data, plain: {"shape": draw(st.sampled_from([(*plain.shape, 1), (10**12,), (-1,), "text", None]))},
)
WHOLE: tuple[Callable[[Draw, np.ndarray], Any], ...] = (
    lambda draw, plain: Array(
        np.full_like(plain, draw(st.sampled_from([math.nan, math.inf, -math.inf])))
        if plain.dtype.kind == "f"
        else plain.astype("float32")
    ),
    lambda draw, plain: Array(plain.reshape(1, *plain.shape)),
    lambda draw, plain: Array(plain.astype("float64")),
    lambda draw, plain: pack({"x": torch.from_numpy(plain.copy()).unsqueeze(0)})["x"],
    lambda draw, plain: pack({"x": torch.from_numpy(plain.copy()).to(torch.complex64)})["x"],
    lambda draw, plain: pack({"x": torch.from_numpy(plain.copy()).to_sparse()})["x"],
)


def spoiled_array(draw: Draw, array: Array) -> Array:
    """Return an array as it comes off the wire, something about it other than it should be."""
    plain = array.numpy()
    if draw(st.integers(0, 2)) == 0:
        made: Array = draw(st.sampled_from(WHOLE))(draw, plain)
        return made
    made = Array(array.dtype, tuple(array.shape), array.stype, array.data)
    made.__dict__.update(draw(st.sampled_from(FIELDS))(draw, made.data, plain))
    return made


def spoil_arrays(draw: Draw, reply: Message) -> Message:
    name, arrays = next(iter(reply.content.array_records.items()))
    key = draw(st.sampled_from([key for key in sorted(arrays) if math.prod(arrays[key].shape) < 10**4]))
    changed = ArrayRecord(dict(arrays))
    how = draw(st.sampled_from(["array"] * 8 + ["missing", "extra", "renamed", "none", "two", "empty"]))
    if how == "array":
        changed[key] = spoiled_array(draw, arrays[key])
    if how in ("missing", "renamed"):
        del changed[key]
    if how in ("extra", "renamed"):
        changed[draw(st.text(max_size=5)) + "?"] = arrays[key]
    if how == "two":
        reply.content["more"] = arrays
    if how in ("empty", "none"):
        changed = ArrayRecord()
    reply.content[name] = changed
    if how == "none":
        del reply.content[name]
    return reply


def spoil_metrics(draw: Draw, reply: Message) -> Message:
    metrics = reply.content.metric_records["metrics"]
    key = draw(st.sampled_from(["num-examples", "loss", "accuracy", "", "two"]))
    if key == "":
        del reply.content["metrics"]
    elif key == "two":
        reply.content["more"] = MetricRecord(dict(metrics))
    elif draw(st.booleans()):
        del metrics[key]
    else:
        of_all = [math.nan, math.inf, -math.inf, [1.0], [], 10**400]
        own = {"num-examples": [0, -1, 1e300, 2**60, True, 7.5], "loss": [True], "accuracy": [5, -0.1, 1.0001, True]}
        metrics.__dict__["_data"][key] = draw(st.sampled_from(of_all + own[key]))
    return reply


def spoil_message(draw: Draw, reply: Message) -> Any:
    how = draw(st.integers(0, 7))
    if how == 0:
        return Message(Error(3, draw(st.none() | st.text(max_size=400) | st.just("\x1b[2J\n\ud800"))), reply_to=reply)
    if how == 1:
        reply.__dict__["_content"] = None
    if how == 2:
        return Message(RecordDict(), metadata=reply.metadata)
    if how == 3:
        return draw(st.sampled_from([None, 5, "a reply", b"bytes", {}, reply.content]))
    if how in (4, 5):
        reply.metadata.__dict__["_src_node_id"] = draw(st.sampled_from([10**6, 0, -5, 2**63]))
    if how == 6:
        return Message(RecordDict({"config": ConfigRecord({"arrays": "none"})}), metadata=reply.metadata)
    if how == 7:
        reply.content.__dict__["_data"] = {"metrics": "text", "arrays": 7}
    return reply


def spoil_describe(draw: Draw, reply: Message) -> Message:
    about = reply.content.config_records["client"]
    key = draw(st.sampled_from(["partition-id", "domain", "held-out"]))
    if draw(st.booleans()):
        del about[key]
    else:
        values = {
            "partition-id": ["1", -1, 10**9, 1.0, True, [1], b"1", 0, 2],
            "domain": [7, "", " ", b"domain1", ["domain1"], "another", "\ud800"],
            "held-out": [1, "no", [], 0.0, True],
        }
        about.__dict__["_data"][key] = draw(st.sampled_from(values[key]))
    return reply


Spoil = Callable[[Draw, Message], Any]
OF_TRAINING: tuple[Spoil, ...] = (spoil_arrays, spoil_arrays, spoil_metrics, spoil_message)
OF_SCORES: tuple[Spoil, ...] = (spoil_metrics, spoil_message)


def drawn(data: st.DataObject, faults: tuple[Spoil, ...]) -> Callable[[Message], Any]:
    spoil = data.draw(st.sampled_from(faults))
    return lambda reply: spoil(data.draw, reply)


# The property ---------------------------------------------------------------------------------------------------------


def rounds(site: Any, spoil: Mapping[str, Callable[[Message], Any]]) -> tuple[dict[str, Tensor], Any]:
    """Return the server's tensors after one round and its report."""
    strategy: NormStrategy = site.bench.strategy
    strategy.nodes, strategy.norms = (), {}
    grid = Sly(site.bench, spoil, site.answers)
    result = strategy.start(grid, strategy.initial_arrays(site.initial), num_rounds=1)
    return unpack(result.arrays), strategy.report


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_the_bad(site: Any) -> dict[str, Tensor]:
    def fail(reply: Message) -> Message:
        return Message(Error(1, "it failed"), reply_to=reply)

    return rounds(site, {"train": fail})[0]


def check_training(site: Any, data: st.DataObject, expected: Mapping[str, Tensor]) -> None:
    new, report = rounds(site, {"train": drawn(data, OF_TRAINING)})
    assert [(told.partition_id) for told in report.train] == [0, 2]
    assert len(report.rejected) == 1
    ((client, reason),) = report.rejected
    assert client in (BAD, None)
    assert reason.isprintable()
    assert reason
    assert equal(new, expected)


def check_evaluation(site: Any, data: st.DataObject) -> None:
    _, report = rounds(site, {"evaluate": drawn(data, OF_SCORES)})
    assert [told.partition_id for told in report.evaluate] == [0, 2]
    ((client, reason),) = report.rejected
    assert client in (BAD, None)
    assert reason.startswith("evaluation failed: ")
    assert len(reason) > len("evaluation failed: ")


def check_describe(site: Any, data: st.DataObject) -> None:
    faults = (spoil_describe, spoil_describe, spoil_message)
    grid = Sly(site.bench, {"query.describe": drawn(data, faults)}, site.answers)
    site.strategy.nodes = ()
    site.strategy.discover(grid)
    nodes, refused = site.strategy.nodes, list(site.strategy._refused)
    assert {node.partition_id for node in nodes} <= {0, 2}
    assert all(node.node_id == node.partition_id + 2 for node in nodes)
    assert refused
    assert all(unfit.reason for _, unfit in refused)


FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SLOW = settings(FAST, max_examples=300)


@pytest.fixture
def site(make_site: Any) -> Any:
    from fednorm.federation.server import expected_of

    made = make_site("fedavg", sizes=((4, 3), (4, 3), (4, 3)))
    made.strategy.expected = expected_of(made.bench)
    made.initial, made.answers = made.bench.model, {}
    initial = {key: tensor.clone() for key, tensor in made.bench.model.state_dict().items()}
    made.strategy.initial_arrays = lambda _: pack({key: initial[key] for key in made.strategy.plan.sent})
    return made


def test_a_bad_training_reply_is_rejected_and_the_average_is_the_others(site: Any) -> None:
    expected = without_the_bad(site)
    FAST(given(st.data())(lambda data: check_training(site, data, expected)))()


def test_a_bad_evaluation_is_rejected(site: Any) -> None:
    FAST(given(st.data())(lambda data: check_evaluation(site, data)))()


def test_a_bad_description_is_refused(site: Any) -> None:
    FAST(given(st.data())(lambda data: check_describe(site, data)))()


@pytest.mark.slow
def test_three_hundred_bad_replies_of_each_kind(site: Any) -> None:
    expected = without_the_bad(site)
    SLOW(given(st.data())(lambda data: check_training(site, data, expected)))()
    SLOW(given(st.data())(lambda data: check_evaluation(site, data)))()
    SLOW(given(st.data())(lambda data: check_describe(site, data)))()


# Whole runs -----------------------------------------------------------------------------------------------------------


def federation(make_site: Any, strategy: str = "fedbn", **sections: Any) -> Any:
    return make_site(strategy, sizes=((4, 3), (4, 3), (4, 3)), **{"rounds": {"num_rounds": 2}, **sections}).bench


def result_of(bench: Any, spoil: Mapping[str, Callable[[Message], Any]], record: RunRecord | None = None) -> Any:
    return serve(Sly(bench, spoil), bench, record, None)


def changed(metric: str, value: Any) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        reply.content.metric_records["metrics"][metric] = value
        return reply

    return change


def without(*records: str) -> Callable[[Message], Message]:
    def drop(reply: Message) -> Message:
        for name in records:
            if name in reply.content:
                del reply.content[name]
        return reply

    return drop


def array(key: str, value: float, *, message: str = "arrays") -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        if message in reply.content.array_records:
            arrays = ArrayRecord(dict(reply.content.array_records[message]))
            arrays.update(pack({key: torch.full_like(unpack(arrays)[key], value)}))
            reply.content[message] = arrays
        return reply

    return change


def without_key(key: str) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        arrays = ArrayRecord(dict(reply.content.array_records["arrays"]))
        del arrays[key]
        reply.content["arrays"] = arrays
        return reply

    return change


def test_an_evaluation_without_a_domain_is_no_result_and_goes_on_when_it_answers(
    make_site: Any, tmp_path: Path
) -> None:
    bench = federation(make_site)
    record = RunRecord(tmp_path, bench.config)
    with pytest.raises(IncompleteError, match=r"Nobody of domain1.*the accuracy is a share.*got 5.*67 %.*min_answered"):
        result_of(bench, {"evaluate": changed("accuracy", 5)}, record)
    assert [line["missing"] for line in record.lines()] == [{"clients": [1], "domains": ["domain1"]}] * 2
    assert not (record.folder / "result.json").exists()
    calm = federation(make_site)
    asked: list[str] = []
    again = Sly(calm, {"evaluate": lambda reply: (asked.append("evaluate"), reply)[1]})
    result = serve(again, calm, RunRecord(tmp_path, calm.config), None)
    assert asked == ["evaluate"]  # nothing was trained again
    whole = result_of(federation(make_site), {})
    assert result["final"] == whole["final"]
    assert result["final"]["answered"] == 1
    assert "missing" not in result["final"]
    assert record.lines()[-1]["rejected"] == []


def test_fewer_answers_are_a_result_where_that_was_asked_for_and_it_says_so(make_site: Any, tmp_path: Path) -> None:
    from fednorm.report.table import accuracy_table

    bench = federation(make_site, rounds={"num_rounds": 1, "min_answered": 0.0})
    result = result_of(bench, {"evaluate": without("metrics")}, RunRecord(tmp_path, bench.config))
    assert result["final"]["missing"] == {"clients": [1], "domains": ["domain1"]}
    assert result["final"]["answered"] == pytest.approx(2 / 3)
    assert set(result["final"]["per_domain"]) == {"domain0", "domain2"}
    assert "seed 1: client 1, nobody of domain1" in " ".join(accuracy_table([result]).notes)
    strict = federation(make_site, rounds={"num_rounds": 1})
    assert strict.config.hash == bench.config.hash
    with pytest.raises(IncompleteError, match=r"has finished without domain1 \(clients 1.*min_answered=0"):
        result_of(strict, {}, RunRecord(tmp_path, strict.config))


def test_a_share_below_one_still_asks_for_somebody_of_each_domain(make_site: Any) -> None:
    bench = federation(make_site, rounds={"num_rounds": 1, "min_answered": 0.5})
    with pytest.raises(IncompleteError, match="Nobody of domain1"):
        result_of(bench, {"evaluate": without("metrics")})


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("kind", "spoil", "reason"),
    [
        ("query.local", without("metrics"), "expected one MetricRecord; got 0"),
        ("query.local", without_key("norm1.weight"), "missing or extra: norm1.weight"),
        ("query.local", array("norm1.running_var", -1.0), "norm1.running_var has negative variances"),
        ("query.local", array("norm1.running_mean", math.nan), "norm1.running_mean has NaN or infinite values"),
        ("query.local", changed("num-examples", 1e300), "num-examples of at most"),
        ("query.local", lambda _: None, "NoneType came in place of a reply"),
    ],
)
def test_local_tensors_that_do_not_fit_reject_their_client(
    make_site: Any, kind: str, spoil: Callable[[Message], Any], reason: str
) -> None:
    matrix = {"kinds": ["own", "averaged", "cross"]}
    with pytest.raises(IncompleteError, match=rf"not every client sent its local tensors; missing: 1.*{reason}"):
        result_of(federation(make_site, evaluate=matrix), {kind: spoil})
    lenient = federation(make_site, evaluate=matrix, rounds={"num_rounds": 1, "min_answered": 0.0})
    result = result_of(lenient, {kind: spoil})
    assert list(result["evaluation"]["cross"]["under"]) == ["domain0 (client 0)", "domain2 (client 2)"]
    assert reason in result["rejected_in_evaluation"][0]["reason"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (array("norm2.running_var", -1.0), "norm2.running_var has negative variances"),
        (array("norm2.running_mean", math.inf), "norm2.running_mean has NaN or infinite values"),
        (without_key("norm2.running_var"), "missing or extra: norm2.running_var"),
    ],
)
def test_statistics_that_do_not_fit_are_left_out_of_the_diagnostics(
    make_site: Any, spoil: Callable[[Message], Any], reason: str
) -> None:
    result = result_of(federation(make_site), {"query.statistics": spoil})
    for line in result["rounds"]:
        assert set(line["diagnostics"]["drift"]) == {"domain0", "domain2"}
        ((client, told),) = [(r["client"], r["reason"]) for r in line["rejected"]]
        assert (client, told.startswith("query.statistics failed: ")) == (1, True)
        assert reason in told


def test_a_negative_variance_that_travels_is_rejected(make_site: Any) -> None:
    result = result_of(federation(make_site, "fedavg"), {"train": array("norm1.running_var", -1.0)})
    assert [line["rejected"] for line in result["rounds"]] == [
        [{"client": 1, "reason": "norm1.running_var has negative variances"}]
    ] * 2


@pytest.mark.parametrize(
    ("metric", "value", "reason"),
    [
        ("num-examples", 1e300, "num-examples of at most"),
        ("num-examples", 5, "num-examples is 5, and this client trains on 4 images"),
        ("loss", math.nan, "the loss is not a number: it is nan"),
        ("accuracy", 5, r"a share in \[0, 1\]; got 5"),
        ("accuracy", [0.5], "expected the metric accuracy, a number"),
    ],
)
def test_metrics_that_do_not_fit_reject_their_client(make_site: Any, metric: str, value: Any, reason: str) -> None:
    import re

    result = result_of(federation(make_site, "fedavg"), {"train": changed(metric, value)})
    for line in result["rounds"]:
        assert [r["client"] for r in line["rejected"]] == [1]
        assert re.search(reason, line["rejected"][0]["reason"])
        assert line["train_loss"] > 0


def test_an_absurd_client_is_named_and_a_limit_keeps_it_out(make_site: Any, tmp_path: Path) -> None:
    spoil = {"train": array("conv1.weight", 1e38)}
    bench = federation(make_site, "fedavg")
    with pytest.raises(DivergedError, match=r"diverged: .*client 1 had a norm of \d\.\d+e\+3\d.*max_update_norm") as e:
        result_of(bench, spoil, RunRecord(tmp_path, bench.config))
    assert "learning_rate" not in str(e.value)
    norms = {c["client"]: c["update_norm"] for c in RunRecord(tmp_path, bench.config).lines()[0]["clients"]["train"]}
    assert norms[1] > 1e38 > 10 > max(norms[0], norms[2]) > 0
    kept = result_of(federation(make_site, "fedavg", rounds={"num_rounds": 2, "max_update_norm": 10.0}), spoil)
    for line in kept["rounds"]:
        assert [r["client"] for r in line["rejected"]] == [1]
        assert "the limit, rounds.max_update_norm, is 10" in line["rejected"][0]["reason"]


def test_the_norm_of_an_update_is_the_distance_it_went(make_site: Any) -> None:
    site = make_site("fedavg")
    initial = site.strategy.initial_arrays(site.bench.model)
    site.strategy.start(site.grid, initial, num_rounds=1)
    other = make_site("fedavg")
    for told in site.strategy.report.train:
        new, old = other.train(told.partition_id, 1, initial), unpack(initial)
        squares = [(new[k].double() - old[k].double()).square().sum() for k in new if new[k].is_floating_point()]
        assert told.update_norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)


def test_a_federation_that_diverged_ends_in_an_error_that_says_when(make_site: Any, tmp_path: Path) -> None:
    bench = federation(make_site, "fedavg", train={"learning_rate": 1e20})
    with pytest.raises(DivergedError, match=r"diverged: the loss is not a number from round \d on.*learning_rate"):
        result_of(bench, {}, RunRecord(tmp_path, bench.config))
    assert issubclass(DivergedError, AggregationError)
    assert issubclass(DivergedError, FedNormError)
    for text in (RunRecord(tmp_path, bench.config).folder / "rounds.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_two_nodes_that_claim_to_be_one_client_are_both_refused(make_site: Any) -> None:
    def claim(reply: Message) -> Message:
        reply.content.config_records["client"].update({"partition-id": 0, "domain": "domain0"})
        return reply

    bench = federation(make_site, rounds={"num_rounds": 1, "min_answered": 0.0})
    result = result_of(bench, {"query.describe": claim})
    assert result["rounds"][0]["sampled"] == [2]
    told = [(r["client"], r["reason"]) for r in result["rounds"][0]["rejected"]]
    assert told == [(0, "query.describe failed: 2 nodes say that they are client 0")] * 2
    assert result["final"]["missing"]["domains"] == ["domain0", "domain1"]


def test_a_second_reply_and_a_stranger_s_are_rejected(make_site: Any) -> None:
    site = make_site("fedavg")
    strategy = site.strategy
    messages = strategy.configure_train(1, strategy.initial_arrays(site.bench.model), ConfigRecord(), site.grid)
    replies = list(site.grid.send_and_receive(messages))
    expected, _ = strategy.aggregate_train(1, replies)
    strategy.configure_train(1, strategy.initial_arrays(site.bench.model), ConfigRecord(), site.grid)
    stranger = Message(replies[0].content, metadata=Metadata(1, "", 99, 1, "", "", 0.0, 1.0, "train"))
    got, _ = strategy.aggregate_train(1, [replies[2], stranger, replies[0], replies[2], replies[1]])
    assert got is not None
    assert expected is not None
    assert equal(unpack(got), unpack(expected))
    assert dict(strategy.report.rejected) == {
        None: "a reply came from node 99, which is not one of this run",
        2: "a second reply to the same message; the first one counts",
    }
