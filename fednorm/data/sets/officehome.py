"""officehome: four domains of 65 classes. Venkateswara et al., CVPR 2017, https://arxiv.org/abs/1706.07522."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, several_domains

NOTE = "Office-Home has no official split: 80/20 by class and domain, with a fixed seed."

SPEC = Benchmark(
    name="officehome",
    summary="Office-Home: art, clipart, product, real_world; 65 classes",
    note=f"Made by fednorm data prepare officehome. {NOTE}",
    sizes={
        "officehome": (
            65,
            {"art": (1942, 485), "clipart": (3492, 873), "product": (3551, 888), "real_world": (3486, 871)},
        )
    },
    load=several_domains("officehome", "Office-Home", NOTE),
)
