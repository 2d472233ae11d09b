"""Large blocks of memory are kept while a run goes on, by the page faults that a later use does not cost."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch

from fednorm import allocation
from fednorm.allocation import keep_large_blocks, large_blocks_kept
from fednorm.config import resolve
from fednorm.federation import simulate as federated
from fednorm.streams import simulate as continual

pytestmark = pytest.mark.skipif(
    allocation._library() is None, reason="another C library than Linux's usual one, or one that was told otherwise"
)

SIZE = 3 * 2**24
"""Bytes of a block, more than the library ever keeps by itself, and less than is kept."""

PAGES = SIZE // resource.getpagesize()


def faults(times: int = 12) -> float:
    """Return how many pages a block costs, as a share of its own, when such blocks have been freed before."""
    for _ in range(times):  # some libraries seldom find room for an aligned block where one of the same size was
        torch.ones(SIZE // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(SIZE // 4)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times / PAGES


def keep_and_give_back() -> None:
    memory = psutil.Process().memory_info
    with large_blocks_kept():
        assert faults() < 0.1
        with large_blocks_kept():
            pass
        assert faults() < 0.1, "a run within a run ended, and the outer one goes on"
        kept = memory().rss
    assert memory().rss < kept - SIZE / 2


def test_a_block_is_used_again_within_a_run_and_given_back_at_its_end() -> None:
    """In a process of its own: what other tests have left at the end of this one's memory would hold it."""
    call = f"import runpy; runpy.run_path({__file__!r})['keep_and_give_back']()"
    subprocess.run([sys.executable, "-c", call], check=True)


def test_without_it_a_block_comes_anew() -> None:
    script = (
        "import resource, torch\n"
        f"for _ in range(12): torch.ones({SIZE // 4})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        f"for _ in range(12): torch.ones({SIZE // 4})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    kept = f"from fednorm.allocation import keep_large_blocks; assert keep_large_blocks()\n{script}"
    plain, ours = (int(subprocess.check_output([sys.executable, "-c", text])) for text in (script, kept))
    assert ours < plain / 10 or plain < 100, "where the system hands out huge pages, a block costs few"


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_whoever_has_chosen_otherwise_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "glibc.malloc.check=0")
    assert not keep_large_blocks()
    with large_blocks_kept():
        assert allocation._depth == 0


def test_it_is_undone_when_a_run_fails() -> None:
    with pytest.raises(KeyError), large_blocks_kept():
        raise KeyError
    assert allocation._depth == 0


class Depths:
    """An observer of a run of either kind, which notes how many runs keep blocks whenever it is told something."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __getattr__(self, _: str) -> Any:
        return lambda *_: self.seen.add(allocation._depth)


def test_a_run_of_either_kind_keeps_blocks_and_gives_them_back() -> None:
    small: dict[str, Any] = {"model": {"width": 4}, "data": {"train_per_client": 16, "test_per_domain": 8}}
    depths = Depths()
    federated.simulate(resolve({**small, "rounds": {"num_rounds": 1}}), runs=None, observer=depths)
    assert depths.seen == {1}
    depths = Depths()
    stream = {"kind": "continual", "model": {"width": 4}, "scenario": {"train_per_experience": 16}}
    continual.simulate(resolve({**stream, "train": {"epochs": 1}}), runs=None, observer=depths)
    assert depths.seen == {1}
    assert allocation._depth == 0
