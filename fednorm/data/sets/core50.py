"""core50: 50 objects in eleven sessions. Lomonaco, Maltoni, https://arxiv.org/abs/1705.03550."""

from __future__ import annotations

from dataclasses import replace

import torch

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded, with_domains
from fednorm.data.domain import Domain, Split
from fednorm.errors import DataError

NOTE = "Each session of CORe50 is tested on the images of all test sessions (3, 7, 10)."


def _core50(reader: Reader) -> Loaded:
    source = with_domains(reader, reader.read("core50"))
    assert source.domains is not None
    sessions = sorted(set(source.domains[source.train].tolist()))
    wanted = reader.wanted(sessions) or tuple(sessions)
    if not len(source.test):
        raise DataError(f"{source.place} has no test images.")
    images, labels = torch.from_numpy(source.images), torch.from_numpy(source.labels)
    test = Split(images, labels, torch.from_numpy(source.test))

    def domain(name: str) -> Domain:
        rows = source.train[source.domains[source.train] == name]  # type: ignore[index]
        return Domain(name, replace(test, index=torch.from_numpy(rows)), test, source.note)

    return loaded("CORe50", [source], tuple(map(domain, wanted)), (NOTE,))


_SESSIONS = ("s01", "s02", "s04", "s05", "s06", "s08", "s09", "s11")

SPEC = Benchmark(
    name="core50",
    summary="CORe50: 50 objects; each of its eight training sessions a domain, s01 to s11",
    note=f"Made by fednorm data prepare core50. {NOTE}",
    # Published are the sums, 119,894 and 44,972; sessions differ by a few images.
    sizes={
        "core50": (
            50,
            {**{name: (14_987 - (name > "s08"), 0) for name in _SESSIONS}, "test": (0, 44_972)},
        )
    },
    load=_core50,
)
