"""A strategy's client side: when it is asked, what it may keep and send, and that no kill touches it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fednorm.cli.app as cli
from fednorm.cards import STRATEGIES
from fednorm.config import resolve
from fednorm.errors import ConfigError, RecordError
from fednorm.federation.local import Local, Phase, Turn
from fednorm.federation.replies import Form
from fednorm.federation.simulate import simulate
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.wire import unpack
from fednorm.federation.workbench import STATE_RECORD, Workbench
from fednorm.records.record import RunRecord

MLP = {"name": "mlp", "width": 8}


class Diary(Local):
    """Writes down when it is asked."""

    calls: ClassVar[list[Any]] = []

    def begin(self, turn: Turn) -> None:
        self.calls.append(("begin", turn.client.partition_id, turn.server_round, turn.steps))
        assert all(torch.equal(turn.tensors[key], tensor) for key, tensor in turn.received.items())

    def adjust(self, turn: Turn) -> None:
        self.calls.append(("adjust", any(p.grad is not None for p in turn.model.parameters())))

    def phases(self, turn: Turn) -> tuple[Phase, ...]:
        body = frozenset(key for key in turn.shared if not key.startswith("fc5"))
        return (Phase(frozenset(turn.shared) - body, steps=2), Phase(body, epochs=2.0))

    def end(self, turn: Turn) -> dict[str, Tensor]:
        self.calls.append(("end", turn.steps))
        turn.state["turns"] = turn.state.get("turns", torch.zeros((), dtype=torch.int64)) + 1
        return {"steps": torch.tensor([float(turn.steps)])}

    def before_evaluation(self, turn: Turn) -> None:
        self.calls.append(("evaluation", turn.client.partition_id))
        turn.state["turns"] = torch.tensor(99)  # an evaluation keeps nothing


class WithDiary(NormStrategy):
    local = Diary

    def extra_to_send(self) -> dict[str, Tensor]:
        return {"greeting": torch.ones(2)}

    def extra_expected(self) -> dict[str, Form]:
        return {"steps": Form((1,))}

    def aggregate_extra(self, partition_id: int, extra: Any, weight: float) -> None:
        Diary.calls.append(("extra", partition_id, extra["steps"].item(), weight))


def test_the_client_side_is_asked_in_order_and_its_state_is_its_own(make_site: Any) -> None:
    Diary.calls.clear()
    site = make_site(STRATEGIES.add(WithDiary), model=MLP, norm={"name": "group_norm"}, held_out=1)
    arrays = site.strategy.initial_arrays(site.bench.model)
    site.strategy.start(site.grid, arrays, num_rounds=1)
    assert site.strategy.report.rejected == []
    # 9 and 8 images in batches of 4: two steps of the head, then two passes of three and of two batches
    assert Diary.calls == [
        ("begin", 0, 1, 0),
        *[("adjust", True)] * 8,
        ("end", 8),
        ("extra", 0, 8.0, 9),
        ("begin", 1, 1, 0),
        *[("adjust", True)] * 6,
        ("end", 6),
        ("extra", 1, 6.0, 8),
        ("evaluation", 0),
        ("evaluation", 1),
    ]
    states = [context.state for context in site.grid.contexts.values()]
    assert [unpack(s.array_records[STATE_RECORD])["turns"].item() for s in states[:2]] == [1, 1]
    assert not states[2]
    size = site.bench.plan.bytes_sent
    assert site.strategy.report.bytes_down == 2 * (size + 8)
    assert site.strategy.report.bytes_up == 2 * (size + 4)
    assert all(p.requires_grad for p in site.bench.model.parameters())


def test_a_phase_leaves_the_other_parameters_as_they_are(make_site: Any) -> None:
    site = make_site(STRATEGIES.add(WithDiary), model=MLP, train={"weight_decay": 0.1, "l2_init": 0.1, "momentum": 0.9})
    before = {key: p.detach().clone() for key, p in site.bench.model.named_parameters()}
    turn = site.bench.turn(site.bench.federation.clients[1], 1)

    class HeadOnly(Local):
        def phases(self, _: Turn) -> tuple[Phase, ...]:
            return (Phase(frozenset({"fc5.weight"}), steps=3),)

    turn.fit(HeadOnly(site.strategy))
    assert turn.steps == 3
    changed = {key for key, p in site.bench.model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {"fc5.weight"}


def test_training_aside_leaves_the_optimizer_as_it_was(make_site: Any) -> None:
    site = make_site(model=MLP, train={"momentum": 0.9, "reset_optimizer": False})
    turn = site.bench.turn(site.bench.federation.clients[1], 1)
    turn.fit(Local(site.strategy))
    optimizer = site.bench.trainee.optimizer
    moments = [optimizer.state[p]["momentum_buffer"].clone() for p in site.bench.model.parameters()]
    tensors = turn.read()
    turn.train_aside(Local(site.strategy), "aside", Phase(epochs=2.0))
    assert not all(torch.equal(tensors[key], tensor) for key, tensor in turn.tensors.items())
    again = [optimizer.state[p]["momentum_buffer"] for p in site.bench.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(moments, again, strict=True))
    assert turn.steps == 2


def test_a_state_that_is_not_finite_is_not_kept(make_site: Any) -> None:
    class Spoiling(Local):
        def end(self, turn: Turn) -> dict[str, Tensor]:
            turn.state["value"] = torch.tensor(float(turn.server_round) if turn.server_round < 2 else float("inf"))
            return {}

    class Spoiled(NormStrategy):
        local = Spoiling

    site = make_site(STRATEGIES.add(Spoiled), model=MLP)
    site.train(1, 1)
    site.train(1, 2)
    assert unpack(site.grid.contexts[3].state.array_records[STATE_RECORD])["value"] == 1


def test_statistics_that_the_server_sends_are_not_estimated_anew_where_a_head_is_local(make_site: Any) -> None:
    """A client that has never trained has a fresh head under FedPer, and the federation's running statistics."""
    site, fresh = make_site("fedper", model=MLP), make_site("fedbn", model=MLP)
    site.evaluate(1)
    statistics = [key for key in site.bench.plan.by_key if key.endswith("running_mean")]
    assert all(torch.count_nonzero(site.bench.model.state_dict()[key]) == 0 for key in statistics)
    fresh.evaluate(1)
    assert all(torch.count_nonzero(fresh.bench.model.state_dict()[key]) > 0 for key in statistics)


class Careless(Local):
    """Keeps and sends the model's own parameters, and writes into what it was given."""

    def end(self, turn: Turn) -> dict[str, Tensor]:
        turn.state.setdefault("first", turn.shared["fc5.bias"].detach())
        turn.state["first"].add_(0)
        turn.extra["given"].fill_(7)
        return {"bias": turn.shared["fc5.bias"]}


class Trusting(NormStrategy):
    local = Careless

    def extra_to_send(self) -> dict[str, Tensor]:
        return {"given": self.__dict__.setdefault("given", torch.zeros(1))}

    def extra_expected(self) -> dict[str, Form]:
        return {"bias": Form((3,))}


def test_what_a_client_keeps_and_sends_are_copies(make_site: Any) -> None:
    site = make_site(STRATEGIES.add(Trusting), model=MLP)
    beside = {"extra": site.strategy.extra_to_send()}
    sent = [site.tell(pid, "train", extra=beside["extra"], **{"server-round": 1}) for pid in range(3)]
    for pid, reply in enumerate(sent):
        kept = unpack(site.grid.contexts[pid + 2].state.array_records[STATE_RECORD])["first"]
        own = unpack(reply.array_records["arrays"])["fc5.bias"]
        assert torch.equal(kept, own)
        assert torch.equal(unpack(reply.array_records["extra"])["bias"], own)
    assert beside["extra"]["given"].item() == 0


def test_what_is_no_tensor_or_not_declared_is_told_of(make_site: Any) -> None:
    class Forgetful(Local):
        def end(self, turn: Turn) -> dict[str, Tensor]:
            if turn.client.partition_id == 0:
                turn.state["count"] = 3  # type: ignore[assignment]
            return {} if turn.client.partition_id == 2 else {"more": torch.ones(1)}

    class Undeclared(NormStrategy):
        local = Forgetful

    site = make_site(STRATEGIES.add(Undeclared), model=MLP)
    site.strategy.start(site.grid, site.strategy.initial_arrays(site.bench.model), num_rounds=1)
    rejected = dict(site.strategy.report.rejected)
    assert rejected.keys() == {0, 1}
    assert "turn.state keeps tensors, and 'count' is a int; wrap it: torch.tensor(value)" in rejected[0]
    assert rejected[1] == "it sends an ArrayRecord 'extra', and the strategy declares none"


# Resuming -------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "data": {"train_per_client": 16, "test_per_domain": 10},
    "model": MLP,
    "train": {"batch_size": 8},
    "rounds": {"num_rounds": 3, "fraction": 0.6},
}


class Killed(Exception):
    pass


class Killer:
    def begin(self, _: Any, first_round: int) -> None:
        self.first_round = first_round

    def round(self, line: Any) -> None:
        if line["round"] == 2:
            raise Killed


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scaffold", {}),
        ("ditto", {}),
        ("local", {}),
        pytest.param("fedrep", {"head_epochs": 1}, marks=pytest.mark.slow),
        pytest.param("fedbabu", {}, marks=pytest.mark.slow),
        pytest.param("centralized", {}, marks=pytest.mark.slow),
        ("fedprox", {"local": "fc5.*", "mu": 0.5}),
    ],
)
def test_a_run_that_was_cut_short_ends_with_the_same_bits(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = resolve({**SMALL, "strategy": {"name": name, **options}})
    whole = simulate(config, runs=tmp_path / "whole")
    with pytest.raises(Killed):
        simulate(config, runs=tmp_path / "cut", observer=Killer())
    checkpoint = RunRecord(tmp_path / "cut", config).load_checkpoint()
    assert checkpoint is not None
    assert any(key.startswith("state/") for key in checkpoint.tensors) == (name in ("scaffold", "ditto"))
    resumed = simulate(config, runs=tmp_path / "cut")
    for file in ("model.safetensors", "clients.safetensors"):
        paths = [Path(result["run"]) / file for result in (whole, resumed)]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            one, other = map(load_file, paths)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in r["rounds"]] for r in (whole, resumed)]
    assert timeless[0] == timeless[1]
    assert whole["evaluation"] == resumed["evaluation"]
    assert whole["rejected_updates"] == 0


def test_a_checkpoint_without_the_servers_control_is_refused(tmp_path: Path) -> None:
    config = resolve({**SMALL, "strategy": {"name": "scaffold"}})
    with pytest.raises(Killed):
        simulate(config, runs=tmp_path, observer=Killer())
    record = RunRecord(tmp_path, config)
    checkpoint = record.load_checkpoint()
    assert checkpoint is not None
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if not key.startswith("strategy/")}
    record.save_checkpoint(replace(checkpoint, tensors=tensors))
    with pytest.raises((RecordError, ConfigError), match="control variates do not fit"):
        simulate(config, runs=tmp_path)


@pytest.mark.parametrize("strategy", ["scaffold", "hbn", "fedbn"])
def test_a_run_plans_the_bytes_that_it_then_sends(strategy: str) -> None:
    """The control variates of SCAFFOLD are as long as what is learned, and HBN sends the network twice."""
    config = resolve({**SMALL, "strategy": {"name": strategy}})
    result = simulate(config, runs=None)
    plan, clients = result["plan"], len(result["rounds"][0]["sampled"])
    for line in result["rounds"]:
        assert line["bytes_down"] + line["bytes_up"] == plan["bytes_per_round"]
    bytes_of = plan["bytes"]
    assert plan["bytes_per_round"] == clients * (
        2 * (bytes_of["shared"] + bytes_of["pooled"]) + bytes_of.get("extra", 0)
    )
    learned = sum(t["bytes"] for t in plan["tensors"] if t["kind"] in ("weight", "bias", "scale", "shift"))
    assert strategy != "scaffold" or bytes_of["extra"] == 2 * learned
    assert strategy != "fedbn" or "extra" not in bytes_of


def test_states_that_no_machine_can_hold_are_refused_before_a_round(make_site: Any) -> None:
    class Hoarder(Local):
        def state_bytes(self, _: Any) -> int:
            return 2**50

    class Hoarding(NormStrategy):
        local = Hoarder

    with pytest.raises(ConfigError, match="local tensors of 3 clients"):
        make_site(STRATEGIES.add(Hoarding))


# A stranger's file ----------------------------------------------------------------------------------------------------

MYFED = '''
import torch
from fednorm.federation.local import Local
from fednorm.federation.strategy import NormStrategy


class Slowed(Local):
    """Averages each gradient with the last one of the client's last round."""

    def adjust(self, turn):
        for key, parameter in turn.shared.items():
            if parameter.grad is not None:
                if (last := turn.state.get(key)) is not None:
                    parameter.grad.lerp_(last, self.strategy.share)
                self.last = {**getattr(self, "last", {}), key: parameter.grad.clone()}

    def end(self, turn):
        turn.state = self.last
        return {}


class MyStrategy(NormStrategy):
    """Every client remembers its last gradient."""

    local = Slowed

    def __init__(self, model, *, share: float = 0.5, **common):
        self.share = share
        super().__init__(model, **common)
'''


def test_a_strangers_strategy_with_client_state_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "myfed.py").write_text(MYFED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "myfed", raising=False)
    common = ["--set", "model.width=4", "--train-per-client", "16", "--set", "data.test_per_domain=10", "--rounds", "2"]
    common += ["--batch-size", "8"]

    def run(*options: str) -> Any:
        arguments = ["fednorm", "federated", "--strategy", "myfed:MyStrategy", *common, *options, "--json"]
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    half, none = run(), run("--set", "strategy.share=0")
    plain = run("--set", "strategy.share=0", "--set", "strategy.local=fc3.*")
    assert half["strategy"] == {"name": "myfed:MyStrategy", "share": 0.5}
    assert len(half["config"]["sources"]["strategy"]) == 12
    losses = [[line["train_loss"] for line in result["rounds"]] for result in (half, none)]
    assert losses[0][0] == losses[1][0]  # no client remembers anything in round 1
    assert losses[0][1] != losses[1][1]
    assert half["rejected_updates"] == none["rejected_updates"] == 0
    assert plain["plan"]["local"] == 2
    fedavg = simulate(resolve({**none["config"], "strategy": {"name": "fedavg"}, "sources": {}}), runs=None)
    assert [line["train_loss"] for line in fedavg["rounds"]] == losses[1]
    bench = Workbench(resolve(half["config"]))
    assert bench.strategy.local.__name__ == "Slowed"
