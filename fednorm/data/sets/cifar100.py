"""cifar100: CIFAR-100 as one domain. Krizhevsky, 2009."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, one_domain

SPEC = Benchmark(
    name="cifar100",
    summary="CIFAR-100 (100 fine classes) as one domain, for label skew",
    note="Ten images are in both train and test, as in the original.",
    sizes={"cifar100": (100, {"": (50_000, 10_000)})},
    load=one_domain("cifar100", "CIFAR-100"),
)
