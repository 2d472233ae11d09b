"""clear10: eleven classes of photographs in ten buckets of time. Lin et al., https://arxiv.org/abs/2201.06289."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, several_domains

SPEC = Benchmark(
    name="clear10",
    summary="CLEAR-10: photographs of 2004 to 2014, bucket_01 to bucket_10, each bucket of time a domain",
    note="Made by fednorm data prepare clear10. The eleventh class is BACKGROUND, what is none of the ten.",
    sizes={"clear10": (11, {f"bucket_{number:02d}": (3300, 550) for number in range(1, 11)})},
    load=several_domains("clear10", "CLEAR-10"),
)
