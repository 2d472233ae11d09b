"""How many workers a run has: what it asks for, what pays, and never more than its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fednorm import cores
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.federation.executors.choice import estimated_seconds, executor_of, obstacle_of, workers_of
from fednorm.federation.executors.sequential import Sequential
from fednorm.federation.executors.workers import Workers

MakeSite = Callable[..., Any]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    monkeypatch.setattr("fednorm.federation.executors.choice.sys.platform", "linux")
    yield
    cores.share_cores(1)


LONG = {"rounds": {"num_rounds": 1000}}


def test_a_short_run_has_none_and_a_long_one_as_many_as_clients_or_cores(make_site: MakeSite) -> None:
    short, long = make_site(), make_site(**LONG)
    times = 1000 / short.bench.config.rounds.num_rounds
    assert estimated_seconds(long.bench) == pytest.approx(times * estimated_seconds(short.bench))
    assert (workers_of(short.bench), workers_of(long.bench)) == (1, 3)
    assert workers_of(make_site(sizes=((9, 5),) * 7, **LONG).bench) == 4
    assert workers_of(make_site(sizes=((9, 5),) * 7, rounds={"num_rounds": 1000, "fraction": 0.3}).bench) == 2
    assert workers_of(make_site(sizes=((9, 5),), **LONG).bench) == 1
    assert isinstance(executor_of(short.bench), Sequential)
    executor = executor_of(long.bench)
    assert isinstance(executor, Workers)
    executor.close()


def test_auto_leaves_out_workers_that_memory_does_not_hold(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = make_site(**LONG)
    for free, count in ((2**40, 3), (2 * 2**28 + 2**27, 2), (0, 1)):
        monkeypatch.setattr("fednorm.federation.executors.choice.free_memory", lambda free=free: free)
        assert workers_of(long.bench) == count


def test_runs_at_the_same_time_share_the_cores(make_site: MakeSite) -> None:
    long, asking = make_site(**LONG), make_site(workers=4)
    for among, share in ((1, 4), (2, 2), (3, 1), (9, 1)):
        cores.share_cores(among)
        assert workers_of(asking.bench) == share
        assert workers_of(long.bench) == min(share, 3)
        assert among * share <= max(4, among)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"workers": 5}, "workers is 5, and 4 cores can be used here"),
        ({"workers": 2, "threads": 2}, "workers is 2, and each worker has one thread; threads is 2"),
    ],
)
def test_what_workers_cannot_do_is_refused(make_site: MakeSite, sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        workers_of(make_site(**sections).bench)


def test_other_devices_and_compiled_passes_have_no_workers() -> None:
    assert "the device is cuda" in obstacle_of(resolve({"device": "cuda"}))
    assert "torch.compile" in obstacle_of(resolve({"compile": True}))
    assert not obstacle_of(resolve({}))


@pytest.mark.parametrize("threads", [1, 2])
def test_nobody_is_given_what_he_did_not_ask_for(make_site: MakeSite, threads: int) -> None:
    assert workers_of(make_site(threads=threads, **LONG).bench) == (3 if threads == 1 else 1)
    assert workers_of(make_site(workers=1, **LONG).bench) == 1


@pytest.mark.parametrize("count", [0, -1, 1025, True, "2", "many", 1.0, None])
def test_a_number_of_workers_that_cannot_be(count: object) -> None:
    with pytest.raises(ConfigError, match=r"workers.* is 'auto' or a number from 1 to 1024; got"):
        resolve({"workers": count})
