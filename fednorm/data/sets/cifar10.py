"""cifar10: CIFAR-10 as one domain. Krizhevsky, 2009."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, one_domain

SPEC = Benchmark(
    name="cifar10",
    summary="CIFAR-10 as one domain, for label skew: set data.clients_per_domain and data.partition",
    note="",
    sizes={"cifar10": (10, {"": (50_000, 10_000)})},
    load=one_domain("cifar10", "CIFAR-10"),
)
